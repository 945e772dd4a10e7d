"""Pauses Python's garbage collection while graphs are made."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Generator
from typing import Any


@contextlib.contextmanager
def garbage_collection_paused() -> Generator[None]:
    """Within the block, reference cycles are not collected, except while functions run that are wrapped in `collecting`.

    Recording a graph makes hundreds of thousands of objects and next to no garbage, and each collection goes through all of them. From a
    warm cache that is a tenth of the time. A capture takes a fraction of a second; one of many steps in one graph takes some seconds. The
    switch belongs to the process, so other threads' garbage waits for as long.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def collecting(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function that takes long: within `garbage_collection_paused`, garbage is collected while it runs.

    Garbage is collected only if it was when `collecting` was called.
    """
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
