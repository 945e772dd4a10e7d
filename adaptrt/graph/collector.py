"""Python's garbage collector, which rests while graphs are made."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Generator
from typing import Any


@contextlib.contextmanager
def collector_rests() -> Generator[None]:
    """Within the block garbage in cycles is not collected, save in functions that are `collecting`.

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


def collecting(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, which takes long: when called from a block of `collector_rests`, garbage is collected as outside of it."""
    collects = gc.isenabled()

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        enables = collects and not gc.isenabled()
        if enables:
            gc.enable()
        try:
            return fn(*args, **kwargs)
        finally:
            if enables:
                gc.disable()

    return run
