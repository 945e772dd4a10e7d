"""Pauses Python's garbage collection while graphs are made."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Generator
from typing import Any


@contextlib.contextmanager
def collector_rests() -> Generator[None]:
    """Pauses garbage collection within the block, except in functions wrapped by `collecting`.

    Recording a graph makes hundreds of thousands of objects and almost no garbage in cycles, and every collection visits all of them. That
    took a tenth of the time to a first result from a warm cache. A capture takes a fraction of a second, and some seconds if one graph
    holds many steps. Garbage collection is paused for all threads meanwhile.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def collecting(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function that takes long, so that garbage is collected in it even when it is called from a block of `collector_rests`."""
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
