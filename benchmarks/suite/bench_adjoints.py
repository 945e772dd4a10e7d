"""The meta-gradient by each adjoint, and by the one that `"auto"` chooses: how far that is from the best."""

from __future__ import annotations

import functools
import itertools

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from adaptrt import Replay, Stash, Unrolled
from benchmarks.suite.contest import Result, contest, times_longer
from benchmarks.suite.contestants import Entrant, ours
from benchmarks.suite.playback import CLOCK, play_back
from benchmarks.suite.workloads import WORKLOADS

AUTO = "auto"
_LARGE = ("conv4-5shot", "conv4-1shot", "conv4-tasks", "transformer", "lstm")
_MANY_MINUTES: dict[str, str] = {workload: "k steps in one graph compile for minutes" for workload in _LARGE}
ADJOINTS = {
    AUTO: Entrant(functools.partial(ours, adjoint="auto")),
    "Unrolled()": Entrant(functools.partial(ours, adjoint=Unrolled()), except_for=_MANY_MINUTES),
    "Stash()": Entrant(functools.partial(ours, adjoint=Stash())),
    "Replay()": Entrant(functools.partial(ours, adjoint=Replay())),
}


@functools.cache
def results(workload: str, share: float, device: str) -> dict[str, Result]:
    asked = WORKLOADS[workload]._replace(device=device)
    names = [name for name in ADJOINTS if ADJOINTS[name].reason_against(asked) is None]
    return contest(asked, names, ("meta",), share, ADJOINTS)["meta"]


@pytest.mark.benchmark(timer=CLOCK, disable_gc=False)
@pytest.mark.parametrize("workload, name", list(itertools.product(WORKLOADS, ADJOINTS)))
def test_adjoint(workload: str, name: str, benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> None:
    if reason := ADJOINTS[name].reason_against(WORKLOADS[workload]):
        pytest.skip(reason)
    found = results(workload, pytestconfig.getoption("--share"), pytestconfig.getoption("--device"))
    benchmark.group = f"{workload}: adjoints"
    benchmark.extra_info.update(workload=workload, adjoint_of=name, error=found[name].error, times_longer=times_longer(found, AUTO)[name])
    play_back(benchmark, found[name].times_s)
