"""Watches the calls of one thread by Python's profiling hook, beside whatever profiles that thread already."""

from __future__ import annotations

import contextlib
import sys
import types
import warnings
from collections.abc import Callable, Generator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

Note = Callable[[types.FrameType, str, Any], object]
"""Takes a frame, an event and its argument, as a function for `sys.setprofile` does."""

_OF_PYTORCH = frozenset({"aten", "prims", "prim"})
"""Namespaces of operations whose rules are PyTorch's own code."""

_alone: set[int] = set()
"""The identities of our own profile functions, in threads where no profiler of the user's is active. Only these may pause."""


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

    told = both if callable(before) else note
    if before is None or id(before) in _alone:
        _alone.add(id(told))
    sys.setprofile(told)
    try:
        yield
    finally:
        _alone.discard(id(told))
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


class RulesUnprofiled(TorchDispatchMode):
    """Runs PyTorch's rules for its own operations on its own tensors without calling our profile function.

    They call no code of the user's, and are most of what is called in a trace. A profiler of the user's is called for all of them.
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        profile = sys.getprofile()
        if id(profile) not in _alone or func.namespace not in _OF_PYTORCH or not all(map(_is_of_pytorch, types)):
            return func(*args, **(kwargs or {}))
        sys.setprofile(None)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            sys.setprofile(profile)


def _is_of_pytorch(kind: type) -> bool:
    """Whether a class of tensors is PyTorch's. One of the user's may have rules of its own."""
    return kind.__module__.partition(".")[0] == "torch"
