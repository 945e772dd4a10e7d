"""Gives the small buffers of an AOTInductor program memory that a thread keeps between calls.

AOTInductor makes each buffer of a program by a call of PyTorch's allocator, a quarter of a microsecond each, or puts all of them on the
stack if they are small together. The stack is too short for programs of many steps, and nobody knows how long that of a host's thread is.
Here they are static variables of the thread, which nothing limits but memory: the thread's first call makes them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

from adaptrt.backend.inductor.exchange import THREAD_BUFFERS
from adaptrt.graph.exchange import exchanged

MAX_BYTES = 2 << 20
"""Of all buffers of a program together. Above it, the time of a call is that of its kernels."""


def buffers_of_threads() -> contextlib.AbstractContextManager[None]:
    """A block in which programs of AOTInductor keep their buffers."""
    return exchanged(THREAD_BUFFERS, _kept, _with_more)


def _kept(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def make_allocation(self: Any, name: str, *args: Any, **kwargs: Any) -> str:
        found = original(self, name, *args, **kwargs)
        lines: list[Any] = self.wrapper_call._lines  # the declaration, if the buffer was to be on the stack, is the last one
        if lines and isinstance(lines[-1], str) and f" {name}_storage[" in lines[-1]:
            lines[-1] = f"alignas(64) static thread_local {lines[-1].lstrip()}"
        return found

    return make_allocation


def _with_more(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def memory_plan_reuse(self: Any) -> None:
        module: Any = sys.modules[type(self).__module__]
        before = module.MAX_STACK_ALLOCATION_SIZE
        module.MAX_STACK_ALLOCATION_SIZE = MAX_BYTES
        try:
            original(self)
        finally:
            module.MAX_STACK_ALLOCATION_SIZE = before

    return memory_plan_reuse
