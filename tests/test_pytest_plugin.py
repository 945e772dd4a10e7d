"""The fixture for users' own suites, in a suite of a user's."""

from __future__ import annotations

import pytest

SUITE = '''
import pytest, torch
from torch import nn
from adaptrt import pytest_plugin
from adaptrt import compile_unroll, optim

torch.manual_seed(0)
model = nn.Linear(3, 2)
support = torch.randn(6, 3), torch.randn(6, 2)

@pytest.fixture
def unroll():
    return compile_unroll(model, optim.sgd(lr=0.1), k=2, backend="eager", cache_size=2)

class Clock:
    """In place of the module `time`: calls take the seconds that are said here, whatever the machine takes."""

    now = 0.0

    def perf_counter(self):
        return self.now

@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pytest_plugin, "time", clock)
    return clock

def call_taking(seconds, clock, unroll):
    """A call that takes so many seconds, one after the other."""
    seconds = iter(seconds)
    def call():
        clock.now += next(seconds)
        return unroll.adapt(support)
    return call

def test_within(clock, unroll, unroll_benchmark):
    call = call_taking([9.0, 0.25, 1.0, 0.5, 0.125, 2.0], clock, unroll)
    latency = unroll_benchmark(call, unroll, calls=5, warm_up=1, p50_s=0.5, p99_s=2.0)
    assert list(latency.times_s) == [0.25, 1.0, 0.5, 0.125, 2.0]
    assert (latency.percentile(50), latency.percentile(99)) == (0.5, 2.0)

def test_meta_gradient(unroll, unroll_benchmark):
    latency = unroll_benchmark(lambda: unroll(support, support).backward(), unroll, calls=3)
    assert min(latency.times_s) > 0  # by the machine's own clock

def test_arguments(unroll, unroll_benchmark):
    with pytest.raises(ValueError, match="at least 1"):
        unroll_benchmark(lambda: None, unroll, calls=0)

def test_p50(clock, unroll, unroll_benchmark):
    unroll_benchmark(call_taking([0.0] * 10 + [0.002] * 5, clock, unroll), unroll, calls=5, p50_s=0.001)

def test_p99(clock, unroll, unroll_benchmark):
    unroll_benchmark(call_taking([0.0] * 30 + [0.5, 0.0], clock, unroll), unroll, calls=22, warm_up=10, p50_s=0.4, p99_s=0.4)

@pytest.mark.parametrize("sizes", [[6, 6, 5, 6], [2, 3, 4, 2]], ids=["a_new_shape", "more_shapes_than_are_kept"])
def test_shapes(unroll, unroll_benchmark, sizes):
    sizes = iter(sizes)
    def call():
        size = next(sizes)
        return unroll.adapt((support[0][:size], support[1][:size]))
    unroll_benchmark(call, unroll, calls=2, warm_up=2)
'''


def test_a_suite_with_the_fixture(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_mine=SUITE)
    # In a process of its own: PyTorch cannot be imported twice in one.
    result = pytester.runpytest_subprocess("-p", "adaptrt.pytest_plugin", "-p", "no:xdist")
    result.assert_outcomes(passed=3, failed=4)
    lines: list[str] = result.outlines
    assert {line.split(" - ")[0] for line in lines if line.startswith("FAILED")} == {
        f"FAILED test_mine.py::{name}"
        for name in ("test_p50", "test_p99", "test_shapes[a_new_shape]", "test_shapes[more_shapes_than_are_kept]")
    }
    result.stdout.re_match_lines_random(
        [
            r"p50 is above the budget of 1\.000 ms: p50 2\.000 ms, p99 2\.000 ms over 5 calls",
            r"p99 is above the budget of 400\.000 ms: p50 0\.000 ms, p99 500\.000 ms over 22 calls",
            r"compiled after 2 warm-up calls: adapt.*cache_size",
            r"=+ latency of unrolls =+",
            r"test_mine\.py::test_within: p50 500\.000 ms, p99 2000\.000 ms over 5 calls",
            r"test_mine\.py::test_meta_gradient: p50 .* over 3 calls",
        ]
    )
