"""From a `torch.optim` instance to the pure optimiser that computes the same, its hyperparameters and its state.

`view` looks at an instance once. The result, a `View`, holds all that follows from `param_groups`; the state is read by a method of it,
because the tensors in `opt.state` change at every step.

Groups of the instance that hold none of the given parameters are left out. If one group remains, the result is the optimiser of this
group. If several remain, it is a `partition` whose labels are the groups' indices in `param_groups`, as strings.

In `param_groups` a number may be a float, a tensor of one element, or a mapping from parameter name to a float or tensor.

Known limits: step hooks that are registered on the instance do not run.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from adaptrt.errors import OptimizerMismatch, UnsupportedOptimizer
from adaptrt.optim.base import Hyper, Optimizer, Params, Schedule, State
from adaptrt.optim.families import FAMILIES, Family, Group
from adaptrt.optim.registry import stepping_class
from adaptrt.optim.torch_state import held_state
from adaptrt.optim.transforms import partition

SUPPORTED: tuple[str, ...] = tuple(kind.__name__ for kind in FAMILIES)
"""Names of the classes of `torch.optim` that `convert` takes."""


@dataclass(frozen=True, slots=True)
class View:
    """What `param_groups` of a `torch.optim` instance said when it was looked at, for certain parameters.

    Attributes:
      optimizer: the pure optimiser. Its `hyper` are the hyperparameters.
      structure: a hashable value. Two views have equal structures exactly if their optimisers have the same arithmetic and the same tree of
        hyperparameters. It depends on the class, on the groups' flags and members, on which terms are off and on which numbers are
        mappings, but not on the numbers.
      members: by label of each group the names of its parameters.
    """

    optimizer: Optimizer
    structure: Hashable
    members: Mapping[str, Sequence[str]]

    def state(self, opt: torch.optim.Optimizer, params: Params) -> State:
        """Returns a detached copy of the state in `opt`, in the tree of `optimizer.init(params)`; see `read_state`."""
        fresh = self.optimizer.init(params)
        if len(self.members) == 1:
            return held_state(opt, params, fresh)
        return {label: held_state(opt, {name: params[name] for name in names}, fresh[label]) for label, names in self.members.items()}


def view(opt: torch.optim.Optimizer, params: Params) -> View:
    """Looks at `opt` once.

    Args:
      opt: an instance of exactly one of the classes in `SUPPORTED`, or of a class that is registered to step as one of them.
      params: the parameters that adapt, by name; the very tensors in `opt.param_groups`.
    Raises:
      UnsupportedOptimizer, OptimizerMismatch, InvalidArgument: as `convert`.
    """
    family, groups = _family(opt), _groups(opt, params)
    made = {group.label: family.build(group) for group in groups}
    members = {group.label: tuple(group.names) for group in groups}
    if len(groups) == 1:
        optimizer = made[groups[0].label]
    else:
        optimizer = partition(made, {name: label for label, names in members.items() for name in names})
    parts = [
        (
            group.label if len(groups) > 1 else None,
            tuple(family.constants(group.settings).items()),
            tuple([(key, _form(value)) for key, value in made[group.label].hyper.items()]),
            members[group.label],
        )
        for group in groups
    ]
    return View(optimizer, (family.name, tuple(parts)), members)


def convert(opt: torch.optim.Optimizer, params: Params) -> Optimizer:
    """Returns the pure optimiser that computes for `params` what `opt.step()` computes; docs/optimisers.md lists what differs.

    Args:
      opt: an instance of exactly one of the classes in `SUPPORTED`. A subclass may step differently, which nothing here could see.
        `foreach`, `fused`, `capturable` and `differentiable` choose an implementation of the same arithmetic, and are ignored.
      params: the parameters that adapt, by name; the very tensors in `opt.param_groups`.

    Raises:
      UnsupportedOptimizer: `opt` is of another class.
      OptimizerMismatch: a tensor of `params` is in no group, or there is none.
      InvalidArgument: a number is outside its domain.

    Example:
      >>> w = torch.zeros(2, requires_grad=True)
      >>> convert(torch.optim.SGD([w], lr=0.1), {"w": w}).hyper
      {'lr': 0.1}
    """
    return view(opt, params).optimizer


def read_hyper(opt: torch.optim.Optimizer, params: Params) -> Hyper:
    """Returns the hyperparameters that are in `opt.param_groups` now, in the tree of `convert(opt, params).hyper`.

    Raises:
      UnsupportedOptimizer, OptimizerMismatch, InvalidArgument: as `convert`.
    """
    return view(opt, params).optimizer.hyper


def read_state(opt: torch.optim.Optimizer, params: Params) -> State:
    """Returns a detached copy of the state in `opt`, in the tree of `convert(opt, params).init(params)`.

    A parameter that `opt` has not stepped yet has its initial state. Later steps of `opt` do not change the result.

    Raises:
      OptimizerMismatch: state has the wrong shape, or part of it is missing; and as `convert`.
      UnsupportedOptimizer, InvalidArgument: as `convert`.
    """
    return view(opt, params).state(opt, params)


def fingerprint(opt: torch.optim.Optimizer, params: Params) -> Hashable:
    """Returns a value that changes when `convert(opt, params)` would return another arithmetic or tree; see `View.structure`.

    Raises:
      UnsupportedOptimizer, OptimizerMismatch, InvalidArgument: as `convert`.
    """
    return view(opt, params).structure


def _family(opt: torch.optim.Optimizer) -> Family:
    family = FAMILIES.get(stepping_class(opt))
    if family is None:
        raise UnsupportedOptimizer(
            f"opt must be an instance of exactly one of {', '.join(SUPPORTED)} from torch.optim, got {type(opt).__module__}."
            f"{type(opt).__qualname__}; a subclass may step differently. Use one of them, or build an adaptrt.optim.Optimizer."
        )
    return family


def _groups(opt: torch.optim.Optimizer, params: Params) -> list[Group]:
    settings = opt.param_groups
    owner = {id(p): index for index, group in enumerate(settings) for p in group["params"]}
    members: dict[int, list[str]] = {}
    for name, p in params.items():
        index = owner.get(id(p))
        if index is None:
            raise OptimizerMismatch(
                f"Parameter '{name}' is in none of the optimiser's {len(settings)} groups. Build the optimiser from this model's "
                "parameters, or leave the parameter out with params=."
            )
        members.setdefault(index, []).append(name)
    if not members:
        raise OptimizerMismatch("params is empty: no parameter of the optimiser adapts. Check params= and requires_grad.")
    return [Group(str(index), settings[index], members[index], opt.defaults) for index in sorted(members)]


def _form(value: Any) -> Hashable:
    """What of a hyperparameter belongs to the structure: the names in a mapping, and the function of a schedule."""
    if isinstance(value, Schedule):
        return value.fn, _form(value.numbers)
    if isinstance(value, Mapping):
        return tuple([(key, _form(entry)) for key, entry in cast("Mapping[str, Any]", value).items()])
    return None
