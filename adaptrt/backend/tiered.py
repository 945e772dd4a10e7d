"""Answers at once and gets faster: operation by operation until the compiled program is there.

One thread compiles in the background, program after program, and takes the lock that captures take. It begins when no call that has
captured a program is under way, since such a call may capture more; a later call that needs a new program while one is being compiled
waits for that one.

Known limits: both tiers of a program return memory of the same layout, so what `Stash` keeps has that of eager kernels.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
import warnings
from collections.abc import Sequence

from torch import Tensor

from adaptrt.backend.base import COMPILING, Backend, Runner
from adaptrt.backend.eager import Eager
from adaptrt.backend.inductor import Inductor
from adaptrt.errors import CompilerUnavailable
from adaptrt.graph.ir import Graph

QUIET_S = 3.0
"""Without a capture after which a call is taken to be over if nobody said so: backward passes capture too."""

_capturing: dict[int, float] = {}
"""When each thread captured last, of those whose call is under way."""


def call_ended() -> None:
    """Says that this thread's call captures no more."""
    _capturing.pop(threading.get_ident(), None)


@dataclasses.dataclass(frozen=True, slots=True)
class Tiered(Backend):
    """`Eager` first, `compiler` as soon as it has compiled."""

    compiler: Backend = dataclasses.field(default_factory=Inductor)

    name = "tiered"
    fuses = True

    def lower(self, graph: Graph) -> Graph:
        return self.compiler.lower(graph)

    def compile(self, graph: Graph) -> Runner:
        runner = TieredRunner(Eager().compile(graph))
        outputs = tuple(dataclasses.replace(output, kept=False) for output in graph.signature.outputs)
        signature = dataclasses.replace(graph.signature, outputs=outputs)
        _capturing[threading.get_ident()] = time.monotonic()
        _compile_later(runner, self.compiler, dataclasses.replace(graph, signature=signature))
        return runner


class TieredRunner:
    """Runs what there is."""

    def __init__(self, now: Runner) -> None:
        self._run = now
        self._done = threading.Event()

    def __call__(self, values: list[Tensor]) -> Sequence[Tensor]:
        return self._run(values)

    @property
    def is_pending(self) -> bool:
        """Whether the compiled program is still to come."""
        return not self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until compiling is over; whether it is."""
        return self._done.wait(timeout_s)

    def replace(self, compiled: Runner | None) -> None:
        """Runs `compiled` from now on; None to stay with what there is."""
        if compiled is not None:
            self._run = compiled
        self._done.set()


_jobs: queue.SimpleQueue[tuple[TieredRunner, Backend, Graph]] = queue.SimpleQueue()
_starting = threading.Lock()
_worker: threading.Thread | None = None


def _compile_later(runner: TieredRunner, compiler: Backend, graph: Graph) -> None:
    global _worker
    _jobs.put((runner, compiler, graph))
    with _starting:
        if _worker is None or not _worker.is_alive():  # after a fork it is not
            _worker = threading.Thread(target=_work, name="adaptrt compiler", daemon=True)
            _worker.start()


def _work() -> None:
    while True:
        runner, compiler, graph = _jobs.get()
        while any(time.monotonic() - captured_s < QUIET_S for captured_s in list(_capturing.values())):
            time.sleep(0.01)
        compiled: Runner | None = None
        try:
            with COMPILING:
                compiled = compiler.compile(graph)
        except Exception as error:
            warnings.warn(
                f"compiling in the background failed; the program stays on the eager backend: {error}", CompilerUnavailable, stacklevel=1
            )
        finally:
            runner.replace(compiled)
