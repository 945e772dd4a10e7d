"""What each class of `torch.optim` is in terms of its pure counterpart, and how one of its parameter groups is read.

`FAMILIES` is the table of the classes that PyTorch has. Classes that users register are in `registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from adaptrt.errors import UnsupportedOptimizer
from adaptrt.optim.adadelta import adadelta
from adaptrt.optim.adafactor import adafactor
from adaptrt.optim.adagrad import adagrad
from adaptrt.optim.adam import adam, adamw
from adaptrt.optim.adamax import adamax
from adaptrt.optim.arithmetic import at
from adaptrt.optim.asgd import asgd
from adaptrt.optim.base import Optimizer
from adaptrt.optim.checks import is_off
from adaptrt.optim.lbfgs import lbfgs
from adaptrt.optim.muon import muon
from adaptrt.optim.nadam import nadam
from adaptrt.optim.radam import radam
from adaptrt.optim.rmsprop import rmsprop
from adaptrt.optim.rprop import rprop
from adaptrt.optim.sgd import sgd

Settings: TypeAlias = Mapping[str, Any]
"""One entry of `param_groups`."""


@dataclass(frozen=True, slots=True)
class Group:
    """A parameter group, restricted to the parameters that adapt.

    Attributes:
      label: the group's label in a `partition`.
      settings: the entry of `param_groups` itself.
      names: the names of its parameters, without those that do not adapt.
      defaults: the arguments of the optimiser's constructor.
    """

    label: str
    settings: Settings
    names: list[str]
    defaults: Settings


@dataclass(frozen=True, slots=True)
class Family:
    """How to read the parameter groups of one class of `torch.optim`.

    Attributes:
      name: the name of the pure counterpart.
      make: the pure counterpart. Its arguments are named as in `param_groups`.
      numbers: the settings that are numbers, or tuples of numbers. They are inputs of a program.
      flags: the settings that are constants of a program.
      adjust: a function from settings to those flags that must differ from the settings.
      constructor_only: numbers that PyTorch takes from its constructor's argument, whatever the group says. A tensor, a mapping or a
        schedule in the group is used all the same.
    """

    name: str
    make: Callable[..., Optimizer]
    numbers: tuple[str, ...]
    flags: tuple[str, ...] = ("maximize",)
    adjust: Callable[[Settings], dict[str, Any]] = lambda settings: {}
    constructor_only: tuple[str, ...] = ()

    def constants(self, settings: Settings) -> dict[str, Any]:
        """Returns the flags by name. A setting that the installed PyTorch does not have keeps its default."""
        found = {flag: settings[flag] for flag in self.flags if flag in settings} | self.adjust(settings)
        return {flag: _constant(flag, value) for flag, value in found.items()}

    def build(self, group: Group) -> Optimizer:
        """Returns the pure optimiser of a group, with the group's current numbers and flags.

        Raises:
          InvalidArgument, InvalidType: a number is outside its domain, or is no number.
          UnsupportedOptimizer: L-BFGS is told to stop early or to search along lines.
        """
        numbers = {key: _value(group, group.settings[key]) for key in self.numbers}
        numbers |= {key: group.defaults[key] for key in self.constructor_only if isinstance(numbers[key], Real)}
        return self.make(**numbers, **self.constants(group.settings))


_BOOLS = ("maximize", "amsgrad", "centered", "nesterov")


def _constant(flag: str, value: Any) -> Any:
    if flag in _BOOLS:  # PyTorch takes whatever is true or false
        return bool(value)
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


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


# --- flags that differ from settings


def _lbfgs(settings: Settings) -> dict[str, Any]:
    if settings["line_search_fn"] is not None or settings["tolerance_grad"] or settings["tolerance_change"]:
        raise UnsupportedOptimizer(
            "LBFGS must make a fixed number of iterations: pass tolerance_grad=0, tolerance_change=0 and line_search_fn=None to it, got "
            f"{settings['tolerance_grad']}, {settings['tolerance_change']} and {settings['line_search_fn']!r}."
        )
    # One evaluation comes before the first iteration and, but for the last, one after each.
    return {"max_iter": min(settings["max_iter"], max(1, settings["max_eval"] - 1))}


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
FAMILIES: dict[type[torch.optim.Optimizer], Family] = {
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
