"""From a `torch.optim` instance: the pure optimiser, its hyperparameters and its state as they stand.

Groups of the instance that hold none of the parameters asked for are left out. If one is left, the result is that optimiser; if
several, a `partition` whose labels are the groups' indices in `param_groups`, as strings.

In `param_groups` a number may be a float, a tensor of one element, or a mapping from parameter name to a float or tensor.

Known limits: step hooks registered on the instance are not seen. SGD does not record how often it has stepped, and only whether it
has matters: a parameter with a momentum buffer gets step count 1.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from adaptrt.errors import OptimizerMismatch, UnsupportedOptimizer
from adaptrt.optim.adadelta import adadelta
from adaptrt.optim.adafactor import adafactor
from adaptrt.optim.adagrad import adagrad
from adaptrt.optim.adam import adam, adamw
from adaptrt.optim.adamax import adamax
from adaptrt.optim.asgd import asgd
from adaptrt.optim.base import Hyper, Optimizer, Params, Schedule, State, at, is_off
from adaptrt.optim.lbfgs import LBFGSState, lbfgs
from adaptrt.optim.muon import muon
from adaptrt.optim.nadam import nadam
from adaptrt.optim.radam import radam
from adaptrt.optim.rmsprop import rmsprop
from adaptrt.optim.rprop import rprop
from adaptrt.optim.schedule import ScheduledState
from adaptrt.optim.sgd import sgd
from adaptrt.optim.transforms import partition

Settings: TypeAlias = Mapping[str, Any]
"""One entry of `param_groups`."""


@dataclass(frozen=True, slots=True)
class Group:
    """A parameter group, seen from the parameters asked for."""

    label: str
    settings: Settings
    names: list[str]
    defaults: Settings
    """The arguments of the optimiser's constructor."""


@dataclass(frozen=True, slots=True)
class Family:
    """How to read one class of `torch.optim`.

    Attributes:
      name: of the pure counterpart.
      make: the pure counterpart, whose arguments are named as in `param_groups`.
      numbers: the settings that are numbers, or tuples of numbers: inputs of a program.
      flags: those that are constants of it.
      adjust: from settings to flags that differ from them.
      constructor_only: numbers that PyTorch takes from its constructor's argument whatever the group says. A tensor, a mapping or a
        schedule in the group is ours to use.
    """

    name: str
    make: Callable[..., Optimizer]
    numbers: tuple[str, ...]
    flags: tuple[str, ...] = ("maximize",)
    adjust: Callable[[Settings], dict[str, Any]] = lambda settings: {}
    constructor_only: tuple[str, ...] = ()

    def constants(self, settings: Settings) -> dict[str, Any]:
        """Flags by name. Settings that a version of PyTorch does not have are left to their defaults."""
        found = {flag: settings[flag] for flag in self.flags if flag in settings} | self.adjust(settings)
        return {flag: tuple(cast("list[Any]", value)) if isinstance(value, list) else value for flag, value in found.items()}

    def build(self, group: Group) -> Optimizer:
        numbers = {key: _value(group, group.settings[key]) for key in self.numbers}
        numbers |= {key: group.defaults[key] for key in self.constructor_only if isinstance(numbers[key], Real)}
        return self.make(**numbers, **self.constants(group.settings))


