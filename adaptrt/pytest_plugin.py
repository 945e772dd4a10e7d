"""Provides a pytest fixture that measures how long an unroll's calls take, and checks that none of them compiles.

Put `pytest_plugins = ["adaptrt.pytest_plugin"]` into the top `conftest.py`, or call `pytest -p adaptrt.pytest_plugin`. The plugin does not
register itself, because then every run of pytest in the environment would import PyTorch.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch

from adaptrt.runtime.unroll import CompiledUnroll

_ROWS = pytest.StashKey[list[tuple[str, "Latency"]]]()


class Latency(NamedTuple):
    """How long calls took.

    Attributes:
      times_s: the seconds of every timed call, in order.
    """

    times_s: Sequence[float]

    def percentile(self, percent: float) -> float:
        """Returns the shortest measured time, in seconds, that this percentage of the calls did not exceed.

        >>> Latency([0.4, 0.1, 0.2, 0.3]).percentile(50)
        0.2
        """
        return sorted(self.times_s)[max(0, math.ceil(percent / 100 * len(self.times_s)) - 1)]

    def __str__(self) -> str:
        return f"p50 {1e3 * self.percentile(50):.3f} ms, p99 {1e3 * self.percentile(99):.3f} ms over {len(self.times_s)} calls"


class UnrollBenchmark:
    """Times calls of an unroll against a budget; the value of the fixture `unroll_benchmark`."""

    def __init__(self, name: str, rows: list[tuple[str, Latency]]) -> None:
        self._name = name
        self._rows = rows

    def __call__(
        self,
        call: Callable[[], Any],
        unroll: CompiledUnroll,
        *,
        calls: int = 200,
        warm_up: int = 10,
        p50_s: float | None = None,
        p99_s: float | None = None,
    ) -> Latency:
        """Times `call`, and fails the test if it is over its budget or if it compiles anything after warming up.

        On a CUDA device the clock is read when the device has finished. Garbage collection is paused while calls are timed.

        Args:
          call: a function without arguments, for example `lambda: unroll.adapt(support)`.
          unroll: the unroll whose programs are watched and whose device is waited for. With tasks it is the result of `vmap()`.
          calls: the number of timed calls, at least 1. With fewer than 100 the p99 is the maximum.
          warm_up: the number of calls before the timed ones, which may compile.
          p50_s, p99_s: the seconds that the median, and 99% of the calls, may take. None means no limit.
        """
        if calls < 1 or warm_up < 0:
            raise ValueError(f"calls must be at least 1 and warm_up at least 0, got {calls} and {warm_up}")
        for _ in range(warm_up):
            call()
        before = list(unroll.graphs().values())  # kept alive so that no later graph has the id of one of these
        latency = Latency(_times_s(call, calls, unroll.device))
        self._rows.append((self._name, latency))
        compiled = [name for name, graph in unroll.graphs().items() if all(graph is not known for known in before)]
        if compiled:
            pytest.fail(
                f"compiled after {warm_up} warm-up calls: {', '.join(compiled)}. Call unroll.warmup() with every shape, "
                "pad to one that was seen, or raise cache_size",
                pytrace=False,
            )
        for percent, budget_s in ((50, p50_s), (99, p99_s)):
            if budget_s is not None and latency.percentile(percent) > budget_s:
                pytest.fail(f"p{percent} is above the budget of {1e3 * budget_s:.3f} ms: {latency}", pytrace=False)
        return latency


def _times_s(call: Callable[[], Any], count: int, device: torch.device) -> list[float]:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times: list[float] = []
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(count):
            wait()
            began = time.perf_counter()
            result = call()
            wait()
            times.append(time.perf_counter() - began)
            del result  # so that the next call does not include freeing it
    finally:
        if collects:
            gc.enable()
    return times


@pytest.fixture
def unroll_benchmark(request: pytest.FixtureRequest) -> UnrollBenchmark:
    """Times calls of an unroll against a budget: `unroll_benchmark(lambda: unroll.adapt(support), unroll, p99_s=0.005)`."""
    return UnrollBenchmark(request.node.nodeid, request.config.stash.setdefault(_ROWS, []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints what was measured."""
    rows = config.stash.get(_ROWS, [])
    if rows:
        terminalreporter.section("latency of unrolls")
        for name, latency in rows:
            terminalreporter.write_line(f"{name}: {latency}")
