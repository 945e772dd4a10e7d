"""The model after adaptation, which `CompiledUnroll.adapt` returns."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from adaptrt.errors import InvalidType
from adaptrt.inner.step import Fixed, as_call
from adaptrt.runtime.state import State
from adaptrt.tree import Tree


class Predictor(Protocol):
    """Computes the outputs of an adapted model."""

    def predict(self, state: State, fixed: Fixed, inputs: Tree, generator: torch.Generator | None) -> Any:
        """Returns the model's output for `inputs`."""
        ...

    def state_dict(self, state: State, fixed: Fixed) -> dict[str, Tensor]:
        """Returns the whole model's state dict."""
        ...


class Adapted:
    """A model after adaptation: its state, and the means to predict with it.

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
        """Returns the adapted model's output for these arguments; differentiable outside `no_grad`.

        The call does not change any buffer, even one that the model's forward pass would update.

        Args:
          args, kwargs: as the model takes them, or one argument that is like the inputs of a batch `(inputs, target)`: a tensor, or a tuple
            or dict of the model's arguments. Every tensor has a task axis if the adaptation was made by `vmap()`.
          generator: where dropout and other random operations draw from; None for the global generator.
        Raises:
          InvalidType: some inputs are given by position and others by keyword.
        """
        if args and kwargs:
            raise InvalidType("pass the model's inputs all by position or all by keyword")
        positional, named = ((), kwargs) if kwargs else as_call(args[0] if len(args) == 1 else args)
        return self._predictor.predict(self.state, self.fixed, named or positional, generator)

    def detach(self) -> Adapted:
        """Returns the same adaptation without its autograd history; the next of several truncated unrolls starts from it.

        Parameters that did not adapt remain the model's own, and still get gradients from predictions.
        """
        return Adapted(self._predictor, self.state.detach(), self.losses.detach(), self.fixed)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the whole model's state after adaptation, detached, under the names of `model.state_dict()`."""
        return self._predictor.state_dict(self.state, self.fixed)
