"""A registered optimiser as a pure one, so that `compile_unroll` takes it: its `_update` is traced as any Python function is.

The steps of a program are all alike. An `_update` may do three things that are not:

- It may begin a parameter's state at its first step (`if len(state) == 0`). A program that starts without state computes both the step that
  begins it and the later step, and takes for each parameter one of the two by its count of updates. So its update costs twice the
  arithmetic.
- It may keep numbers in the state. In a program they are 0-dim float64 tensors. If `_update` decides by one of them, an error names the
  line.
- It may decide by a setting (`if weight_decay != 0`). The setting's value decides. A later call with another value needs another program
  only if the outcome is another one.

If it writes to anything else, an attribute or a setting, this would not be carried from step to step, and it is refused.

Known limits: an object of a class of the user's own, in the settings or in an attribute, is a constant, and so is what `_update` reads from
a closure or a global. A parameter's step must not depend on whether the state of another parameter has begun.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.errors import UnsupportedOptimizer
from adaptrt.graph.passes.lift_noise import forbid_noise
from adaptrt.higher.differentiable import DifferentiableOptimizer
from adaptrt.higher.entries import Entries, cloned, conformed, fitted, frozen
from adaptrt.higher.utils import _recursive_map, settings_of
from adaptrt.higher.watched import Place, Question, Watched, constants, inputs, is_number
from adaptrt.higher.writes import check_writes, snapshot
from adaptrt.inner.diagnose import updating
from adaptrt.optim.base import Hyper, Optimizer, Params, State
from adaptrt.optim.reading import Source, kinds_of

_MAX_BUILT = 16


class RegisteredState(NamedTuple):
    """The state of a registered optimiser in a program.

    Attributes:
      num_updates: by parameter name, as 0-dim int64 tensors, how often its state was updated in this unroll.
      entries: by parameter name what `_update` keeps of it.
    """

    num_updates: dict[str, Tensor]
    entries: Entries


class RegisteredSource(Source):
    """An instance of a registered class. Its current settings and state are read at every call, and never written to.

    Args:
      version: the differentiable version of the class.
      opt: the instance.
      params: the parameters that adapt, by name.
    Raises:
      UnsupportedOptimizer: the version overrides more of `DifferentiableOptimizer` than `_update`.
      NotTraceable: its `_update` does what a program cannot do.
    """

    def __init__(self, version: type[DifferentiableOptimizer], opt: torch.optim.Optimizer, params: Params) -> None:
        _check_version(version, type(opt))
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
        return inputs(self._opt.param_groups)

    def state(self) -> State:
        initial = self._current().initial(self._params)
        held = {name: self._opt.state[p] for name, p in self._params.items() if self._opt.state.get(p)}
        return initial._replace(
            entries={**initial.entries, **{name: fitted(entry, initial.entries[name], name) for name, entry in held.items()}}
        )

    def _current(self) -> _Built:
        started = frozenset(name for name, p in self._params.items() if self._opt.state.get(p))
        for built in self._built:
            if built.serves(self._opt, started):
                return built
        self._built = [*self._built[1 - _MAX_BUILT :], _Built(next(self._numbers), self._version, self._opt, self._params, started)]
        return self._built[-1]


class _Built:
    """The pure optimiser for one outcome of all that `_update` decides by settings.

    Args:
      number: tells it from the others of its source.
      version: the differentiable version of the class.
      opt: the instance.
      params: the parameters that adapt, by name.
      started: the names of those for which the instance has state already.
    """

    def __init__(
        self, number: int, version: type[DifferentiableOptimizer], opt: torch.optim.Optimizer, params: Params, started: frozenset[str]
    ) -> None:
        self.number = number
        self._version = version
        self._opt = opt
        self._started = started
        self._constants = constants(opt)
        self._numbers = inputs(opt.param_groups)
        self._outcomes: dict[Question, Any] = {}
        name_of = {id(p): name for name, p in params.items()}
        self._names = [[name_of[id(p)] for p in group["params"] if id(p) in name_of] for group in opt.param_groups]
        self._places = {name: (i, j) for i, names in enumerate(self._names) for j, name in enumerate(names)}
        self._originals = params
        self.optimizer = Optimizer(self._init, self._update, init_is_constant=True)
        self._fresh: dict[Hashable, RegisteredState] = {}
        self.initial(params)

    def serves(self, opt: torch.optim.Optimizer, started: frozenset[str]) -> bool:
        """Tells whether a step of `opt`, with its current settings and attributes, does what a step of this optimiser does."""
        return (
            started == self._started
            and constants(opt) == self._constants
            and all(_is_same(question.answer(opt.param_groups), outcome) for question, outcome in self._outcomes.items())
        )

    def initial(self, params: Params) -> RegisteredState:
        """Returns `init(params)`, which is computed once for each combination of dtypes and devices."""
        kinds = kinds_of(params)
        if kinds not in self._fresh:
            with torch.inference_mode(False), torch.no_grad(), updating(), forbid_noise():
                self._fresh[kinds] = self._init(params)
        return self._fresh[kinds]

    def _init(self, params: Params) -> RegisteredState:
        # Two steps on zeros: the first says what is kept, the second whether it stays the same, and both what is decided by settings.
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        entries = self._run(zeros, zeros, self._numbers, {})[1]
        conformed(entries, self._run(zeros, zeros, self._numbers, entries)[1])
        counts = {name: torch.zeros((), dtype=torch.int64, device=p.device) for name, p in params.items()}
        return RegisteredState(counts, tree.map_leaves(torch.zeros_like, entries))

    def _update(self, grads: Params, state: RegisteredState, params: Params, hyper: Hyper) -> tuple[dict[str, Tensor], RegisteredState]:
        entries = state.entries
        counts = {name: count + 1 if name in grads else count for name, count in state.num_updates.items()}
        if self._started >= set(grads) or not tree.leaves(entries):
            new, after = self._run(grads, params, hyper, {name: entry for name, entry in entries.items() if tree.leaves(entry)})
            return new, RegisteredState(counts, {**entries, **conformed(entries, after)})
        begun = {name: entry for name, entry in entries.items() if name in self._started}
        is_first = {name: count == 0 for name, count in state.num_updates.items()}
        # Where a branch is not taken it must be finite and have finite derivatives, or its part of the gradient, 0 * inf, is NaN: the first
        # step is given ones then, at which no square root or quotient is at its end, and the later one what the first step would leave.
        safe = {name: torch.where(is_first[name], grad, torch.ones_like(grad)) for name, grad in grads.items()}
        first_new, first = self._run(safe, params, hyper, begun)
        first = {**entries, **conformed(entries, first)}

        def chosen(name: str, a: Any, b: Any) -> Any:
            return tree.map_leaves(functools.partial(torch.where, is_first[name]), a, b)

        later_new, later = self._run(grads, params, hyper, {name: chosen(name, first[name], entry) for name, entry in entries.items()})
        later = {**entries, **conformed(entries, later)}
        new = {name: chosen(name, first_new[name], later_new[name]) for name in params}
        return new, RegisteredState(counts, {name: chosen(name, first[name], later[name]) for name in entries})

    def _run(self, grads: Params, params: Params, hyper: Hyper, entries: Entries) -> tuple[dict[str, Tensor], Entries]:
        """One step of the registered class itself: the new parameters, and the state of those parameters whose state has begun."""
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
            held = {j: _recursive_map(entries[name], cloned) for j, name in enumerate(names) if name in entries}
            version.state[i] = collections.defaultdict(dict, held)
        before = snapshot(version)
        version._update([[grads[name].clone() if name in grads else None for name in names] for names in self._names])
        check_writes(version, before, self._names)
        new = {name: version.param_groups[i]["params"][j].to(params[name].dtype) for name, (i, j) in self._places.items()}
        kept = {name: version.state[i].get(j) for name, (i, j) in self._places.items()}
        return new, {name: frozen(entry or {}, params[name], name) for name, entry in kept.items() if entry or name in grads}

    def _watched_groups(self, hyper: Hyper) -> list[dict[str, Any]]:
        """The instance's groups without their parameters, and with each input of the program as a `Watched`."""
        groups: list[dict[str, Any]] = []
        for i, group in enumerate(self._opt.param_groups):
            given = {key: iter(values) for key, values in hyper[str(i)].items()}
            watched = dict[str, Any]()
            for key, value in settings_of(group).items():
                places = map(functools.partial(Place, i, key), itertools.count())

                def watch(leaf: Any, key: str = key, places: Any = places, given: Any = given) -> Any:
                    place = next(places)
                    return Watched(next(given[key]), place, self._opt.param_groups, self._outcomes) if is_number(leaf) else leaf

                watched[key] = _recursive_map(value, watch)
            groups.append(watched)
        return groups


def _check_version(version: type[DifferentiableOptimizer], kind: type[torch.optim.Optimizer]) -> None:
    base = DifferentiableOptimizer
    methods = {name for name, value in vars(base).items() if callable(value) and not name.startswith("__")}
    # `_update` is traced, and the other two serve `write_state` alone, which no program calls.
    other = sorted(name for name in methods - {"_update", "write_state", "_entry_for"} if getattr(version, name) is not getattr(base, name))
    if other:
        raise UnsupportedOptimizer(
            f"{version.__name__}, registered for {kind.__name__}, overrides {', '.join(other)}, which a program would not run. "
            "Do it in _update"
        )


def _is_same(a: Any, b: Any) -> bool:
    """Whether two answers are equal. NaN is equal to NaN here."""
    return a == b or (a != a and b != b)
