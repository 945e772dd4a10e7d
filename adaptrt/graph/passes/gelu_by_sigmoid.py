"""Expresses the approximate GELU by one sigmoid, with derivatives in closed form, before it is differentiated.

PyTorch computes it by `tanh`, which takes four times as long as the exponential in a sigmoid, and its second derivative also by `cosh`.

    gelu(x)   = x (1 + tanh(w / 2)) / 2 = x s             s = sigmoid(w),  w = 2 c (x + a x^3)     (Hendrycks and Gimpel 2016)
    gelu'(x)  = s + x p w'                                p = s (1 - s),  w' = 2 c (1 + 3 a x^2)
    gelu''(x) = p (2 w' + x w'' + x (1 - 2 s) w'^2)
"""

# pyright: reportIncompatibleMethodOverride=false, reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from adaptrt.graph.passes.write_out import WriteOut

_C = 2 * math.sqrt(2 / math.pi)
_AC = 0.044715 * _C

_DTYPES = (torch.float32, torch.float64)
"""Dtypes for which the formula is used. In half precision the operation rounds once, but the formula would round at every step."""


class GeluBySigmoid(WriteOut):
    """Replaces `gelu(x, approximate="tanh")` by its formula."""

    functions = (F.gelu,)
    name, noun = "gelu_by_sigmoid", "functions"

    def write(self, input: Tensor, *, approximate: str = "none", **more: Any) -> Any:
        return _gelu(input) if approximate == "tanh" and not more and input.dtype in _DTYPES else NotImplemented


def _gelu(x: Tensor) -> Tensor:
    return _Gelu.apply(x)  # type: ignore[return-value]


class _Gelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * _sigmoid(x)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * _slope(*ctx.saved_tensors)


def _slope(x: Tensor) -> Tensor:
    return _Slope.apply(x)  # type: ignore[return-value]


class _Slope(Function):
    """Computes the first derivative of the approximate GELU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        s, p = _sigmoid(x)
        return s + x * p * (_C + 3 * _AC * (x * x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # autograd differentiates the operations below
        s, p = _sigmoid(x)
        bend = 3 * _AC * (x * x)
        slope = _C + bend
        # multiply by p first, because it is zero where the squares overflow
        return gradient * (2 * p * (slope + bend) + x * (1 - 2 * s) * (p * slope * slope))


def _sigmoid(x: Tensor) -> tuple[Tensor, Tensor]:
    return _Sigmoid.apply(x * (_C + _AC * (x * x)))  # type: ignore[return-value]


class _Sigmoid(Function):
    """Computes s and p = s (1 - s), without cancellation where s is nearly one."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> tuple[Tensor, Tensor]:
        small = torch.exp(-w.abs())
        large = 1 / (1 + small)
        s, p = torch.where(w < 0, small * large, large), small * (large * large)
        ctx.save_for_backward(s, p)
        return s, p

    @staticmethod
    def backward(ctx: Any, of_s: Tensor, of_p: Tensor) -> Tensor:
        s, p = ctx.saved_tensors
        return p * (of_s + of_p * (1 - 2 * s))