def convert(opt: torch.optim.Optimizer, params: Params) -> Optimizer:
    """The pure optimiser that computes what `opt.step()` computes for `params`.

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
    family = _FAMILIES.get(type(opt))
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


# --- numbers, flags and state of one group


def _value(group: Group, value: Any) -> Any:
    if type(value) is float:  # nearly always, and this is on the path of every call
        return value
    if isinstance(value, tuple | list):
        return tuple([_value(group, entry) for entry in cast("Sequence[Any]", value)])
    if isinstance(value, Mapping):
        return {name: _number(at(cast("Mapping[str, Any]", value), name)) for name in group.names}
    return _number(value)


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.reshape(()) if value.dim() and value.numel() == 1 else value
    return float(value) if isinstance(value, Real) else value


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
    # The fields of our states are named as torch.optim names its own.
    return {
        name: zeros._replace(
            **{
                key: _kept(opt.state.get(params[name]), key, name, zero)
                for key, zero in zeros._asdict().items()
                if isinstance(zero, Tensor)
            }
        )
        for name, zeros in fresh.items()
    }


def _kept(entry: Mapping[str, Any] | None, key: str, name: str, zero: Tensor) -> Tensor:
    """Field `key` of the state that torch.optim keeps for one parameter, as a tensor like `zero`."""
    if not entry or all(value is None for value in entry.values()):
        return zero
    if entry.get(key) is None:
        if key == "step":
            return torch.ones_like(zero)
        raise OptimizerMismatch(
            f"The optimiser's state for parameter '{name}' has no '{key}', only {sorted(entry)}. It was made under other settings; "
            "build the optimiser anew, or restore them."
        )
    value = torch.as_tensor(entry[key]).detach()
    if value.shape != zero.shape and not (key == "step" and value.numel() == 1):
        raise OptimizerMismatch(
            f"The optimiser's '{key}' for parameter '{name}' must have shape {list(zero.shape)}, got {list(value.shape)}. "
            "The state belongs to another model; load the matching checkpoint or clear opt.state."
        )
    return value.reshape(zero.shape).to(device=zero.device, dtype=zero.dtype, copy=True)


def _lbfgs(settings: Settings) -> dict[str, Any]:
    if settings["line_search_fn"] is not None or settings["tolerance_grad"] or settings["tolerance_change"]:
        raise UnsupportedOptimizer(
            "LBFGS must make a fixed number of iterations: pass tolerance_grad=0, tolerance_change=0 and line_search_fn=None to it, got "
            f"{settings['tolerance_grad']}, {settings['tolerance_change']} and {settings['line_search_fn']!r}."
        )
    # One evaluation comes before the first iteration and, but for the last, one after each.
    return {"max_iter": min(settings["max_iter"], max(1, settings["max_eval"] - 1))}


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


def _nesterov(settings: Settings) -> dict[str, Any]:
    # SGD looks at nesterov only where momentum is on, and momentum may have been set to zero after construction.
    return {"nesterov": bool(settings["nesterov"]) and not is_off(settings["momentum"])}


def _decoupled(settings: Settings) -> dict[str, Any]:
    # AdamW is Adam with this setting, and in either class the step goes by the setting; it matters where there is a decay.
    return {"decoupled_weight_decay": bool(settings["decoupled_weight_decay"]) and not is_off(settings["weight_decay"])}


def _adam_or_adamw(decoupled_weight_decay: bool, **settings: Any) -> Optimizer:
    return (adamw if decoupled_weight_decay else adam)(**settings)


_MOMENTS = ("lr", "betas", "eps", "weight_decay")
_ADAM = Family("adam", _adam_or_adamw, _MOMENTS, ("amsgrad", "maximize"), _decoupled)
_FAMILIES: dict[type[torch.optim.Optimizer], Family] = {
    torch.optim.SGD: Family("sgd", sgd, ("lr", "momentum", "dampening", "weight_decay"), adjust=_nesterov),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.Adamax: Family("adamax", adamax, _MOMENTS),
    torch.optim.NAdam: Family("nadam", nadam, (*_MOMENTS, "momentum_decay"), adjust=_decoupled),
    torch.optim.RAdam: Family("radam", radam, _MOMENTS, adjust=_decoupled),
    torch.optim.Adagrad: Family(
        "adagrad",
        adagrad,
        ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
        constructor_only=("initial_accumulator_value",),
    ),
    torch.optim.Adadelta: Family("adadelta", adadelta, ("lr", "rho", "eps", "weight_decay")),
    torch.optim.ASGD: Family("asgd", asgd, ("lr", "lambd", "alpha", "t0", "weight_decay")),
    torch.optim.RMSprop: Family("rmsprop", rmsprop, ("lr", "alpha", "eps", "weight_decay", "momentum"), ("centered", "maximize")),
    torch.optim.Rprop: Family("rprop", rprop, ("lr", "etas", "step_sizes")),
    torch.optim.Adafactor: Family("adafactor", adafactor, ("lr", "beta2_decay", "eps", "d", "weight_decay")),
    torch.optim.Muon: Family(
        "muon", muon, ("lr", "weight_decay", "momentum", "eps"), ("nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn")
    ),
    torch.optim.LBFGS: Family("lbfgs", lbfgs, ("lr",), ("max_iter", "history_size", "maximize"), _lbfgs),
}

SUPPORTED: tuple[str, ...] = tuple(kind.__name__ for kind in _FAMILIES)
"""Names of the classes of `torch.optim` that `convert` takes."""
