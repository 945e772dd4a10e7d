"""What an optimiser is: two pure functions, and the hyperparameters they read.

`update` is out of place and decides nothing by the value of a tensor. So the same function runs eagerly, under `torch.func.vmap` over
tasks, and while a graph is captured with fake tensors; and its derivative is the meta-gradient.

Known limits: bias corrections are formed in float64, which MPS devices do not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from adaptrt.errors import InvalidArgument, InvalidType, OptimizerMismatch

Params: TypeAlias = Mapping[str, Tensor]
"""Tensors by parameter name."""

Number: TypeAlias = float | Tensor

Count: TypeAlias = int | Tensor
"""Steps so far: a 0-dim int64 tensor in a program, whose inputs are tensors; where steps are made one by one, a Python int does, and what
follows from it alone is computed in Python."""


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """A hyperparameter as a function of the step; made by `schedule` and `per_step`.

    Attributes:
      fn: (step, **numbers) -> a number, or one for each parameter by name. `step` is a 0-dim float64 tensor, 0 at the first step.
      numbers: what `fn` reads besides the step. They are hyperparameters: floats, tensors of any shape, or mappings of those.
    """

    fn: Callable[..., Any]
    numbers: Mapping[str, Any]


Value: TypeAlias = Number | Mapping[str, Number] | Schedule
"""A hyperparameter: one number for all parameters, one for each parameter by name, or a function of the step."""

# Both are trees, and each optimiser knows the exact type of its own; a union here would only force casts on everyone.
State: TypeAlias = Any
"""A tree of dict, tuple and NamedTuple with tensors as leaves."""
Absent: TypeAlias = tuple[()]
"""What stands in a state for a tensor that is not needed: a tree without leaves, which `torch.func.vmap` returns where it refuses None."""
Hyper: TypeAlias = Any
"""`Mapping[str, Value]` for the optimisers here; a tuple of those for `chain`, a dict of those by label for `partition`."""


def _nothing() -> dict[str, Value]:
    return {}


@dataclass(frozen=True, slots=True, eq=False)
class Optimizer:
    """An optimiser as a pair of pure functions.

    Attributes:
      init: params -> state. Fresh tensors on the device of each parameter. It may read the parameters' values; gradients then flow through.
      update: (grads, state, params, hyper) -> (new params, new state), out of place. `grads` may lack a parameter that the loss
        does not use: the parameter and its state then pass through, as `torch.optim` skips `grad is None`.
      hyper: the hyperparameters as given to the constructor; `update` reads those it is handed, which have the same tree. Leaves are floats
        and tensors; the optimisers here take a 0-dim tensor, or, in a mapping by parameter name, also one of the parameter's shape.
      updates_per_step: how many updates, each with a gradient of its own, make one step. One, but for L-BFGS.
      remembers_step: whether its state holds the step it made, so that nothing may change that step afterwards.
      init_is_constant: whether `init` reads no values, only shapes, dtypes and devices, so that one result serves all calls.
      modules: those that `update` calls; their train or eval mode is a constant of a program, and looked at before every call.

    Raises:
      InvalidArgument: `updates_per_step` is no int of at least 1.
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


@dataclass(frozen=True, slots=True, eq=False)
class Transform:
    """A map from updates to updates, to be composed with an optimiser by `chain`.

    Attributes:
      init: params -> state.
      update: (updates, state, params, hyper) -> (updates, state); `updates` are gradients before the optimiser, steps after it.
      hyper, init_is_constant: as in `Optimizer`.
    """

    init: Callable[[Params], State]
    update: Callable[[Params, State, Params, Hyper], tuple[dict[str, Tensor], State]]
    hyper: Hyper = field(default_factory=_nothing)
    init_is_constant: bool = False


# --- reading hyperparameters inside an update


def at(value: Value, name: str) -> Number:
    """The value that a hyperparameter has for parameter `name`.

    >>> at(0.1, "weight"), at({"weight": 0.2}, "weight")
    (0.1, 0.2)

    Raises:
      InvalidArgument: `value` is a mapping without that name.
    """
    if isinstance(value, Schedule):
        raise InvalidArgument("A schedule was given to an optimiser that was built without one. Build it anew with the schedule.")
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        raise InvalidArgument(f"A hyperparameter given by name has no value for parameter '{name}', only for {sorted(value)}. Add one.")
    return value[name]


