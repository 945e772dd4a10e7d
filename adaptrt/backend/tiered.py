"""Runs programs operation by operation until the compiled program is there, so that the first answer comes at once.

One thread compiles in the background, program after program, and holds the lock that captures take. It does not begin while a call is under
way that has captured a program, since such a call may capture more. A later call that needs a new program while another one is being
compiled waits until that one is done. In a forked child, which does not have that thread, a program that was still to be compiled gets a
thread when it is first run there.

Known limits: both tiers of a program return memory of the same layout. So what `Stash` keeps has the layout that eager kernels choose.
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
from adaptrt.process import after_fork, lock

QUIET_S = 3.0
"""If a thread has captured nothing for so long, its call is taken to be over, even if `call_ended` was not called. Backward passes capture,
too, and do not call it."""

_capturing: dict[int, float] = {}
"""For each thread whose call is under way, when it captured last."""


def call_ended() -> None:
    """Says that this thread's call will capture nothing more."""
    _capturing.pop(threading.get_ident(), None)


@dataclasses.dataclass(frozen=True, slots=True)
class Tiered(Backend):
    """Runs programs by `Eager` first, and by `compiler` as soon as it has compiled them."""

    compiler: Backend = dataclasses.field(default_factory=Inductor)

    name = "tiered"
    fuses = True

    def lower(self, graph: Graph) -> Graph:
        return self.compiler.lower(graph)

    def private_parts(self) -> tuple[str, ...]:
        return self.compiler.private_parts()

    def compile(self, graph: Graph) -> Runner:
        runner = TieredRunner(Eager().compile(graph))
        outputs = tuple(dataclasses.replace(output, kept=False) for output in graph.signature.outputs)
        signature = dataclasses.replace(graph.signature, outputs=outputs)
        _capturing[threading.get_ident()] = time.monotonic()
        _compile_later(runner, self.compiler, dataclasses.replace(graph, signature=signature))
        return runner


class TieredRunner:
    """Runs the compiled program if it is there, else the eager one."""

    def __init__(self, now: Runner) -> None:
        self._run = now
        self._is_done = False

    def __call__(self, values: list[Tensor]) -> Sequence[Tensor]:
        return self._run(values)

    @property
    def is_pending(self) -> bool:
        """Whether the compiled program is still to come."""
        return not self._is_done

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until compiling is over; whether it is."""
        _start()
        with _DONE:
            return _DONE.wait_for(lambda: self._is_done, timeout_s)

    def replace(self, compiled: Runner | None) -> None:
        """Runs `compiled` from now on. None means that there will be no compiled program."""
        if compiled is not None:
            self._run = compiled
        with _DONE:
            self._is_done = True
            _DONE.notify_all()

    def start_when_run(self) -> None:
        """Starts the compiling thread when the program is run next."""
        run = self._run

        def start(values: list[Tensor]) -> Sequence[Tensor]:
            if self._run is start:
                self._run = run
            _start()
            return run(values)

        self._run = start


_DONE = threading.Condition(lock())
"""Notified whenever a program is done."""

_Job = tuple[TieredRunner, Backend, Graph]
_unfinished: list[_Job] = []
_jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
_starting = lock()
_worker: threading.Thread | None = None


def _compile_later(runner: TieredRunner, compiler: Backend, graph: Graph) -> None:
    job = runner, compiler, graph
    _unfinished.append(job)
    _jobs.put(job)
    _start()


def _start() -> None:
    """Makes sure that there is a thread if there is anything to compile."""
    global _worker
    with _starting:
        if _unfinished and (_worker is None or not _worker.is_alive()):
            _worker = threading.Thread(target=_work, name="adaptrt compiler", daemon=True)
            _worker.start()


@after_fork
def _begin_anew() -> None:
    """In a forked child there is no compiling thread, and no other call is under way."""
    global _jobs, _worker
    _jobs, _worker = queue.SimpleQueue(), None
    for thread in _capturing.keys() - {threading.get_ident()}:
        del _capturing[thread]
    for job in _unfinished:
        _jobs.put(job)
        job[0].start_when_run()


def _work() -> None:
    while True:
        job = _jobs.get()
        runner, compiler, graph = job
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
            _unfinished.remove(job)
            runner.replace(compiled)
