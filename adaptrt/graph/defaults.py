"""Reads those settings of PyTorch's that a model's operations depend on although it does not name them.

`torch.ones(3)` in a model has the default dtype and is on the default device, and some operations choose another kernel if algorithms must
be deterministic. Programs hold what was chosen while they were captured, so these settings are part of what a program is for.

What needs no attention: the number of threads (`backend/inductor/assumptions.py`), flushing of denormal numbers, which holds for compiled
code as for any other, and switches that only choose between kernels for one operation, such as `torch.backends.mkldnn`.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Hashable

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


_num_function_modes = getattr(torch._C, "_len_torch_function_stack", _one)
"""A default device is a mode of the thread's, on this stack."""


def settings() -> Hashable:
    """Returns the settings of the calling thread, in less than half a microsecond where no default device is set."""
    device = torch.get_default_device() if _num_function_modes() else None
    if device is not None and device.type == "cpu":
        device = None  # which it is where nothing is set
    return torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype(), device
