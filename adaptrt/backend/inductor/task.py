"""Runs a function in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from adaptrt.process import waits


class Task:
    """A function that runs in a thread of its own, or at once where the system has no more threads.

    In place of Inductor's pool of threads, which may never build again after a signal handler has raised while it was given work: then a
    lock of the pool's is held for ever. The lock here is taken by `with` statements only, which no handler can come into.
    """

    def __init__(self, fn: Callable[[], Any]) -> None:
        self._fn = fn
        self._running = threading.Lock()
        self._running.acquire()
        self._value: Any = None
        self._error: BaseException | None = None
        # A daemon, for which a process that ends does not wait.
        thread = threading.Thread(target=self._run, name="adaptrt builder", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more threads to give
            self._run()

    def _run(self) -> None:
        try:
            self._value = self._fn()
        except BaseException as error:
            self._error = error
        finally:
            self._running.release()

    @waits
    def result(self) -> Any:
        """Waits until it has run, and returns what it returned or raises what it raised."""
        with self._running:
            if self._error is not None:
                raise self._error
            return self._value
