"""Translates operations that move elements to other places, or take some of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt.export.onnx.writer import Name, Refused, Rule, Value, Writer

aten = torch.ops.aten


def _same(write: Writer, like: Tensor, x: Value, *args: Any, **options: Any) -> Name:
    return write.get(x)


def _reshape(write: Writer, like: Tensor, x: Value, *args: Any) -> Name:
    return write.reshape_value(x, like.shape)


def _permute(write: Writer, like: Tensor, x: Value, axes: Sequence[int]) -> Name:
    order = [x.axis(axis) for axis in axes]
    if order == [*range(x.dim - 2), x.dim - 1, x.dim - 2]:
        found = write("Transpose", write.get(x), perm=order)
        write.exchanged[found] = x
        return found
    # ONNX Runtime is fast where one axis moves, which it does not see if there are others of one element, or axes that stay together.
    runs: list[list[int]] = []
    for axis in order:
        if x.shape[axis] != 1:
            if runs and _follow(x.shape, runs[-1][-1], axis):
                runs[-1].append(axis)
            else:
                runs.append([axis])
    before = sorted(runs)
    if before == runs:
        return write.reshape_value(x, like.shape)
    if len(runs) == x.dim:
        return write("Transpose", write.get(x), perm=order)
    merged = write.reshape_value(x, [math.prod(x.shape[axis] for axis in run) for run in before])
    return write.reshape(write("Transpose", merged, perm=[before.index(run) for run in runs]), like.shape)


def _follow(shape: Sequence[int], one: int, other: int) -> bool:
    """Whether one axis comes after the other in memory, but for axes of one element."""
    return one < other and all(size == 1 for size in shape[one + 1 : other])


def _expand(write: Writer, like: Tensor, x: Value, *args: Any, **options: Any) -> Name:
    return write("Expand", write.get(x), write.integers(like.shape)) if x.shape != tuple(like.shape) else write.get(x)


def _cat(write: Writer, like: Tensor, parts: Sequence[Value], dim: int = 0) -> Name:
    filled = [part for part in parts if part.shape != (0,)] or parts[:1]  # PyTorch lets such a tensor stand for none at all
    names = [write.get(part, like.dtype) for part in filled]
    return write("Concat", *names, axis=dim % like.dim()) if len(names) > 1 else names[0]


def _slice(write: Writer, like: Tensor, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Name:
    dim = x.axis(dim)
    size = x.shape[dim]
    first = min(max((start or 0) + (size if (start or 0) < 0 else 0), 0), size)
    last = size if end is None else min(max(end + (size if end < 0 else 0), first), size)
    return write("Slice", write.get(x), *[write.integers([value]) for value in (first, last, dim, step)])


def _flip(write: Writer, like: Tensor, x: Value, axes: Sequence[int]) -> Name:
    count = len(axes)
    bounds = [-1] * count, [torch.iinfo(torch.int64).min] * count, [x.axis(axis) for axis in axes], [-1] * count
    return write("Slice", write.get(x), *[write.integers(list(values)) for values in bounds]) if count else write.get(x)


def _select(write: Writer, like: Tensor, x: Value, dim: int, index: int) -> Name:
    return write("Gather", write.get(x), write.integers(index % x.shape[dim]), axis=x.axis(dim))


def _split(write: Writer, like: Sequence[Tensor], x: Value, sizes: Sequence[int], dim: int = 0) -> list[Name]:
    return write.node("Split", write.get(x), write.integers(list(sizes)), outputs=len(sizes), axis=x.axis(dim))


def _pad(write: Writer, like: Tensor, x: Value, pads: Sequence[int], value: float = 0) -> Name:
    first, last = [0] * x.dim, [0] * x.dim
    for place in range(len(pads) // 2):
        first[-1 - place], last[-1 - place] = pads[2 * place], pads[2 * place + 1]
    return write("Pad", write.get(x), write.integers(first + last), write.number(value, x.dtype))


def _repeat(write: Writer, like: Tensor, x: Value, repeats: Sequence[int]) -> Name:
    shape = [1] * (len(repeats) - x.dim) + list(x.shape)
    return write("Tile", write.reshape(write.get(x), shape), write.integers(list(repeats)))


def _full_like(write: Writer, like: Tensor, x: Value, value: float, **options: Any) -> Name:
    return write.full(value, like.dtype, like.shape)


def _diagonal(write: Writer, like: Tensor, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Name:
    one, two = x.axis(dim1), x.axis(dim2)
    rest = [axis for axis in range(x.dim) if axis not in (one, two)]
    name, count = write("Transpose", write.get(x), perm=[*rest, one, two]), like.shape[-1]
    rows = torch.arange(count) + max(-offset, 0)
    places = rows * x.shape[two] + torch.arange(count) + max(offset, 0)
    flat = write.reshape(name, [*[x.shape[axis] for axis in rest], x.shape[one] * x.shape[two]])
    return write("Gather", flat, write.constant(places), axis=len(rest))


def _as_strided(write: Writer, like: Tensor, x: Value, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Name:
    contiguous = torch.empty(list(size), device="meta").stride()
    if offset or tuple(stride) != contiguous or like.numel() != torch.Size(x.shape).numel():
        raise Refused(" to another layout than a contiguous one")
    return _reshape(write, like, x)


RULES: dict[Any, Rule] = {
    aten.clone.default: _same,
    **dict.fromkeys((aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dims), _reshape),
    aten.permute.default: _permute,
    aten.expand.default: _expand,
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.flip.default: _flip,
    aten.select.int: _select,
    aten.split_with_sizes.default: _split,
    aten.constant_pad_nd.default: _pad,
    aten.repeat.default: _repeat,
    aten.full_like.default: _full_like,
    aten.diagonal.default: _diagonal,
    aten.as_strided.default: _as_strided,
}
