"""Checks of what users pass: hyperparameters when an optimiser is made, and gradients when it is updated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

from torch import Tensor

from adaptrt.errors import InvalidArgument, InvalidType, OptimizerMismatch
from adaptrt.optim.base import Number, Params, PerTask, Schedule, Value


def check_grads(grads: Params, params: Params) -> None:
    """Checks that every gradient belongs to a parameter and has its shape.

    Without this an unknown name would be ignored, and a gradient of another shape would be broadcast, both silently.

    Raises:
      OptimizerMismatch: a gradient belongs to no parameter, or has another shape.
    """
    for name, grad in grads.items():
        if name not in params:
            raise OptimizerMismatch(f"grads has '{name}', which params has not. Known parameters: {sorted(params)}.")
        if grad.shape != params[name].shape:
            raise OptimizerMismatch(f"grads['{name}'] must have the parameter's shape {list(params[name].shape)}, got {list(grad.shape)}.")


def check_flags(**flags: object) -> None:
    """Raises InvalidType unless all flags are bools, because any other value would pass for true or false."""
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise InvalidType(f"{key} must be True or False, got {value!r}.")


def is_off(value: object) -> bool:
    """Tells whether `value` is the Python number zero, which removes its term. A tensor never is, because its value may change."""
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
    """Returns `value` with plain floats, after checking types, shapes and, for Python numbers, that they are in `domain`.

    The values of tensors are not read: they may be fake, or change before they are used. Schedules are not checked either.

    Raises:
      InvalidType: `value` is not a number, a floating-point tensor or a mapping of those.
      InvalidArgument: a number is outside the domain, or a tensor with axes is not an entry of a mapping.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, PerTask):
        if value.values.dim() != 1:
            raise InvalidArgument(
                f"{key} must be a number for each task, got per_task() of a tensor of shape {list(value.values.shape)}. "
                f"For one value per element give a mapping: {key}={{parameter name: per_task(tensor)}}."
            )
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


def _checked_number(key: str, value: object, domain: Domain) -> Number | PerTask:
    if isinstance(value, PerTask):
        return value
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
    """Returns the entries of an argument that is a tuple of `count` numbers.

    Raises:
      InvalidType: `value` is not a tuple or list.
      InvalidArgument: `value` has another length.
    """
    if not isinstance(value, tuple | list):
        raise InvalidType(f"{key} must be a tuple of {count} numbers, got {type(value).__name__}.")
    found = tuple(cast("Sequence[Any]", value))
    if len(found) != count:
        raise InvalidArgument(f"{key} must be a tuple of {count} numbers, got {len(found)}.")
    return found


def checked_moments(lr: Value, betas: object, eps: Value) -> dict[str, Value]:
    """Checks the numbers that the optimisers of Adam's family share, and returns them by their names in `hyper`."""
    beta1, beta2 = entries("betas", betas, 2)
    return {
        "lr": checked("lr", lr),
        "beta1": checked("betas[0]", beta1, FRACTION),
        "beta2": checked("betas[1]", beta2, FRACTION),
        "eps": checked("eps", eps),
    }


def scalar(hyper: Mapping[str, Value], key: str) -> Any:
    """Returns hyperparameter `key` of a transform, which has one value for all parameters.

    Raises:
      InvalidArgument: it is a mapping by parameter name, or a schedule.
    """
    value = hyper[key]
    if isinstance(value, Schedule):
        raise InvalidArgument(f"{key} of a transform cannot be a schedule.")
    if isinstance(value, Mapping):
        raise InvalidArgument(f"{key} is one number for all parameters together, got a mapping of {sorted(cast('Params', value))}.")
    return value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value