def read(hyper: Mapping[str, Value], key: str, name: str, param: Tensor) -> Number:
    """Hyperparameter `key` for parameter `name`: a float, or a tensor with no axes or the parameter's.

    Raises:
      InvalidArgument: `hyper` has no such key, or its tensor has another shape.
    """
    if key not in hyper:
        raise InvalidArgument(f"hyper has no '{key}', only {sorted(hyper)}. Pass a tree like the optimiser's own `hyper`.")
    value = at(hyper[key], name)
    if isinstance(value, Tensor) and value.dim() and value.shape != param.shape:
        if value.numel() == 1:  # torch.optim takes tensors of one element too
            return value.reshape(())
        raise InvalidArgument(
            f"{key} for parameter '{name}' must be a scalar or of the parameter's shape {list(param.shape)}, got shape {list(value.shape)}."
        )
    return value


def double(value: Number) -> Number:
    """`value` in the precision of a Python float; what powers and differences from one are formed in.

    For counts too: a float to the power of an int64 tensor would be float32.
    """
    return value.to(torch.float64) if isinstance(value, Tensor) else value


def fit(value: Number, param: Tensor) -> Number:
    """`value` such that its product with a tensor like `param` has the dtype of `param`.

    PyTorch does that by itself for a 0-dim `value` and a `param` with axes, and keeps all digits of `value` where `param` is of
    half precision. So only the other cases are cast.
    """
    return value.to(param.dtype) if isinstance(value, Tensor) and (value.dim() or not param.dim()) else value


# The next three make fewer operations where the number is a float: on the tape of an eager loop every operation counts.


def plus(x: Tensor, factor: Number, y: Tensor) -> Tensor:
    """`x + factor * y`."""
    return x + y * fit(factor, x) if isinstance(factor, Tensor) else torch.add(x, y, alpha=factor)


def average(old: Tensor, new: Tensor, kept: Number) -> Tensor:
    """`kept * old + (1 - kept) * new`: one step of an exponential moving average."""
    if isinstance(kept, Tensor) or old.dtype != new.dtype:
        return old * fit(kept, old) + new * fit(1 - double(kept), old)
    return torch.lerp(old, new, 1 - kept)


def average_square(old: Tensor, new: Tensor, kept: Number) -> Tensor:
    """`kept * old + (1 - kept) * new * new`. Not by `lerp`, which makes NaN of two infinities, and squares overflow."""
    if isinstance(kept, Tensor):
        return old * fit(kept, old) + new * new * fit(1 - double(kept), old)
    return torch.addcmul(old * kept, new, new, value=1 - kept)


def sqrt(value: Number) -> Number:
    """Square root of a hyperparameter."""
    return torch.sqrt(value) if isinstance(value, Tensor) else math.sqrt(value)


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root of x >= 0 whose derivative at 0 is 0, where that of `torch.sqrt` is infinite and turns 0 * inf into NaN.

    Two masks: one on the result alone would still multiply the infinite derivative by zero.
    """
    zero = x == 0
    return torch.sqrt(x.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)


def check_grads(grads: Params, params: Params) -> None:
    """Every gradient belongs to a parameter and has its shape.

    Raises:
      OptimizerMismatch: one does not; without this an unknown name would be ignored and a shape broadcast, both silently.
    """
    for name, grad in grads.items():
        if name not in params:
            raise OptimizerMismatch(f"grads has '{name}', which params has not. Known parameters: {sorted(params)}.")
        if grad.shape != params[name].shape:
            raise OptimizerMismatch(f"grads['{name}'] must have the parameter's shape {list(params[name].shape)}, got {list(grad.shape)}.")


def like(value: Number, other: Number) -> Number:
    """`value` in the dtype of `other` in every case, for `where`, which would take the wider dtype of a 0-dim tensor with a task axis."""
    return value.to(other.dtype) if isinstance(value, Tensor) and isinstance(other, Tensor) else value


def choose(condition: bool | Tensor, a: Number, b: Number) -> Any:
    """`a` where the condition holds, else `b`; decided in Python where the condition is a bool."""
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def smaller(a: Number, b: Number) -> Any:
    """The smaller of each element of `a` and `b`, in the dtype of `a`; where they are equal, the derivative is that of `a`."""
    # Not `clamp`, whose derivative where both are equal differs between versions of PyTorch. NaN in `a` stays.
    return choose(a > b, like(b, a), a)


def larger(a: Number, b: Number) -> Any:
    """The larger of each element of `a` and `b`, in the dtype of `a`; where they are equal, the derivative is that of `a`."""
    return choose(a < b, like(b, a), a)


# --- checking hyperparameters when an optimiser is made


def check_count(key: str, value: object) -> None:
    """Raises InvalidArgument unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgument(f"{key} must be an int of at least 1, got {value!r}.")


