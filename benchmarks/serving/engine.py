"""What the serving engine costs beside the programs that it runs: latency of a lone request, and adaptations a second for 16 tenants.

python -m benchmarks.serving.engine [--only sine] [--seconds 1.5] [--out FILE.md]
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import adaptrt
from adaptrt.serve import Engine
from benchmarks.serving import harness
from benchmarks.serving.harness import KEEP, TENANTS, Bar, Case, percentile
from benchmarks.suite.report import table

MOST_ABOVE_S = 150e-6
LEAST_SHARE = 0.7
LEAST_GAIN = 5.0
"""Bars: what an idle engine may add to a program of one task; with 16 tenants, the share of the vmapped program's own throughput, and how
many times that of one call after the other it is, which is asked of the small model alone."""


def timed(call: Callable[[], object], calls: int) -> float:
    """Returns the median seconds of several calls, after some that are not timed."""
    for _ in range(calls // 10 + 2):
        call()
    found: list[float] = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


class Programs(NamedTuple):
    """Median seconds of the programs alone: an adaptation and a prediction of one task, and an adaptation of all tenants together."""

    adaptation: float
    prediction: float
    all_lanes: float


def programs_alone(case: Case, calls: int) -> Programs:
    """Times the programs without the engine, states stacked already."""
    many, unroll = case.unroll.vmap(), case.unroll
    with torch.inference_mode():
        of_all = adaptrt.stack([many.start()] * TENANTS)
        together = tuple(map(torch.stack, zip(*case.supports, strict=True)))
        base = unroll.start()
        return Programs(
            timed(lambda: unroll.adapt(case.supports[0], start=base, keep=KEEP), calls),
            timed(lambda: base(case.inputs), calls),
            timed(lambda: many.adapt(together, start=of_all, keep=KEEP), calls),
        )


async def latencies(case: Case, engine: Engine, calls: int) -> tuple[list[float], list[float]]:
    """Returns seconds of adaptations and predictions of one tenant, one after the other, with nothing else to do."""
    adaptations, predictions = [], []
    for index in range(calls + calls // 10):
        began = time.perf_counter()
        await engine.adapt("lone", case.supports[index % TENANTS])
        adapted = time.perf_counter()
        await engine.predict("lone", case.inputs)
        adaptations.append(adapted - began)
        predictions.append(time.perf_counter() - adapted)
    return adaptations[calls // 10 :], predictions[calls // 10 :]


async def rate(case: Case, engine: Engine, seconds: float) -> float:
    """Returns adaptations a second of 16 tenants, each of which calls again when it has its answer."""
    ends = time.perf_counter() + seconds

    async def tenant(index: int) -> int:
        count = 0
        while time.perf_counter() < ends:
            await engine.adapt(f"tenant {index}", case.supports[index])
            count += 1
        return count

    began = time.perf_counter()
    counts = await asyncio.gather(*[tenant(index) for index in range(TENANTS)])
    return sum(counts) / (time.perf_counter() - began)


async def rate_of_lists(case: Case, engine: Engine, seconds: float) -> float:
    """Returns adaptations a second of 16 tenants whose caller hands them in together, and waits for all."""
    requests = [(f"tenant {index}", support) for index, support in enumerate(case.supports)]
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        await engine.adapt_all(requests)
        count += TENANTS
    return count / (time.perf_counter() - began)


class Result(NamedTuple):
    """What was measured of one model: seconds of calls, and adaptations a second."""

    alone: Programs
    adaptations: list[float]
    predictions: list[float]
    rate: float
    rate_of_lists: float


async def measure(case: Case, calls: int, seconds: float) -> Result:
    """Checks the numbers of one model, and measures an engine with it."""
    async with Engine(case.unroll, (case.supports[0], case.inputs), lanes=(1, TENANTS), keep=KEEP) as engine:
        await harness.require_right_numbers(case, engine)
        alone = programs_alone(case, calls)
        adaptations, predictions = await latencies(case, engine, calls)
        rates = [await rate(case, engine, seconds) for _ in range(3)]
        together = [await rate_of_lists(case, engine, seconds) for _ in range(3)]
        assert engine.stats().num_compiled_after_ready == 0
    return Result(alone, adaptations, predictions, statistics.median(rates), statistics.median(together))


def markdown(case: Case, found: Result) -> list[str]:
    """Returns the part of a report on one model."""
    alone, lines, bars = found.alone, list[list[str]](), list[Bar]()
    for name, own, times in (("adapt", alone.adaptation, found.adaptations), ("predict", alone.prediction, found.predictions)):
        through = statistics.median(times)
        lines.append([name, *[f"{1e6 * value:.0f} µs" for value in (own, through, through - own, percentile(times, 99))]])
        bar = f"at most {1e6 * MOST_ABOVE_S:.0f} µs"
        bars.append(Bar(f"{name}, one lane, above the program", bar, f"{1e6 * (through - own):.0f} µs", through - own <= MOST_ABOVE_S))
    lone = table(["one lane, idle", "program p50", "engine p50", "above it", "engine p99"], lines)
    own, one_by_one, through_engine = TENANTS / alone.all_lanes, 1 / alone.adaptation, 1 / statistics.median(found.adaptations)
    rates = {
        "the vmapped program alone": own,
        "unroll.adapt, one after the other": one_by_one,
        "engine.adapt, one after the other": through_engine,
        f"engine.adapt, {TENANTS} callers": found.rate,
        f"engine.adapt_all, {TENANTS} tenants": found.rate_of_lists,
    }
    head = [f"{TENANTS} tenants", "adaptations/s", "of the program's own", "times unroll.adapt one by one", "times engine.adapt one by one"]
    lines = [
        [name, f"{value:,.0f}", *[f"{value / other:.2f}" for other in (own, one_by_one, through_engine)]] for name, value in rates.items()
    ]
    for name in list(rates)[3:]:
        bars.append(
            Bar(f"{name}, of the program's own", f"at least {LEAST_SHARE}", f"{rates[name] / own:.2f}", rates[name] / own >= LEAST_SHARE)
        )
    best = max(found.rate, found.rate_of_lists) / through_engine
    if case.title.startswith("sine"):
        bars.append(
            Bar("16 tenants, times engine.adapt one after the other (MLP)", f"at least {LEAST_GAIN}", f"{best:.2f}", best >= LEAST_GAIN)
        )
    return [f"## {case.title}", lone, table(head, lines), harness.bars(bars)]


def main() -> None:
    """Measures an engine with each model."""
    parser = harness.parser(__doc__)
    parser.add_argument("--calls", type=int, default=1000, help="timed calls for each latency; a fifth with the larger model")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each of three runs for each rate")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    parts: list[str] = []
    for make in harness.chosen_cases(chosen.only):
        case = make(TENANTS, chosen.backend)
        calls = chosen.calls if make is harness.sine else chosen.calls // 5
        parts += markdown(case, asyncio.run(measure(case, calls, chosen.seconds)))
    title = "What the serving engine costs beside its programs"
    harness.publish(harness.report(title, parts, f"; keep={KEEP!r}, MemoryStore"), chosen.out)


if __name__ == "__main__":
    main()
