"""Replaces small matrix products on the CPU by operations that the compiler makes part of the kernels around them.

A call of a matrix library costs a microsecond or two, whatever the sizes. It also separates what comes before it from what comes after it
into two kernels. In a model whose layers have some tens of units that takes most of the time. Products with a vector become multiplications
and a sum, which are loops that are fused with others. Products of matrices become the operation `small_matmul`, for which the backend has
code of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adaptrt.graph.cost import PRODUCTS

aten = torch.ops.aten

MAX_EACH = 1 << 18
"""Multiplications of one product up to which the backend's code is as fast as the library, by benchmarks/small_matmuls.py."""

MAX_SECOND_FACTOR = 1 << 14
"""Elements of the second factor, which that code may copy to the stack; a row takes up a register of 16 at least."""

MAX_TOTAL_IN_LOOPS, MAX_EACH_IN_LOOPS = 1 << 15, 1 << 12
"""Multiplications with a vector up to which loops are faster than the library: of all products of an operation, or of each of them."""


def _shape(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


_LIBRARY: Any = torch.library.Library("adaptrt", "FRAGMENT")
_LIBRARY.define("small_matmul(Tensor a, Tensor b) -> Tensor")
_LIBRARY.impl("small_matmul", torch.matmul, "CPU")
_LIBRARY.impl("small_matmul", _shape, "Meta")

small_matmul: Any = torch.ops.adaptrt.small_matmul.default
"""The operation a [M, K], b [K, N] -> [M, N], or T of them at once."""

PRODUCTS.add(small_matmul)

_DTYPES = (torch.float32, torch.float64)
"""In half precision a product would be rounded before it is summed."""


def _product(a: Tensor, b: Tensor) -> Any:
    """[..., M, K] times [..., K, N]; NotImplemented if it is not small."""
    if a.device.type != "cpu" or a.dtype not in _DTYPES:
        return NotImplemented
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    each, total = m * k * n, a.numel() * n
    if min(m, k, n) > 1:
        return small_matmul(a, b) if each <= MAX_EACH and k * max(n, 16) <= MAX_SECOND_FACTOR else NotImplemented
    if total <= MAX_TOTAL_IN_LOOPS or each <= MAX_EACH_IN_LOOPS:
        return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)
    return NotImplemented


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    product = _product(a, b)
    if product is NotImplemented:
        return product
    if alpha != 1:
        product = product * alpha
    if beta == 0:  # as in addmm, NaN in `c` is not looked at
        return product
    return (c if beta == 1 else c * beta) + product


RULES: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
}
"""What replaces each operation; NotImplemented where the product is not small. The backend applies these rules together with its own."""
