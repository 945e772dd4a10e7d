"""Many tenants through few places in memory: whether memory stays what it is, and every state what it would be alone.

    python -m benchmarks.serving.tenants [--minutes 10] [--out FILE.md]

Callers adapt 10,000 tenants, drawn from a fixed seed, and predict after every fourth adaptation. An engine keeps the states of 1,000 in
memory, in front of a `SQLiteStore`, so nine of ten adaptations read a state that was pushed out, and push another one out. Data differs
between tenants, and between the adaptations of each.

Resident memory is sampled once a second, and counts after the first tenth of the time. Then the engine ends, and the state that the store
has of each tenant, optimiser and all, is compared: bit for bit with a program of the same number of lanes that runs this tenant alone, all
lanes alike; and up to rounding with `unroll.adapt` for this tenant alone.

With `--out` a figure of the memory is drawn beside the report.
"""

from __future__ import annotations

import array
import asyncio
import math
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt import CompiledUnroll, compile_unroll, optim
from adaptrt.serve import Engine, SQLiteStore
from benchmarks.serving import harness
from benchmarks.serving.harness import Bar
from benchmarks.suite.report import table

NUM_TENANTS, NUM_SLOTS = 10_000, 1_000
NUM_LANES = 16
CALLERS = 4 * NUM_LANES
K = 5
KEEP = "finite"
NUM_BATCHES = 8
"""Support batches of a tenant, which come by turns."""

WARM_UP = 0.1
"""Share of the time after which memory counts."""

MOST_GROWTH = 0.05
RTOL, ATOL = 1e-3, 1e-4


class Population(NamedTuple):
    """The unroll, and data of all tenants: sines of amplitudes and phases of their own."""

    unroll: CompiledUnroll
    inputs: Tensor  # [NUM_BATCHES, S, 1]
    targets: Tensor  # [tenants, NUM_BATCHES, S, 1]

    def support(self, tenant: int, number: int) -> tuple[Tensor, Tensor]:
        """Returns the data of a tenant's adaptation of this number."""
        return self.inputs[number % NUM_BATCHES], self.targets[tenant, number % NUM_BATCHES]


