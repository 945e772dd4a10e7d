"""A registered optimiser as a pure one, so that `compile_unroll` takes it: its `_update` is traced like any Python.

The steps of a program are all alike, and three things in an `_update` are not:

- It may begin a parameter's state at its first step (`if len(state) == 0`). A program that starts without state holds both, the step that
  begins it and the later one, and takes for each parameter one by its count of updates; so its update costs twice the arithmetic.
- It may keep numbers in the state. In a program they are 0-dim float64 tensors, and deciding by one is an error that names the line.
- It may decide by a setting (`if weight_decay != 0`). That is done by the setting's value; a call with another outcome makes another
  program, a call with another value of the same outcome does not.

What else it writes to, an attribute or a setting, would not be carried from step to step, and is refused.

Known limits: an object of a class of the user's own, in the settings or in an attribute, is a constant; so is what `_update` reads from a
closure or a global. A parameter's step may not depend on whether the state of another has begun.
"""

from __future__ import annotations

import collections
import functools
import itertools
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.errors import NotTraceable, OptimizerMismatch, UnsupportedOptimizer
from adaptrt.graph.passes.lift_noise import forbid_noise
from adaptrt.higher.utils import _recursive_map, flatten, settings_of
from adaptrt.inner.diagnose import updating
from adaptrt.optim.base import Hyper, Optimizer, Params, State
from adaptrt.optim.source import Source, kinds_of

Groups = Sequence[Mapping[str, Any]]
Entries = dict[str, Any]
"""By parameter name what `_update` keeps of it, numbers as tensors."""

_MAX_BUILT = 16


class RegisteredState(NamedTuple):
    """State of a registered optimiser in a program."""

    num_updates: dict[str, Tensor]
    """By parameter name, 0-dim int64: how often its state was updated in this unroll."""
    entries: Entries


class RegisteredSource(Source):
    """An instance of a registered class, read as it stands at every call.

    Args:
      base: `DifferentiableOptimizer`, which stands above this file.
      version: its differentiable version, a subclass.
      opt: the instance; left alone.
      params: those that adapt, by name.
    Raises:
      UnsupportedOptimizer: the version differs in more than `_update`.
    """

    def __init__(self, base: Any, version: Any, opt: torch.optim.Optimizer, params: Params) -> None:
        _check_version(version, base, type(opt))
        self._version = version
        self._opt = opt
        self._params = params
        self._built: list[_Built] = []
        self._numbers = itertools.count()
        self._current()

    def structure(self) -> Hashable:
        return self._current().number

    def optimizer(self) -> Optimizer:
        return self._current().optimizer

    def hyper(self) -> Hyper:
        return _inputs(self._opt.param_groups)

    def state(self) -> State:
        initial = self._current().initial(self._params)
        held = {name: self._opt.state[p] for name, p in self._params.items() if self._opt.state.get(p)}
        return initial._replace(
            entries={**initial.entries, **{name: _fitted(entry, initial.entries[name], name) for name, entry in held.items()}}
        )

    def _current(self) -> _Built:
        started = frozenset(name for name, p in self._params.items() if self._opt.state.get(p))
        for built in self._built:
            if built.serves(self._opt, started):
                return built
        self._built = [*self._built[1 - _MAX_BUILT :], _Built(next(self._numbers), self._version, self._opt, self._params, started)]
        return self._built[-1]


