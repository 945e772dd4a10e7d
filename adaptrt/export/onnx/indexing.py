"""Translates operations that read or write at places which other tensors name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt.export.onnx.writer import Name, OneName, Operand, Refused, Rule, Value, Writer

aten = torch.ops.aten


def _embedding(write: Writer, like: Tensor, table: Value, indices: Value, *rest: Any) -> Name:
    return write("Gather", write.get(table), write.get(indices), axis=0)


def _index_select(write: Writer, like: Tensor, x: Value, dim: int, indices: Value) -> Name:
    return write("Gather", write.get(x), write.reshape(write.get(indices), [-1]), axis=x.axis(dim))


def _gather(write: Writer, like: Tensor, x: Value, dim: int, indices: Value, *, sparse_grad: bool = False) -> Name:
    if not x.dim:
        return write.get(x)
    return write("GatherElements", write.get(x), write.get(indices), axis=x.axis(dim))


def _scatter(reduction: str) -> OneName:
    def rule(write: Writer, like: Tensor, x: Value, dim: int, indices: Value, source: Operand) -> Name:
        if isinstance(source, Value):
            values = write.get(source, like.dtype)
            if source.shape != indices.shape:  # PyTorch takes the first so many of each axis
                count = len(indices.shape)
                bounds = [0] * count, indices.shape, range(count)
                values = write("Slice", values, *[write.integers(list(entries)) for entries in bounds])
        else:
            values = write.full(source, like.dtype, indices.shape)
        return write("ScatterElements", write.get(x), write.get(indices), values, axis=x.axis(dim), reduction=reduction)

    return rule


_REDUCTIONS = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}


def _scatter_reduce(
    write: Writer, like: Tensor, x: Value, dim: int, indices: Value, source: Value, reduce: str, *, include_self: bool = True
) -> Name:
    if reduce not in _REDUCTIONS or not include_self:
        raise Refused(f" with reduce={reduce!r}, include_self={include_self}")
    return _scatter(_REDUCTIONS[reduce])(write, like, x, dim, indices, source)


class _Places:
    """The axes that tensors of indices name, which may be several.

    PyTorch puts the axes of the indices, broadcast with each other, where the first index stands if all of them stand side by side, and
    else first. GatherND and ScatterND want the indexed axes first.
    """

    def __init__(self, write: Writer, x: Value, indices: Sequence[Value | None]) -> None:
        given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for _, index in given):
            raise Refused(" with a mask")
        self.axes = [axis for axis, _ in given]
        self.shape = list(torch.broadcast_shapes(*[index.shape for _, index in given]))
        rest = [axis for axis in range(x.dim) if axis not in self.axes]
        self.order = [*self.axes, *rest]
        self.rest = [x.shape[axis] for axis in rest]
        beside = self.axes == list(range(self.axes[0], self.axes[0] + len(self.axes)))
        self.before = self.axes[0] if beside else 0
        parts = [write.reshape(self._broadcast(write, index), [*self.shape, 1]) for _, index in given]
        self.name = write("Concat", *parts, axis=len(self.shape)) if len(parts) > 1 else parts[0]

    def _broadcast(self, write: Writer, index: Value) -> Name:
        name = write.get(index, torch.int64)
        return name if list(index.shape) == self.shape else write("Expand", name, write.integers(self.shape))

    def to_front(self) -> list[int]:
        """The order in which a result has the axes of the indices first."""
        count = len(self.shape)
        places = range(self.before, self.before + count)
        return [*places, *[axis for axis in range(count + len(self.rest)) if axis not in places]]


def _ordered(write: Writer, name: Name, order: Sequence[int]) -> Name:
    return name if list(order) == list(range(len(order))) else write("Transpose", name, perm=list(order))


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _index(write: Writer, like: Tensor, x: Value, indices: Sequence[Value | None]) -> Name:
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) == 1 and given[0][1].dtype not in (torch.bool, torch.uint8):
        return write("Gather", write.get(x), write.get(given[0][1]), axis=given[0][0])
    places = _Places(write, x, indices)
    found = write("GatherND", _ordered(write, write.get(x), places.order), places.name)
    return _ordered(write, found, _inverse(places.to_front()))


def _index_put(write: Writer, like: Tensor, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False) -> Name:
    places = _Places(write, x, indices)
    shape = [*places.shape, *places.rest]  # of the values, with the axes of the indices first
    front = places.to_front()
    of_result = [shape[place] for place in _inverse(front)]
    name = write.get(values, like.dtype)
    if list(values.shape) != of_result:
        name = write("Expand", name, write.integers(of_result))
    source = _ordered(write, write.get(x), places.order)
    options = {"reduction": "add"} if accumulate else {}
    found = write("ScatterND", source, places.name, _ordered(write, name, front), **options)
    return _ordered(write, found, _inverse(places.order))


RULES: dict[Any, Rule] = {
    aten.embedding.default: _embedding,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
    **dict.fromkeys((aten.scatter.src, aten.scatter.value), _scatter("none")),
    aten.scatter_add.default: _scatter("add"),
    aten.scatter_reduce.two: _scatter_reduce,
    aten.index.Tensor: _index,
    aten.index_put.default: _index_put,
}
