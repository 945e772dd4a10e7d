"""Finds out whether programs can be compiled on this machine, and says so once where they cannot."""

from __future__ import annotations

import functools
import shutil
import sysconfig
import warnings
from pathlib import Path

import torch

from adaptrt.errors import CompilerUnavailable


def warn_if_missing(device: torch.device) -> bool:
    """Whether programs for `device` cannot be compiled on this machine. A warning says so, once a process."""
    reason = _missing(device.type)
    if reason is not None and device.type not in _WARNED:
        _WARNED.add(device.type)
        warnings.warn(
            f"{reason}; programs run on the eager backend, correct but slower. Install one, or pass backend='eager'.",
            CompilerUnavailable,
            stacklevel=5,
        )
    return reason is not None


_WARNED: set[str] = set()


@functools.cache
def _missing(device_type: str) -> str | None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch.utils._triton import has_triton

        if device_type != "cpu":
            return None if has_triton() else "Triton was not found"
        try:
            compiler = get_cpp_compiler()
        except Exception:  # InvalidCxxCompiler, or what the failed search for one raised
            return "no C++ compiler was found"
    if shutil.which(compiler) is None:
        return f"the C++ compiler '{compiler}' was not found"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "the Python headers were not found (Python.h, on Debian in the package python3-dev), and compiled kernels need them"
    return None
