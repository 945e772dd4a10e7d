"""One factor and one term for each channel, in one pass over the whole tensor.

ONNX's batch normalisation is (x - mean) / sqrt(variance + epsilon) * factor + term with one number of each for every channel. With mean 0,
variance 1 and epsilon 0 it is x * factor + term, which ONNX Runtime computes in one pass, where a product and a sum are two. Any axes
that stand side by side are channels, if the tensor is reshaped so that they are its second axis, which copies nothing.

One factor or term alone is faster so, too, if channels are short: ONNX Runtime's broadcasting takes long for each of them.

Known limits: ONNX Runtime's batch normalisation uses one thread, so the largest tensors are left to products and sums, which use all.
It subtracts the product of factor and mean, which is NaN for an infinite factor: what is infinite in PyTorch then is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from adaptrt.export.onnx.writer import Name, Operand, Value, Writer

_DTYPES = (torch.float32, torch.float64)
"""For which ONNX Runtime has batch normalisation."""

_SHORT = 256
"""Up to so many elements in a channel, a product or a sum alone is a batch normalisation."""

_SIZES = range(1024, 2**19)
"""Numbers of elements of tensors for which it pays."""


class _Channels(NamedTuple):
    """How a tensor is seen: [before, channels, elements of a channel]."""

    before: int
    number: int
    length: int


def product(write: Writer, shape: Sequence[int], a: Operand, b: Operand) -> Name | None:
    """Returns the product of a tensor of this shape with a factor for each channel. None if it is another product, or faster as it is."""
    for x, factor in ((a, b), (b, a)):
        channels = _channels(shape, x, factor)
        if channels is not None and channels.length <= _SHORT:
            return _normalised(write, x, channels, factor=factor)
    return None


def total(write: Writer, shape: Sequence[int], a: Operand, b: Operand) -> Name | None:
    """Like `product`, for a sum with a term for each channel. If the tensor is such a product itself, both are computed together."""
    for x, term in ((a, b), (b, a)):
        channels = _channels(shape, x, term)
        if channels is None:
            continue
        assert isinstance(x, Value)
        y, factor = write.products.get(x.name, (0, 0))
        for one, other in ((y, factor), (factor, y)):
            if _channels(shape, one, other) == channels:
                return _normalised(write, one, channels, factor=other, term=term)
        if channels.length <= _SHORT:
            return _normalised(write, x, channels, term=term)
    return None


def difference(write: Writer, shape: Sequence[int], x: Operand, mean: Operand) -> Name | None:
    """Like `product`, for a difference to one number for each channel."""
    channels = _channels(shape, x, mean)
    return None if channels is None or channels.length > _SHORT else _normalised(write, x, channels, mean=mean)


def _channels(shape: Sequence[int], x: Operand, each: Operand) -> _Channels | None:
    """Returns the channels of x for which `each` has one number; None if it has other numbers."""
    if not isinstance(x, Value) or not isinstance(each, Value) or x.shape != tuple(shape) or math.prod(shape) not in _SIZES:
        return None
    sizes = (*[1] * (x.dim - each.dim), *each.shape)
    own = [axis for axis, size in enumerate(sizes) if size > 1]
    if x.dtype not in _DTYPES or each.dtype != x.dtype or not own:
        return None
    first, last = own[0], own[-1] + 1
    found = _Channels(math.prod(shape[:first]), math.prod(shape[first:last]), math.prod(shape[last:]))
    return found if sizes[first:last] == tuple(shape[first:last]) and found.length > 1 else None


def _normalised(write: Writer, x: Operand, channels: _Channels, *, factor: Operand = 1.0, term: Operand = 0.0, mean: Operand = 0.0) -> Name:
    assert isinstance(x, Value)

    def of_channels(value: Operand) -> Name:
        if isinstance(value, Value):
            return write.reshape_value(value, [channels.number])
        return write.full(value, x.dtype, [channels.number])

    # ONNX Runtime wants at least three axes.
    source = write.reshape_value(x, channels) if x.shape[:2] != channels[:2] or x.dim < 3 else write.get(x)
    found = write("BatchNormalization", source, *map(of_channels, (factor, term, mean, 1.0)), epsilon=0.0)
    return found if source == write.get(x) else write.reshape(found, x.shape)
