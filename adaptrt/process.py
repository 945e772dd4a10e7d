"""Changes of the whole process: they are put back whatever ends a block, and in a process that is forked meanwhile.

Some things that a capture or a compilation changes belong to the process and not to a thread: functions of PyTorch's, flags, hooks, locks.
Two events may come at any moment and would leave them changed.

- A fork. The child process has the forking thread only. Locks that other threads held at that moment would never be released in it, and
  what they had changed would never be put back. So locks are made by `lock`, and changes are written down (`changed`) before they are made.
  The child makes the locks anew and undoes the changes of other threads.
- A signal handler that raises, as Python's own for Ctrl-C does. The exception may come up in the very code that enters or leaves a block,
  and then that block is never left, or by the garbage collector at some later time. Or it comes up in Python code that PyTorch's C++ code
  has called where nothing may raise, which ends the process. So handlers wait for the end of a capture or compilation unless user's code
  runs at that moment (`_Signals`), and what was left undone nevertheless is undone there (`leaving_nothing`).

Known limits: locks of other libraries, PyTorch's among them, stay as the fork found them. Putting a handler back is an ordinary call of
`signal.signal`: `signal.siginterrupt` has to be called again afterwards, and a handler that C code has put in the place of one that is
written in Python is lost.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import signal
import sys
import sysconfig
import threading
import time
import types
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

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

    Context variables are as they were, too. In the main thread, handlers of signals wait as `_Signals` says.
    """

    @functools.wraps(fn)
    def run(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        before = set(_open)
        signals = None
        try:
            if threading.current_thread() is threading.main_thread():
                signals = _deferring or _Signals()
                signals.install()
            return contextvars.copy_context().run(fn, *args, **kwargs)
        finally:
            try:
                _undo_all_but(before)
            except BaseException:
                _undo_all_but(before)
                raise
            if signals is not None:
                signals.handle_pending()

    return run


def _undo_all_but(before: set[changed]) -> None:
    thread = threading.get_ident()
    for change in reversed(_open.copy()):
        if change.thread == thread and change not in before:
            change.close()


_deferring: _Signals | None = None


class _Signals:
    """Stands in for the handlers of signals that are written in Python, while functions run that `leaving_nothing` has decorated.

    A handler is called at once if the signal comes while user's code runs, or while the main thread waits for a compiler, or if it comes
    again after a while, as when somebody presses Ctrl-C once more. Otherwise it is called when the innermost of these functions ends.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._pending: dict[int, float] = {}  # for each signal when it came

    def install(self) -> None:
        """Stands in from now on, if it does not yet. To be called in the main thread."""
        global _deferring
        if _deferring is self:
            return
        changed(self.restore).__enter__()
        _deferring = self
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self)

    def restore(self) -> None:
        """Puts the handlers back."""
        global _deferring
        for number, handler in self._handlers.items():
            if signal.getsignal(number) is self:
                signal.signal(number, handler)
        _deferring = None

    def handle_pending(self) -> None:
        """Calls the handlers of the signals that have come in the meantime."""
        while self._pending:
            number = next(iter(self._pending))
            del self._pending[number]
            self._handlers[number](number, sys._getframe())

    def __call__(self, number: int, frame: types.FrameType | None) -> Any:
        """As a handler of signals."""
        if _deferring is self and not _may_raise(frame):
            since_s = time.monotonic() - self._pending.setdefault(number, time.monotonic())
            if since_s < _AGAIN_S:
                return None
        self._pending.pop(number, None)
        return self._handlers[number](number, frame)


_AGAIN_S = 1.0

_SIGNALS = signal.valid_signals()
_LIBRARIES = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<frozen")
_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep


def waits(fn: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorates a function that waits for another thread or process: handlers of signals do not wait for it."""
    _waiting.add(fn.__code__)
    return fn


_waiting: set[types.CodeType] = set()


def _may_raise(frame: types.FrameType | None) -> bool:
    """Whether code runs that leaves everything in order if it is left by an exception: user's code, or code that waits."""
    if frame is None:
        return True
    code = frame.f_code
    if code.co_filename.startswith(_LIBRARIES):
        return code in _waiting
    return not code.co_filename.startswith(_STANDARD_LIBRARY) or "-packages" in code.co_filename


def _renew() -> None:
    """Makes a forked child usable."""
    for held in list(_locks):
        if not held._is_owned():
            held._at_fork_reinit()
    thread = threading.get_ident()
    others = [change for change in _open if change.thread != thread]
    _open[:] = [change for change in _open if change.thread == thread]
    undo = [change.undo for change in reversed(others) if not change.of_thread]
    for fn in (*undo, *_in_child):
        with contextlib.suppress(Exception):  # the others have to be called all the same
            fn()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
