"""Small functions that an `_update` written for the original may use: out-of-place arithmetic, and masks of gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Factor = float | Tensor


def _add(tensor: Tensor, a1: Factor, a2: Tensor | None = None) -> Tensor:
    """Returns `tensor + a1`, or with three arguments `tensor + a1 * a2`."""
    return tensor + (a1 if a2 is None else a1 * a2)


def _addcdiv(tensor: Tensor, a1: Factor, a2: Tensor, a3: Tensor | None = None) -> Tensor:
    """Returns `tensor + a1 / a2`, or with four arguments `tensor + a1 * (a2 / a3)`."""
    return tensor + (a1 / a2 if a3 is None else a1 * (a2 / a3))


def _addcmul(tensor: Tensor, a1: Factor, a2: Tensor, a3: Tensor | None = None) -> Tensor:
    """Returns `tensor + a1 * a2`, or with four arguments `tensor + a1 * a2 * a3`."""
    return tensor + (a1 * a2 if a3 is None else a1 * a2 * a3)


def _get_mask_closure(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns a hook that zeroes a gradient where `mask` is true, and also every gradient of that gradient."""

    def closure(grad: Tensor) -> Tensor:
        grad = torch.where(mask, torch.zeros_like(grad), grad)
        if grad.requires_grad:
            grad.register_hook(closure)
        return grad

    return closure


def _maybe_mask(tensor: Tensor, mask: Tensor) -> None:
    """Puts the hook of `_get_mask_closure` on a tensor that requires grad."""
    if tensor.requires_grad:
        tensor.register_hook(_get_mask_closure(mask))
