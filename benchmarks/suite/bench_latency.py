"""Latency of adaptation, of adaptation and prediction, and of the meta-gradient: every contestant on every workload.

Contestants are timed by turns (`contest.py`); what was measured is played back to pytest-benchmark.
"""

from __future__ import annotations

import functools
import itertools

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.suite.contest import QUANTITIES, Result, WrongNumbers, contest, times_longer
from benchmarks.suite.contestants import ENTRANTS
from benchmarks.suite.playback import CLOCK, play_back
from benchmarks.suite.workloads import WORKLOADS


@functools.cache
def results(
    workload: str, names: tuple[str, ...], quantities: tuple[str, ...], share: float, device: str
) -> tuple[dict[str, dict[str, Result]], dict[str, WrongNumbers]]:
    """By quantity and contestant; and what was wrong with those who were sent off, while the others went on."""
    placed = WORKLOADS[workload]._replace(device=device)
    sent_off: dict[str, WrongNumbers] = {}
    while True:
        try:
            return contest(placed, [name for name in names if name not in sent_off], quantities, share), sent_off
        except WrongNumbers as error:
            sent_off[error.contestant] = error.with_traceback(None)  # which holds all that took part


@pytest.mark.benchmark(timer=CLOCK, disable_gc=False)
@pytest.mark.parametrize("workload, quantity, name", list(itertools.product(WORKLOADS, QUANTITIES, ENTRANTS)))
def test_latency(workload: str, quantity: str, name: str, benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> None:
    chosen = pytestconfig.getoption("--entrants")
    names = tuple(entrant for entrant in ENTRANTS if chosen is None or entrant in chosen.split(";"))
    quantities = tuple(str(pytestconfig.getoption("--quantities")).split(";"))
    if name not in names or quantity not in quantities:
        pytest.skip("not asked for")
    device = pytestconfig.getoption("--device")
    if reason := ENTRANTS[name].reason_against(WORKLOADS[workload]._replace(device=device)):
        pytest.skip(reason)
    by_quantity, sent_off = results(workload, names, quantities, pytestconfig.getoption("--share"), device)
    if name in sent_off:
        raise sent_off[name]
    found = by_quantity[quantity]
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
