"""A registered optimiser as a pure one, so that `compile_unroll` takes it: its `_update` is traced like any Python.

The steps of a program are all alike, and three things in an `_update` are not:

- It may begin a parameter's state at its first step (`if len(state) == 0`). A program that starts without state holds both, the step that
  begins it and the later one, and takes one by the count of updates; so its update costs twice the arithmetic.
- It may keep numbers in the state. In a program they are 0-dim float64 tensors, and deciding by one is an error that names the line.
- It may decide by a setting (`if weight_decay != 0`). That is done by the setting's value; a call with another outcome makes another
  program, a call with another value of the same outcome does not.

Known limits: a tensor in the settings that is not floating-point is a constant, and so is a Python int; other state than `self.state`
is not carried from step to step.
"""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.errors import NotTraceable, OptimizerMismatch
from adaptrt.higher.utils import _recursive_map, flatten
from adaptrt.optim.base import Hyper, Optimizer, Params, State
from adaptrt.optim.source import Source

Entries = dict[str, Any]
"""By parameter name what `_update` keeps of it, numbers as tensors."""


class RegisteredState(NamedTuple):
    """State of a registered optimiser in a program."""

    num_updates: Tensor
    """0-dim int64: updates so far in this unroll."""
    entries: Entries


class RegisteredSource(Source):
    """An instance of a registered class, read as it stands at every call.

    Args:
      make: (optimizer, its parameters) -> the differentiable version.
      opt: the instance; left alone.
      params: those that adapt, by name.
    """

    def __init__(self, make: Callable[[torch.optim.Optimizer, Sequence[Tensor]], Any], opt: torch.optim.Optimizer, params: Params) -> None:
        self._make = make
        self._opt = opt
        self._params = params
        self._built: list[_Built] = []
        self._current()

    def structure(self) -> Hashable:
        return self._built.index(self._current())

    def optimizer(self) -> Optimizer:
        return self._current().optimizer

    def hyper(self) -> Hyper:
        return {
            str(i): {key: found for key, value in _settings(group).items() if (found := tuple(filter(_is_number, flatten(value))))}
            for i, group in enumerate(self._opt.param_groups)
        }

    def state(self) -> State:
        initial: RegisteredState = self._current().initial(self._params)
        held = {name: self._opt.state[p] for name, p in self._params.items() if self._opt.state.get(p)}
        return initial._replace(
            entries={**initial.entries, **{name: _fitted(entry, initial.entries[name], name) for name, entry in held.items()}}
        )

    def _current(self) -> _Built:
        groups = self._opt.param_groups
        started = frozenset(name for name, p in self._params.items() if self._opt.state.get(p))
        for built in self._built:
            if built.serves(groups, started):
                return built
        self._built.append(_Built(self._make, self._opt, self._params, started))
        return self._built[-1]


