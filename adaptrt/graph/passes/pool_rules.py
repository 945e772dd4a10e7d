"""Writes average pools, adaptive pools and resizing, and their gradients, as products with matrices along each axis.

Each of them is linear and separable: y = A x B^T for matrices A and B that depend on sizes only. Its transpose, the gradient, is A^T g B.
The matrices are made of a few operations on counted indices, which are the same in every call, so that whoever translates the graph may
compute them once. Maxima of adaptive pools are looked up in tables of the windows.

Known limits: a product with a matrix costs more than a pool where images are large, such as 224 by 224 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _along(x: Tensor, matrices: Sequence[Tensor], transposed: bool) -> Tensor:
    """Applies a matrix to each of the last axes of `x`."""
    for place, matrix in enumerate(reversed(matrices)):
        axis = x.dim() - 1 - place
        factor = matrix if transposed else matrix.t()
        x = torch.matmul(x.transpose(axis, -1), factor).transpose(axis, -1)
    return x


def _counted(size: int, like: Tensor) -> Tensor:
    return torch.arange(size, device=like.device)


def _adaptive(size: int, num_windows: int, like: Tensor) -> Tensor:
    """[windows, elements]: each row averages one window of an adaptive pool, which starts and ends at rounded places."""
    window, element = _counted(num_windows, like).unsqueeze(1), _counted(size, like)
    first = window * size // num_windows
    last = ((window + 1) * size + num_windows - 1) // num_windows
    return torch.where((element >= first) & (element < last), 1.0 / (last - first).to(like.dtype), 0.0).to(like.dtype)


def adaptive_avg_pool(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """`aten._adaptive_avg_pool2d`, in any number of dimensions."""
    if all(size == 1 for size in sizes):
        return x.mean(list(range(x.dim() - len(sizes), x.dim())), keepdim=True)
    return _along(x, [_adaptive(size, count, x) for size, count in zip(x.shape[-len(sizes) :], sizes, strict=True)], False)


def adaptive_avg_pool2d_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """`aten._adaptive_avg_pool2d_backward`."""
    return _adaptive_backward(gradient, x, 2)


def adaptive_avg_pool3d_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """`aten._adaptive_avg_pool3d_backward`."""
    return _adaptive_backward(gradient, x, 3)


def _adaptive_backward(gradient: Tensor, x: Tensor, num_axes: int) -> Tensor:
    sizes, counts = x.shape[-num_axes:], gradient.shape[-num_axes:]
    if all(count == 1 for count in counts):
        return (gradient / math.prod(sizes)).expand(x.shape).clone()
    return _along(gradient, [_adaptive(size, count, x) for size, count in zip(sizes, counts, strict=True)], True)


def adaptive_max_pool2d(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`aten.adaptive_max_pool2d`: the first maximum in each window, and its place in the image."""
    tables = [_window_table(size, count, x) for size, count in zip(x.shape[-2:], sizes, strict=True)]
    rows, columns = tables
    # [rows of windows, columns of windows, rows in a window, columns in a window]
    places = rows[:, None, :, None] * x.shape[-1] + columns[None, :, None, :]
    places = places.reshape(sizes[0] * sizes[1], -1)
    windows = x.flatten(-2)[..., places]
    chosen = windows.argmax(-1, keepdim=True)
    found = windows.gather(-1, chosen).squeeze(-1)
    index = places.expand(windows.shape).gather(-1, chosen).squeeze(-1)
    shape = [*x.shape[:-2], *sizes]
    return found.reshape(shape), index.reshape(shape)


