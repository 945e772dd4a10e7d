"""A model after adaptation: what `CompiledUnroll.adapt` returns."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from adaptrt.errors import InvalidType
from adaptrt.inner.step import Fixed, as_call
from adaptrt.runtime.state import State
from adaptrt.tree import Tree


class Predictor(Protocol):
    """What computes the outputs of an adapted model."""

    def predict(self, state: State, fixed: Fixed, inputs: Tree, generator: torch.Generator | None) -> Any:
        """What the model returns for `inputs`."""
        ...

    def state_dict(self, state: State, fixed: Fixed) -> dict[str, Tensor]:
        """The whole model's state dict."""
        ...


class Adapted:
    """A model after adaptation: its state, and what can predict with it.

    Attributes:
      state: what the steps changed, as a value.
      losses: support loss before each step, (k,) or [T, k].
      fixed: what the model needs besides its state. Parameters that did not adapt are the model's own.
    """

    def __init__(self, predictor: Predictor, state: State, losses: Tensor, fixed: Fixed) -> None:
        self._predictor = predictor
        self.state = state
        self.losses = losses
        self.fixed = fixed

    @property
    def params(self) -> dict[str, Tensor]:
        """Adapted parameters by name; with a task axis [T, ...] if made by `vmap()`."""
        return self.state.params

    @property
    def buffers(self) -> dict[str, Tensor]:
        """Buffers by name, as the support batches left them."""
        return self.state.buffers

    @property
    def opt_state(self) -> Tree:
        """The optimiser's state."""
        return self.state.opt_state

    @property
    def num_tasks(self) -> int | None:
        """T, or None without a task axis."""
        return self.state.num_tasks

    def __call__(self, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
        """What the adapted model returns for these arguments; differentiable outside `no_grad`.

        Buffers that this call would update are left as they are.

        Args:
          args, kwargs: as the model takes them, or one argument that is inputs as in `(inputs, target)`: a tensor, a tuple or a dict of the
            model's arguments. With a task axis on every tensor if made by `vmap()`.
          generator: where dropout and other random operations draw from; None for the global generator.
        Raises:
          InvalidType: some inputs are given by position and others by keyword.
        """
        if args and kwargs:
            raise InvalidType("pass the model's inputs all by position or all by keyword")
        positional, named = ((), kwargs) if kwargs else as_call(args[0] if len(args) == 1 else args)
        return self._predictor.predict(self.state, self.fixed, named or positional, generator)

    def detach(self) -> Adapted:
        """The same adaptation, cut from what it was computed from: where the next of several truncated unrolls starts.

        Parameters that did not adapt are the model's own, as before, and still get gradients from predictions.
        """
        return Adapted(self._predictor, self.state.detach(), self.losses.detach(), self.fixed)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's state after adaptation, detached, under the names of `model.state_dict()`."""
        return self._predictor.state_dict(self.state, self.fixed)
