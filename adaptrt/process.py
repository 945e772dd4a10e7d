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

Known limits: locks of other libraries, PyTorch's among them, stay as the fork found them. A handler that has waited for a second is called
wherever the main thread is, which may be in PyTorch's code.
"""

from __future__ import annotations

import _thread
import contextlib
import contextvars
import ctypes
import functools
import os
import signal
import sys
import sysconfig
import threading
import time
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Generator
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


@contextlib.contextmanager
def warnings_put_back() -> Generator[None]:
    """As `warnings.catch_warnings`, in a forked child, too."""
    block = warnings.catch_warnings()

    def undo() -> None:
        with contextlib.suppress(RuntimeError):  # it has not been entered yet
            block.__exit__(None, None, None)

    with changed(undo):
        block.__enter__()
        yield


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
                try:
                    _undo_all_but(before)
                except BaseException:
                    _undo_all_but(before)
                    raise
            finally:
                if signals is not None:
                    signals.handle_pending()

    return run


def _undo_all_but(before: set[changed]) -> None:
    thread = threading.get_ident()
    with contextlib.ExitStack() as stack:  # which goes on with the others where one raises
        for change in _open.copy():
            if change.thread == thread and change not in before:
                stack.callback(change.close)


_deferring: _Signals | None = None


class _Signals:
    """Stands in for the handlers of signals that are written in Python, while functions run that `leaving_nothing` has decorated.

    A handler is called at once if the signal comes while user's code runs, or while the main thread waits for a compiler. Otherwise it is
    called when the innermost of these functions ends, or after `_AGAIN_S`, when a thread sends the signal once more.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._pending: dict[int, float] = {}  # for each signal when it came
        self._sent_again: set[int] = set()
        self._lock = lock()

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
                try:
                    _set_handler(number, self)
                except _NotAllowed:
                    return

    def restore(self) -> None:
        """Puts the handlers back."""
        global _deferring
        with self._lock:
            _deferring = None
        for number, handler in self._handlers.items():
            if signal.getsignal(number) is self:
                _set_handler(number, handler)

    def handle_pending(self) -> None:
        """Calls the handlers of the signals that have come in the meantime, of all of them even if one raises."""
        while self._pending:
            number = next(iter(self._pending))
            self._forget(number)
            try:
                self._handlers[number](number, sys._getframe())
            finally:
                self.handle_pending()

    def __call__(self, number: int, frame: types.FrameType | None) -> Any:
        """As a handler of signals."""
        with self._lock:
            if number in self._sent_again:
                self._sent_again.remove(number)
                if number not in self._pending:
                    return None  # it was handled while it was sent
        now = time.monotonic()
        if _deferring is self and not _may_raise(frame):
            if number not in self._pending:
                self._pending[number] = now
                with contextlib.suppress(RuntimeError):  # there can be no more threads
                    # Not one of `threading`, whose locks the interrupted code may hold.
                    _thread.start_new_thread(self._send_again, (number, now))
            if now - self._pending.get(number, now) < _AGAIN_S:
                return None
        self._forget(number)
        return self._handlers[number](number, frame)

    def _forget(self, number: int) -> None:
        with self._lock:
            self._pending.pop(number, None)

    def _send_again(self, number: int, since: float) -> None:
        """Sends a signal to the main thread that has waited since then for `_AGAIN_S`, if it still waits."""
        while (rest_s := since + _AGAIN_S - time.monotonic()) > 0:
            time.sleep(rest_s)
        with self._lock:
            if _deferring is self and self._pending.get(number) == since and signal.getsignal(number) is self:
                self._sent_again.add(number)
                if hasattr(signal, "pthread_kill"):
                    signal.pthread_kill(threading.main_thread().ident or 0, number)
                else:
                    _thread.interrupt_main(signal.Signals(number))


class _NotAllowed(Exception):
    """Only the thread that has started the process may set handlers, which need not be the first that has imported `threading`."""


def _set_handler(number: int, handler: Any) -> None:
    """Sets the handler that is written in Python. What C code and `signal.siginterrupt` have told the system about the signal stays.

    Raises:
      _NotAllowed: not in this thread.
    """
    kept = ctypes.create_string_buffer(_ACTION_SIZE)
    is_kept = _sigaction is not None and _sigaction(number, None, kept) == 0
    try:
        signal.signal(number, handler)
    except ValueError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename != signal.__file__:
            raise  # a handler has raised it
        raise _NotAllowed from None
    if _sigaction is not None and is_kept:
        _sigaction(number, kept, None)


def _find_sigaction() -> Callable[[int, Any, Any], int] | None:
    """The function of the C library, where there is one. It is called without releasing the interpreter's lock."""
    if sys.platform not in ("linux", "darwin"):
        return None
    try:
        found = ctypes.PyDLL(None).sigaction
    except (OSError, AttributeError):
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    return found


_sigaction = _find_sigaction()
_ACTION_SIZE = 256
"""Bytes. No system's `struct sigaction` is larger; what is in it is not looked at."""

_AGAIN_S = 1.0

_SIGNALS = signal.valid_signals()
_LIBRARIES = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)
_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep


def waits(fn: Callable[Params, Result]) -> Callable[Params, Result]:
    """Decorates a function that waits for another thread or process: handlers of signals do not wait for it."""
    _waiting.add(fn.__code__)
    return fn


_waiting: set[types.CodeType] = set()


def _may_raise(frame: types.FrameType | None) -> bool:
    """Whether code runs that leaves everything in order if it is left by an exception: user's code, or code that waits.

    Code of the standard library counts as its caller's.
    """
    while frame is not None and _is_of_standard_library(frame.f_code.co_filename):
        frame = frame.f_back
    return frame is None or not frame.f_code.co_filename.startswith(_LIBRARIES) or frame.f_code in _waiting


def _is_of_standard_library(file: str) -> bool:
    return file.startswith("<frozen") or (file.startswith(_STANDARD_LIBRARY) and "-packages" not in file)


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