class _Built:
    """The pure optimiser for one outcome of all that is decided by settings."""

    def __init__(self, number: int, version: Any, opt: torch.optim.Optimizer, params: Params, started: frozenset[str]) -> None:
        self.number = number
        self._version = version
        self._opt = opt
        self._started = started
        self._constants = _constants(opt)
        self._numbers = _inputs(opt.param_groups)
        self._outcomes: dict[_Question, Any] = {}
        name_of = {id(p): name for name, p in params.items()}
        self._names = [[name_of[id(p)] for p in group["params"] if id(p) in name_of] for group in opt.param_groups]
        self._places = {name: (i, j) for i, names in enumerate(self._names) for j, name in enumerate(names)}
        self._originals = params
        self.optimizer = Optimizer(self._init, self._update, init_is_constant=True)
        self._fresh: dict[Hashable, RegisteredState] = {}
        self.initial(params)

    def serves(self, opt: torch.optim.Optimizer, started: frozenset[str]) -> bool:
        """Whether a step of `opt` as it stands does what this one does."""
        return (
            started == self._started
            and _constants(opt) == self._constants
            and all(_is_same(question.answer(opt.param_groups), outcome) for question, outcome in self._outcomes.items())
        )

    def initial(self, params: Params) -> RegisteredState:
        """`init(params)`, made once for each kind of parameters."""
        kinds = kinds_of(params)
        if kinds not in self._fresh:
            with torch.inference_mode(False), torch.no_grad(), updating(), forbid_noise():
                self._fresh[kinds] = self._init(params)
        return self._fresh[kinds]

    def _init(self, params: Params) -> RegisteredState:
        # Two steps on zeros: the first says what is kept, the second whether it stays the same, and both what is decided by settings.
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        entries = self._run(zeros, zeros, self._numbers, {})[1]
        _conformed(entries, self._run(zeros, zeros, self._numbers, entries)[1])
        counts = {name: torch.zeros((), dtype=torch.int64, device=p.device) for name, p in params.items()}
        return RegisteredState(counts, tree.map_leaves(torch.zeros_like, entries))

    def _update(self, grads: Params, state: RegisteredState, params: Params, hyper: Hyper) -> tuple[dict[str, Tensor], RegisteredState]:
        entries = state.entries
        counts = {name: count + 1 if name in grads else count for name, count in state.num_updates.items()}
        if self._started >= set(grads) or not tree.leaves(entries):
            new, after = self._run(grads, params, hyper, {name: entry for name, entry in entries.items() if tree.leaves(entry)})
            return new, RegisteredState(counts, {**entries, **_conformed(entries, after)})
        begun = {name: entry for name, entry in entries.items() if name in self._started}
        is_first = {name: count == 0 for name, count in state.num_updates.items()}
        # Where a branch is not taken it must be finite and have finite derivatives, or its part of the gradient, 0 * inf, is NaN: the first
        # step is given ones then, at which no square root or quotient is at its end, and the later one what the first step would leave.
        safe = {name: torch.where(is_first[name], grad, torch.ones_like(grad)) for name, grad in grads.items()}
        first_new, first = self._run(safe, params, hyper, begun)
        first = {**entries, **_conformed(entries, first)}

        def chosen(name: str, a: Any, b: Any) -> Any:
            return tree.map_leaves(functools.partial(torch.where, is_first[name]), a, b)

        later_new, later = self._run(grads, params, hyper, {name: chosen(name, first[name], entry) for name, entry in entries.items()})
        later = {**entries, **_conformed(entries, later)}
        new = {name: chosen(name, first_new[name], later_new[name]) for name in params}
        return new, RegisteredState(counts, {name: chosen(name, first[name], later[name]) for name in entries})

    def _run(self, grads: Params, params: Params, hyper: Hyper, entries: Entries) -> tuple[dict[str, Tensor], Entries]:
        """One step of the registered class itself: the new parameters, and what it keeps of those whose state it has begun."""
        # An instance of the same class with the parameters that adapt alone, and no state. `_update` may write to the tensors it is given:
        # they are copies, which passes remove where it does not.
        like: Any = object.__new__(type(self._opt))
        vars(like).update(vars(self._opt))
        like.state = collections.defaultdict(dict)
        like.param_groups = self._watched_groups(hyper)
        for group, names in zip(like.param_groups, self._names, strict=True):
            group["params"] = [self._originals[name] for name in names]
        version = self._version(like, list(self._originals.values()))
        if version._grad_callback is not None or version._first_order:
            raise UnsupportedOptimizer(
                f"{self._version.__name__} sets a grad_callback or first_order, which a program would not see. Do it in _update"
            )
        for i, names in enumerate(self._names):
            version.param_groups[i]["params"] = [params[name].clone() for name in names]
            held = {j: _recursive_map(entries[name], _cloned) for j, name in enumerate(names) if name in entries}
            version.state[i] = collections.defaultdict(dict, held)
        before = _snapshot(version)
        version._update([[grads[name].clone() if name in grads else None for name in names] for names in self._names])
        _check_writes(version, before, self._names)
        new = {name: version.param_groups[i]["params"][j].to(params[name].dtype) for name, (i, j) in self._places.items()}
        kept = {name: version.state[i].get(j) for name, (i, j) in self._places.items()}
        return new, {name: _frozen(entry or {}, params[name], name) for name, entry in kept.items() if entry or name in grads}

    def _watched_groups(self, hyper: Hyper) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        for i, group in enumerate(self._opt.param_groups):
            given = {key: iter(values) for key, values in hyper[str(i)].items()}
            watched = dict[str, Any]()
            for key, value in settings_of(group).items():
                places = map(functools.partial(_Place, i, key), itertools.count())

                def watch(leaf: Any, key: str = key, places: Any = places, given: Any = given) -> Any:
                    place = next(places)
                    return _Watched(next(given[key]), place, self._opt.param_groups, self._outcomes) if _is_number(leaf) else leaf

                watched[key] = _recursive_map(value, watch)
            groups.append(watched)
        return groups