def _window_table(size: int, num_windows: int, like: Tensor) -> Tensor:
    """[windows, largest window]: the elements of each window. A smaller window names its last element again."""
    window = _counted(num_windows, like).unsqueeze(1)
    first = window * size // num_windows
    last = ((window + 1) * size + num_windows - 1) // num_windows
    largest = max(-(-(i + 1) * size // num_windows) - i * size // num_windows for i in range(num_windows))
    return torch.minimum(first + _counted(largest, like), last - 1)


def adaptive_max_pool2d_backward(gradient: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    """`aten.adaptive_max_pool2d_backward`: adds each gradient to the element that was chosen."""
    flat = x.new_zeros([*x.shape[:-2], x.shape[-2] * x.shape[-1]])
    return flat.scatter_add(-1, indices.flatten(-2), gradient.flatten(-2)).reshape(x.shape)


def _pair(value: Sequence[int]) -> list[int]:
    return [value[0], value[-1]]


def avg_pool2d_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    """`aten.avg_pool2d_backward`."""
    taps, pads = _pair(kernel), _pair(padding)
    steps = _pair(stride) if stride else taps
    sizes, counts = x.shape[-2:], gradient.shape[-2:]
    axes = list(zip(sizes, counts, taps, steps, pads, strict=True))
    even = all(tap == step and pad == 0 and tap * count <= size for size, count, tap, step, pad in axes)
    if even and not ceil_mode:
        spread = (gradient / (divisor or math.prod(taps))).unsqueeze(-1).unsqueeze(-3)
        spread = spread.expand([*gradient.shape[:-2], counts[0], taps[0], counts[1], taps[1]])
        spread = spread.reshape([*gradient.shape[:-2], counts[0] * taps[0], counts[1] * taps[1]])
        rest = [sizes[0] - spread.shape[-2], sizes[1] - spread.shape[-1]]
        return aten.constant_pad_nd.default(spread, [0, rest[1], 0, rest[0]]) if any(rest) else spread
    matrices = [_uneven(*axis, gradient, count_include_pad, divisor is None) for axis in axes]
    found = _along(gradient, matrices, True)
    return found if divisor is None else found / divisor


def _uneven(size: int, count: int, tap: int, step: int, pad: int, like: Tensor, with_padding: bool, averaged: bool) -> Tensor:
    """[windows, elements]: each row averages, or sums, one window of an average pool with stride and padding."""
    window, element = _counted(count, like).unsqueeze(1), _counted(size, like)
    first = window * step - pad
    last = torch.clamp(first + tap, max=size + pad)
    inside = (element >= first) & (element < last)
    if not averaged:
        return inside.to(like.dtype)
    length = last - first if with_padding else torch.clamp(last, max=size) - torch.clamp(first, min=0)
    return torch.where(inside, 1.0 / length.to(like.dtype), 0.0).to(like.dtype)


def _resized(resize: Callable[[Tensor], Tensor], size: int, like: Tensor) -> Tensor:
    """[outputs, inputs]: the matrix of a linear function along one axis, found by what it makes of each unit vector."""
    units = torch.eye(size, dtype=like.dtype, device=like.device).unsqueeze(1)  # [inputs, 1, size]
    return resize(units).squeeze(1).t()


def upsample_nearest2d_backward(
    gradient: Tensor, output_size: Sequence[int], input_size: Sequence[int], scale_h: float | None = None, scale_w: float | None = None
) -> Tensor:
    """`aten.upsample_nearest2d_backward`."""
    matrices = [
        _resized(lambda units, out=out, scale=scale: aten.upsample_nearest1d.default(units, [out], scale), size, gradient)
        for out, size, scale in zip(output_size, input_size[-2:], (scale_h, scale_w), strict=True)
    ]
    return _along(gradient, matrices, True)


def upsample_bilinear2d_backward(
    gradient: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    align_corners: bool,
    scale_h: float | None = None,
    scale_w: float | None = None,
) -> Tensor:
    """`aten.upsample_bilinear2d_backward`."""
    matrices = [
        _resized(lambda units, out=out, scale=scale: aten.upsample_linear1d.default(units, [out], align_corners, scale), size, gradient)
        for out, size, scale in zip(output_size, input_size[-2:], (scale_h, scale_w), strict=True)
    ]
    return _along(gradient, matrices, True)


RULES: dict[Any, Callable[..., Any]] = {
    aten._adaptive_avg_pool2d.default: adaptive_avg_pool,
    aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool2d_backward,
    aten._adaptive_avg_pool3d.default: adaptive_avg_pool,
    aten._adaptive_avg_pool3d_backward.default: adaptive_avg_pool3d_backward,
    aten.adaptive_max_pool2d.default: adaptive_max_pool2d,
    aten.adaptive_max_pool2d_backward.default: adaptive_max_pool2d_backward,
    aten.avg_pool2d_backward.default: avg_pool2d_backward,
    aten.upsample_nearest2d_backward.default: upsample_nearest2d_backward,
    aten.upsample_bilinear2d_backward.default: upsample_bilinear2d_backward,
}
