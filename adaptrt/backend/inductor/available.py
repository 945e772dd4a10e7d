"""Finds out whether programs can be compiled on this machine, and says so once where they cannot.

Where there is no C++ compiler, programs that were built before still run, from the cache on disk. So programs are only given up altogether
where that cache holds none.
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from adaptrt.backend.inductor.library import any_built
from adaptrt.errors import CompilerUnavailable, InvalidArgument

_ASSERTS = "before PyTorch 2.14 the compiler generates wrong code under `python -O`, because some of its `assert` statements have effects"


def warn_if_missing(device: torch.device) -> bool:
    """Whether programs for `device` cannot be compiled on this machine. A warning says so, once a process."""
    reason, advice = _ASSERTS, "Run Python without -O and PYTHONOPTIMIZE"
    if assertions_count():
        reason, advice = _missing(device.type), "Install one"
    if reason is not None and device.type not in _WARNED:
        _WARNED.add(device.type)
        warnings.warn(
            f"{reason}; programs run on the eager backend, correct but slower. {advice}, or pass backend='eager'.",
            CompilerUnavailable,
            stacklevel=5,
        )
    return reason is not None


def refuse_without_assertions() -> None:
    """Raises where PyTorch's compiler would generate wrong code.

    Raises:
      InvalidArgument: Python does not execute assertions, and this PyTorch relies on them.
    """
    if not assertions_count():
        raise InvalidArgument(f"{_ASSERTS}; run Python without -O and PYTHONOPTIMIZE, or pass backend='eager'")


def assertions_count() -> bool:
    """Whether PyTorch's compiler does what it was written to do.

    Up to 2.13 its scheduler aligns the loops of two operations within an assertion, and a way to compute indices is given up for another
    when an assertion fails. In 2.14 these are ordinary statements, which Python always executes.
    """
    return __debug__ or torch.__version__ >= (2, 14)  # pyright: ignore[reportOperatorIssue]


def cannot_build(error: BaseException) -> bool:
    """Whether compiling a program failed because this machine cannot build or keep it. A warning says so, once for each reason."""
    from torch._inductor.exc import CppCompileError

    reason = _cause(error, lambda cause: isinstance(cause, (ImportError, CppCompileError)) or _is_of_the_system(cause))
    if reason is None:
        return False
    kind = f"{type(reason).__name__} {getattr(reason, 'errno', '')}"
    if kind not in _WARNED:
        _WARNED.add(kind)
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "the cache folder")
        warnings.warn(
            f"a program could not be built, or not be kept in {folder} ({type(reason).__name__}: {str(reason)[:500]}); it runs on the "
            "eager backend, correct but slower. If no C++ compiler was found, install one; if the folder cannot be written to, set "
            "TORCHINDUCTOR_CACHE_DIR to another before the process starts; or pass backend='eager'.",
            CompilerUnavailable,
            stacklevel=2,
        )
    return True


def comes_from_outside(error: BaseException) -> bool:
    """Whether an error is the system's, so that compiling in another way would fail as well: a full disk, or a compiler that was killed."""
    return _cause(error, _is_of_the_system) is not None


def _is_of_the_system(error: BaseException) -> bool:
    from torch._inductor.exc import InvalidCxxCompiler

    # Python and PyTorch have no classes for these.
    texts = ("can't start new thread", "can't allocate memory", "bad_alloc")
    return isinstance(error, (OSError, MemoryError, InvalidCxxCompiler)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def _cause(error: BaseException | None, is_meant: Callable[[BaseException], bool]) -> BaseException | None:
    """The error, or what it was raised for, that is meant."""
    while error is not None and not is_meant(error):
        error = getattr(error, "inner_exception", None) or error.__cause__
    return error


_WARNED: set[str] = set()


def _missing(device_type: str) -> str | None:
    """Why no program can be run that is not on the eager backend."""
    reason = _no_compiler(device_type)
    return None if reason is None or (device_type == "cpu" and any_built()) else reason


@functools.cache
def _no_compiler(device_type: str) -> str | None:
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
