"""The serving engine under open load: latency at half of its capacity, goodput and queue at and beyond its capacity.

    python -m benchmarks.serving.load [--only sine] [--seconds 10] [--out FILE.md]

Requests of many tenants arrive as a Poisson process with a fixed seed. Arrivals follow the clock and do not wait for answers, and a latency
counts from the moment at which the request was due, so what an engine that falls behind does to later requests is counted. Numbers are
compared with the unroll alone first. Then capacity is measured in a closed loop: answers a second where more callers wait than a batch
holds. That is done anew before and after each load, whose goodput is compared with the mean. Requests arrive at 0.5, 1 and 2 times the
capacity: without deadlines, with deadlines of a few batches, and with long ones, so that first deadlines bound the queue, and then
`max_queue` does.

The requests are made on the engine's event loop, as by the HTTP server that would hold it: what it costs to accept or refuse a request is a
service's cost, too. What it is that is measured, the engine or the generator, three numbers say. "late" is how long after its due moment
a request was made; it is part of the latency. "loop" is the share of time in which the event loop's thread ran, on which both the
generator and half of the engine are. "generator" is that share with requests at the same rate that are answered without an engine. Both
share Python's interpreter lock with the thread that computes.

Before the loads Python's garbage collector is told to leave alone what is there (`gc.freeze()`), as a service should once it is ready: a
full collection goes through all of PyTorch's objects, and meanwhile nothing else runs. The last row, "not frozen", shows what that does.

"in vain" counts adaptations that were computed, but not committed since their deadline had passed. Whether a request is begun although its
deadline has passed cannot be counted from outside, so it is tried before: with a clock that jumps while requests wait.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch

import adaptrt
from adaptrt.errors import DeadlineExceeded, Overloaded
from adaptrt.serve import Engine
from benchmarks.serving import harness
from benchmarks.serving.harness import KEEP, Bar, Beginning, Case, percentile
from benchmarks.suite.report import shown_time, table

LANES = (1, 4, 16)
MAX_DELAY_S = 0.002
NUM_TENANTS = 1000
NUM_SUPPORTS = 64
CALLERS = 4 * LANES[-1]
MAX_QUEUE = 16 * LANES[-1]
NOT_FROZEN = "none, not frozen"
LOADS = [
    (0.5, "none", None),
    (1.0, "short deadlines", 6),
    (2.0, "short deadlines", 6),
    (1.0, "long deadlines", 60),
    (2.0, "long deadlines", 60),
    (0.5, NOT_FROZEN, None),
]
"""Times the capacity, and the deadline in times of a batch. With short ones fewer than `MAX_QUEUE` requests can wait, with long ones the
queue is full first."""

WARM_UP = 0.2
"""Share of a load's time that is not counted."""

MAX_BURST = 16
"""How many requests that are late are made before the event loop has a turn."""

PATIENCE_S = 20.0


class Adapts(Protocol):
    """The part of an engine that is loaded."""

    async def adapt(self, tenant: str, support: Any, deadline_s: float | None = None) -> Any: ...