class _Built:
    """The pure optimiser for one outcome of all that is decided by settings."""

    def __init__(
        self,
        make: Callable[[torch.optim.Optimizer, Sequence[Tensor]], Any],
        opt: torch.optim.Optimizer,
        params: Params,
        started: frozenset[str],
    ) -> None:
        self._make = make
        self._groups = opt.param_groups
        self._started = started
        self._constants = [_constants(group) for group in opt.param_groups]
        self._numbers = [{key: flatten(value) for key, value in _settings(group).items()} for group in opt.param_groups]
        self._outcomes: dict[_Question, Any] = {}
        name_of = {id(p): name for name, p in params.items()}
        self._names = [[name_of[id(p)] for p in group["params"] if id(p) in name_of] for group in opt.param_groups]
        self._places = {name: (i, j) for i, names in enumerate(self._names) for j, name in enumerate(names)}
        # The same class with the parameters that adapt alone, and no state.
        self._like = object.__new__(type(opt))
        vars(self._like).update(vars(opt))
        self._like.state = collections.defaultdict(dict)
        self._like.param_groups = [
            {**group, "params": [params[name] for name in names]} for group, names in zip(opt.param_groups, self._names, strict=True)
        ]
        self._all = list(params.values())
        self.optimizer = Optimizer(self._init, self._update, init_is_constant=True)
        self._fresh: dict[Hashable, RegisteredState] = {}
        self.initial(params)

    def serves(self, groups: Sequence[Mapping[str, Any]], started: frozenset[str]) -> bool:
        """Whether a step under these settings does what this one does."""
        return (
            started == self._started
            and [_constants(group) for group in groups] == self._constants
            and all(_same(question.answer(groups), outcome) for question, outcome in self._outcomes.items())
        )

    def initial(self, params: Params) -> RegisteredState:
        """`init(params)`, made once for each kind of parameters."""
        kinds = tuple([(p.dtype, p.device) for p in params.values()])
        if kinds not in self._fresh:
            with torch.inference_mode(False), torch.no_grad():
                self._fresh[kinds] = self._init(params)
        return self._fresh[kinds]

    def _init(self, params: Params) -> RegisteredState:
        # Two steps on zeros: the first says what is kept, the second whether it stays the same, and both what is decided by settings.
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        hyper = {str(i): {key: tuple(filter(_is_number, leaves)) for key, leaves in n.items()} for i, n in enumerate(self._numbers)}
        entries = self._run(zeros, zeros, hyper, {})[1]
        _check_alike(entries, self._run(zeros, zeros, hyper, entries)[1])
        device = next((p.device for p in params.values()), None)
        return RegisteredState(torch.zeros((), dtype=torch.int64, device=device), tree.map_leaves(torch.zeros_like, entries))

    def _update(self, grads: Params, state: RegisteredState, params: Params, hyper: Hyper) -> tuple[dict[str, Tensor], RegisteredState]:
        num_updates = state.num_updates + 1
        entries = {name: state.entries[name] for name in grads}
        if self._started >= set(grads) or not tree.leaves(entries):
            new, after = self._run(grads, params, hyper, entries)
            return new, RegisteredState(num_updates, {**state.entries, **after})
        is_first = state.num_updates == 0
        first = self._run(grads, params, hyper, {name: entry for name, entry in entries.items() if name in self._started})
        _check_alike(entries, first[1])
        # In place of zeros, at which a later step's arithmetic may have no value or no derivative.
        later = self._run(grads, params, hyper, tree.map_leaves(lambda a, b: torch.where(is_first, a, b), first[1], entries))
        _check_alike(entries, later[1])
        new, after = tree.map_leaves(lambda a, b: torch.where(is_first, a, b), first, later)
        return new, RegisteredState(num_updates, {**state.entries, **after})

    def _run(self, grads: Params, params: Params, hyper: Hyper, entries: Entries) -> tuple[dict[str, Tensor], Entries]:
        """One step of the registered class itself."""
        version = self._make(self._like, self._all)
        for i, names in enumerate(self._names):
            group = version.param_groups[i]
            for key, leaves in self._numbers[i].items():
                given = iter(hyper[str(i)].get(key, ()))
                seen = iter(
                    [
                        _Watched(next(given), _Place(i, key, place), self._groups, self._outcomes) if _is_number(leaf) else leaf
                        for place, leaf in enumerate(leaves)
                    ]
                )
                group[key] = _recursive_map(self._like.param_groups[i][key], lambda leaf, seen=seen: next(seen))
            group["params"] = [params[name] for name in names]
            version.state[i] = collections.defaultdict(dict, {j: _thawed(entries[name]) for j, name in enumerate(names) if name in entries})
        version._update([[grads.get(name) for name in names] for names in self._names])
        new, after = dict(params), Entries()
        for name in grads:
            i, j = self._places[name]
            new[name] = version.param_groups[i]["params"][j].to(params[name].dtype)
            after[name] = _frozen(version.state[i].get(j) or {}, params[name], entries.get(name))
        return new, after


# --- state


def _frozen(entry: Mapping[str, Any], param: Tensor, before: Any) -> Any:
    """State with its numbers as tensors, its keys in order; tensors in the dtypes that they had."""

    def as_tensor(leaf: Any) -> Any:
        if isinstance(leaf, bool) or not isinstance(leaf, int | float):
            return leaf
        return torch.full((), float(leaf), dtype=torch.float64, device=param.device)

    found = {key: _recursive_map(entry[key], as_tensor) for key in sorted(entry)}
    if before is None or tree.flatten(found)[1] != tree.flatten(before)[1]:
        return found
    return tree.map_leaves(lambda new, old: new.to(old.dtype), found, before)


