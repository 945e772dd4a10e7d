"""A model after adaptation: what `CompiledUnroll.adapt` returns."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.errors import InvalidType
from adaptrt.inner.step import LOSS_BUFFER, Carry, Fixed, as_call
from adaptrt.tree import Tree


class Owner(Protocol):
    """The unroll that an adaptation came from."""

    def predict(self, adapted: Adapted, inputs: Tree, generator: torch.Generator | None) -> Any: ...

    def state_dict(self, adapted: Adapted) -> dict[str, Tensor]: ...


class Adapted:
    """A model after adaptation.

    Attributes:
      params: adapted parameters by name; with a task axis [T, ...] if made by `vmap()`.
      buffers: buffers by name, as the support batches left them.
      opt_state: the optimiser's state.
      losses: support loss before each step, (k,) or [T, k].
      num_tasks: T, or None without a task axis.
      carry, fixed: the same and all else that the model needs, as programs take it. Parameters that did not adapt are the model's own.
    """

    def __init__(self, owner: Owner, carry: Carry, losses: Tensor, fixed: Fixed, num_tasks: int | None) -> None:
        self._owner = owner
        self.carry = carry
        self.fixed = fixed
        self.num_tasks = num_tasks
        self.losses = losses
        self.params = carry.params
        self.opt_state = carry.opt_state
        self.buffers = {name: value for name, value in carry.buffers.items() if not name.startswith(LOSS_BUFFER)}

    def comes_from(self, owner: Owner) -> bool:
        """Whether it is an adaptation of this unroll."""
        return self._owner is owner

    def __call__(self, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
        """What the adapted model returns for these arguments; differentiable outside `no_grad`.

        Args:
          args, kwargs: as the model takes them, or one argument that is inputs as in `(inputs, target)`: a tensor, a tuple or a dict of the
            model's arguments. With a task axis on every tensor if made by `vmap()`.
          generator: where dropout and the like draw from; None for the global generator.
        Buffers that this call would update are left as they are.
        """
        if args and kwargs:
            raise InvalidType("pass the model's inputs all by position or all by keyword")
        positional, named = ((), kwargs) if kwargs else as_call(args[0] if len(args) == 1 else args)
        return self._owner.predict(self, named or positional, generator)

    def detach(self) -> Adapted:
        """The same adaptation, cut from what it was computed from: where the next of several truncated unrolls starts.

        Parameters that did not adapt are the model's own, as before, and still get gradients from predictions.
        """
        carry, losses = tree.map_leaves(Tensor.detach, (self.carry, self.losses))
        return Adapted(self._owner, carry, losses, self.fixed, self.num_tasks)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's state after adaptation, detached, under the names of `model.state_dict()`."""
        return self._owner.state_dict(self)
