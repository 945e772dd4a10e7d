"""Pauses Python's garbage collection while graphs are made."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Generator
from typing import Any

from adaptrt.graph.switches import Switch, Switches

_PAUSED = 2_000_000_011
"""How many new objects start a collection while it is paused. Nobody else sets this number, so that a change by the user is noticed."""


def _threshold() -> int:
    return gc.get_threshold()[0]


def _set_threshold(value: int) -> None:
    gc.set_threshold(value, *gc.get_threshold()[1:])


COLLECTOR = Switch(_threshold, _set_threshold, _PAUSED)
"""How often garbage is collected. `gc.enable()` and `gc.disable()` are left to the user."""

_NOT_COLLECTING = Switches(COLLECTOR)


@contextlib.contextmanager
def garbage_collection_paused() -> Generator[None]:
    """Within the block, reference cycles are not collected, except while functions run that are wrapped in `collecting`.

    Recording a graph makes hundreds of thousands of objects and next to no garbage, and each collection goes through all of them. From a
    warm cache that is a tenth of the time. A capture takes a fraction of a second; one of many steps in one graph takes some seconds. The
    switch belongs to the process, so other threads' garbage waits for as long.
    """
    with _NOT_COLLECTING.held():
        yield


def collecting(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function that takes long: within `garbage_collection_paused`, garbage is collected while it runs, as the user wants it."""

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        with COLLECTOR.lifted():
            return fn(*args, **kwargs)

    return run
