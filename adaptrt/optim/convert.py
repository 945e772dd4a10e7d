"""From a `torch.optim` instance: the pure optimiser, its hyperparameters and its state as they stand.

Groups of the instance that hold none of the parameters asked for are left out. If one is left, the result is that optimiser; if
several, a `partition` whose labels are the groups' indices in `param_groups`, as strings.

In `param_groups` a number may be a float, a tensor of one element, or a mapping from parameter name to a float or tensor.

Known limits: step hooks registered on the instance are not seen. SGD does not record how often it has stepped, and only whether it
has matters: a parameter with a momentum buffer gets step count 1.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from adaptrt.errors import OptimizerMismatch, UnsupportedOptimizer
from adaptrt.optim.adam import adam, adamw
from adaptrt.optim.adam import live as live_in_adam
from adaptrt.optim.base import Hyper, Number, Optimizer, Params, State, Value, at, is_off
from adaptrt.optim.sgd import live as live_in_sgd
from adaptrt.optim.sgd import sgd
from adaptrt.optim.transforms import partition

Settings: TypeAlias = Mapping[str, Any]
"""One entry of `param_groups`."""


class Flags(NamedTuple):
    """What of a group is structure, besides which numbers are on."""

    nesterov: bool = False
    maximize: bool = False
    amsgrad: bool = False
    decoupled: bool = False


@dataclass(frozen=True, slots=True)
class Group:
    """A parameter group, seen from the parameters asked for."""

    label: str
    settings: Settings
    names: list[str]


@dataclass(frozen=True, slots=True)
class Family:
    """How to read one class of `torch.optim`."""

    name: str
    values: Callable[[Group], dict[str, Value]]
    live: Callable[..., dict[str, Value]]
    flags: Callable[[Settings], Flags]
    build: Callable[[dict[str, Value], Flags], Optimizer]


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
    built = {group.label: family.build(family.values(group), family.flags(group.settings)) for group in groups}
    if len(groups) == 1:
        return built[groups[0].label]
    return partition(built, {name: group.label for group in groups for name in group.names})


def read_hyper(opt: torch.optim.Optimizer, params: Params) -> Hyper:
    """The hyperparameters in `opt.param_groups` now, in the tree of `convert(opt, params).hyper`.

    Raises:
      UnsupportedOptimizer, OptimizerMismatch: as `convert`.
    """
    family, groups = _family(opt), _groups(opt, params)
    hyper = {group.label: family.live(**family.values(group)) for group in groups}
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
        fresh = family.build(family.values(group), family.flags(group.settings)).init(own)
        # The fields of our states are named as torch.optim names its own.
        fields = {
            key: {name: _kept(opt.state.get(own[name]), key, name, zero) for name, zero in zeros.items()}
            for key, zeros in cast("dict[str, dict[str, Tensor]]", fresh._asdict()).items()
        }
        state[group.label] = fresh._replace(**fields)
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
        hyper = family.live(**family.values(group))
        on = tuple((key, isinstance(value, Mapping)) for key, value in hyper.items())
        label = group.label if len(groups) > 1 else None
        parts.append((label, family.flags(group.settings), on, tuple(group.names)))
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
    return [Group(str(index), settings[index], members[index]) for index in sorted(members)]


# --- numbers, flags and state of one group


def _value(group: Group, value: Value) -> Value:
    if type(value) is float:  # nearly always, and this is on the path of every call
        return value
    if isinstance(value, Mapping):
        return {name: _number(at(value, name)) for name in group.names}
    return _number(value)


def _number(value: Number) -> Number:
    if isinstance(value, Tensor):
        return value.reshape(()) if value.dim() and value.numel() == 1 else value
    return float(value) if isinstance(value, Real) else value


def _sgd_values(group: Group) -> dict[str, Value]:
    settings = group.settings
    return {key: _value(group, settings[key]) for key in ("lr", "momentum", "dampening", "weight_decay")}


def _sgd_flags(settings: Settings) -> Flags:
    # SGD looks at nesterov only where momentum is on, and momentum may have been set to zero after construction.
    return Flags(nesterov=bool(settings["nesterov"]) and not is_off(settings["momentum"]), maximize=bool(settings["maximize"]))


def _build_sgd(values: dict[str, Value], flags: Flags) -> Optimizer:
    return sgd(**values, nesterov=flags.nesterov, maximize=flags.maximize)


def _adam_values(group: Group) -> dict[str, Value]:
    settings = group.settings
    beta1, beta2 = settings["betas"]
    return {
        "lr": _value(group, settings["lr"]),
        "beta1": _value(group, beta1),
        "beta2": _value(group, beta2),
        "eps": _value(group, settings["eps"]),
        "weight_decay": _value(group, settings["weight_decay"]),
    }


def _adam_flags(settings: Settings) -> Flags:
    # AdamW is Adam with this setting, and in either class the step goes by the setting.
    decoupled = bool(settings["decoupled_weight_decay"]) and not is_off(settings["weight_decay"])
    return Flags(maximize=bool(settings["maximize"]), amsgrad=bool(settings["amsgrad"]), decoupled=decoupled)


def _build_adam(values: dict[str, Value], flags: Flags) -> Optimizer:
    return (adamw if flags.decoupled else adam)(
        lr=values["lr"],
        betas=(values["beta1"], values["beta2"]),
        eps=values["eps"],
        weight_decay=values["weight_decay"],
        amsgrad=flags.amsgrad,
        maximize=flags.maximize,
    )


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


_ADAM = Family("adam", _adam_values, live_in_adam, _adam_flags, _build_adam)
_FAMILIES: dict[type[torch.optim.Optimizer], Family] = {
    torch.optim.SGD: Family("sgd", _sgd_values, live_in_sgd, _sgd_flags, _build_sgd),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
}

SUPPORTED: tuple[str, ...] = tuple(kind.__name__ for kind in _FAMILIES)
"""Names of the classes of `torch.optim` that `convert` takes."""