def _thawed(entry: Any) -> Any:
    """A copy that `_update` may write to, as it does by `state["step"] += 1`."""
    return _recursive_map(entry, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


def _fitted(entry: Any, like: Any, name: str) -> Any:
    """What the instance keeps for a parameter, in the form in which a program does."""
    found = _frozen(entry, next(iter(tree.leaves(like)), torch.zeros(())), None)
    problem = tree.flatten(found)[1] != tree.flatten(like)[1] or any(
        a.shape != b.shape for a, b in zip(tree.leaves(found), tree.leaves(like), strict=False)
    )
    if problem:
        raise OptimizerMismatch(
            f"The optimiser's state for parameter '{name}' is not what its _update keeps: {tree.difference(like, found)}. Clear opt.state, "
            "or let both keep the same."
        )
    return tree.map_leaves(lambda value, other: value.detach().to(other, copy=True), found, like)


def _check_alike(expected: Entries, got: Entries) -> None:
    for name, entry in got.items():
        old, new = tree.flatten(expected[name]), tree.flatten(entry)
        if old[1] != new[1] or any(a.shape != b.shape for a, b in zip(old[0], new[0], strict=True)):
            raise NotTraceable(
                f"_update must keep the same state at every step; for parameter '{name}' it keeps other keys, shapes or constants at a "
                f"later one: {tree.difference(expected[name], entry)}"
            )


# --- settings


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _is_number(leaf: Any) -> bool:
    """Whether a setting is an input of a program."""
    return isinstance(leaf, float) or (isinstance(leaf, Tensor) and leaf.is_floating_point())


def _constants(group: Mapping[str, Any]) -> Any:
    def constant(leaf: Any) -> Any:
        if _is_number(leaf):
            return leaf.shape if isinstance(leaf, Tensor) and leaf.dim() else None
        return id(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf)

    return _recursive_map(_settings(group), constant)


class _Place(NamedTuple):
    """Where a number stands in the settings."""

    group: int
    key: str
    position: int

    def value(self, groups: Sequence[Mapping[str, Any]]) -> Any:
        return flatten(groups[self.group][self.key])[self.position]


class _Question(NamedTuple):
    """What a step was decided by."""

    place: _Place
    ask: Callable[[float, Any], Any]
    other: Any

    def answer(self, groups: Sequence[Mapping[str, Any]]) -> Any:
        value = self.place.value(groups)
        return self.ask(float(value.detach() if isinstance(value, Tensor) else value), self.other)


def _itself(value: float, other: None) -> float:
    del other
    return value


def _same(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)


class _Watched:
    """A setting as `_update` sees it: a tensor in arithmetic; what is decided by it is decided by its value, and noted.

    Args:
      tensor: what arithmetic takes: the program's input.
      place: of the setting.
      groups: where it stands.
      outcomes: by question what was decided, so that all programs decide alike.
    """

    def __init__(self, tensor: Any, place: _Place, groups: Sequence[Mapping[str, Any]], outcomes: dict[_Question, Any]) -> None:
        self._tensor, self._place, self._groups, self._outcomes = tensor, place, groups, outcomes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return func(*_recursive_map(args, _plain), **_recursive_map(kwargs or {}, _plain))

    def _decide(self, ask: Callable[[float, Any], Any], other: Any = None) -> Any:
        now = self._place.value(self._groups)
        if isinstance(now, Tensor) and now.numel() != 1:
            raise NotTraceable(
                f"_update decides by the setting '{self._place.key}', which is a tensor of several elements. Use torch.where"
            )
        question = _Question(self._place, ask, other)
        if question not in self._outcomes:
            self._outcomes[question] = question.answer(self._groups)
        return self._outcomes[question]

    def _compare(self, ask: Callable[[Any, Any], Any], other: Any) -> Any:
        if isinstance(other, Tensor):
            return ask(_plain(self), other)
        return self._decide(ask, float(other) if isinstance(other, _Watched) else other)

    def __float__(self) -> float:
        now = self._place.value(self._groups)
        if isinstance(now, Tensor) and now.requires_grad:
            raise NotTraceable(
                f"_update turns the setting '{self._place.key}', which requires grad, into a Python number. Compute with the tensor: "
                "torch.sqrt or ** 0.5 for math.sqrt"
            )
        return self._decide(_itself)

    def __bool__(self) -> bool:
        return self._decide(operator.ne, 0)

    def __int__(self) -> int:
        return int(float(self))

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
for _name in ("neg", "pos", "abs"):
    setattr(_Watched, f"__{_name}__", _arithmetic(_name))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(_Watched, f"__{_name}__", _comparison(_name))


def _plain(leaf: Any) -> Any:
    return leaf._tensor if isinstance(leaf, _Watched) else leaf