def _check_version(version: Any, base: Any, kind: type[torch.optim.Optimizer]) -> None:
    ours = {name for name, value in vars(base).items() if callable(value) and not name.startswith("__")} - {"_update", "write_state"}
    other = sorted(name for name in ours - {"_entry_for"} if getattr(version, name) is not getattr(base, name))
    if other:
        raise UnsupportedOptimizer(
            f"{version.__name__}, registered for {kind.__name__}, overrides {', '.join(other)}, which a program would not run. "
            "Do it in _update"
        )


# --- what a step writes to


def _snapshot(version: Any) -> dict[str, Any]:
    """What may not change in a step: attributes, and settings."""
    held = {name: value for name, value in vars(version).items() if name not in ("param_groups", "state", "_built")}
    settings = [settings_of(group) for group in version.param_groups]
    return {name: _content(value) for name, value in {**held, "param_groups": settings}.items()}


def _content(value: Any) -> Any:
    """A nest's form and its leaves, tensors with the count of writes to them."""
    leaves: list[Any] = []

    def note(leaf: Any) -> int:
        if type(leaf) is collections.deque:
            return sum(note(entry) for entry in leaf)
        leaves.append((leaf, leaf._version if type(leaf) is not _Watched and isinstance(leaf, Tensor) else 0))
        return len(leaves)

    return _recursive_map(value, note), leaves


def _check_writes(version: Any, before: dict[str, Any], names: Sequence[Sequence[str]]) -> None:
    after = _snapshot(version)
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        same = (
            old is not None
            and new is not None
            and old[0] == new[0]
            and len(old[1]) == len(new[1])
            and all(a is b and x == y for (a, x), (b, y) in zip(old[1], new[1], strict=True))
        )
        if not same:
            what = "a setting" if name == "param_groups" else f"self.{name}"
            raise NotTraceable(f"_update writes to {what}, which is not carried from step to step. Keep it in self.state[group][index]")
    for states, own in zip(version.state, names, strict=True):
        extra = [key for key, entry in states.items() if entry and key not in range(len(own))]
        if extra:
            raise NotTraceable(
                f"_update keeps state under {extra[0]!r}, which is no parameter's index. Keep it in self.state[group][index]"
            )


# --- state


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _frozen(entry: Mapping[str, Any], param: Tensor, name: str) -> Any:
    """State with its numbers as tensors and its keys in order.

    Raises:
      NotTraceable: it holds something else.
    """

    def as_tensor(leaf: Any) -> Any:
        leaf = _plain(leaf)
        if isinstance(leaf, bool | str | None | Tensor):
            return leaf
        if isinstance(leaf, int | float):
            return torch.full((), float(leaf), dtype=torch.float64, device=param.device)
        raise NotTraceable(
            f"_update keeps a {type(leaf).__name__} in the state of parameter '{name}'. Keep tensors, numbers, and lists, tuples and dicts "
            "of those"
        )

    return {key: _recursive_map(entry[key], as_tensor) for key in sorted(entry)}


