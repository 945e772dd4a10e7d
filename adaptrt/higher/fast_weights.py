"""The versions of a handle's fast weights, and the twins that hold the latest of them."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from adaptrt.graph.switches import MATH_ATTENTION, MATH_ATTENTION_NO_CUDNN
from adaptrt.higher.places import Places
from adaptrt.higher.twins import Links, Twins, links_of, make_twins


class FastWeights:
    """The fast weights of one handle.

    Args:
      model: the original.
      handle: a copy of its module tree.

    Attributes:
      versions: every version of the fast weights, the latest last, each in the order of the model's parameters. If versions are not
        tracked, only the latest. None means that there are none yet.
      track: whether earlier versions are kept.
      places: where in the module tree the fast weights go.
      num_running: how many forward passes of the handle and of its parts are running.
    """

    def __init__(self, model: nn.Module, handle: nn.Module) -> None:
        self.versions: list[list[Tensor]] | None = None
        self.track = True
        self.num_running = 0
        self.places = Places(model, handle)
        self._is_recurrent = any(isinstance(part, nn.RNNBase) for part in model.modules())
        # Kept from call to call: the twins with the latest weights, and what they were made from.
        self._twins: Twins | None = None
        self._held: list[Tensor] = []
        self._forms: list[Any] = []
        self._links: list[Links] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FastWeights:
        """Returns a copy whose weights have the same graph behind them. `places.adopt` must tell it its modules."""
        made = memo[id(self)] = object.__new__(FastWeights)
        for values in self.versions or ():
            memo.update({id(value): value.clone() for value in values if not value.is_leaf})
        vars(made).update(
            {name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name not in ("_twins", "_links", "_held")}
        )
        made._twins, made._links, made._held = None, None, []
        return made

    @property
    def latest(self) -> list[Tensor] | None:
        """The latest version, or None if there is none yet."""
        return None if self.versions is None else self.versions[-1]

    def put(self, values: Iterable[Tensor]) -> None:
        """Makes `values` the latest version: one more if versions are tracked, else in place of the only one.

        Raises:
          IndexError: there are fewer values than fast weights.
          TypeError: one of them is no tensor.
        """
        values = list(values)
        if len(values) < self.places.num_params:
            raise IndexError(
                f"params has {len(values)} tensors: give one for each of the module's {self.places.num_params} parameters, in their order"
            )
        if strange := [type(value).__name__ for value in values if not isinstance(value, Tensor)]:
            raise TypeError(f"params must be tensors, in the order of the module's parameters; got a {strange[0]}")
        if self.versions is None or self.track:
            self.versions = [*(self.versions or []), values]
        else:
            self.versions[0] = values
            del self.versions[1:]
        self._twins, self._held = None, []

    def show(self) -> None:
        """Makes the latest version the parameters that the handle's modules show."""
        if self.latest is not None:
            self.places.show(self.latest)

    def update(self, values: Iterable[Tensor]) -> None:
        """Makes `values` the latest version, and shows it."""
        self.put(values)
        self.show()

    def differentiable_twice(self) -> AbstractContextManager[object]:
        """Returns a context in which the gradient of a forward pass has a derivative, if one may be asked for."""
        if not (self.track and torch.is_grad_enabled()):
            return nullcontext()
        return MATH_ATTENTION_NO_CUDNN if self._is_recurrent else MATH_ATTENTION

    def running(self) -> Twins:
        """Returns the twins that run in place of the handle, with the latest version.

        Raises:
          ValueError: there are no fast weights yet.
        """
        forms = self.places.forms()
        if forms != self._forms:
            self.show()
            self._forms, self._links, self._twins = forms, None, None
        latest = self.latest
        # Programs also write to the list that `fast_params` returns.
        if self._twins is not None and latest is not None and not all(map(operator.is_, self._held, latest)):
            self.show()
            self._twins = None
        if self._twins is None:
            if latest is None:
                raise ValueError("params must be given: the patched module does not hold fast weights of its own")
            if self._links is None:
                self._links = links_of(self.places)
            self._held, self._twins = list(latest), make_twins(self.places, self._links, latest)
        return self._twins

    def take_over(self, twins: Twins) -> None:
        """Changes the handle as a forward pass has changed `twins`."""
        if not twins.untouched() and twins.hand_over(self.places.parts()):
            self._links = None
            if self._twins is not twins:
                self._twins = None

    def forget_twins(self) -> None:
        """Must be called when an attribute or a submodule of the handle was set: twins are then made anew."""
        self._twins = self._links = None
