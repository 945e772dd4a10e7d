"""Computes layer and group norms of half-precision inputs with float32 weights in float32, and rounds the result at the end.

Autocast on the CPU makes such calls, and the kernels compute them in this way. The kernels return means and standard deviations in float32.
Fake tensors claim that these have the input's dtype, and vmap's rules return results in the weight's dtype (2.13). So a graph of the
operations themselves would name other dtypes than it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_HALF = (torch.bfloat16, torch.float16)


def _is_mixed(x: Tensor, *others: Tensor | None) -> bool:
    return x.dtype in _HALF and any(other is not None and other.dtype is torch.float32 for other in others)


def _float(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.float()


def _layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    if not _is_mixed(x, weight, bias):
        return NotImplemented
    result, mean, rstd = aten.native_layer_norm(x.float(), shape, _float(weight), _float(bias), eps)
    return result.to(x.dtype), mean, rstd


def _layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Sequence[bool],
) -> Any:
    if not _is_mixed(x, weight, bias):
        return NotImplemented
    found = aten.native_layer_norm_backward(grad.float(), x.float(), shape, mean, rstd, _float(weight), _float(bias), mask)
    return _rounded(found, x, weight, bias)


def _group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *sizes: Any) -> Any:
    """Computes the group norm; `sizes` are N, C, H * W, groups and eps."""
    if not _is_mixed(x, weight, bias):
        return NotImplemented
    result, mean, rstd = aten.native_group_norm(x.float(), _float(weight), _float(bias), *sizes)
    return result.to(x.dtype), mean, rstd


def _group_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, *rest: Any) -> Any:
    """Computes the gradients of the group norm; `rest` is N, C, H * W, groups and the output mask."""
    if not _is_mixed(x, mean, weight):
        return NotImplemented
    found = aten.native_group_norm_backward(grad.float(), x.float(), mean.float(), rstd.float(), _float(weight), *rest)
    return _rounded(found, x, weight, weight)


def _rounded(found: Sequence[Tensor | None], *like: Tensor | None) -> tuple[Tensor | None, ...]:
    """Converts each gradient to the dtype of the tensor that it is the gradient of."""
    return tuple(
        gradient if gradient is None or value is None else gradient.to(value.dtype) for gradient, value in zip(found, like, strict=True)
    )


RULES: dict[Any, Callable[..., Any]] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
}
"""The function that replaces each operation. It returns NotImplemented if the dtypes are not mixed."""
