"""Reads those settings of PyTorch's that a model's operations depend on although it does not name them.

`torch.ones(3)` in a model has the default dtype and is on the default device, and some operations choose another kernel if algorithms must
be deterministic. Programs hold what was chosen while they were captured, so these settings are part of what a program is for.

What needs no attention: the number of threads (`backend/inductor/assumptions.py`), flushing of denormal numbers, which holds for compiled
code as for any other, and switches that only choose between kernels for one operation, such as `torch.backends.mkldnn`.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from adaptrt.graph.exchange import Entry, Target

DEFAULT_DEVICE = Entry(
    "default device",
    "A call asks for the default device only if one may be set in its thread.",
    "every call asks for it, and takes longer",
    needed=(Target("torch._C", "_len_torch_function_stack"),),
)


def _one() -> int:
    return 1


def _default_device() -> torch.device | None:
    device = torch.get_default_device()
    return None if device.type == "cpu" else device  # which it is where nothing is set


SETTINGS = "(deterministic(), dtype(), device() if num_modes() else None)"
"""The settings of the calling thread as an expression, for code that is generated and must be quick."""

NAMES: Mapping[str, Callable[[], Any]] = {
    "deterministic": torch.are_deterministic_algorithms_enabled,
    "dtype": torch.get_default_dtype,
    "device": _default_device,
    "num_modes": getattr(torch._C, "_len_torch_function_stack", _one),  # a default device is a mode of the thread's
}
"""What `SETTINGS` calls."""
