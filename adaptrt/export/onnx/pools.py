"""Translates pools and resizing.

ONNX counts the places of maxima through the whole tensor, PyTorch through each image. The gradient of a pool takes ONNX's own; whoever
else needs the places gets PyTorch's.

Where windows fill an image without overlap, the gradient finds the maxima anew by comparisons, because ONNX Runtime's pool is twenty times
as fast if it need not say where they are. All of it are operations on whole tensors: enlarge the maxima and compare; of equal elements in
a window, the first has the highest rank; enlarge the highest ranks and compare again; enlarge the gradient and multiply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt.export.onnx.writer import Name, OneName, Pool, Rule, Value, Writer

aten = torch.ops.aten


def _spread(value: Sequence[int] | int, num_axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * (num_axes if len(values) == 1 else 1)


def _one_channel(write: Writer, x: Name, shape: Sequence[int], num_axes: int) -> Name:
    """Returns the images with one channel each. With several, ONNX Runtime reorders them before the pool and back after it."""
    return write.reshape(x, [math.prod(shape[:-num_axes]), 1, *shape[-num_axes:]])


def _first(x: Value, num_axes: int) -> Tensor:
    """The place of each image's first element in the whole tensor."""
    images = torch.Size(x.shape[:-num_axes])
    return torch.arange(images.numel()).reshape(*images, *[1] * num_axes) * math.prod(x.shape[-num_axes:])


def _max_pool(num_axes: int) -> Rule:
    def rule(
        write: Writer,
        like: Sequence[Tensor],
        x: Value,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        ceil_mode: bool = False,
    ) -> list[Name]:
        taps = _spread(kernel, num_axes)
        options = {
            "kernel_shape": taps,
            "strides": _spread(stride, num_axes) if stride else taps,
            "pads": _spread(padding, num_axes) * 2,
            "dilations": _spread(dilation, num_axes),
            "ceil_mode": int(ceil_mode),
        }
        found, places = write.node("MaxPool", _one_channel(write, write.get(x), x.shape, num_axes), outputs=2, **options)
        found, places = write.reshape(found, like[0].shape), write.reshape(places, like[1].shape)
        in_image = write("Sub", places, write.constant(_first(x, num_axes)))
        write.pools[in_image] = Pool(found, places)
        return [found, in_image]

    return rule


def _max_pool_backward(num_axes: int) -> Rule:
    def rule(
        write: Writer,
        like: Tensor,
        gradient: Value,
        x: Value,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        ceil_mode: bool,
        indices: Value,
    ) -> Name:
        pool = write.pools.get(indices.name)
        taps = _spread(kernel, num_axes)
        strides = _spread(stride, num_axes) if stride else taps
        overlap = any(step < (tap - 1) * spread + 1 for step, tap, spread in zip(strides, taps, _spread(dilation, num_axes), strict=True))
        # Windows side by side, none of which reaches beyond an image.
        sizes = zip(x.shape[-num_axes:], gradient.shape[-num_axes:], taps, strict=True)
        simple = strides == taps and not any(_spread(padding, num_axes)) and all(tap * count <= size for size, count, tap in sizes)
        is_plain = simple and not overlap and num_axes == 2 and x.dim == 4 and like.dtype == torch.float32
        if pool is not None and is_plain and not any(size % tap for size, tap in zip(x.shape[2:], taps, strict=True)):
            return _compared(write, write.get(gradient), write.get(x), pool.maxima, x.shape, taps)
        places = write("Add", write.get(indices), write.constant(_first(x, num_axes))) if pool is None else pool.places
        if is_plain:
            shape = write.integers(x.shape)
            return write("MaxUnpool", write.get(gradient), places, shape, kernel_shape=taps, strides=strides)
        size = torch.Size(x.shape).numel()
        zeros = write.full(0, like.dtype, [size])
        flat = write.reshape(places, [-1]), write.reshape(write.get(gradient), [-1])
        return write.reshape(write("ScatterElements", zeros, *flat, axis=0, reduction="add" if overlap else "none"), x.shape)

    return rule


def _compared(write: Writer, gradient: Name, x: Name, maxima: Name, shape: Sequence[int], taps: Sequence[int]) -> Name:
    """The gradient of a pool of float32 whose windows fill the images without overlap."""

    def enlarged(name: Name) -> Name:
        return write("Resize", name, "", "", write.integers(list(shape)), **_REPEATED)

    def equal(one: Name, other: Name) -> Name:
        return write.cast(write("Equal", one, other), torch.float32)

    size = math.prod(taps)
    ranks = torch.arange(size, 0, -1, dtype=torch.float32).reshape(*taps)
    ranks = ranks.repeat(*[length // tap for length, tap in zip(shape[2:], taps, strict=True)])
    of_maxima = write("Mul", equal(x, enlarged(maxima)), write.constant(ranks))
    highest = write("MaxPool", _one_channel(write, of_maxima, shape, 2), kernel_shape=list(taps), strides=list(taps))
    highest = write.reshape(highest, [*shape[:2], *[length // tap for length, tap in zip(shape[2:], taps, strict=True)]])
    return write("Mul", enlarged(gradient), equal(of_maxima, enlarged(highest)))


_REPEATED = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor", "mode": "nearest"}
"""Resizing by repeating elements."""


def _avg_pool(num_axes: int) -> OneName:
    def rule(
        write: Writer,
        like: Tensor,
        x: Value,
        kernel: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor: int | None = None,
    ) -> Name:
        assert not ceil_mode and divisor is None, "these are lowered"
        taps = _spread(kernel, num_axes)
        options = {"kernel_shape": taps, "strides": _spread(stride, num_axes) if stride else taps, "pads": _spread(padding, num_axes) * 2}
        lead = [1] * (num_axes + 2 - x.dim)
        source = write.reshape(write.get(x), [*lead, *x.shape]) if lead else write.get(x)
        found = write("AveragePool", source, count_include_pad=int(count_include_pad), **options)
        return write.reshape(found, like.shape) if lead else found

    return rule


def _nearest(write: Writer, like: Tensor, x: Value, *rest: Any) -> Name:
    """By integer factors; others are lowered."""
    return write("Resize", write.get(x), "", "", write.integers(like.shape), **_REPEATED)


RULES: dict[Any, Rule] = {
    aten.max_pool2d_with_indices.default: _max_pool(2),
    aten.max_pool3d_with_indices.default: _max_pool(3),
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward(2),
    aten.max_pool3d_with_indices_backward.default: _max_pool_backward(3),
    aten.avg_pool2d.default: _avg_pool(2),
    aten.avg_pool3d.default: _avg_pool(3),
    aten.upsample_nearest2d.default: _nearest,
}
