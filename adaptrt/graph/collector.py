"""Python's garbage collector, which rests while graphs are made."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator


@contextlib.contextmanager
def collector_rests() -> Generator[None]:
    """Within the block garbage in cycles is not collected.

    Recording a graph makes hundreds of thousands of objects and next to no garbage, and each collection goes through all of them: a tenth
    of the time from a warm cache. A capture takes parts of a second, many steps in one graph some seconds; other threads' garbage waits
    as long.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