def _conformed(expected: Entries, got: Entries) -> Entries:
    """State with the dtypes that it has at the first step; floating-point tensors are cast.

    Raises:
      NotTraceable: it has other keys, shapes or kinds of numbers.
    """

    def cast(name: str, new: Tensor, old: Tensor) -> Tensor:
        if new.dtype != old.dtype and not (new.is_floating_point() and old.is_floating_point()):
            raise _unlike(name, expected[name], got[name])
        return new.to(old.dtype)

    found = Entries()
    for name, entry in got.items():
        (new, form), (old, wanted) = tree.flatten(entry), tree.flatten(expected.get(name, {}))
        if form != wanted or any(a.shape != b.shape for a, b in zip(new, old, strict=True)):
            raise _unlike(name, expected.get(name, {}), entry)
        found[name] = tree.unflatten(form, [cast(name, a, b) for a, b in zip(new, old, strict=True)])
    return found


def _unlike(name: str, expected: Any, got: Any) -> NotTraceable:
    return NotTraceable(
        f"_update must keep the same state at every step; for parameter '{name}' it keeps other keys, shapes, dtypes or constants at a "
        f"later one: {tree.difference(expected, got)}"
    )


def _fitted(entry: Any, like: Any, name: str) -> Any:
    """What the instance keeps for a parameter, in the form in which a program does."""
    found = _frozen(entry, next(iter(tree.leaves(like)), torch.zeros(())), name)
    (values, form), (wanted, expected) = tree.flatten(found), tree.flatten(like)
    if form != expected or any(a.shape != b.shape for a, b in zip(values, wanted, strict=True)):
        raise OptimizerMismatch(
            f"The optimiser's state for parameter '{name}' is not what its _update keeps: {tree.difference(like, found)}. Clear opt.state, "
            "or let both keep the same."
        )
    return tree.map_leaves(lambda value, other: value.detach().to(other, copy=True), found, like)


# --- settings


def _is_number(leaf: Any) -> bool:
    """Whether a setting is an input of a program."""
    return isinstance(leaf, float) or (isinstance(leaf, Tensor) and leaf.is_floating_point())


def _inputs(groups: Groups) -> dict[str, dict[str, tuple[Any, ...]]]:
    """By group and setting the numbers that are inputs."""
    return {
        str(i): {key: found for key, value in settings_of(group).items() if (found := tuple(filter(_is_number, flatten(value))))}
        for i, group in enumerate(groups)
    }


def _constants(opt: torch.optim.Optimizer) -> Any:
    """All else that a step reads of the instance: other settings, and attributes."""

    def constant(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return ("number", tuple(leaf.shape)) if leaf.is_floating_point() else ("tensor", leaf.dtype, leaf.tolist())
        return float if isinstance(leaf, float) else (type(leaf), leaf)

    def attribute(leaf: Any) -> Any:
        return ("tensor", id(leaf)) if isinstance(leaf, Tensor) else (type(leaf), leaf)

    own = {name: value for name, value in vars(opt).items() if name not in _attributes_of_any()}
    return [_recursive_map(settings_of(group), constant) for group in opt.param_groups], _recursive_map(own, attribute)


@functools.cache
def _attributes_of_any() -> frozenset[str]:
    """Attributes that every optimiser has, and those that a scheduler puts there."""
    return frozenset(vars(torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=0.1))) | {"step", "_opt_called"}


class _Place(NamedTuple):
    """Where a number stands in the settings."""

    group: int
    key: str
    position: int

    def held(self, groups: Groups) -> Any:
        return flatten(groups[self.group][self.key])[self.position]


class _Question(NamedTuple):
    """What a step was decided by."""

    place: _Place
    ask: Callable[[Any, Any], Any]
    other: Any

    def answer(self, groups: Groups) -> Any:
        found = [part.held(groups) if isinstance(part, _Place) else part for part in (self.place, self.other)]
        result = self.ask(*[part.detach() if isinstance(part, Tensor) else part for part in found])
        return bool(result) if isinstance(result, Tensor) else result


