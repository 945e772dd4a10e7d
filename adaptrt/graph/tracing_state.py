"""What PyTorch remembers about tracing, for a thread and for the process, and how it is put back."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Generator
from typing import Any, cast

import torch
from torch import overrides
from torch.fx import _symbolic_trace
from torch.utils import _python_dispatch

from adaptrt.graph.exchange import FLAGS_OF_MODES, FX_TRACING, FX_TRACING_OF_OLD
from adaptrt.process import changed


def flags_of_modes() -> Callable[[], None]:
    """Returns a function that puts back what PyTorch remembers about dispatch modes for the whole process.

    Known limit: each mode remembers these flags when it begins and puts them back when it ends, so modes of two threads that overlap may
    leave them wrong. So may a capture and a mode of another thread that begins or ends meanwhile. PyTorch does not say which modes other
    threads are in.
    """
    scope: dict[str, Any] = cast(Any, _python_dispatch).__dict__
    before = {name: value for name, value in scope.items() if name.startswith("_is_in_")}

    def undo() -> None:
        scope.update(before)
        if FLAGS_OF_MODES.holds:
            scope["set_is_in_mode_without_ignore_compile_internals"](before["_is_in_any_mode_without_ignore_compile_internals"])

    return undo


def modes() -> Callable[[], None]:
    """Returns a function that puts the modes of this thread back to what they are now, if an exception has kept one from ending."""
    dispatch, functions, gradients = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack(), torch.is_grad_enabled()

    def undo() -> None:
        while torch._C._len_torch_dispatch_stack() > dispatch:
            _python_dispatch._pop_mode()
        while torch._C._len_torch_function_stack() > functions:
            overrides._pop_mode()
        torch.set_grad_enabled(gradients)

    return undo


@contextlib.contextmanager
def marked_as_tracing() -> Generator[None]:
    """What `torch.compile` compiled for fake tensors would not be recorded; while this thread traces, it does not compile (`plain.py`)."""
    trace: Any = _symbolic_trace
    if FX_TRACING.holds:
        before, flag, put = trace._get_is_fx_tracing(), True, trace._set_is_fx_tracing
    elif FX_TRACING_OF_OLD.holds:
        before, flag, put = trace._is_fx_tracing_flag, _InThisThread(), functools.partial(setattr, trace, "_is_fx_tracing_flag")
    else:
        yield
        return
    with changed(functools.partial(put, before)):
        put(flag)
        yield


class _InThisThread:
    """True in the thread that made it, and False in others."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self._thread
