"""Translates matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt.export.onnx.writer import Name, Rule, Value, Writer

aten = torch.ops.aten


def _factor(write: Writer, value: Value) -> tuple[Name, int]:
    """Returns the name of a matrix and 0, or of the one of which it is the transpose and 1."""
    name = write.get(value)
    return (write.get(write.exchanged[name]), 1) if name in write.exchanged else (name, 0)


def _mm(write: Writer, like: Tensor, a: Value, b: Value) -> Name:
    left, left_is_transposed = _factor(write, a)
    right, right_is_transposed = _factor(write, b)
    if left_is_transposed or right_is_transposed:
        return write("Gemm", left, right, transA=left_is_transposed, transB=right_is_transposed)
    return write("MatMul", left, right)


def _addmm(write: Writer, like: Tensor, term: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Name:
    left, left_is_transposed = _factor(write, a)
    right, right_is_transposed = _factor(write, b)
    options = {"transA": left_is_transposed, "transB": right_is_transposed, "alpha": float(alpha), "beta": float(beta)}
    return write("Gemm", left, right, write.get(term), **options)


def _matmul(write: Writer, like: Tensor, a: Value, b: Value) -> Name:
    return write("MatMul", write.get(a), write.get(b))


def _convolution(
    write: Writer,
    like: Tensor,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Name:
    num_axes = x.dim - 2
    strides, pads, dilations, more = (_spread(value, num_axes) for value in (stride, padding, dilation, output_padding))
    options: dict[str, Any] = {"kernel_shape": list(weight.shape[2:]), "strides": strides, "pads": pads * 2, "dilations": dilations}
    names = [write.get(value) for value in (x, weight, bias) if value is not None]
    if transposed:
        return write("ConvTranspose", *names, group=groups, output_padding=more, **options)
    return write("Conv", *names, group=groups, **options)


def _spread(value: Sequence[int], num_axes: int) -> list[int]:
    return [int(entry) for entry in value] * (num_axes if len(value) == 1 else 1)


RULES: dict[Any, Rule] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.bmm.default: _matmul,
    aten.convolution.default: _convolution,
}
