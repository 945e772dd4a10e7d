"""Refuses calls within what transforms or records operations, because it cannot look into programs."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt.errors import WithinTransform
from adaptrt.graph.exchange import Entry, Target

TRANSFORMS = Entry(
    "transformations",
    "Calls within a transformation of torch.func are refused by name. Gradients for several cotangents at once run operation by operation.",
    "PyTorch raises an error of its own, where it notices",
    needed=tuple([Target("torch._C._functorch", name) for name in ("maybe_current_level", "is_batchedtensor", "is_legacy_batchedtensor")]),
)

_private: Any = torch._C
_current_level: Callable[[], int | None] = _private._functorch.maybe_current_level if TRANSFORMS.holds else lambda: None
_mode_of: Callable[[Any], object] = getattr(_private, "_get_dispatch_mode", lambda key: None)
_keys: Any = getattr(_private, "_TorchDispatchModeKey", None)
_RECORDERS = {"FAKE": "FakeTensorMode", "PROXY": "make_fx", "FUNCTIONAL": "functionalisation"}


def refuse_transforms() -> None:
    """Raises within a transformation of `torch.func`, which cannot look into programs.

    Raises:
      WithinTransform: this thread is within one.
    """
    if _current_level() is not None:
        raise WithinTransform(
            "an unroll, or the result of one, was called within a transformation of torch.func (vmap, grad, vjp, jvp, jacrev, ...), which "
            "cannot look into programs. For tasks call unroll.vmap() on stacked data; for gradients let tensors require grad, and call "
            "backward() or torch.autograd.grad; for Jacobians, torch.autograd.functional.jacobian"
        )


def refuse_recorders() -> None:
    """Raises within what runs Python code to record its operations, as a program would be captured with the recorder's tensors.

    Raises:
      WithinTransform: this thread is within `make_fx` or `FakeTensorMode`.
    """
    for key, name in _RECORDERS.items():
        if hasattr(_keys, key) and _mode_of(getattr(_keys, key)) is not None:
            raise WithinTransform(
                f"an unroll was called within {name}, which cannot see what its programs compute; call it outside, or record the model "
                "without it"
            )


def holds_mapped(values: Sequence[Tensor]) -> bool:
    """Whether one of these stands for several tensors, as where several gradients are asked for at once (`is_grads_batched=True`)."""
    if not TRANSFORMS.holds:
        return False
    functions: Any = _private._functorch
    return any(functions.is_batchedtensor(value) or functions.is_legacy_batchedtensor(value) for value in values)
