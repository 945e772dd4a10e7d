"""How an unroll reads its optimiser: through a `Source`, anew at every call."""

from __future__ import annotations

import abc
from collections.abc import Hashable
from typing import NamedTuple

from adaptrt.optim.base import Hyper, Optimizer, Params, State


class Reading(NamedTuple):
    """What one call found: the results of the methods of `Source`.

    A source returns the very same object twice only if nothing has changed in between.
    """

    structure: Hashable
    hyper: Hyper
    state: State


class Source(abc.ABC):
    """An optimiser for certain parameters, whose settings and state may change between calls.

    Attributes:
      starts_from_values: whether `state_for` has to be asked for the state to start from.
    """

    starts_from_values: bool = False

    @abc.abstractmethod
    def structure(self) -> Hashable:
        """Returns a value that changes when `optimizer()` would return another arithmetic."""

    @abc.abstractmethod
    def optimizer(self) -> Optimizer:
        """Returns the pure optimiser of the current structure."""

    @abc.abstractmethod
    def hyper(self) -> Hyper:
        """Returns the current hyperparameters: floats or tensors."""

    @abc.abstractmethod
    def state(self) -> State:
        """Returns the state to start from, which nobody may write to."""

    def state_for(self, params: Params) -> State | None:
        """Returns the state to start from with other values of the parameters, None if it is `state()` whatever they are."""
        del params
        return None

    def read(self) -> Reading:
        """Returns structure, hyperparameters and state together."""
        return Reading(self.structure(), self.hyper(), self.state())


def kinds_of(params: Params) -> Hashable:
    """Returns dtypes and devices, on which an initial state depends. It also depends on the shapes, but these never change."""
    return tuple([(value.dtype, value.device) for value in params.values()])
