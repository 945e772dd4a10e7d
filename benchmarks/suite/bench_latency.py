"""Latency of adaptation, of adaptation and prediction, and of the meta-gradient: every contestant on every workload.

Contestants are timed by turns (`contest.py`); what was measured is played back to pytest-benchmark.
"""

from __future__ import annotations

import functools
import itertools

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.suite.contest import QUANTITIES, Result, contest, times_longer
from benchmarks.suite.contestants import ENTRANTS
from benchmarks.suite.playback import CLOCK, play_back
from benchmarks.suite.workloads import WORKLOADS


@functools.cache
def results(workload: str, names: tuple[str, ...], share: float, device: str) -> dict[str, dict[str, Result]]:
    return contest(WORKLOADS[workload]._replace(device=device), names, share=share)


@pytest.mark.benchmark(timer=CLOCK, disable_gc=False)
@pytest.mark.parametrize("workload, quantity, name", list(itertools.product(WORKLOADS, QUANTITIES, ENTRANTS)))
def test_latency(workload: str, quantity: str, name: str, benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> None:
    chosen = pytestconfig.getoption("--entrants")
    names = tuple(entrant for entrant in ENTRANTS if chosen is None or entrant in chosen.split(";"))
    if name not in names:
        pytest.skip("not asked for")
    if reason := ENTRANTS[name].reason_against(WORKLOADS[workload]):
        pytest.skip(reason)
    found = results(workload, names, pytestconfig.getoption("--share"), pytestconfig.getoption("--device"))[quantity]
    mine = found[name]
    benchmark.group = f"{workload}: {quantity}"
    benchmark.extra_info.update(
        workload=workload,
        quantity=quantity,
        contestant=name,
        error=mine.error,
        first_call_s=mine.compile_s,
        times_longer=times_longer(found, name),
    )
    play_back(benchmark, mine.times_s)
