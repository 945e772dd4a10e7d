"""Where an unroll reads its optimiser from, at every call: a pure `Optimizer`, or a `torch.optim` instance as it stands."""

from __future__ import annotations

import abc
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch

from adaptrt import tree
from adaptrt.errors import InvalidType
from adaptrt.optim.base import Hyper, Optimizer, Params, State
from adaptrt.optim.convert import SUPPORTED, convert, fingerprint, read_hyper, read_state

_MAX_MADE = 16
_registered: dict[type[torch.optim.Optimizer], Callable[[torch.optim.Optimizer, Params], Source]] = {}


def register(kind: type[torch.optim.Optimizer], make: Callable[[Any, Params], Source] | None) -> None:
    """Makes `source` read instances of exactly `kind` by `make`; None for what it does by itself."""
    _registered.pop(kind, None)
    if make is not None:
        _registered[kind] = make


class Reading(NamedTuple):
    """An optimiser as it stands: what the methods of `Source` return. The same object only where nothing has changed."""

    structure: Hashable
    hyper: Hyper
    state: State


class Source(abc.ABC):
    """An optimiser for the parameters `params`, read anew at every call."""

    @abc.abstractmethod
    def structure(self) -> Hashable:
        """Changes when `optimizer()` gives another arithmetic."""

    @abc.abstractmethod
    def optimizer(self) -> Optimizer:
        """The pure optimiser of the current structure."""

    @abc.abstractmethod
    def hyper(self) -> Hyper:
        """Hyperparameters now: floats or tensors."""

    @abc.abstractmethod
    def state(self) -> State:
        """The state to start from; never written to."""

    def read(self) -> Reading:
        """All three at once."""
        return Reading(self.structure(), self.hyper(), self.state())


class PureSource(Source):
    """A pure optimiser: starts from its initial state, with the hyperparameters it was made with."""

    def __init__(self, optimizer: Optimizer, params: Params) -> None:
        self._optimizer = optimizer
        self._params = params
        self._initial: tuple[Hashable, State] = None, None
        self.state()  # an unsuitable parameter is refused when the unroll is made

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


class TorchSource(Source):
    """A `torch.optim` instance: param_groups and state are read as they stand, and left alone."""

    def __init__(self, opt: torch.optim.Optimizer, params: Params) -> None:
        self._opt = opt
        self._params = params
        self._made: dict[Hashable, tuple[Optimizer, State]] = {}
        self._read: _Read | None = None
        self._stateless: tuple[_Read, Reading] | None = None
        self._current()

    def structure(self) -> Hashable:
        return self._now().structure

    def optimizer(self) -> Optimizer:
        return self._current()[0]

    def hyper(self) -> Hyper:
        return self._now().hyper

    def state(self) -> State:
        return self.read().state

    def read(self) -> Reading:
        now = self._now()
        if self._opt.state:
            return Reading(now.structure, now.hyper, read_state(self._opt, self._params))
        if self._stateless is not None and self._stateless[0] is now:
            return self._stateless[1]
        reading = Reading(now.structure, now.hyper, self._current(now)[1])
        if now.held is not None and not tree.leaves(reading.state):
            self._stateless = now, reading
        return reading

    def _current(self, now: _Read | None = None) -> tuple[Optimizer, State]:
        key = (now or self._now()).structure, kinds_of(self._params)
        if key not in self._made:
            if len(self._made) >= _MAX_MADE:
                self._made = {}
            optimizer = convert(self._opt, self._params)
            self._made[key] = optimizer, _initial(optimizer, self._params)
        return self._made[key]

    def _now(self) -> _Read:
        """What the groups say, read anew if they hold other objects than at the last call."""
        groups = self._opt.param_groups
        read = self._read
        if read is None or not _hold(groups, read.held):
            fixed = all(_is_fixed(value) for group in groups for key, value in group.items() if key != "params")
            held = [([*group.values()], [*group["params"]]) for group in groups] if fixed else None
            read = self._read = _Read(held, fingerprint(self._opt, self._params), read_hyper(self._opt, self._params))
        return read


class _Read(NamedTuple):
    """Groups as they were read.

    Attributes:
      held: for each group its values and its parameters; None where a value may change and stay the same object.
      structure, hyper: what follows from them.
    """

    held: Sequence[tuple[list[Any], list[Any]]] | None
    structure: Hashable
    hyper: Hyper


def _is_fixed(value: Any) -> bool:
    """Whether the same object surely says the same; a 0-dim floating-point tensor is an input, whose value is not read here.

    One of another shape is not: what is read of it is a view, which does not follow its `requires_grad` and `data`.
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


def source(opt: object, params: Params) -> Source:
    """The source for what the user passed as `opt`.

    Raises:
      InvalidType: neither an `adaptrt.optim.Optimizer` nor a `torch.optim.Optimizer`.
      UnsupportedOptimizer: a class of `torch.optim` without pure counterpart.
    """
    if isinstance(opt, Optimizer):
        return PureSource(opt, params)
    if isinstance(opt, torch.optim.Optimizer):
        if type(opt) in _registered:
            return _registered[type(opt)](opt, params)
        return TorchSource(opt, params)
    raise InvalidType(
        f"opt must be an adaptrt.optim.Optimizer such as adaptrt.optim.sgd(lr=0.1), or an instance of torch.optim's "
        f"{', '.join(SUPPORTED)}; got {type(opt).__name__}"
    )


def kinds_of(params: Params) -> Hashable:
    """Dtypes and devices: what an initial state depends on besides shapes, which stay."""
    return tuple([(value.dtype, value.device) for value in params.values()])


def _initial(optimizer: Optimizer, params: Params) -> State:
    # Kept for all calls, so it must not become an inference tensor, which autograd refuses.
    with torch.inference_mode(False), torch.no_grad():
        return optimizer.init(params)
