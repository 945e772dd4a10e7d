"""Expresses max-pooling over windows that do not overlap by maxima of strided slices, before it is differentiated.

PyTorch's operation finds indices, its gradient scatters to them, and the gradient's gradient gathers from them. None of these fuses with
the operations around it. A choice between slices is a pointwise operation, and so are its derivatives. They choose the same element as the
operation does: the first of equal elements, and NaN rather than any number.
"""

# pyright: reportIncompatibleMethodOverride=false, reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from adaptrt.graph.passes.write_out import WriteOut

MAX_WINDOW = 16
"""The largest number of elements in a window. The choice is written out for each of them."""


class PoolAsMaxima(WriteOut):
    """Replaces `torch.nn.functional.max_pool2d` by choices between slices."""

    functions = (F.max_pool2d, torch.max_pool2d)
    name, noun = "pool_as_maxima", "pools"

    def write(self, *args: Any, **kwargs: Any) -> Any:
        window = _window(*args, **kwargs)
        return NotImplemented if window is None else _maximum(args[0] if args else kwargs["input"], *window)


def _window(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    *rest: Any,
    **more: Any,
) -> tuple[int, int] | None:
    """Returns height and width of the window, or None if this rewrite does not apply to the call."""
    height, width = _pair(kernel_size)
    strides = _pair(stride) if stride else (height, width)
    if strides != (height, width) or _pair(padding) != (0, 0) or _pair(dilation) != (1, 1) or ceil_mode or any(rest) or any(more.values()):
        return None
    if input.device.type != "cpu" or not input.is_floating_point() or input.dim() < 3 or not 1 < height * width <= MAX_WINDOW:
        return None
    return (height, width) if input.shape[-2] >= height and input.shape[-1] >= width else None


def _pair(value: Any) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1])


def _maximum(x: Tensor, height: int, width: int) -> Tensor:
    return _Maximum.apply(x, height, width)  # type: ignore[return-value]


# Once it is known which place of each window is the largest, pooling is linear. The two classes below are this linear function and its
# transpose. Autograd by itself would add up one padded gradient for each slice.


class _Maximum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, height: int, width: int) -> Tensor:
        slices = _slices(x, height, width)
        found, place = slices[0], torch.zeros_like(slices[0])
        for index, value in enumerate(slices[1:], 1):
            later = (value > found) | (value != value)  # NaN is chosen before any number
            found, place = torch.where(later, value, found), torch.where(later, float(index), place)
        ctx.save_for_backward(place)
        ctx.form = x.shape, height, width
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Spread.apply(gradient, *ctx.saved_tensors, *ctx.form), None, None


class _Spread(Function):
    """Copies the value of each window to the element that was chosen in it, with zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, place: Tensor, shape: torch.Size, height: int, width: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.form = height, width
        indices = torch.arange(height * width, dtype=value.dtype, device=value.device).view(height, 1, width)
        # [..., rows, height, columns, width]
        chosen = place.unsqueeze(-1).unsqueeze(-3) == indices
        spread = torch.where(chosen, value.unsqueeze(-1).unsqueeze(-3), 0.0).flatten(-2).flatten(-3, -2)
        return F.pad(spread, (0, shape[-1] - spread.shape[-1], 0, shape[-2] - spread.shape[-2])) if spread.shape != shape else spread

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Chosen.apply(gradient, *ctx.saved_tensors, *ctx.form), None, None, None, None


class _Chosen(Function):
    """Returns for each window the element that was chosen in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, height: int, width: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.form = x.shape, height, width
        slices = _slices(x, height, width)
        found = slices[0]
        for index, value in enumerate(slices[1:], 1):
            found = torch.where(place == float(index), value, found)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Spread.apply(gradient, *ctx.saved_tensors, *ctx.form), None, None, None


def _slices(x: Tensor, height: int, width: int) -> list[Tensor]:
    """Returns one slice for each place in a window: the elements at that place of all windows."""
    rows, columns = x.shape[-2] // height * height, x.shape[-1] // width * width
    return [row[..., j:columns:width] for row in (x[..., i:rows:height, :] for i in range(height)) for j in range(width)]
