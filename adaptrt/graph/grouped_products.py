"""Products of groups of rows with a matrix for each group, as mixtures of experts compute them, by ordinary products.

`_grouped_mm` accepts only bfloat16 on fake tensors, where its kernel for the CPU accepts float32, too. Which rows form a group is data. So
here all rows are multiplied with all matrices, and a mask selects: the same numbers, for as many times the work as there are groups.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _grouped_product(
    left: Tensor, right: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Computes what `_grouped_mm` does. With G groups, which end at `offs`, [G]:

    - [M, K] x [G, K, N] -> [M, N]: groups of rows of `left`.
    - [G, M, K] x [K, N] -> [M, N]: groups of columns of `right`.
    - [M, K] x [K, N] -> [G, M, N]: groups of the terms of each sum.
    - [G, M, K] x [G, K, N] -> [G, M, N].
    """
    if left.dtype is torch.bfloat16 or bias is not None:
        return NotImplemented
    if offs is None:
        found = torch.bmm(left, right)
    else:
        groups = offs.shape[0]
        length = left.shape[1] if left.dim() == right.dim() else left.shape[0] if left.dim() == 2 else right.shape[1]
        belongs = _membership(offs, length)  # [G, length]
        lefts = left.unsqueeze(0).expand(groups, *left.shape) if left.dim() == 2 else left
        rights = right.unsqueeze(0).expand(groups, *right.shape) if right.dim() == 2 else right
        if left.dim() == right.dim():
            found = torch.bmm(torch.where(belongs.unsqueeze(1), lefts, 0.0), torch.where(belongs.unsqueeze(2), rights, 0.0))
        else:
            found = torch.where(belongs.unsqueeze(2 if left.dim() == 2 else 1), torch.bmm(lefts, rights), 0.0).sum(0)
    return found if out_dtype is None else found.to(out_dtype)


def _membership(offs: Tensor, length: int) -> Tensor:
    """Returns for each group and each place whether the place is in the group."""
    places = torch.arange(length, device=offs.device)
    ends = offs.unsqueeze(1)
    begins = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
    return (places >= begins) & (places < ends)


RULES: dict[Any, Callable[..., Any]] = {aten._grouped_mm.default: _grouped_product}
