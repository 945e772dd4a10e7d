"""Watches the calls of one thread by Python's profiling hook, beside whatever profiles that thread already."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Generator
from typing import Any

Note = Callable[[types.FrameType, str, Any], object]
"""Takes a frame, an event and its argument, as a function for `sys.setprofile` does."""


@contextlib.contextmanager
def profiled(note: Note) -> Generator[None]:
    """Within the block `note` is told of the calls of this thread.

    A profile function that is set already is told, too. `cProfile`, which is written in C before Python 3.12, pauses. Another profiler in C,
    such as PyTorch's with stacks, could not be put back from Python. It stays, and the slot of debuggers is taken, in which `note` is told
    of calls of Python functions only.
    """
    before: Any = sys.getprofile()
    if before is None or callable(before):
        get, put, put_back = sys.getprofile, sys.setprofile, sys.setprofile
    elif hasattr(before, "enable"):
        get, put, put_back = lambda: None, sys.setprofile, lambda _: (sys.setprofile(None), before.enable())
    else:
        get, put, put_back = sys.gettrace, sys.settrace, sys.settrace
    told: Any = get()

    def both(frame: types.FrameType, event: str, arg: Any) -> Any:
        note(frame, event, arg)
        return told(frame, event, arg)

    def alone(frame: types.FrameType, event: str, arg: Any) -> None:
        note(frame, event, arg)

    put(both if isinstance(told, types.FunctionType | types.MethodType) else alone)
    try:
        yield
    finally:
        put_back(told)
