"""The arithmetic that the updates share: how a hyperparameter is read, and operations on floats, tensors and both.

A hyperparameter is a float where it is a constant, and a tensor where it is an input that may be learned. Every function here takes either.
With a float most of them make fewer operations, which matters on the tape of an eager loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptrt.errors import InvalidArgument
from adaptrt.optim.base import Number, PerTask, Schedule, Value


def at(value: Value, name: str) -> Number:
    """Returns the value that a hyperparameter has for parameter `name`.

    >>> at(0.1, "weight"), at({"weight": 0.2}, "weight")
    (0.1, 0.2)

    Raises:
      InvalidArgument: `value` is a mapping without that name.
    """
    if isinstance(value, Schedule):
        raise InvalidArgument("A schedule was given to an optimiser that was built without one. Build it anew with the schedule.")
    if isinstance(value, Mapping):
        if name not in value:
            raise InvalidArgument(f"A hyperparameter given by name has no value for parameter '{name}', only for {sorted(value)}. Add one.")
        value = value[name]
    if isinstance(value, PerTask):
        raise InvalidArgument("A value for each task was given to an optimiser's update, which is that of one task. Use it with vmap().")
    return value


def read(hyper: Mapping[str, Value], key: str, name: str, param: Tensor) -> Number:
    """Returns hyperparameter `key` for parameter `name`: a float, or a tensor that is 0-dim or of the parameter's shape.

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
    """Returns `value` in the precision of a Python float, in which powers and differences from one are computed.

    Counts are converted too, because a float to the power of an int64 tensor would be float32.
    """
    return value.to(torch.float64) if isinstance(value, Tensor) else value


def fit(value: Number, param: Tensor) -> Number:
    """Returns `value` such that its product with a tensor like `param` has the dtype of `param`.

    PyTorch sees to that by itself where `value` is 0-dim and `param` is not, and it keeps all digits of `value` where `param` is of half
    precision. So only the other cases are cast.
    """
    return value.to(param.dtype) if isinstance(value, Tensor) and (value.dim() or not param.dim()) else value


def plus(x: Tensor, factor: Number, y: Tensor) -> Tensor:
    """Computes `x + factor * y`."""
    return x + y * fit(factor, x) if isinstance(factor, Tensor) else torch.add(x, y, alpha=factor)


def average(old: Tensor, new: Tensor, kept: Number) -> Tensor:
    """Computes `kept * old + (1 - kept) * new`: one step of an exponential moving average."""
    if isinstance(kept, Tensor) or old.dtype != new.dtype:
        return old * fit(kept, old) + new * fit(1 - double(kept), old)
    return torch.lerp(old, new, 1 - kept)


def average_square(old: Tensor, new: Tensor, kept: Number) -> Tensor:
    """Computes `kept * old + (1 - kept) * new * new`.

    It does not use `lerp`, which makes NaN of two infinities; squares may overflow.
    """
    if isinstance(kept, Tensor):
        return old * fit(kept, old) + new * new * fit(1 - double(kept), old)
    return torch.addcmul(old * kept, new, new, value=1 - kept)


def sqrt(value: Number) -> Number:
    """Computes the square root of a hyperparameter."""
    return torch.sqrt(value) if isinstance(value, Tensor) else math.sqrt(value)


def safe_sqrt(x: Tensor) -> Tensor:
    """Computes the square root of x >= 0, with derivative 0 at x = 0.

    The derivative of `torch.sqrt` is infinite there and turns 0 * inf into NaN. Two masks are needed: one on the result alone would still
    multiply the infinite derivative by zero.
    """
    zero = x == 0
    return torch.sqrt(x.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)


def like(value: Number, other: Number) -> Number:
    """Returns `value` in the dtype of `other`, for `where`.

    `where` would otherwise take the wider dtype of a 0-dim tensor that has a task axis.
    """
    return value.to(other.dtype) if isinstance(value, Tensor) and isinstance(other, Tensor) else value


def choose(condition: bool | Tensor, a: Number, b: Number) -> Any:
    """Returns `a` where the condition holds, else `b`. If the condition is a bool, Python decides."""
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def smaller(a: Number, b: Number) -> Any:
    """Returns the smaller of each element of `a` and `b`, in the dtype of `a`. Where they are equal, the derivative is that of `a`."""
    # Not `clamp`, whose derivative where both are equal differs between versions of PyTorch. NaN in `a` stays.
    return choose(a > b, like(b, a), a)


def larger(a: Number, b: Number) -> Any:
    """Returns the larger of each element of `a` and `b`, in the dtype of `a`. Where they are equal, the derivative is that of `a`."""
    return choose(a < b, like(b, a), a)
