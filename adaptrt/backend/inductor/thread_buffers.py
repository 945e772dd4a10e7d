"""Gives the small buffers of an AOTInductor program memory that a thread keeps between calls, and results memory of their own.

AOTInductor makes each buffer of a program by a call of PyTorch's allocator, a quarter of a microsecond each, or puts all of them on the
stack if they are small together. The stack is too short for programs of many steps, and nobody knows how long that of a host's thread is.
Here they are static variables of the thread, which nothing limits but memory: the thread's first call makes them.

What is left to AOTInductor then returns such a buffer by way of a tensor that the thread keeps, too: the next call would change the results
of this one, and they would be gone with the thread. So each result is a copy.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from adaptrt.backend.inductor.exchange import THREAD_BUFFERS
from adaptrt.graph.exchange import exchanged

MAX_BYTES = 2 << 20
"""Of all buffers of a program together. Above it, the time of a call is that of its kernels."""
_LIMIT = "MAX_STACK_ALLOCATION_SIZE"
_ASSIGNED = re.compile(r"aoti_torch_assign_tensors\((\w+)\.tensor\(\), (output_handles\[\d+\])\)")


def settings() -> dict[str, bool]:
    """Returns what Inductor is to be told: buffers may be variables only where `buffers_of_threads` looks after them."""
    return {"aot_inductor.allow_stack_allocation": THREAD_BUFFERS.holds}


def buffers_of_threads() -> contextlib.AbstractContextManager[None]:
    """A block in which programs of AOTInductor keep their buffers."""
    return exchanged(THREAD_BUFFERS, _kept, _with_more, _copied)


def _kept(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def make_allocation(
        self: Any,
        name: str,
        device: Any,
        dtype: Any,
        shape: Any,
        stride: Any,
        buffer_if_can_stack_allocate: Any = None,
        is_pinned: bool = False,
    ) -> str:
        found = original(self, name, device, dtype, shape, stride, buffer_if_can_stack_allocate, is_pinned)
        if buffer_if_can_stack_allocate is not None:
            lines: list[Any] = self.wrapper_call._lines
            if not isinstance(lines[-1], str) or f" {name}_storage[" not in lines[-1]:
                raise RuntimeError(f"AOTInductor declares its buffers in another way than adaptrt knows: {lines[-1]}")
            lines[-1] = f"alignas(64) static thread_local {lines[-1].lstrip()}"
        return found

    return make_allocation


class _Limit(int):
    """A limit that is `MAX_BYTES` for the thread that made it, and for others the number that it is."""

    def __new__(cls, value: int) -> _Limit:
        limit = super().__new__(cls, value)
        limit._owner = threading.get_ident()
        return limit

    _owner: int

    def __ge__(self, total: Any) -> bool:
        return (MAX_BYTES if threading.get_ident() == self._owner else int(self)) >= total


def _with_more(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def memory_plan_reuse(self: Any) -> None:
        module: Any = sys.modules[type(self).__module__]
        before = getattr(module, _LIMIT)
        setattr(module, _LIMIT, _Limit(before))
        try:
            original(self)
        finally:
            setattr(module, _LIMIT, before)

    return memory_plan_reuse


def _copied(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def generate_return(self: Any, output_refs: Sequence[str]) -> None:
        lines: list[Any] = self.wrapper_call._lines
        first = len(lines)
        original(self, output_refs)
        num_kept = num_copied = 0
        for place in range(first, len(lines)):
            line = lines[place]
            if not isinstance(line, str):
                continue
            num_kept += "ThreadLocalCachedOutput" in line
            if "aoti_torch_new_uninitialized_tensor" in line:
                lines[place] = ""
            copied, number = _ASSIGNED.subn(r"aoti_torch_clone(\1.tensor(), &\2)", line)
            if number:
                lines[place] = copied
                num_copied += number
        if num_kept != num_copied:
            raise RuntimeError("AOTInductor returns its buffers in another way than adaptrt knows; results would share memory")

    return generate_return