class Nothing:
    """Answers at the next turn of the event loop: what is left is the generator."""

    async def adapt(self, tenant: str, support: Any, deadline_s: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        loop.call_soon(future.set_result, None)
        await future


class Offered(NamedTuple):
    """What became of an open load.

    Attributes:
      rate: requests a second that were due.
      goodput: answers a second.
      latencies_s: from the due moment to the answer.
      late_s: from the due moment to the call.
      counts: of requests, by what became of them.
      loop_share: of the time in which the event loop's thread ran.
    """

    rate: float
    goodput: float
    latencies_s: list[float]
    late_s: list[float]
    counts: Counter[str]
    loop_share: float


async def offer(engine: Adapts, case: Case, times: Sequence[float], seconds: float, deadline_s: float | None) -> Offered:
    """Calls `adapt` at these times for tenants drawn from a fixed seed, and waits for the answers.

    Raises:
      RuntimeError: a request was not answered, long after the last.
    """
    drawn = random.Random(1)
    requests = [(f"tenant {tenant}", case.supports[tenant % len(case.supports)]) for tenant in range(NUM_TENANTS)]
    chosen = [requests[drawn.randrange(NUM_TENANTS)] for _ in times]
    latencies_s: list[float] = []
    late_s: list[float] = []
    counts: Counter[str] = Counter()
    warm_s = WARM_UP * seconds
    num_in_time = num_done = 0
    all_done = asyncio.Event()

    def note(due: float, error: BaseException | None) -> None:
        nonlocal num_in_time, num_done
        num_done += 1
        if num_done == len(times):
            all_done.set()
        if isinstance(error, DeadlineExceeded):
            counts["expired"] += 1
        elif isinstance(error, Overloaded):
            counts["overloaded"] += 1
        elif error is not None:
            counts[type(error).__name__] += 1
        else:
            counts["answered"] += 1
            now = time.perf_counter() - began
            num_in_time += warm_s <= now < seconds
            if due >= warm_s:
                latencies_s.append(now - due)

    began, cpu_began = time.perf_counter(), time.thread_time()
    for due, (tenant, support) in zip(times, chosen, strict=True):
        if (ahead := began + due - time.perf_counter()) > 0:
            await asyncio.sleep(ahead)
        elif len(late_s) % MAX_BURST == 0:
            await asyncio.sleep(0)
        late = max(0.0, time.perf_counter() - began - due)
        late_s.append(late)
        left_s = None if deadline_s is None else max(0.0, deadline_s - late)
        Beginning(engine.adapt(tenant, support, left_s), lambda _, error, due=due: note(due, error))
    share = (time.thread_time() - cpu_began) / (time.perf_counter() - began)
    try:
        await asyncio.wait_for(all_done.wait(), PATIENCE_S)
    except TimeoutError:
        raise RuntimeError(f"{len(times) - num_done} requests were not answered within {PATIENCE_S} s") from None
    return Offered(len(times) / seconds, num_in_time / (seconds - warm_s), latencies_s, late_s, counts, share)


class Capacity(NamedTuple):
    """Adaptations a second in a closed loop, and the seconds of a batch meanwhile."""

    rate: float
    batch_s: float

    def mean(self, other: Capacity) -> Capacity:
        return Capacity((self.rate + other.rate) / 2, (self.batch_s + other.batch_s) / 2)


async def capacity(case: Case, engine: Engine, seconds: float) -> Capacity:
    """Measures callers that each call again at once."""
    tenants = random.Random(2)

    async def caller(ends: float) -> int:
        count = 0
        while time.perf_counter() < ends:
            tenant = tenants.randrange(NUM_TENANTS)
            await engine.adapt(f"tenant {tenant}", case.supports[tenant % len(case.supports)])
            count += 1
        return count

    rates: list[float] = []
    batches_s: list[float] = []
    for _ in range(3):
        before, began = engine.stats().events, time.perf_counter()
        counts = await asyncio.gather(*[caller(began + seconds / 3) for _ in range(CALLERS)])
        passed = time.perf_counter() - began
        rates.append(sum(counts) / passed)
        batches_s.append(passed / (engine.stats().events["adapt batches"] - before.get("adapt batches", 0)))
    return Capacity(statistics.median(rates), statistics.median(batches_s))


class Row(NamedTuple):
    """A load, and what the engine counted meanwhile.

    Attributes:
      times: the capacity.
      what: which bound the requests have.
      deadline_s: of each.
      capacity: the mean of before and after.
      offered: what became of it.
      in_vain: adaptations that were computed and not committed.
      longest: the longest queue seen.
    """

    times: float
    what: str
    deadline_s: float | None
    capacity: Capacity
    offered: Offered

    @property
    def share(self) -> float:
        """Goodput by capacity."""
        return self.offered.goodput / self.capacity.rate

    in_vain: int
    longest: int


async def row(case: Case, engine: Engine, capacity: Capacity, times: float, what: str, deadline_s: float | None, seconds: float) -> Row:
    """Offers a load to an engine: so many times its capacity.

    Raises:
      RuntimeError: the engine has not committed what its callers were told, or counts other refusals than they got.
    """
    longest = 0

    async def watch() -> None:
        nonlocal longest
        while True:
            longest = max(longest, engine.stats().num_waiting)
            await asyncio.sleep(0.01)

    before = Counter(engine.stats().events)
    watcher = asyncio.create_task(watch())
    offered = await offer(engine, case, harness.poisson(times * capacity.rate, seconds, seed=0), seconds, deadline_s)
    watcher.cancel()
    events = Counter(engine.stats().events) - before
    finished = events["committed"] + events["not kept"]
    counted = {"answered": finished, "expired": events["expired"], "overloaded": events["overloaded"]}
    if any(offered.counts[name] != count for name, count in counted.items()) or events["failed"]:
        raise RuntimeError(f"callers count {dict(offered.counts)}, the engine {dict(events)}")
    return Row(times, what, deadline_s, capacity, offered, events["adapt"] - finished, longest)


async def require_expired_work_is_not_run(case: Case) -> None:
    """Raises if an engine begins an adaptation whose deadline has passed. Its clock jumps while requests wait."""
    now = 0.0
    async with Engine(case.unroll, (case.supports[0], case.inputs), lanes=LANES[-1:], keep=KEEP, clock=lambda: now) as engine:
        calls = [asyncio.create_task(engine.adapt(f"tenant {index}", case.supports[0], 1.0)) for index in range(1000)]
        await asyncio.sleep(0)
        now = 2.0
        begun = engine.stats().events.get("adapt", 0) + LANES[-1]  # and one batch that was taken, but not counted yet
        found = await asyncio.gather(*calls, return_exceptions=True)
        computed = engine.stats().events.get("adapt", 0)
    if computed > begun or any(not isinstance(error, DeadlineExceeded) for error in found[computed:]):
        raise RuntimeError(f"{computed} adaptations were computed, of which {begun} at most had begun before their deadline")


class Result(NamedTuple):
    """What was measured of one model.

    Attributes:
      program_s: of the program of a full batch alone.
      generator_share: of the time that the generator takes at the rate of the capacity.
      rows: the loads.
    """

    program_s: float
    generator_share: float
    rows: list[Row]


def program_s(case: Case, calls: int = 30) -> float:
    """Returns the median seconds of the program of a full batch, without the engine."""
    many, num_lanes = case.unroll.vmap(), LANES[-1]
    supports = [case.supports[index % len(case.supports)] for index in range(num_lanes)]
    together = tuple(map(torch.stack, zip(*supports, strict=True)))
    times: list[float] = []
    with torch.inference_mode():
        start = adaptrt.stack([many.start()] * num_lanes)
        for _ in range(calls + 3):
            began = time.perf_counter()
            many.adapt(together, start=start, keep=KEEP)
            times.append(time.perf_counter() - began)
    return statistics.median(times[3:])


async def measure(case: Case, seconds: float) -> Result:
    """Checks the numbers of one model, and loads an engine with it."""
    await require_expired_work_is_not_run(case)
    example = case.supports[0], case.inputs
    async with Engine(case.unroll, example, lanes=LANES, keep=KEEP, max_queue=MAX_QUEUE, max_delay_s=MAX_DELAY_S) as engine:
        await harness.require_right_numbers(case, engine)
        await capacity(case, engine, seconds / 10)  # which also makes the tenants known
        gc.collect()
        gc.freeze()
        before = await capacity(case, engine, seconds / 2)
        rows: list[Row] = []
        for times, what, num_batches in LOADS:
            if what == NOT_FROZEN:
                gc.unfreeze()
            deadline_s = None if num_batches is None else MAX_DELAY_S + num_batches * before.batch_s
            found = await row(case, engine, before, times, what, deadline_s, seconds)
            after = await capacity(case, engine, seconds / 2)
            rows.append(found._replace(capacity=before.mean(after)))
            before = after
        assert engine.stats().num_compiled_after_ready == 0
    nothing = await offer(Nothing(), case, harness.poisson(rows[0].capacity.rate, seconds / 5, seed=0), seconds / 5, None)
    return Result(program_s(case), nothing.loop_share, rows)


def bars(found: Result) -> list[Bar]:
    """Returns what is required of the loads."""
    half, beyond = found.rows[0], [row for row in found.rows if row.times == 2]
    p99, bound = percentile(half.offered.latencies_s, 99), MAX_DELAY_S + 3 * half.capacity.batch_s
    rows = [Bar("p99 at 0.5 × capacity", f"at most {shown_time(bound)}", shown_time(p99), p99 <= bound)]
    for row in beyond:
        rows.append(Bar(f"goodput at 2 × capacity, {row.what}", "at least 0.90 of capacity", f"{row.share:.2f}", row.share >= 0.9))
    longest = max(row.longest for row in found.rows)
    rows.append(Bar("longest queue", f"at most {MAX_QUEUE}", str(longest), longest <= MAX_QUEUE))
    return rows


HEAD = ["load", "deadline", "capacity/s", "offered/s", "goodput/s", "of capacity", "p50", "p99"]
HEAD += ["expired", "overloaded", "in vain", "queue", "late", "loop"]


def markdown(case: Case, found: Result) -> list[str]:
    """Returns the part of a report on one model."""
    lines: list[list[str]] = []
    for row in found.rows:
        offered = row.offered
        num = sum(offered.counts.values()) or 1
        lines.append(
            [
                f"{row.times:g} ×",
                row.what if row.deadline_s is None else shown_time(row.deadline_s),
                f"{row.capacity.rate:,.0f}",
                f"{offered.rate:,.0f}",
                f"{offered.goodput:,.0f}",
                f"{row.share:.2f}",
                *[shown_time(percentile(offered.latencies_s, percent)) for percent in (50, 99)],
                *[f"{100 * offered.counts[name] / num:.1f}%" for name in ("expired", "overloaded")],
                str(row.in_vain),
                str(row.longest),
                shown_time(percentile(offered.late_s, 99)),
                f"{100 * offered.loop_share:.0f}%",
            ]
        )
    batch_s = statistics.median(row.capacity.batch_s for row in found.rows)
    words = (
        f"At capacity the engine runs a batch every {shown_time(batch_s)}; the program of {LANES[-1]} lanes alone takes "
        f"{shown_time(found.program_s)}. Generator at capacity: {100 * found.generator_share:.0f}% of the time."
    )
    return [f"## {case.title}", words, table(HEAD, lines), harness.bars(bars(found))]


def main() -> None:
    """Loads an engine with each model."""
    parser = harness.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load, and of measuring capacity")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    parts: list[str] = []
    for make in harness.chosen_cases(chosen.only):
        case = make(NUM_SUPPORTS, chosen.backend)
        parts += markdown(case, harness.run(measure(case, chosen.seconds)))
    details = f"; lanes {LANES}, max_delay_s={MAX_DELAY_S}, max_queue={MAX_QUEUE}, {NUM_TENANTS:,} tenants, MemoryStore, keep={KEEP!r}"
    words = "`late` is the 99th percentile; the other columns are explained in the header of `benchmarks/serving/load.py`."
    harness.publish(harness.report("The serving engine under open load", [words, *parts], details), chosen.out)


if __name__ == "__main__":
    main()
