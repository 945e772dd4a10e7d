"""Recorded times as a benchmark's own: pytest-benchmark cannot take turns or start processes, but has statistics, JSON and comparisons."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from pytest_benchmark.fixture import BenchmarkFixture


class Playback:
    """A clock that shows recorded seconds: each second look at it is one record later than the look before."""

    def __init__(self) -> None:
        self._looks: Iterator[float] = iter(())

    def load(self, times_s: Sequence[float]) -> None:
        self._looks = itertools.chain.from_iterable((0.0, seconds) for seconds in times_s)

    def __call__(self) -> float:
        return next(self._looks)


CLOCK = Playback()
"""For `@pytest.mark.benchmark(timer=CLOCK)`."""


def play_back(benchmark: BenchmarkFixture, times_s: Sequence[float]) -> None:
    """Lets a benchmark marked with `CLOCK` have taken these seconds."""
    CLOCK.load(times_s)
    benchmark.pedantic(lambda: None, rounds=len(times_s), iterations=1)
