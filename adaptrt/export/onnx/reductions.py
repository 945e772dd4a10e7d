"""Translates sums, means, maxima and other functions of whole axes, normalisation among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt.export.onnx.writer import WIDER, Name, OneName, Rule, Value, Writer

aten = torch.ops.aten
Axes = Sequence[int] | int | None


def _axes(x: Value, dim: Axes) -> list[int]:
    if dim is None or dim == [] or dim == ():
        return list(range(x.dim))
    return [x.axis(axis) for axis in ([dim] if isinstance(dim, int) else dim)]


def _reduced(kind: str) -> OneName:
    def rule(write: Writer, like: Tensor, x: Value, dim: Axes = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Name:
        del dtype  # the result's
        wide = torch.int32 if like.dtype == torch.bool else WIDER.get(like.dtype, like.dtype)
        source, axes = write.get(x, wide), _axes(x, dim)
        found = write(kind, source, write.integers(axes), keepdims=int(keepdim)) if axes else source
        return found if wide == like.dtype else write.cast(found, like.dtype)

    return rule


def _product(write: Writer, like: Tensor, x: Value, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None) -> Name:
    return _reduced("ReduceProd")(write, like, x, dim, keepdim)


def _extreme_place(kind: str) -> Rule:
    def rule(write: Writer, like: Tensor, x: Value, dim: int | None = None, keepdim: bool = False) -> Name:
        source = write.get(x, WIDER.get(x.dtype, x.dtype))
        if dim is None:
            found = write(kind, write.reshape(source, [-1]), axis=0, keepdims=0)
            return write.reshape(found, like.shape) if like.dim() else found
        if not x.dim:
            return write.integers(0)
        return write(kind, source, axis=x.axis(dim), keepdims=int(keepdim))

    return rule


def _softmax(kind: str) -> Rule:
    def rule(write: Writer, like: Tensor, x: Value, dim: int, half_to_float: bool) -> Name:
        return write(kind, write.get(x, like.dtype), axis=x.axis(dim))

    return rule


def _layer_norm(
    write: Writer, like: Sequence[Tensor], x: Value, shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> list[Name]:
    scale = write.full(1, x.dtype, shape) if weight is None else write.get(weight)
    names = [write.get(x), scale, *([] if bias is None else [write.get(bias)])]
    return write.node("LayerNormalization", *names, outputs=3, axis=x.dim - len(shape), epsilon=eps)


def _cumsum(write: Writer, like: Tensor, x: Value, dim: int, *, dtype: torch.dtype | None = None) -> Name:
    del dtype
    return write("CumSum", write.get(x, like.dtype), write.integers(x.axis(dim))) if x.dim else write.get(x, like.dtype)


def _topk(write: Writer, like: Sequence[Tensor], x: Value, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> list[Name]:
    return write.node("TopK", write.get(x), write.integers([k]), outputs=2, axis=x.axis(dim), largest=int(largest), sorted=1)


def _sort(write: Writer, like: Sequence[Tensor], x: Value, dim: int = -1, descending: bool = False) -> list[Name]:
    return _topk(write, like, x, x.shape[dim], dim, descending)


def _stable_sort(
    write: Writer, like: Sequence[Tensor], x: Value, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> list[Name]:
    return _sort(write, like, x, dim, descending)  # equal elements stay in order, as ONNX's specification says


RULES: dict[Any, Rule] = {
    aten.sum.dim_IntList: _reduced("ReduceSum"),
    **dict.fromkeys((aten.mean.default, aten.mean.dim), _reduced("ReduceMean")),
    **dict.fromkeys((aten.prod.default, aten.prod.dim_int), _product),
    aten.amax.default: _reduced("ReduceMax"),
    aten.amin.default: _reduced("ReduceMin"),
    aten.argmax.default: _extreme_place("ArgMax"),
    aten.argmin.default: _extreme_place("ArgMin"),
    aten._softmax.default: _softmax("Softmax"),
    aten._log_softmax.default: _softmax("LogSoftmax"),
    aten.native_layer_norm.default: _layer_norm,
    aten.cumsum.default: _cumsum,
    aten.topk.default: _topk,
    aten.sort.default: _sort,
    aten.sort.stable: _stable_sort,
}
