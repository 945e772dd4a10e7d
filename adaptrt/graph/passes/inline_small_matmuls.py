"""Small matrix products on the CPU become multiplications and a sum, which a compiler makes loops of and fuses with what surrounds them.

A call of a matrix library costs a microsecond or two whatever the sizes, and ends the kernel before it and begins one behind it. In a model
whose layers have some tens of units that is most of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

MAX_TOTAL, MAX_EACH = 1 << 15, 1 << 12
"""Multiplications up to which loops are faster, by benchmarks/small_matmuls.py: of all products of an operation, or of each of them."""

_DTYPES = (torch.float32, torch.float64)
"""In half precision a product would be rounded before it is summed."""


def _is_small(a: Tensor, b: Tensor) -> bool:
    if a.device.type != "cpu" or a.dtype not in _DTYPES:
        return False
    return a.numel() * b.shape[-1] <= MAX_TOTAL or a.shape[-2] * a.shape[-1] * b.shape[-1] <= MAX_EACH


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[..., M, K] times [..., K, N]."""
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)


def _mm(a: Tensor, b: Tensor) -> Any:
    return _product(a, b) if _is_small(a, b) else NotImplemented


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if not _is_small(a, b):
        return NotImplemented
    product = _product(a, b) if alpha == 1 else _product(a, b) * alpha
    if beta == 0:  # as in addmm, NaN in `c` is not looked at
        return product
    return (c if beta == 1 else c * beta) + product


RULES: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
}
"""For each operation what it becomes; NotImplemented where the product is not small. A backend applies them with its own."""
