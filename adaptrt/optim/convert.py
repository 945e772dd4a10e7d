"""From a `torch.optim` instance: the pure optimiser, its hyperparameters and its state as they stand.

Groups of the instance that hold none of the parameters asked for are left out. If one is left, the result is that optimiser; if
several, a `partition` whose labels are the groups' indices in `param_groups`, as strings.

In `param_groups` a number may be a float, a tensor of one element, or a mapping from parameter name to a float or tensor.

Known limits: step hooks registered on the instance are not seen. SGD does not record how often it has stepped, and only whether it
has matters: a parameter with a momentum buffer gets step count 1.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.errors import OptimizerMismatch, UnsupportedOptimizer
from adaptrt.optim.base import Hyper, Optimizer, Params, Schedule, State
from adaptrt.optim.families import ALIASES, FAMILIES, Family, Group
from adaptrt.optim.lbfgs import LBFGSState
from adaptrt.optim.schedule import ScheduledState
from adaptrt.optim.sgd import SGDState
from adaptrt.optim.transforms import partition

SUPPORTED: tuple[str, ...] = tuple(kind.__name__ for kind in FAMILIES)
"""Names of the classes of `torch.optim` that `convert` takes."""


def convert(opt: torch.optim.Optimizer, params: Params) -> Optimizer:
    """The pure optimiser that computes what `opt.step()` computes for `params`; docs/optimisers.md lists what differs.

    Args:
      opt: an instance of exactly one of the classes in `SUPPORTED`. A subclass may step differently, which nothing here could see.
        `foreach`, `fused`, `capturable` and `differentiable` choose an implementation of the same arithmetic, and are ignored.
      params: the parameters that adapt, by name; the very tensors in `opt.param_groups`.

    Raises:
      UnsupportedOptimizer: another class.
      OptimizerMismatch: a tensor of `params` is in no group, or there is none.
      InvalidArgument: a number is outside its domain.

    Example:
      >>> w = torch.zeros(2, requires_grad=True)
      >>> convert(torch.optim.SGD([w], lr=0.1), {"w": w}).hyper
      {'lr': 0.1}
    """
    family, groups = _family(opt), _groups(opt, params)
    built = {group.label: family.build(group) for group in groups}
    if len(groups) == 1:
        return built[groups[0].label]
    return partition(built, {name: group.label for group in groups for name in group.names})


def read_hyper(opt: torch.optim.Optimizer, params: Params) -> Hyper:
    """The hyperparameters in `opt.param_groups` now, in the tree of `convert(opt, params).hyper`.

    Raises:
      UnsupportedOptimizer, OptimizerMismatch: as `convert`.
    """
    family, groups = _family(opt), _groups(opt, params)
    hyper = {group.label: family.build(group).hyper for group in groups}
    return hyper[groups[0].label] if len(groups) == 1 else hyper


def read_state(opt: torch.optim.Optimizer, params: Params) -> State:
    """A detached copy of the state in `opt`, in the tree of `convert(opt, params).init(params)`.

    Zeros for a parameter that `opt` has not stepped yet. Later steps of `opt` do not change the result.

    Raises:
      OptimizerMismatch: state of a wrong shape, or part of it missing; and as `convert`.
      UnsupportedOptimizer: as `convert`.
    """
    family, groups = _family(opt), _groups(opt, params)
    state: dict[str, State] = {}
    for group in groups:
        own = {name: params[name] for name in group.names}
        state[group.label] = _read(opt, own, family.build(group).init(own))
    return state[groups[0].label] if len(groups) == 1 else state


def fingerprint(opt: torch.optim.Optimizer, params: Params) -> Hashable:
    """A value that changes when `convert(opt, params)` would give an optimiser or a tree of hyperparameters of another structure.

    It depends on the class, the groups' flags and members, which terms are off, and which numbers are mappings; not on numbers.

    Raises:
      UnsupportedOptimizer, OptimizerMismatch: as `convert`.
    """
    family, groups = _family(opt), _groups(opt, params)
    parts: list[Hashable] = []
    for group in groups:
        hyper = family.build(group).hyper
        on = tuple((key, _kind(value)) for key, value in hyper.items())
        label = group.label if len(groups) > 1 else None
        parts.append((label, tuple(family.constants(group.settings).items()), on, tuple(group.names)))
    return family.name, tuple(parts)


# --- groups


def _family(opt: torch.optim.Optimizer) -> Family:
    family = FAMILIES.get(ALIASES.get(type(opt), type(opt)))
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


# --- structure and state of one group


def _kind(value: Any) -> Hashable:
    if isinstance(value, Schedule):
        return value.fn, _kind(value.numbers)
    if isinstance(value, Mapping):
        return tuple([(key, _kind(entry)) for key, entry in cast("Mapping[str, Any]", value).items()])
    return None


def _read(opt: torch.optim.Optimizer, params: Params, fresh: State) -> State:
    """The state in `opt`, in the tree of `fresh`."""
    if isinstance(fresh, ScheduledState):  # schedules begin with the unroll
        return fresh._replace(state=_read(opt, params, fresh.state))
    if isinstance(fresh, LBFGSState):
        return _read_lbfgs(opt, params, fresh)
    return {name: tree.map_leaves(_copied, of_entry(opt.state.get(params[name]), name, zeros)) for name, zeros in fresh.items()}


def _copied(value: Tensor) -> Tensor:
    return value.detach().clone()


def of_entry(entry: Mapping[str, Any] | None, name: str, fresh: Any) -> Any:
    """What torch.optim keeps for parameter `name`, as the named tuple that `fresh` is; `fresh` itself where it keeps nothing.

    Raises:
      OptimizerMismatch: a tensor of a wrong shape, or part of it missing.
    """
    # The fields of our states are named as torch.optim names its own.
    if entry and isinstance(fresh, SGDState):  # which counts no steps: one with a buffer has made some
        entry = {**entry, "step": 1}
    fields = {key: _field(entry, key, name, zero) for key, zero in fresh._asdict().items() if isinstance(zero, Tensor)}
    return fresh._replace(**fields)


def _field(entry: Mapping[str, Any] | None, key: str, name: str, zero: Tensor) -> Tensor:
    if not entry or all(value is None for value in entry.values()):
        return zero
    if entry.get(key) is None:
        raise OptimizerMismatch(
            f"The optimiser's state for parameter '{name}' has no '{key}', only {sorted(entry)}. It was made under other settings; "
            "build the optimiser anew, or restore them."
        )
    value = torch.as_tensor(entry[key])
    if value.shape != zero.shape and not (key == "step" and value.numel() == 1):
        raise OptimizerMismatch(
            f"The optimiser's '{key}' for parameter '{name}' must have shape {list(zero.shape)}, got {list(value.shape)}. "
            "The state belongs to another model; load the matching checkpoint or clear opt.state."
        )
    return value.reshape(zero.shape).to(device=zero.device, dtype=zero.dtype)


def _read_lbfgs(opt: torch.optim.Optimizer, params: Params, fresh: LBFGSState) -> LBFGSState:
    """PyTorch keeps one state for all parameters, under the first of them, and as vectors in their order."""
    held = opt.param_groups[0]["params"]
    entry = opt.state.get(held[0], {})
    if not entry.get("n_iter"):
        return fresh
    if {id(p) for p in held} != {id(p) for p in params.values()}:
        raise OptimizerMismatch(
            f"The state of LBFGS is of {len(held)} parameters together, of which {len(params)} adapt. Adapt all, or clear opt.state."
        )
    size = sum(p.numel() for p in held)
    if len(entry["prev_flat_grad"]) != size:
        raise OptimizerMismatch(
            f"The state of LBFGS must have {size} elements, got {len(entry['prev_flat_grad'])}. Load the matching checkpoint or clear "
            "opt.state."
        )
    places = dict(zip(map(id, held), torch.split(torch.arange(size), [p.numel() for p in held]), strict=True))
    order = torch.cat([places[id(p)] for p in params.values()])

    def rows(vectors: Sequence[Tensor], zeros: Tensor) -> Tensor:
        found = [vector.detach()[order].to(zeros) for vector in vectors[-len(zeros) :]]
        return torch.cat([zeros[len(found) :], torch.stack(found)]) if found else zeros

    return LBFGSState(
        n_iter=torch.as_tensor(entry["n_iter"]).to(fresh.n_iter),
        prev_flat_grad=entry["prev_flat_grad"].detach()[order].to(fresh.prev_flat_grad),
        prev_step=(entry["d"] * entry["t"]).detach()[order].to(fresh.prev_step),
        old_dirs=rows(entry["old_dirs"], fresh.old_dirs),
        old_stps=rows(entry["old_stps"], fresh.old_stps),
    )
