"""Functions of PyTorch's compiler, exchanged for the time and the thread of one compilation."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Generator
from typing import Any


@contextlib.contextmanager
def exchanged(owner: Any, name: str, other: Callable[..., Any]) -> Generator[None]:
    """Within the block this thread gets `other` for `owner.name`, and all other threads what it was.

    To be entered under the lock `COMPILING`: blocks of two threads must not overlap.
    """
    original: Callable[..., Any] = getattr(owner, name)
    thread: int | None = threading.get_ident()

    @functools.wraps(original)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (other if threading.get_ident() == thread else original)(*args, **kwargs)

    setattr(owner, name, either)
    try:
        yield
    finally:
        setattr(owner, name, original)
        thread = None  # whoever has imported `either` in the meantime keeps it