def _number(value: Any, other: None) -> float:
    del other
    return float(value)


def _is_same(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)


class _Watched:
    """A setting as `_update` sees it: a tensor in arithmetic; what is decided by it is decided by its value, and noted.

    Args:
      tensor: what arithmetic takes: the program's input.
      place: of the setting.
      groups: where it stands.
      outcomes: by question what was decided, so that all programs decide alike.
    """

    def __init__(self, tensor: Any, place: _Place, groups: Groups, outcomes: dict[_Question, Any]) -> None:
        self._tensor, self._place, self._groups, self._outcomes = tensor, place, groups, outcomes

    @property
    def __class__(self) -> type:  # what isinstance asks for  # pyright: ignore[reportIncompatibleMethodOverride]
        if isinstance(self._place.held(self._groups), float):
            return float
        raise NotTraceable(
            f"_update asks for the type of the setting '{self._place.key}', which is a tensor. Compute with it as with a number"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._tensor, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return func(*_recursive_map(args, _plain), **_recursive_map(kwargs or {}, _plain))

    def _decide(self, ask: Callable[[Any, Any], Any], other: Any = None) -> Any:
        held = self._place.held(self._groups)
        if isinstance(held, Tensor) and held.numel() != 1:
            raise NotTraceable(
                f"_update decides by the setting '{self._place.key}', which is a tensor of several elements. Use torch.where"
            )
        question = _Question(self._place, ask, other)
        if question not in self._outcomes:
            self._outcomes[question] = question.answer(self._groups)
        return self._outcomes[question]

    def _compare(self, ask: Callable[[Any, Any], Any], other: Any) -> Any:
        if type(other) is _Watched:
            return self._decide(ask, other._place)
        if isinstance(other, Tensor):
            return ask(self._tensor, other)
        return self._decide(ask, other) if isinstance(other, int | float) else ask(float(self), other)

    def __float__(self) -> float:
        held = self._place.held(self._groups)
        if isinstance(held, Tensor) and held.requires_grad:
            raise NotTraceable(
                f"_update turns the setting '{self._place.key}', which requires grad, into a Python number. Compute with the tensor: "
                "torch.sqrt or ** 0.5 for math.sqrt"
            )
        return self._decide(_number)

    def __bool__(self) -> bool:
        return self._decide(operator.ne, 0)

    def __int__(self) -> int:
        return int(float(self))

    def __round__(self, digits: int | None = None) -> Any:
        return round(float(self), digits)

    def __format__(self, form: str) -> str:
        return format(float(self), form)

    def __str__(self) -> str:
        return str(float(self))

    def __repr__(self) -> str:
        return repr(float(self))

    __hash__ = None  # type: ignore[assignment]


def _arithmetic(name: str) -> Callable[..., Any]:
    ask = getattr(operator, name)
    return lambda self, *others: ask(_plain(self), *map(_plain, others))


def _reflected(name: str) -> Callable[..., Any]:
    ask = getattr(operator, name)
    return lambda self, other: ask(_plain(other), _plain(self))


def _comparison(name: str) -> Callable[..., Any]:
    ask = getattr(operator, name)
    return lambda self, other: self._compare(ask, other)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(_Watched, f"__{_name}__", _arithmetic(_name))
    setattr(_Watched, f"__r{_name}__", _reflected(_name))
for _name in ("neg", "pos", "abs", "getitem"):
    setattr(_Watched, f"__{_name}__", _arithmetic(_name))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(_Watched, f"__{_name}__", _comparison(_name))


def _plain(leaf: Any) -> Any:
    return leaf._tensor if type(leaf) is _Watched else leaf


def number_or_zero(leaf: Any) -> Any:
    """A setting for an optimiser of `adaptrt.optim`, in which the Python number zero removes a term; what is not watched as it is."""
    if type(leaf) is not _Watched:
        return leaf
    return 0.0 if isinstance(leaf._place.held(leaf._groups), float) and leaf == 0 else leaf._tensor
