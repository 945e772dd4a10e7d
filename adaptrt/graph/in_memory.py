"""Makes sure that a tensor's memory holds its values, because compiled kernels get nothing but its address."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

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
      InvalidType: the values are in the memory of other tensors, or do not exist.
    """
    keys = torch._C._dispatch_keys(value)
    for key, reason in _ELSEWHERE.items():
        if keys.has(key):
            raise InvalidType(f"a tensor of class {type(value).__name__}, {Spec.of(value)}, {reason}")
    if value._is_zerotensor():
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    return value.resolve_conj().resolve_neg()
