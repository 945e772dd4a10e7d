"""What an optimiser is here: two pure functions, and the hyperparameters that they read.

`update` returns new tensors and never writes to its arguments, and it decides nothing by the value of a tensor. So one function serves
three uses: it runs eagerly, it runs under `torch.func.vmap` over tasks, and it is captured as a graph with fake tensors. Its derivative is
the meta-gradient.

Known limits: bias corrections are computed in float64, which MPS devices do not have.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import CellType, FunctionType
from typing import Any, TypeAlias, cast

from torch import Tensor, nn

from adaptrt.errors import InvalidArgument

Params: TypeAlias = Mapping[str, Tensor]
"""Tensors by parameter name."""

Number: TypeAlias = float | Tensor

Count: TypeAlias = int | Tensor
"""The number of steps so far. In a program it is a 0-dim int64 tensor, because the inputs of a program are tensors. Where steps are made
one by one it is a Python int, and what follows from it alone is computed in Python."""


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """A hyperparameter that is a function of the step. `schedule` and `per_step` make one.

    Attributes:
      fn: (step, **numbers) -> a number, or one number for each parameter by name. `step` is a 0-dim float64 tensor, 0 at the first step.
      numbers: what `fn` reads besides the step. These are hyperparameters: floats, tensors of any shape, or mappings of those.
    """

    fn: Callable[..., Any]
    numbers: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class PerTask:
    """A hyperparameter, or a part of one, that has a value for each task. `per_task` makes one.

    Attributes:
      values: along an axis of tasks, [T, ...]; within the step of one task, that task's value.
    """

    values: Tensor


Value: TypeAlias = Number | PerTask | Mapping[str, Number | PerTask] | Schedule
"""A hyperparameter: one number for all parameters, one number for each parameter by name, or a function of the step; by task or not."""

# Both are trees, and each optimiser knows the exact type of its own; a union here would only force casts on everyone.
State: TypeAlias = Any
"""A tree of dict, tuple and NamedTuple with tensors as leaves."""
Absent: TypeAlias = tuple[()]
"""Takes the place of a tensor that a state does not need. It is a tree without leaves, which `torch.func.vmap` can return; None is
refused there."""
Hyper: TypeAlias = Any
"""The optimisers here have a `Mapping[str, Value]`; `chain` has a tuple of those, and `partition` a dict of those by label."""


def _nothing() -> dict[str, Value]:
    return {}


@dataclass(frozen=True, slots=True, eq=False)
class Optimizer:
    """An optimiser as a pair of pure functions.

    Attributes:
      init: params -> state. It returns fresh tensors on the device of each parameter. It may read the values of the parameters; gradients
        then flow through it.
      update: (grads, state, params, hyper) -> (new params, new state). It writes to none of its arguments. `grads` may lack a parameter
        that the loss does not use: this parameter and its state are then returned unchanged, as `torch.optim` skips one whose `grad` is
        None.
      hyper: the hyperparameters that the constructor was given. `update` reads the ones that are passed to it, which have the same tree.
        Leaves are floats and tensors. The optimisers here take 0-dim tensors and, in a mapping by parameter name, also tensors of the
        parameter's shape.
      updates_per_step: how many updates, each with its own gradient, make one step. It is 1 for all optimisers but L-BFGS.
      remembers_step: whether the state holds the step that was made, so that nothing may change this step afterwards.
      init_is_constant: whether `init` reads no values but only shapes, dtypes and devices, so that one result serves all calls.
      modules: the modules that `update` calls. Their train or eval mode is a constant of a program, and is compared before every call.

    Raises:
      InvalidArgument: `updates_per_step` is not an int of at least 1.
    """

    init: Callable[[Params], State]
    update: Callable[[Params, State, Params, Hyper], tuple[dict[str, Tensor], State]]
    hyper: Hyper = field(default_factory=_nothing)
    updates_per_step: int = 1
    remembers_step: bool = False
    init_is_constant: bool = False
    modules: tuple[nn.Module, ...] = ()

    def __post_init__(self) -> None:
        check_count("updates_per_step", self.updates_per_step)

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimizer:
        return memo.setdefault(id(self), Optimizer(*[_copied(getattr(self, field.name), memo) for field in fields(self)]))


@dataclass(frozen=True, slots=True, eq=False)
class Transform:
    """A map from updates to updates, which `chain` composes with an optimiser.

    Attributes:
      init: params -> state.
      update: (updates, state, params, hyper) -> (updates, state). `updates` are gradients if the transform stands before the optimiser,
        and steps if it stands after it.
      hyper, init_is_constant: as in `Optimizer`.
    """

    init: Callable[[Params], State]
    update: Callable[[Params, State, Params, Hyper], tuple[dict[str, Tensor], State]]
    hyper: Hyper = field(default_factory=_nothing)
    init_is_constant: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Transform:
        return memo.setdefault(id(self), Transform(*[_copied(getattr(self, field.name), memo) for field in fields(self)]))


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Returns a deep copy. That of a function has copies of the modules, optimisers and functions that it closes over.

    `copy.deepcopy` takes a function for a constant, and so the copy of an optimiser would call the modules of the original.
    """
    if not isinstance(value, FunctionType) or value.__closure__ is None:
        return copy.deepcopy(value, memo)
    if id(value) not in memo:
        cells = tuple([CellType() for _ in value.__closure__])
        made = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        made.__kwdefaults__ = value.__kwdefaults__
        vars(made).update(vars(value))
        memo[id(value)] = made
        for cell, old in zip(cells, value.__closure__, strict=True):
            with contextlib.suppress(ValueError):  # of a variable that has no value yet
                content = old.cell_contents
                cell.cell_contents = _copied(content, memo) if _may_hold_modules(content) else content
    return memo[id(value)]


def _may_hold_modules(content: Any) -> bool:
    if isinstance(content, Mapping):
        content = tuple(cast("Mapping[Any, Any]", content).values())
    if isinstance(content, tuple | list):
        return any(map(_may_hold_modules, cast("tuple[Any, ...]", content)))
    return isinstance(content, nn.Module | Optimizer | Transform | FunctionType)


def check_count(key: str, value: object) -> None:
    """Raises InvalidArgument unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgument(f"{key} must be an int of at least 1, got {value!r}.")
