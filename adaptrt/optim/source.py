"""The two kinds of optimisers that an unroll takes as sources: a pure `Optimizer`, and a `torch.optim` instance.

The third kind, an instance of a registered class, is made by whoever registered the class; see `registry`.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch

from adaptrt import tree
from adaptrt.errors import InvalidType
from adaptrt.optim.base import Hyper, Optimizer, Params, State
from adaptrt.optim.convert import SUPPORTED, View, view
from adaptrt.optim.reading import Reading, Source, kinds_of
from adaptrt.optim.registry import REGISTERED

_MAX_MADE = 16


class PureSource(Source):
    """A pure optimiser. It starts from its initial state, with the hyperparameters it was made with.

    A parameter that does not suit the optimiser is refused when the source is made.
    """

    def __init__(self, optimizer: Optimizer, params: Params) -> None:
        self._optimizer = optimizer
        self._params = params
        self._initial: tuple[Hashable, State] = None, None
        self.starts_from_values = not optimizer.init_is_constant
        self.state()

    def structure(self) -> Hashable:
        return tuple([part.training for module in self._optimizer.modules for part in module.modules()])

    def optimizer(self) -> Optimizer:
        return self._optimizer

    def hyper(self) -> Hyper:
        return self._optimizer.hyper

    def state(self) -> State:
        if not self._optimizer.init_is_constant:
            return self._optimizer.init(self._params)
        kinds = kinds_of(self._params)
        if self._initial[0] != kinds:  # model.float(), model.to(device)
            self._initial = kinds, _initial(self._optimizer, self._params)
        return self._initial[1]

    def state_for(self, params: Params) -> State | None:
        return None if self._optimizer.init_is_constant else self._optimizer.init(params)

    def read(self) -> Reading:
        # Whoever reads gets a state that depends on values by `state_for`, of the parameters that the model has now.
        state = self.state() if self._optimizer.init_is_constant else ()
        return Reading(self.structure(), self.hyper(), state)


class TorchSource(Source):
    """A `torch.optim` instance. Its current settings and state are read at every call, and never written to."""

    def __init__(self, opt: torch.optim.Optimizer, params: Params) -> None:
        self._opt = opt
        self._params = params
        self._made: dict[Hashable, tuple[Optimizer, State]] = {}
        self._last: _Look | None = None
        self._stateless: tuple[_Look, Reading] | None = None
        self._current(self._now())

    def structure(self) -> Hashable:
        return self._now().view.structure

    def optimizer(self) -> Optimizer:
        return self._current(self._now())[0]

    def hyper(self) -> Hyper:
        return self._now().view.optimizer.hyper

    def state(self) -> State:
        return self.read().state

    def read(self) -> Reading:
        now = self._now()
        structure, hyper = now.view.structure, now.view.optimizer.hyper
        if self._opt.state:
            return Reading(structure, hyper, now.view.state(self._opt, self._params))
        if self._stateless is not None and self._stateless[0] is now:
            return self._stateless[1]
        reading = Reading(structure, hyper, self._current(now)[1])
        if now.held is not None and not tree.leaves(reading.state):
            self._stateless = now, reading
        return reading

    def _current(self, now: _Look) -> tuple[Optimizer, State]:
        """The optimiser of a structure, which is kept, and its initial state."""
        key = now.view.structure, kinds_of(self._params)
        if key not in self._made:
            if len(self._made) >= _MAX_MADE:
                self._made = {}
            self._made[key] = now.view.optimizer, _initial(now.view.optimizer, self._params)
        return self._made[key]

    def _now(self) -> _Look:
        """Looks at the groups again if they hold other objects than at the last call."""
        groups = self._opt.param_groups
        last = self._last
        if last is None or not _hold(groups, last.held):
            fixed = all(_is_fixed(value) for group in groups for key, value in group.items() if key != "params")
            held = [([*group.values()], [*group["params"]]) for group in groups] if fixed else None
            last = self._last = _Look(held, view(self._opt, self._params))
        return last


class _Look(NamedTuple):
    """A view of an instance, and what its groups held at that time.

    Attributes:
      held: for each group its values and its parameters. None where a value may change and stay the same object.
      view: what follows from them.
    """

    held: Sequence[tuple[list[Any], list[Any]]] | None
    view: View


def _is_fixed(value: Any) -> bool:
    """Whether the same object always says the same.

    A 0-dim floating-point tensor does: it is an input, whose value is not read here. One of another shape does not, because what is read of
    it is a view, which does not follow its `requires_grad` and `data`.
    """
    if isinstance(value, tuple):
        return all(map(_is_fixed, cast("tuple[Any, ...]", value)))
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and not value.dim()
    return value is None or isinstance(value, bool | int | float | str)


def _hold(groups: Sequence[Mapping[str, Any]], held: Sequence[tuple[list[Any], list[Any]]] | None) -> bool:
    """Whether the groups hold these very objects."""
    if held is None or len(groups) != len(held):
        return False
    return all(
        len(group) == len(values)
        and all(map(operator.is_, group.values(), values))
        and len(group["params"]) == len(params)
        and all(map(operator.is_, group["params"], params))
        for group, (values, params) in zip(groups, held, strict=True)
    )


_NO_UPDATE = Optimizer(init=lambda params: (), update=lambda grads, state, params, hyper: (dict(params), state), init_is_constant=True)


def source(opt: object, params: Params) -> Source:
    """Returns the source for what the user passed as `opt`.

    Args:
      opt: an `adaptrt.optim.Optimizer`, or an instance of a class of `torch.optim` or of a registered class; None to update nothing.
      params: the parameters that adapt, by name.
    Raises:
      InvalidType: `opt` is neither an `adaptrt.optim.Optimizer` nor a `torch.optim.Optimizer`.
      UnsupportedOptimizer: its class has no pure counterpart and is not registered.
    """
    if opt is None:
        return PureSource(_NO_UPDATE, params)
    if isinstance(opt, Optimizer):
        return PureSource(opt, params)
    if isinstance(opt, torch.optim.Optimizer):
        registration = REGISTERED.get(type(opt))
        if registration is not None and registration.make_source is not None:
            return registration.make_source(opt, params)
        return TorchSource(opt, params)
    raise InvalidType(
        f"opt must be an adaptrt.optim.Optimizer such as adaptrt.optim.sgd(lr=0.1), or an instance of torch.optim's "
        f"{', '.join(SUPPORTED)}; got {type(opt).__name__}"
    )


def _initial(optimizer: Optimizer, params: Params) -> State:
    # Kept for all calls, so it must not become an inference tensor, which autograd refuses.
    with torch.inference_mode(False), torch.no_grad():
        return optimizer.init(params)
