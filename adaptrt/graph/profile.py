"""Watches the calls of one thread by Python's profiling hook, beside whatever profiles that thread already."""

from __future__ import annotations

import contextlib
import sys
import types
import warnings
from collections.abc import Callable, Generator
from typing import Any

Note = Callable[[types.FrameType, str, Any], object]
"""Takes a frame, an event and its argument, as a function for `sys.setprofile` does."""


@contextlib.contextmanager
def profiled(note: Note) -> Generator[None]:
    """Within the block `note` is told of the calls of this thread.

    A profile function that is set already is told, too. `cProfile`, which is written in C before Python 3.12, pauses. Another profiler that
    is written in C, such as PyTorch's with stacks, cannot be put back from Python: a warning says that it ends for this thread.
    """
    before: Any = sys.getprofile()

    def both(frame: types.FrameType, event: str, arg: Any) -> None:
        note(frame, event, arg)
        before(frame, event, arg)

    sys.setprofile(both if callable(before) else note)
    try:
        yield
    finally:
        if before is None or callable(before):
            sys.setprofile(before)
        else:
            sys.setprofile(None)
            if hasattr(before, "enable"):
                before.enable()
            else:
                warnings.warn(
                    f"the profiler {type(before).__name__} sees no more Python calls of this thread, because a program was captured; warm "
                    "up before profiling, by unroll.warmup() or by a first call",
                    RuntimeWarning,
                    stacklevel=2,
                )
