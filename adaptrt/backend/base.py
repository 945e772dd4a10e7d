"""What runs a graph."""

from __future__ import annotations

import abc
import contextlib
import math
import threading
import time
from collections.abc import Callable, Generator, Sequence

from torch import Tensor

from adaptrt.graph.ir import Graph

Runner = Callable[[list[Tensor]], Sequence[Tensor]]
"""Takes every input of a graph in order, with the strides of its signature, constants included, and may empty the list. Safe to call from
threads."""


class CompilationLock:
    """A reentrant lock that knows when it was last released."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.last_released_s = -math.inf

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.last_released_s = time.monotonic()
        self._lock.release()

    @contextlib.contextmanager
    def quietly(self) -> Generator[None]:
        """Holds the lock without this counting as a release."""
        with self._lock:
            yield


COMPILING = CompilationLock()
"""Held while anything is captured or compiled: PyTorch's tracing state belongs to the process."""


class Backend(abc.ABC):
    """Turns graphs into callables. Instances are immutable."""

    name: str
    fuses: bool = False
    """Whether small operations cost next to nothing beside others."""

    def lower(self, graph: Graph) -> Graph:
        """The graph in the operations that `compile` would put in the place of its own, for what has to know which they are."""
        return graph

    @abc.abstractmethod
    def compile(self, graph: Graph) -> Runner:
        """The graph as a callable that computes the same values up to rounding."""
