"""Makes sure that there are values, in the memory of tensors, because compiled kernels get nothing but its address."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptrt.errors import InvalidType
from adaptrt.tree import Spec

_ELSEWHERE = {
    torch._C.DispatchKey.Python: "has no values of its own, or holds them in other tensors; pass what it stands for",
    torch._C.DispatchKey.Functionalize: "is being functionalised by PyTorch; call the unroll outside of that transformation",
    torch._C.DispatchKey.FuncTorchBatched: "is mapped by torch.func.vmap, which is not compiled; use unroll.vmap() for tasks",
    torch._C.DispatchKey.FuncTorchGradWrapper: "is differentiated by torch.func, which is not compiled; use torch.autograd",
}
"""Kinds of tensors whose memory does not hold their values."""


def in_memory(value: Tensor) -> Tensor:
    """Returns a tensor whose memory holds the values of `value`, which is `value` itself unless it says how they are to be read.

    Such are negated and conjugated views, and zeros that were never allocated.

    Raises:
      InvalidType: the values are in the memory of other tensors, are no plain numbers, or do not exist; or operations on the tensor do
        something else than what they do to its values.
    """
    keys = torch._C._dispatch_keys(value)
    for key, reason in _ELSEWHERE.items():
        if keys.has(key):
            raise InvalidType(f"a tensor of class {type(value).__name__}, {Spec.of(value)}, {reason}")
    fault = _fault(value)
    if fault is not None:
        raise InvalidType(f"a tensor of class {type(value).__name__}, {Spec.of(value)}, {fault}")
    if value._is_zerotensor():
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return value.resolve_conj().resolve_neg()


def _fault(value: Tensor) -> str | None:
    if value.is_quantized:
        return "is quantised; call .dequantize() on it"
    if changes_operations(type(value)):
        return "changes by its __torch_function__ what operations do, which programs do not call; pass value.as_subclass(torch.Tensor)"
    if value.layout is torch.strided and value.numel() and not value._is_zerotensor() and not value.untyped_storage().nbytes():
        return "has no memory any more, because its storage was resized to 0; gather it first, as FSDP's summon_full_params does"
    return None


def changes_operations(kind: type[Tensor]) -> bool:
    """Whether a class of tensors decides itself what PyTorch's functions do with them."""
    function: Any = getattr(kind, "__torch_function__", None)
    return function is not _NONE and getattr(function, "__func__", None) is not _ORDINARY


_NONE: Any = getattr(torch.nn.Parameter, "__torch_function__", None)
"""A class with this one has none."""
_ORDINARY: Any = getattr(getattr(Tensor, "__torch_function__", None), "__func__", None)
