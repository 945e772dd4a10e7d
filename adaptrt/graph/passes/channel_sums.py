"""Sums over all but the channels of images are taken image by image, and then over images.

Batch normalisation needs them, for its statistics and for each of its derivatives. On the CPU images lie with their channels last, and in
one go Inductor adds up one register of channels over all images, then the next: it reads memory with gaps, several times over. One image
fits into the cache that is next to the processor. The statistics come as a mean and the squares around it: two readings, with additions
only, where one reading needs a division for each element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

MIN_ELEMENTS, MAX_ELEMENTS_OF_IMAGE = 1 << 17, 1 << 18
"""With fewer all images are in that cache; with more in one, not even that."""

_DTYPES = (torch.float32, torch.float64)


def _over_all_but_channels(x: Tensor, axes: Sequence[int] | None) -> bool:
    if x.device.type != "cpu" or x.dtype not in _DTYPES or x.dim() < 4 or axes is None:
        return False
    if x.numel() < MIN_ELEMENTS or x.numel() > MAX_ELEMENTS_OF_IMAGE * x.shape[0]:
        return False
    return {axis % x.dim() for axis in axes} == set(range(x.dim())) - {1}


def _in_stages(x: Tensor) -> Tensor:
    """[N, C, ...] -> [1, C, ...] with axes of length one."""
    return aten.sum.dim_IntList(aten.sum.dim_IntList(x, list(range(2, x.dim())), True), [0], True)


def _sum(x: Tensor, axes: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    if dtype is not None or not _over_all_but_channels(x, axes):
        return NotImplemented
    found = _in_stages(x)
    return found if keepdim else found.reshape(-1)


def _var_mean(x: Tensor, axes: Sequence[int] | None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    if not _over_all_but_channels(x, axes):
        return NotImplemented
    count = x.numel() // x.shape[1]
    mean = _in_stages(x) / count
    around = x - mean
    variance = _in_stages(around * around) / max(count - (1 if correction is None else correction), 0)
    return (variance, mean) if keepdim else (variance.reshape(-1), mean.reshape(-1))


RULES: dict[Any, Callable[..., Any]] = {aten.sum.dim_IntList: _sum, aten.var_mean.correction: _var_mean}
"""What the operations become; NotImplemented where they sum over other axes. A backend applies them with its own."""
