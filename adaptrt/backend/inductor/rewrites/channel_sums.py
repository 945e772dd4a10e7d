"""Sums over all but the channels of images are taken image by image, and then over images. Large images are taken row by row.

Batch normalisation needs them, for its statistics and for each of its derivatives. On the CPU images lie with their channels last, and in
one go Inductor adds up one register of channels over all images, then the next: it reads memory with gaps, several times over. One image,
or one row of it, fits into the cache that is next to the processor. (Rows of images that stay contiguous, with no convolution before them,
take up to 1.4 times as long as all at once; what Inductor will make of the layout is not known here.) The statistics come as a mean and the
squares around it: two readings, with additions only, where one reading needs a division for each element.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

MIN_ELEMENTS = 1 << 17
"""Below, all images are in that cache."""

MAX_IMAGE_BYTES = 1 << 18
"""Above, rows are read faster than images: measured in docs/notes/0005-speed-on-the-cpu.md."""

MIN_ROW = 14
"""Shorter rows leave too many sums to add up afterwards: those of 7 took up to twice as long as images."""

_DTYPES = (torch.float32, torch.float64)


def _stages(x: Tensor, axes: Sequence[int] | None) -> list[list[int]] | None:
    """The axes summed over first, and those after them, if `axes` are some of images and all within one.

    Of [..., N, C, H, W] those of H and W, and of N; of large images that of W, and those of N and H.
    """
    if x.device.type != "cpu" or x.dtype not in _DTYPES or axes is None or x.numel() < MIN_ELEMENTS:
        return None
    summed = {axis % x.dim() for axis in axes}
    first = x.dim()
    while first - 1 in summed:
        first -= 1
    within, images = list(range(first, x.dim())), sorted(axis for axis in summed if axis < first)
    if len(within) < 2 or not images:
        return None
    image_bytes = math.prod(x.shape[images[-1] + 1 :]) * x.element_size()
    if image_bytes > MAX_IMAGE_BYTES and x.shape[-1] >= MIN_ROW:
        return [within[-1:], images + within[:-1]]
    return [within, images]


def _in_stages(x: Tensor, stages: list[list[int]]) -> Tensor:
    """With axes of length one for those that are summed over."""
    for axes in stages:
        x = aten.sum.dim_IntList(x, axes, True)
    return x


def _without(x: Tensor, stages: list[list[int]]) -> Tensor:
    """Without those axes."""
    summed = {axis for axes in stages for axis in axes}
    return x.reshape([length for axis, length in enumerate(x.shape) if axis not in summed])


def _sum(x: Tensor, axes: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    stages = _stages(x, axes)
    if dtype is not None or stages is None:
        return NotImplemented
    found = _in_stages(x, stages)
    return found if keepdim else _without(found, stages)


def _var_mean(x: Tensor, axes: Sequence[int] | None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    stages = _stages(x, axes)
    if stages is None:
        return NotImplemented
    total = _in_stages(x, stages)
    count = x.numel() // total.numel()
    mean = total / count
    around = x - mean
    variance = _in_stages(around * around, stages) / max(count - (1 if correction is None else correction), 0)
    return (variance, mean) if keepdim else (_without(variance, stages), _without(mean, stages))


RULES: dict[Any, Callable[..., Any]] = {aten.sum.dim_IntList: _sum, aten.var_mean.correction: _var_mean}
"""What the operations become; NotImplemented where they do not sum over images. A backend applies them with its own."""
