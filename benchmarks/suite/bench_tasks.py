"""Throughput: how many meta-gradients of tasks a second, against the number of tasks in one call."""

from __future__ import annotations

import functools
import itertools

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.suite.contest import Result, contest
from benchmarks.suite.contestants import ENTRANTS
from benchmarks.suite.playback import CLOCK, play_back
from benchmarks.suite.workloads import WORKLOADS

NAMES = ("torch.func", "JAX jit + optax", "adaptrt")


@functools.cache
def results(num_tasks: int, share: float, device: str) -> dict[str, Result]:
    names = [name for name in NAMES if ENTRANTS[name].reason_against(WORKLOADS["sine-tasks"]) is None]
    return contest(WORKLOADS["sine-tasks"]._replace(num_tasks=num_tasks, device=device), names, ("meta",), share)["meta"]


@pytest.mark.benchmark(timer=CLOCK, disable_gc=False)
@pytest.mark.parametrize("num_tasks, name", list(itertools.product((1, 4, 16, 64, 256), NAMES)))
def test_throughput(num_tasks: int, name: str, benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> None:
    if reason := ENTRANTS[name].reason_against(WORKLOADS["sine-tasks"]):
        pytest.skip(reason)
    found = results(num_tasks, pytestconfig.getoption("--share"), pytestconfig.getoption("--device"))[name]
    benchmark.group = f"sine MLP, {num_tasks} tasks"
    benchmark.extra_info.update(entrant=name, num_tasks=num_tasks, error=found.error)
    play_back(benchmark, found.times_s)
