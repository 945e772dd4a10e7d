"""Gradients by name, as tests compare them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def gradients(value: Tensor, leaves: Mapping[str, Tensor], cotangent: Tensor | None = None) -> dict[str, Tensor]:
    """The value and its gradients by all leaves, by name; zeros where it depends on none. Its graph stays."""
    grads = torch.autograd.grad(value, list(leaves.values()), cotangent, allow_unused=True, retain_graph=True)
    found = {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in zip(leaves.items(), grads, strict=True)}
    return {"value": value.detach(), **found}
