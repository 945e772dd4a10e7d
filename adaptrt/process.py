"""Changes of the whole process: they are put back whatever ends a block, and in a process that is forked meanwhile.

Some things that a capture or a compilation changes belong to the process and not to a thread: functions of PyTorch's, flags, hooks, locks.
Two events may come at any moment and would leave them changed.

- A signal handler that raises, as Python's own for Ctrl-C does. The exception may come up within the very code that puts something back. So
  each change is written down before it is made (`changed`), and what a block has left undone is undone where the outermost function ends
  (`leaving_nothing`).
- A fork. The child process has the forking thread only. Locks that other threads held at that moment would never be released in it, and
  what they had changed would never be put back. So locks are made by `lock`, and the child makes those anew that another thread held; and
  the child undoes all changes of other threads.

Known limits: locks of other libraries, PyTorch's among them, stay as the fork found them.
"""

from __future__ import annotations

import contextvars
import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Params = ParamSpec("Params")
Result = TypeVar("Result")

_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_open: list[changed] = []
"""Changes that are in force, in the order in which they were made."""
_in_child: list[Callable[[], object]] = []


def lock() -> Any:
    """Returns a new lock that its thread may take several times. In a forked child it is free unless the forking thread holds it.

    Its `with` statement is written in C, so that no signal handler can come between taking it and the block.
    """
    made = threading.RLock()
    _locks.add(made)
    return made


def after_fork(fn: Callable[[], object]) -> Callable[[], object]:
    """Calls `fn` in each forked child, after its locks are free and changes are undone. Can be used as a decorator."""
    _in_child.append(fn)
    return fn


class changed:
    """A block in which something of the process is changed.

    Args:
      undo: puts it back. It has to do no harm if the change has not been made yet, or if it is called twice.
      of_thread: whether only this thread has the change, so that a forked child has nothing to put back for others.
    """

    __slots__ = ("of_thread", "thread", "undo")

    def __init__(self, undo: Callable[[], object], of_thread: bool = False) -> None:
        self.undo = undo
        self.of_thread = of_thread
        self.thread = threading.get_ident()

    def __enter__(self) -> None:
        _open.append(self)

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the block, unless it has ended. If a signal handler raises meanwhile, it has not."""
        if self in _open:
            self.undo()
            _open.remove(self)


def leaving_nothing(fn: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorates a function: when it ends, all changes are undone that this thread has made since it began.

    If one signal handler raises in all that time, this holds wherever it does. Context variables are as they were, too.
    """

    @functools.wraps(fn)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        before = set(_open)
        try:
            return contextvars.copy_context().run(fn, *args, **kwargs)
        finally:
            try:
                _undo_all_but(before)
            except BaseException:
                _undo_all_but(before)
                raise

    return run


def _undo_all_but(before: set[changed]) -> None:
    thread = threading.get_ident()
    for change in reversed(_open.copy()):
        if change.thread == thread and change not in before:
            change.close()


def _renew() -> None:
    """Makes a forked child usable."""
    for held in list(_locks):
        if not held._is_owned():
            held._at_fork_reinit()
    thread = threading.get_ident()
    others = [change for change in _open if change.thread != thread]
    _open[:] = [change for change in _open if change.thread == thread]
    for change in reversed(others):
        if not change.of_thread:
            change.undo()
    for fn in _in_child:
        fn()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
