"""Writes average pools, adaptive pools and resizing, and their gradients, as products with matrices along each axis.

Each of them is linear and separable: y = A x B^T for matrices A and B that depend on sizes only. Its transpose, the gradient, is A^T g B.
The matrices are made of a few operations on counted indices, which are the same in every call, so that whoever translates the graph may
compute them once. Maxima of adaptive pools are looked up in tables of the windows.

Known limits: a product with a matrix costs more than a pool where images are large, such as 224 by 224 pixels.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._decomp import decomposition_table

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


@dataclasses.dataclass(frozen=True, slots=True)
class _Windows:
    """The windows of an average pool along one axis."""

    size: int
    tap: int
    step: int
    pad: int
    ceil_mode: bool

    @property
    def count(self) -> int:
        """How many there are. With `ceil_mode` the last may reach beyond the padding, but must begin before it."""
        room = self.size + 2 * self.pad - self.tap
        if not self.ceil_mode:
            return room // self.step + 1
        count = -(-room // self.step) + 1
        return count - 1 if (count - 1) * self.step >= self.size + self.pad else count


def _windows(sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool) -> list[_Windows]:
    numbers = [list(value) * (len(sizes) if len(value) == 1 else 1) for value in (kernel, stride or kernel, padding)]
    return [_Windows(size, tap, step, pad, ceil_mode) for size, tap, step, pad in zip(sizes, *numbers, strict=True)]


def _avg_pool(num_axes: int) -> Callable[..., Any]:
    """`aten.avg_pool2d` and its like, where ONNX and other interpreters mean something else by the same numbers."""

    def rule(
        x: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor: int | None = None,
    ) -> Tensor:
        if not ceil_mode and divisor is None:
            return NotImplemented
        windows = _windows(x.shape[-num_axes:], kernel, stride, padding, ceil_mode)
        found = _along(x, [_uneven(entry, x, count_include_pad, divisor is None) for entry in windows], False)
        return found if divisor is None else found / divisor

    return rule


def _avg_pool_backward(num_axes: int) -> Callable[..., Tensor]:
    """`aten.avg_pool2d_backward` and its like."""

    def rule(
        gradient: Tensor,
        x: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        ceil_mode: bool,
        count_include_pad: bool,
        divisor: int | None,
    ) -> Tensor:
        windows = _windows(x.shape[-num_axes:], kernel, stride, padding, ceil_mode)
        if all(entry.tap == entry.step and entry.pad == 0 and entry.tap * entry.count <= entry.size for entry in windows):
            return _spread(gradient / (divisor or math.prod(entry.tap for entry in windows)), x, windows)
        found = _along(gradient, [_uneven(entry, gradient, count_include_pad, divisor is None) for entry in windows], True)
        return found if divisor is None else found / divisor

    return rule


def _spread(value: Tensor, x: Tensor, windows: Sequence[_Windows]) -> Tensor:
    """Repeats each value all over its window, with zeros where no window is."""
    num_axes = len(windows)
    for place in range(num_axes):
        value = value.unsqueeze(value.dim() - 2 * place)
    shape = [size for entry in windows for size in (entry.count, entry.tap)]
    value = value.expand([*x.shape[:-num_axes], *shape])
    value = value.reshape([*x.shape[:-num_axes], *[entry.count * entry.tap for entry in windows]])
    rest = [size for entry in reversed(windows) for size in (0, entry.size - entry.count * entry.tap)]
    return aten.constant_pad_nd.default(value, rest) if any(rest) else value


def _uneven(windows: _Windows, like: Tensor, with_padding: bool, averaged: bool) -> Tensor:
    """[windows, elements]: each row averages, or sums, one window of an average pool with stride and padding."""
    size = windows.size
    window, element = _counted(windows.count, like).unsqueeze(1), _counted(size, like)
    first = window * windows.step - windows.pad
    last = torch.clamp(first + windows.tap, max=size + windows.pad)
    inside = (element >= first) & (element < last)
    if not averaged:
        return inside.to(like.dtype)
    length = last - first if with_padding else torch.clamp(last, max=size) - torch.clamp(first, min=0)
    return torch.where(inside, 1.0 / length.to(like.dtype), 0.0).to(like.dtype)


def _nearest(x: Tensor, output_size: Sequence[int], *scales: float | None) -> Any:
    """`aten.upsample_nearest2d` by factors that are no integers; the others stay."""
    if all(new % old == 0 for new, old in zip(output_size, x.shape[-2:], strict=True)):
        return NotImplemented
    return _decomposition(aten.upsample_nearest2d.default)(x, output_size, *scales)


def _decomposition(target: Any) -> Callable[..., Any]:
    return cast(Any, decomposition_table)[target]


def _resized(resize: Callable[[Tensor], Tensor], size: int, like: Tensor) -> Tensor:
    """[outputs, inputs]: the matrix of a linear function along one axis, found by what it makes of each unit vector."""
    units = torch.eye(size, dtype=like.dtype, device=like.device).unsqueeze(1)  # [inputs, 1, size]
    return resize(units).squeeze(1).t()


def _nearest_backward(gradient: Tensor, output_size: Sequence[int], input_size: Sequence[int], *scales: float | None) -> Tensor:
    """`aten.upsample_nearest2d_backward` and its like."""
    return _along(
        gradient,
        [
            _resized(lambda units, out=out, scale=scale: aten.upsample_nearest1d.default(units, [out], scale), size, gradient)
            for out, size, scale in zip(output_size, input_size[2:], scales or [None] * len(output_size), strict=True)
        ],
        True,
    )


def _linear_backward(
    gradient: Tensor, output_size: Sequence[int], input_size: Sequence[int], align_corners: bool, *scales: float | None
) -> Tensor:
    """`aten.upsample_bilinear2d_backward` and its like."""
    return _along(
        gradient,
        [
            _resized(lambda units, out=out, scale=scale: aten.upsample_linear1d.default(units, [out], align_corners, scale), size, gradient)
            for out, size, scale in zip(output_size, input_size[2:], scales or [None] * len(output_size), strict=True)
        ],
        True,
    )


RULES: dict[Any, Callable[..., Any]] = {
    aten._adaptive_avg_pool2d.default: adaptive_avg_pool,
    aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool2d_backward,
    aten._adaptive_avg_pool3d.default: adaptive_avg_pool,
    aten._adaptive_avg_pool3d_backward.default: adaptive_avg_pool3d_backward,
    aten.adaptive_max_pool2d.default: adaptive_max_pool2d,
    aten.adaptive_max_pool2d_backward.default: adaptive_max_pool2d_backward,
    aten.avg_pool2d.default: _avg_pool(2),
    aten.avg_pool3d.default: _avg_pool(3),
    aten.avg_pool2d_backward.default: _avg_pool_backward(2),
    aten.avg_pool3d_backward.default: _avg_pool_backward(3),
    aten.upsample_nearest2d.default: _nearest,
    aten.upsample_nearest1d_backward.default: _nearest_backward,
    aten.upsample_nearest2d_backward.default: _nearest_backward,
    aten.upsample_nearest3d_backward.default: _nearest_backward,
    aten.upsample_linear1d_backward.default: _linear_backward,
    aten.upsample_bilinear2d_backward.default: _linear_backward,
    aten.upsample_trilinear3d_backward.default: _linear_backward,
}