def population(num_tenants: int, backend: str) -> Population:
    """Makes the tenants from one seed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)).eval()
    unroll = compile_unroll(model, optim.sgd(lr=0.01, momentum=0.9), K, loss=F.mse_loss, backend=backend)
    inputs = 10 * torch.rand(NUM_BATCHES, 10, 1) - 5
    amplitudes, phases = 0.1 + 2 * torch.rand(num_tenants, 1, 1, 1), math.pi * torch.rand(num_tenants, 1, 1, 1)
    return Population(unroll, inputs, amplitudes * torch.sin(inputs + phases))


class Sample(NamedTuple):
    """Memory at a moment: seconds since the start, and bytes."""

    at_s: float
    rss: int


class Run(NamedTuple):
    """What was found.

    Attributes:
      samples: of memory.
      from_s: from when on they count.
      counts: adaptations of each tenant.
      most_cached: states in memory, the largest number seen.
      num_bytes: of one state.
      num_equal: tenants whose state is equal bit for bit to that of the tenant alone.
      largest: difference from `unroll.adapt`, relative to the largest parameter.
    """

    samples: list[Sample]
    from_s: float
    counts: Sequence[int]
    most_cached: int
    num_bytes: int
    num_equal: int
    largest: float


async def serve(
    people: Population, store: SQLiteStore, slots: int, seconds: float, counts: Any
) -> tuple[list[Sample], int, dict[str, str]]:
    """Adapts tenants until the time is over, and counts how often each.

    Returns:
      Samples, the most states in memory, and the fingerprint of the base.
    """
    num_tenants, process = len(people.targets), psutil.Process()
    drawn = random.Random(0)
    busy: set[int] = set()
    samples: list[Sample] = []
    num_adaptations = most_cached = 0
    example, cache_bytes = people.support(0, 0), slots * num_bytes(people)
    async with Engine(
        people.unroll, (example, example[0]), lanes=(NUM_LANES,), together=True, keep=KEEP, store=store, cache_bytes=cache_bytes
    ) as engine:
        began = time.perf_counter()

        async def caller() -> None:
            nonlocal num_adaptations
            while time.perf_counter() - began < seconds:
                tenant = drawn.randrange(num_tenants)
                if tenant in busy:  # so that data and order of a tenant's adaptations are known
                    continue
                busy.add(tenant)
                outcome = await engine.adapt(f"tenant {tenant}", people.support(tenant, counts[tenant]))
                assert outcome.kept
                counts[tenant] += 1
                num_adaptations += 1
                if num_adaptations % 4 == 0:
                    await engine.predict(f"tenant {tenant}", people.inputs[0])
                busy.discard(tenant)

        async def watch() -> None:
            nonlocal most_cached
            while True:
                passed = time.perf_counter() - began
                samples.append(Sample(passed, process.memory_info().rss))
                most_cached = max(most_cached, engine.stats().num_cached_tenants)
                await asyncio.sleep(min(1.0, seconds / 20))

        watcher = asyncio.create_task(watch())
        await asyncio.gather(*[caller() for _ in range(CALLERS)])
        watcher.cancel()
    return samples, most_cached, engine.fingerprint


def num_bytes(people: Population) -> int:
    """Returns the bytes of a state."""
    return sum(value.numel() * value.element_size() for value in people.unroll.start().state.leaves)


def compare(people: Population, store: SQLiteStore, fingerprint: Mapping[str, str], counts: Sequence[int]) -> tuple[int, float]:
    """Compares the states in a store with what tenants have alone.

    Returns:
      How many are equal bit for bit, and the largest relative difference from `unroll.adapt`.

    Raises:
      AssertionError: a state differs from `unroll.adapt` by more than rounding.
    """
    unroll, many = people.unroll, people.unroll.vmap()
    num_equal, largest = 0, 0.0
    with torch.inference_mode():
        for tenant, count in enumerate(counts):
            record = store.get(f"tenant {tenant}")
            assert (record is not None) == (count > 0), f"tenant {tenant} has a record: {record is not None}, adaptations: {count}"
            if record is None:
                continue
            assert isinstance(record.state, bytes) and record.num_adaptations == count
            found = unroll.load(record.state, fingerprint=fingerprint).state.leaves
            alone, alike = unroll.start(), adaptrt.stack([many.start()] * NUM_LANES)
            for number in range(count):
                x, y = people.support(tenant, number)
                alone = unroll.adapt((x, y), start=alone, keep=KEEP)
                alike = many.adapt((torch.stack([x] * NUM_LANES), torch.stack([y] * NUM_LANES)), start=alike, keep=KEEP)
            num_equal += all(map(torch.equal, found, alike.unbind()[0].state.leaves))
            expected = alone.state.leaves
            scale = max(value.abs().max().item() for value in expected)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=RTOL, atol=ATOL, msg=lambda text, tenant=tenant: f"tenant {tenant}: {text}")
                largest = max(largest, (one - other).abs().max().item() / scale)
    return num_equal, largest


def measure(num_tenants: int, slots: int, seconds: float, backend: str) -> Run:
    """Serves, and compares states."""
    people = population(num_tenants, backend)
    counts = array.array("l", [0] * num_tenants)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tenants.db"
        store = SQLiteStore(path, synchronous="normal")
        samples, most_cached, fingerprint = harness.run(serve(people, store, slots, seconds, counts))
        store.close()
        store = SQLiteStore(path)
        num_equal, largest = compare(people, store, fingerprint, counts)
        store.close()
    return Run(samples, WARM_UP * seconds, counts, most_cached, num_bytes(people), num_equal, largest)


def growth(found: Run) -> tuple[float, float]:
    """Returns how much more memory than at the beginning there was at most, as a share, and the slope in bytes a minute."""
    counted = [sample for sample in found.samples if sample.at_s >= found.from_s]
    begin = counted[0].rss
    mean_s, mean = sum(sample.at_s for sample in counted) / len(counted), sum(sample.rss for sample in counted) / len(counted)
    over = sum((sample.at_s - mean_s) ** 2 for sample in counted) or 1.0
    slope = sum((sample.at_s - mean_s) * (sample.rss - mean) for sample in counted) / over
    return max(abs(sample.rss - begin) for sample in counted) / begin, 60 * slope


def markdown(found: Run, slots: int) -> list[str]:
    """Returns the parts of the report."""
    last = found.samples[-1]
    share, slope = growth(found)
    num_used = sum(count > 0 for count in found.counts)
    counted = [sample.rss for sample in found.samples if sample.at_s >= found.from_s]
    rows = [
        ["adaptations", f"{sum(found.counts):,}, {sum(found.counts) / last.at_s:,.0f} a second"],
        ["of a tenant", f"{min(found.counts)} to {max(found.counts)}"],
        ["tenants with a state", f"{num_used:,} of {len(found.counts):,}"],
        ["most states in memory", f"{found.most_cached:,}, of {found.num_bytes:,} bytes each"],
        ["resident memory from the warm-up on", f"{min(counted) / 2**20:,.1f} to {max(counted) / 2**20:,.1f} MiB"],
        ["trend", f"{slope / 2**20:+.2f} MiB a minute"],
        ["largest difference from `unroll.adapt` alone", f"{found.largest:.0e} of the largest value"],
    ]
    bars = [
        Bar("resident memory from the warm-up on", f"within {MOST_GROWTH:.0%}", f"{share:.1%}", share <= MOST_GROWTH),
        Bar("states equal bit for bit to the tenant's alone", "all", f"{found.num_equal:,} of {num_used:,}", found.num_equal == num_used),
        # A tenant with a request keeps its place.
        Bar("states in memory", f"at most {slots + CALLERS:,}", f"{found.most_cached:,}", found.most_cached <= slots + CALLERS),
    ]
    return [table(["", ""], rows), harness.bars(bars)]


def figure(found: Run, path: Path) -> None:
    """Resident memory over time, and the band that it has to stay in."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, axis = plt.subplots(figsize=(7, 3.6))
    minutes, sizes = zip(*[(sample.at_s / 60, sample.rss / 2**20) for sample in found.samples], strict=True)
    begin = next(sample.rss for sample in found.samples if sample.at_s >= found.from_s) / 2**20
    axis.axhspan(
        begin * (1 - MOST_GROWTH), begin * (1 + MOST_GROWTH), color="C2", alpha=0.15, label=f"±{MOST_GROWTH:.0%} of the end of the warm-up"
    )
    axis.axvline(found.from_s / 60, color="C7", linewidth=1)
    axis.plot(minutes, sizes, color="C0", label="resident memory")
    axis.set(xlabel="minutes", ylabel="MiB", xlim=(0, None), ylim=(0, 1.25 * max(sizes)), title=f"{sum(found.counts):,} adaptations")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


def main() -> None:
    """Serves many tenants, and reports."""
    parser = harness.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of serving; comparing states takes some more")
    parser.add_argument("--tenants", type=int, default=NUM_TENANTS)
    parser.add_argument("--slots", type=int, default=NUM_SLOTS, help="states in memory")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(chosen.tenants, chosen.slots, 60 * chosen.minutes, chosen.backend)
    parts = markdown(found, chosen.slots)
    if chosen.out is not None:
        figure(found, chosen.out.with_suffix(".png"))
        parts.append(f"![resident memory over time]({chosen.out.with_suffix('.png').name})")
    title = f"{chosen.tenants:,} tenants through {chosen.slots:,} places in memory"
    details = f"; sine MLP 1-40-40-1, SGD with momentum, k = {K}, lanes ({NUM_LANES},), SQLiteStore(synchronous='normal')"
    harness.publish(harness.report(title, parts, details), chosen.out)


if __name__ == "__main__":
    main()
