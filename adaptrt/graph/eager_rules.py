"""Rules of eager kernels that fake kernels and operator schemas do not state, for functions that are traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adaptrt.functional import note_write
from adaptrt.graph import grouped_products, mixed_norms
from adaptrt.graph.operations import name_of

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.mv.default, aten.dot.default}


class EagerRules(TorchDispatchMode):
    """Enforces rules of eager kernels that fake kernels or operator schemas do not state.

    The schema of `native_batch_norm` does not say that it updates the running statistics, and fake matrix products accept operands of
    different dtypes. PyTorch's Python dispatcher would correct both, but its recurrent networks drop the dropout between layers (2.13).
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        del types
        if func in _PRODUCTS:
            dtypes = {value.dtype for value in args if isinstance(value, Tensor)}
            if len(dtypes) > 1:
                raise RuntimeError(f"{name_of(func)} needs operands of one dtype, got {' and '.join(sorted(map(str, dtypes)))}")
        if func is aten.native_batch_norm.default and args[3] is not None:
            func = aten._native_batch_norm_legit.default
            if args[5]:
                note_write(*args[3:5])
        if func is aten._efficientzerotensor.default:  # of forward mode; what is computed from it may lose its device (PyTorch 2.13)
            func = aten.zeros.default
        rule = mixed_norms.RULES.get(func) or grouped_products.RULES.get(func)
        if rule is not None:
            found = rule(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return func(*args, **(kwargs or {}))
