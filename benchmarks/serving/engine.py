"""What the serving engine costs beside the programs that it runs: latency of a lone request, and adaptations a second for 16 tenants.

python -m benchmarks.serving.engine
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt import CompiledUnroll, compile_unroll, optim
from adaptrt.demo.learner import build_model
from adaptrt.serve import Engine

TENANTS = 16
K = 5
KEEP = "not_worse"

Batch = tuple[Tensor, Tensor]


class Case(NamedTuple):
    """A model, what it adapts to, and what it predicts for."""

    name: str
    unroll: CompiledUnroll
    supports: list[Batch]
    inputs: Tensor


def sine() -> Case:
    """MAML's sine network, and ten points for each tenant."""
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)).eval()
    unroll = compile_unroll(model, optim.sgd(lr=0.01), K, loss=F.mse_loss)
    supports = [(torch.randn(10, 1), torch.randn(10, 1)) for _ in range(TENANTS)]
    return Case("sine MLP 1-40-40-1, SGD, k = 5", unroll, supports, torch.randn(10, 1))


def demo() -> Case:
    """The demo's network of three convolutions, and five images of five classes for each tenant."""
    model = build_model(seed=0)
    unroll = compile_unroll(model, torch.optim.SGD(model.parameters(), lr=0.1), K, loss=F.cross_entropy)
    supports = [(torch.randn(25, 1, 8, 8), torch.arange(25) % 5) for _ in range(TENANTS)]
    return Case("the demo's conv net, SGD, k = 5, 25 images", unroll, supports, torch.randn(50, 1, 8, 8))


def percentile(times_s: list[float], percent: float) -> float:
    """Returns a percentile of times."""
    return sorted(times_s)[min(len(times_s) - 1, int(percent / 100 * len(times_s)))]


def timed(call: Callable[[], object], calls: int) -> list[float]:
    """Returns the seconds of each of several calls, after some that are not timed."""
    for _ in range(calls // 10 + 2):
        call()
    found: list[float] = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return found


class Programs(NamedTuple):
    """Seconds of the programs alone: medians, but for the list."""

    one_lane: list[float]
    one_call: float
    all_lanes: float
    prediction: list[float]


def programs_alone(case: Case, calls: int) -> Programs:
    """Times the programs without the engine, states stacked already."""
    many, unroll = case.unroll.vmap(), case.unroll
    with torch.inference_mode():
        one, of_all = adaptrt.stack([many.start()]), adaptrt.stack([many.start()] * TENANTS)
        first = tuple(value[None] for value in case.supports[0])
        together = tuple(map(torch.stack, zip(*case.supports, strict=True)))
        base = unroll.start()
        return Programs(
            timed(lambda: many.adapt(first, start=one, keep=KEEP), calls),
            statistics.median(timed(lambda: unroll.adapt(case.supports[0], start=base, keep=KEEP), calls)),
            statistics.median(timed(lambda: many.adapt(together, start=of_all, keep=KEEP), calls)),
            timed(lambda: one(case.inputs[None]), calls),
        )


async def require_right_numbers(case: Case, engine: Engine) -> None:
    """Raises unless 16 tenants that adapt twice, at once, get what the unroll alone computes for each.

    Each case draws its data from one seed. Programs of different numbers of lanes round differently; where two numbers under a max-pool are
    equal but for that, the gradient goes to another of them, and with other seeds a tenant's outputs may differ by 0.01.
    """
    for _ in range(2):
        await asyncio.gather(*[engine.adapt(f"right {index}", support) for index, support in enumerate(case.supports)])
    for index, support in enumerate(case.supports):
        with torch.inference_mode():
            alone = case.unroll.adapt(support, keep=KEEP)
            expected = case.unroll.adapt(support, start=alone, keep=KEEP)(case.inputs)
        torch.testing.assert_close(await engine.predict(f"right {index}", case.inputs), expected, rtol=1e-3, atol=1e-4)


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


async def measure(case: Case, calls: int, seconds: float) -> None:
    """Checks the numbers of one model, and prints its table."""
    async with Engine(case.unroll, (case.supports[0], case.inputs), lanes=(1, TENANTS), keep=KEEP) as engine:
        await require_right_numbers(case, engine)
        alone = programs_alone(case, calls)
        adaptations, predictions = await latencies(case, engine, calls)
        rates = [await rate(case, engine, seconds) for _ in range(3)]
        together = [await rate_of_lists(case, engine, seconds) for _ in range(3)]
        assert engine.stats().num_compiled_after_ready == 0
    print(f"\n{case.name}\n\n| one lane, idle | program p50 | engine p50 | above it | engine p99 |\n|---|---|---|---|---|")
    for name, program, found in (("adapt", alone.one_lane, adaptations), ("predict", alone.prediction, predictions)):
        medians = [statistics.median(times) * 1e6 for times in (program, found)]
        tail = percentile(found, 99) * 1e6
        print(f"| {name} | {medians[0]:.0f} µs | {medians[1]:.0f} µs | {medians[1] - medians[0]:.0f} µs | {tail:.0f} µs |")
    own, one_by_one, through_engine = TENANTS / alone.all_lanes, 1 / alone.one_call, 1 / statistics.median(adaptations)
    print(f"\n| {TENANTS} tenants | adaptations/s | of the program's own | times unroll.adapt one by one | times engine.adapt one by one |")
    print("|---|---|---|---|---|")
    for name, per_s in (
        ("the vmapped program alone", own),
        ("unroll.adapt, one after the other", one_by_one),
        ("engine.adapt, one after the other", through_engine),
        (f"engine.adapt, {TENANTS} callers", statistics.median(rates)),
        (f"engine.adapt_all, {TENANTS} tenants", statistics.median(together)),
    ):
        print(f"| {name} | {per_s:,.0f} | {per_s / own:.2f} | {per_s / one_by_one:.2f} | {per_s / through_engine:.2f} |")


def main() -> None:
    """Prints the processor, and tables in Markdown for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1000, help="timed calls for each latency")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each of three runs for each rate")
    parser.add_argument("--only", choices=("sine", "demo"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = model[0].split(":")[1].strip() if model else platform.machine()
    print(f"{name}, {len(model)} cores; torch {torch.__version__}, Python {platform.python_version()}; keep={KEEP!r}, MemoryStore")
    for make in (sine, demo):
        if chosen.only in (None, make.__name__):
            torch.manual_seed(0)
            asyncio.run(measure(make(), chosen.calls if make is sine else chosen.calls // 5, chosen.seconds))


if __name__ == "__main__":
    main()