def check_flags(**flags: object) -> None:
    """Raises InvalidType unless all are bools; any other value would pass for true or false."""
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise InvalidType(f"{key} must be True or False, got {value!r}.")


def is_off(value: object) -> bool:
    """Whether `value` is the Python number zero, which removes its term; a tensor never is, as its value may change."""
    return isinstance(value, Real) and value == 0


@dataclass(frozen=True, slots=True)
class Domain:
    """The numbers from `low` to `high`, with or without these two."""

    low: float = 0.0
    high: float = math.inf
    with_low: bool = True
    with_high: bool = True

    def __contains__(self, number: float) -> bool:
        return (self.low < number or (self.with_low and self.low == number)) and (
            number < self.high or (self.with_high and number == self.high)
        )

    def __str__(self) -> str:
        lower = f"at least {self.low}" if self.with_low else f"above {self.low}"
        if self.high == math.inf:
            return lower
        upper = f"at most {self.high}" if self.with_high else f"below {self.high}"
        return upper if self.low == -math.inf else f"{lower} and {upper}"


NON_NEGATIVE = Domain()
FRACTION = Domain(0.0, 1.0, with_high=False)
REAL = Domain(-math.inf)


def checked(key: str, value: Value, domain: Domain = NON_NEGATIVE) -> Value:
    """`value` with plain floats, after checking type, shape and, for Python numbers, that they are in `domain`.

    The values of tensors are not looked at: they may be fake, or change before they are used. Nor are schedules.

    Raises:
      InvalidType: not a number, floating-point tensor or mapping of those.
      InvalidArgument: out of the domain, or a tensor with axes that is not an entry of a mapping.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, Mapping):
        return {name: _checked_number(f"{key}['{name}']", entry, domain) for name, entry in value.items()}
    number = _checked_number(key, value, domain)
    if isinstance(number, Tensor) and number.numel() != 1:
        raise InvalidArgument(
            f"{key} must be a scalar, got a tensor of shape {list(number.shape)}. "
            f"For one value per element give a mapping: {key}={{parameter name: tensor}}."
        )
    return number


def _checked_number(key: str, value: object, domain: Domain) -> Number:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise InvalidType(f"{key} must be a floating-point tensor, got {value.dtype}.")
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidType(f"{key} must be a float, a tensor or a mapping of those by parameter name, got {type(value).__name__}.")
    number = float(value)
    if number not in domain:  # NaN is in none
        raise InvalidArgument(f"{key} must be {domain}, got {number}.")
    return number


def entries(key: str, value: object, count: int) -> tuple[Any, ...]:
    """The entries of an argument that is a tuple of `count` numbers.

    Raises:
      InvalidType: not a tuple or list.
      InvalidArgument: of another length.
    """
    if not isinstance(value, tuple | list):
        raise InvalidType(f"{key} must be a tuple of {count} numbers, got {type(value).__name__}.")
    found = tuple(cast("Sequence[Any]", value))
    if len(found) != count:
        raise InvalidArgument(f"{key} must be a tuple of {count} numbers, got {len(found)}.")
    return found


def checked_moments(lr: Value, betas: object, eps: Value) -> dict[str, Value]:
    """The numbers that the optimisers of Adam's family share, checked, by their names in `hyper`."""
    beta1, beta2 = entries("betas", betas, 2)
    return {
        "lr": checked("lr", lr),
        "beta1": checked("betas[0]", beta1, FRACTION),
        "beta2": checked("betas[1]", beta2, FRACTION),
        "eps": checked("eps", eps),
    }


def scalar(hyper: Mapping[str, Value], key: str) -> Number:
    """Hyperparameter `key` of a transform that has one value for all parameters.

    Raises:
      InvalidArgument: a mapping by parameter name was given.
    """
    value = hyper[key]
    if isinstance(value, Schedule):
        raise InvalidArgument(f"{key} of a transform cannot be a schedule.")
    if isinstance(value, Mapping):
        raise InvalidArgument(f"{key} is one number for all parameters together, got a mapping of {sorted(cast('Params', value))}.")
    return value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value
