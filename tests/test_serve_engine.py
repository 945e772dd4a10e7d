"""The engine: numbers under mixing, guards, the queue, commits, outages, and what is refused."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptrt
from adaptrt import CompiledUnroll
from adaptrt.errors import (
    CommitConflict,
    DeadlineExceeded,
    DeviceMismatch,
    InvalidArgument,
    InvalidBatch,
    InvalidState,
    InvalidType,
    LabelOutOfRange,
    NonFiniteInput,
    NotServing,
    Overloaded,
    ShapeChanged,
    StoreUnavailable,
    TooManyTenants,
    UnknownTenant,
)
from adaptrt.serve import Change, Engine, History, Lifecycle, MemoryStore, Outcome, Record, SizesTaken, SQLiteStore, Store, programs, trees
from adaptrt.serve.queue import WorkQueue
from adaptrt.serve.work import Work
from tests import web

_DRAWN = torch.Generator().manual_seed(0)
OPTIMISERS: dict[str, Callable[[nn.Module, float], Any]] = {
    "sgd": lambda model, scale: adaptrt.optim.sgd(lr=scale, momentum=0.9),
    "chain": lambda model, scale: adaptrt.optim.chain(adaptrt.optim.clip_by_global_norm(1.0), adaptrt.optim.sgd(lr=scale)),
    "groups": lambda model, scale: torch.optim.SGD([{"params": part.parameters(), "lr": scale} for part in list(model.children())[::2]]),
}
X, Y = SUPPORT = torch.randn(6, 3, generator=_DRAWN), torch.arange(6) % 2
INPUTS = torch.randn(4, 3)


def make(lr: float = 0.3, **changes: Any) -> CompiledUnroll:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    wanted: dict[str, Any] = {"loss": F.cross_entropy, "backend": "eager", **changes}
    return adaptrt.compile_unroll(model, adaptrt.optim.adam(lr=lr), 2, **wanted)


@functools.cache
def shared_unroll() -> CompiledUnroll:
    return make()


@pytest.fixture(autouse=True, scope="module")
def _programs_are_compiled_once() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    with web.shared_programs():
        yield


def data(seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(6, 3, generator=generator), torch.randint(2, (6,), generator=generator)


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """Holds the compute thread before its next batch, and notes what each batch has: the numbers of lanes in use."""

    def __init__(self, engine: Engine) -> None:
        self.log: list[tuple[str, list[str]]] = []
        self._open = threading.Event()
        self._open.set()
        self.reached = threading.Event()
        lanes = engine._core._lanes
        for kind in ("adapt", "predict"):
            setattr(lanes, kind, self._through(kind, getattr(lanes, kind)))

    def _through(self, kind: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def through(works: Sequence[Any]) -> Any:
            self.log.append((kind, [work.tenant.name if work.tenant else "" for work in works]))
            self.reached.set()
            assert self._open.wait(20)
            return run(works)

        return through

    async def hold(self, engine: Engine) -> asyncio.Task[Any]:
        """Returns once a first request is held on the compute thread."""
        self.reached.clear()
        self._open.clear()
        first = asyncio.create_task(engine.adapt_predict(SUPPORT, INPUTS))
        await asyncio.to_thread(self.reached.wait, 20)
        self.log.clear()
        return first

    def open(self) -> None:
        self._open.set()


def run(test: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(test(), 30))


@contextlib.asynccontextmanager
async def serving(unroll: CompiledUnroll | None = None, **changes: Any) -> AsyncIterator[Engine]:
    wanted: dict[str, Any] = {"lanes": (1, 4), "max_delay_s": 0.02, "together": True, **changes}
    async with Engine(unroll or shared_unroll(), (SUPPORT, INPUTS), **wanted) as engine:
        yield engine
        assert engine.stats().num_compiled_after_ready == 0
    assert engine.stats().lifecycle is Lifecycle.STOPPED
    assert not engine._core._tenants


def require_close(losses: Sequence[float], expected: Sequence[float]) -> None:
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))


async def tick() -> None:
    """Lets other tasks go as far as they can."""
    for _ in range(5):
        await asyncio.sleep(0)


# Numbers


class Alone:
    """One tenant, without the engine: calls of the unroll, one after the other."""

    def __init__(self, unroll: CompiledUnroll, keep: str = "not_worse") -> None:
        self._unroll = unroll
        self._keep = keep
        self._state = unroll.start()

    def adapt(self, support: Any) -> list[float]:
        with torch.no_grad():
            self._state = self._unroll.adapt(support, start=self._state, keep=self._keep)
        return self._state.losses.tolist()

    def predict(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return self._state(inputs)

    def forget(self) -> None:
        self._state = self._unroll.start()


OPERATIONS = st.lists(st.tuples(st.integers(0, 4), st.sampled_from("aapf"), st.integers(0, 50)), min_size=1, max_size=30)


async def act(engine: Engine, operations: Sequence[tuple[int, str, int]]) -> dict[int, list[Any]]:
    """Runs each tenant's operations one after the other, all tenants at once; returns what each got."""
    found: dict[int, list[Any]] = {}

    async def of_tenant(tenant: int) -> None:
        name, got = f"tenant {tenant}", found.setdefault(tenant, [])
        for _, kind, seed in [operation for operation in operations if operation[0] == tenant]:
            if kind == "a":
                got.append(torch.tensor((await engine.adapt(name, data(seed))).losses))
            elif kind == "p":
                got.append(await engine.predict(name, data(seed)[0][:4]))
            else:
                await engine.forget(name)

    await asyncio.gather(*[of_tenant(tenant) for tenant in {tenant for tenant, _, _ in operations}])
    return found


over_ways = pytest.mark.parametrize("together", [True, False], ids=["together", "one by one"])


@over_ways
@settings(max_examples=25, deadline=None)
@given(operations=OPERATIONS)
def test_any_interleaving_equals_each_tenant_alone(together: bool, operations: list[tuple[int, str, int]]) -> None:
    async def test() -> dict[int, list[Any]]:
        async with serving(together=together) as engine:
            return await act(engine, operations)

    found = run(test)
    for tenant, got in found.items():
        alone, results = Alone(shared_unroll()), iter(got)
        for _, kind, seed in [operation for operation in operations if operation[0] == tenant]:
            if kind == "a":
                torch.testing.assert_close(next(results), torch.tensor(alone.adapt(data(seed))))
            elif kind == "p":
                torch.testing.assert_close(next(results), alone.predict(data(seed)[0][:4]))
            else:
                alone.forget()


@settings(max_examples=10, deadline=None)
@given(operations=OPERATIONS)
def test_with_one_size_of_batch_the_bits_are_equal(operations: list[tuple[int, str, int]]) -> None:
    async def test() -> None:
        async with serving(lanes=(4,)) as engine:
            mixed = await act(engine, operations)
        for tenant, got in mixed.items():
            async with serving(lanes=(4,)) as engine:
                alone = await act(engine, [operation for operation in operations if operation[0] == tenant])
            assert all(torch.equal(one, other) for one, other in zip(got, alone[tenant], strict=True))

    run(test)


def test_one_by_one_the_bits_are_those_of_the_unroll_alone() -> None:
    async def test() -> None:
        async with serving(lanes=(1, 4), together=False) as engine:
            names = ["ann", "bob", "cyd"]
            outcomes = await engine.adapt_all([(name, data(index)) for index, name in enumerate(names)])
            outputs = await asyncio.gather(*[engine.predict(name, INPUTS) for name in names])
        for index, (outcome, found) in enumerate(zip(outcomes, outputs, strict=True)):
            with torch.inference_mode():
                alone = shared_unroll().adapt(data(index), keep="not_worse")
                expected = alone(INPUTS)
            assert isinstance(outcome, Outcome) and outcome.losses == tuple(alone.losses.tolist())
            assert torch.equal(found, expected) and not found.is_inference()

    run(test)


@pytest.mark.parametrize("one_by_one_takes_s", [0.5, 2.0])
def test_the_faster_way_is_chosen_once(one_by_one_takes_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two is faster is given here; afterwards all batches of this size are computed so, and nothing is compiled."""

    def seconds(run: Callable[[], object]) -> float:
        run()
        return one_by_one_takes_s / 4 if getattr(run, "__name__", "") in ("adapt_alone", "predict_alone") else 1.0

    monkeypatch.setattr(programs, "_seconds", seconds)

    async def test() -> None:
        async with Engine(make(), (SUPPORT, INPUTS), lanes=(1, 4)) as engine:
            used = engine._programs
            assert not used.is_together("adapt", 1) and not used.is_together("predict", 1)
            assert used.is_together("adapt", 4) == used.is_together("predict", 4) == (one_by_one_takes_s > 1)
            names = ["ann", "bob", "cyd"]
            await engine.adapt_all([(name, data(index)) for index, name in enumerate(names)])
            for index, name in enumerate(names):
                alone = Alone(shared_unroll())
                alone.adapt(data(index))
                torch.testing.assert_close(await engine.predict(name, INPUTS), alone.predict(INPUTS))
            assert engine.stats().num_compiled_after_ready == 0

    run(test)


def test_a_version_is_that_of_weights_steps_and_hyperparameters() -> None:
    def version(unroll: CompiledUnroll) -> str:
        return Engine(unroll, (SUPPORT, INPUTS), lanes=(1,)).version

    def trained_on() -> CompiledUnroll:
        unroll = make()
        with torch.no_grad():
            next(iter(unroll.module().parameters())).add_(1e-3)
        return unroll

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    three_steps = adaptrt.compile_unroll(model, adaptrt.optim.adam(lr=0.3), 3, loss=F.cross_entropy, backend="eager")
    assert version(make()) == version(make())
    assert len({version(unroll) for unroll in (make(), make(lr=0.2), three_steps, trained_on())}) == 4


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_has_a_version(name: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()

    def version(scale: float) -> str:
        unroll = adaptrt.compile_unroll(model, OPTIMISERS[name](model, scale), 2, loss=F.cross_entropy, backend="eager")
        return Engine(unroll, (SUPPORT, INPUTS), lanes=(1,)).version

    assert version(0.1) == version(0.1) != version(0.2)


@pytest.mark.parametrize("together", [None, False])
def test_a_lone_request_is_not_computed_over_tasks(together: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with serving(lanes=(4,), together=together) as engine:
            for name in ("adapt", "predict"):
                monkeypatch.setattr(engine._programs, name, None)
            assert (await engine.adapt("ann", SUPPORT)).kept
            await engine.predict("ann", INPUTS)

    run(test)


def test_a_tenant_that_has_a_state_is_not_one_too_many(tmp_path: Path) -> None:
    """Two engines on one store: the second finds, when it commits, that the first has committed for the tenant."""

    async def test() -> None:
        with contextlib.closing(SQLiteStore(tmp_path / "tenants.db")) as store:
            async with serving(store=store, max_tenants=1) as one, serving(store=store, max_tenants=1) as other:
                outcomes = await asyncio.gather(one.adapt("ann", SUPPORT), other.adapt("ann", SUPPORT))
                assert abs(outcomes[0].version - outcomes[1].version) == 1
                with pytest.raises(TooManyTenants):
                    await one.adapt("bob", SUPPORT)

    run(test)


def test_batches_mix_tenants_and_stateless_requests() -> None:
    async def test() -> None:
        async with serving(lanes=(1, 8)) as engine:
            gate = Gate(engine)
            first = await gate.hold(engine)
            names = ["ann", "bob", "cyd"]
            calls = [engine.adapt(name, data(index)) for index, name in enumerate(names)]
            tasks = [asyncio.create_task(call) for call in [*calls, engine.adapt_predict(data(7), INPUTS)]]
            await tick()
            gate.open()
            *outcomes, prediction = await asyncio.gather(*tasks)
            assert ("adapt", ["", *names]) in gate.log
            for index, outcome in enumerate(outcomes):
                require_close(outcome.losses, Alone(shared_unroll()).adapt(data(index)))
            alone = Alone(shared_unroll())
            alone.adapt(data(7))
            torch.testing.assert_close(prediction.outputs, alone.predict(INPUTS))
            assert (await first).kept

    run(test)


@over_ways
@pytest.mark.parametrize("bad", ["nan", "huge", "label"])
def test_a_bad_lane_leaves_the_others_as_they_are(bad: str, together: bool) -> None:
    unroll = make(nonfinite="ignore") if bad == "nan" else shared_unroll()
    lane = {"nan": (torch.full((6, 3), float("nan")), SUPPORT[1]), "huge": data(9, 1e30), "label": (SUPPORT[0], SUPPORT[1] + 5)}[bad]

    async def states(last: tuple[Tensor, Tensor]) -> tuple[list[Tensor], Any]:
        async with serving(unroll, lanes=(4,), together=together) as engine:
            gate = Gate(engine)
            first = await gate.hold(engine)
            calls = [engine.adapt(f"tenant {index}", data(index)) for index in range(3)]
            tasks = [asyncio.create_task(call) for call in [*calls, engine.adapt("zoe", last)]]
            await tick()
            gate.open()
            found = (await asyncio.gather(*tasks, return_exceptions=True))[-1]
            await first
            return [await engine.predict(f"tenant {index}", INPUTS) for index in range(3)] + [await engine.predict("zoe", INPUTS)], found

    async def test() -> None:
        good, kept = await states(data(4))
        others, refused = await states(lane)
        assert kept.kept
        assert isinstance(refused, LabelOutOfRange) if bad == "label" else (not refused.kept and refused.version == 0)
        assert all(torch.equal(one, other) for one, other in zip(good[:3], others[:3], strict=True))
        torch.testing.assert_close(others[3], Alone(unroll).predict(INPUTS))

    run(test)


def test_data_that_is_not_finite_is_refused_alone() -> None:
    async def test() -> None:
        async with serving() as engine:
            gate = Gate(engine)
            first = await gate.hold(engine)
            bad = SUPPORT[0].clone()
            bad[2, 1] = float("inf")
            supports = [data(0), (bad, SUPPORT[1]), data(1)]
            tasks = [asyncio.create_task(engine.adapt(f"{index}", support)) for index, support in enumerate(supports)]
            await tick()
            gate.open()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(each).__name__ for each in found] == ["Outcome", "NonFiniteInput", "Outcome"]
            assert ("adapt", ["0", "2"]) in gate.log  # the others stay together
            await first
            with pytest.raises(NonFiniteInput):
                await engine.predict("0", torch.full((4, 3), float("nan")))

    run(test)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [("finite", True), (None, True), (1e-6, False), (1e6, True), (lambda before, after: after.loss > before.loss, False)],
)
def test_guards(keep: Any, expected: bool) -> None:
    async def test() -> None:
        async with serving(lanes=(2,), keep=keep) as engine:
            outcome = await engine.adapt("ann", SUPPORT)
            assert (outcome.kept, outcome.version > 0) == (expected, expected)
            base = shared_unroll().start()(INPUTS)
            assert torch.allclose(await engine.predict("ann", INPUTS), base) is not expected
            assert engine.stats().events.get("not kept", 0) == (not expected)

    run(test)


def test_a_guard_by_norm_refuses_an_optimiser_state_that_overflowed() -> None:
    async def test() -> None:
        async with serving(keep=1e6) as engine:
            assert not (await engine.adapt("ann", data(3, 1e30))).kept

    run(test)


# Sizes


def losses(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


@over_ways
def test_weighted_examples_are_padded_without_changing_numbers(together: bool) -> None:
    async def test() -> None:
        unroll = make(loss=losses, examples="weighted")
        async with serving(unroll, support_sizes=(2, 6), query_sizes=(1, 4), together=together) as engine:
            for length in (1, 2, 3, 5, 6):
                few = data(length)[0][:length], data(length)[1][:length]
                found = await engine.adapt_predict(few, INPUTS[: min(length, 4)])
                alone = Alone(shared_unroll())
                require_close(found.losses, alone.adapt(few))
                torch.testing.assert_close(found.outputs, alone.predict(INPUTS[: min(length, 4)]))
            with pytest.raises(ShapeChanged, match="7 examples, and programs are warmed for 2, 6; add it to support_sizes"):
                await engine.adapt("ann", (torch.randn(7, 3), torch.zeros(7, dtype=torch.long)))

    run(test)


def test_without_weights_support_sizes_must_match() -> None:
    async def test() -> None:
        async with serving(support_sizes=(3, 6)) as engine:
            assert (await engine.adapt("ann", (SUPPORT[0][:3], SUPPORT[1][:3]))).kept
            with pytest.raises(ShapeChanged, match=r"4 examples, and programs are warmed for 3, 6; .*examples='weighted'"):
                await engine.adapt("ann", (SUPPORT[0][:4], SUPPORT[1][:4]))
            assert (await engine.predict("ann", INPUTS[:3])).shape == (3, 2)  # rows do not depend on each other

    run(test)


class Centred(nn.Module):
    """A model in which every output depends on all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0))


class Pooled(Centred):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean(0, keepdim=True)


@pytest.mark.parametrize("model", [Centred(), Pooled(), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).train()])
def test_query_rows_are_not_added_where_that_changes_numbers(model: nn.Module) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.expand(len(target), -1), target)

    unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(lr=0.1), 1, loss=loss, backend="eager")

    async def test() -> None:
        async with serving(unroll, lanes=(2,)) as engine:
            assert (await engine.predict("ann", INPUTS)).shape[1] == 2
            with pytest.raises(ShapeChanged, match=r"3 examples, and programs are warmed for 4; .*padding is not possible"):
                await engine.predict("ann", INPUTS[:3])

    run(test)


def test_nothing_is_compiled_after_the_start() -> None:
    async def test() -> None:
        sizes = {"lanes": (1, 2), "support_sizes": (3, 6), "query_sizes": (1, 4)}
        async with serving(make(cache_size=2), **sizes) as engine:  # four shapes of support
            before = engine.stats().num_programs
            assert before == 4 * (1 + 1 + 1)  # steps, guard, prediction
            for length in (3, 6, 3):
                few = SUPPORT[0][:length], SUPPORT[1][:length]
                await asyncio.gather(*[engine.adapt(f"{index}", few) for index in range(5)])
                await asyncio.gather(*[engine.predict(f"{index}", INPUTS[: length - 2]) for index in range(5)])
            await engine.forget("3")
            await engine.adapt_predict(SUPPORT, INPUTS)
            assert engine.stats().num_programs == before

    run(test)


def test_a_model_that_changes_its_mode_is_refused_and_not_compiled_anew() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)).eval()
    unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(lr=0.1), 1, loss=F.cross_entropy, backend="eager")

    async def test() -> None:
        async with serving(unroll) as engine:
            await engine.adapt("ann", SUPPORT)
            model.train()
            with pytest.raises(ShapeChanged):
                await engine.adapt("ann", SUPPORT)
            model.eval()
            assert (await engine.adapt("ann", SUPPORT)).version > 0

    run(test)


# The queue


def test_expired_work_never_begins_and_commits_nothing() -> None:
    clock = Clock()

    async def test() -> None:
        async with serving(clock=clock) as engine:
            gate = Gate(engine)
            first = await gate.hold(engine)
            late = [engine.adapt("ann", SUPPORT, 1.0), engine.predict("bob", INPUTS, 1.0), engine.adapt_predict(SUPPORT, INPUTS, 1.0)]
            tasks = [asyncio.create_task(call) for call in [*late, engine.adapt("cyd", SUPPORT, 3.0)]]
            await tick()
            clock.now += 2.0
            gate.open()
            *found, kept = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(error) for error in found] == [DeadlineExceeded] * 3
            assert isinstance(kept, Outcome) and kept.version > 0
            assert [names for kind, names in gate.log if kind == "adapt"] == [["cyd"]]
            await first
            assert engine.stats().events["expired"] == 3
            assert engine._core._states.cache.get("ann") is None

    run(test)


def test_a_deadline_that_passes_while_it_computes_commits_nothing() -> None:
    clock = Clock()

    async def test() -> None:
        async with serving(clock=clock) as engine:
            gate = Gate(engine)
            first = await gate.hold(engine)
            gate.open()
            await first
            gate.reached.clear()
            gate._open.clear()
            task = asyncio.create_task(engine.adapt("ann", SUPPORT, 1.0))
            await asyncio.to_thread(gate.reached.wait, 20)
            clock.now += 1.0
            gate.open()
            with pytest.raises(DeadlineExceeded):
                await task
            assert engine._core._states.cache.get("ann") is None

    run(test)


def test_lanes_go_first_to_what_can_end_in_time() -> None:
    """Under overload the earliest deadlines would have to be missed again and again, and nothing would be committed."""
    clock = Clock()

    async def test() -> None:
        async with serving(clock=clock, lanes=(2,), max_delay_s=0.0) as engine:
            lanes = engine._core._lanes
            run_batch = lanes.adapt

            def adapt(works: Sequence[Any]) -> Any:
                found = run_batch(works)
                clock.now += 1.0
                return found

            lanes.adapt = adapt
            gate = Gate(engine)
            await engine.adapt("ann", SUPPORT)  # a batch takes a second
            first = await gate.hold(engine)
            calls = [("ann", 2.0), ("bob", 2.0), ("cyd", 4.5), ("dan", 4.5), ("eve", 9.0)]
            tasks = [asyncio.create_task(engine.adapt(name, SUPPORT, deadline_s)) for name, deadline_s in calls]
            await tick()
            gate.open()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(one, Outcome) for one in found] == [False, False, True, True, True]
            assert [names for kind, names in gate.log if kind == "adapt"] == [["cyd", "dan"], ["eve"]]
            await first

    run(test)


@pytest.mark.parametrize("slack", [1.3, 1.9, 3.0])
def test_requests_without_a_deadline_do_not_take_the_time_of_one_that_has_one(slack: float) -> None:
    """A batch of four takes a second, and in each of them four requests without a deadline come, and one with."""
    clock, in_time = Clock(), 0
    waiting = WorkQueue(4, 0.0, 10_000, 64, clock)
    future: Any = None  # nobody waits
    for _ in range(40):
        with waiting.lock:
            for deadline in (*[math.inf] * 4, clock.now + slack):
                work = Work("adapt", None, None, 6, 6, deadline, clock.now, future)
                waiting.admit(work)
                waiting.push(work)
        taken = waiting.take()
        assert taken is not None
        clock.now += 1.0
        in_time += sum([clock.now <= work.deadline < math.inf for work in taken[0]])
        with waiting.lock:
            waiting.took(taken[0], clock.now - 1.0)
    assert in_time == 40


def test_of_late_requests_the_one_with_most_time_left_goes_first() -> None:
    clock = Clock()
    waiting = WorkQueue(2, 0.0, 100, 64, clock)
    future: Any = None  # nobody waits
    with waiting.lock:
        waiting.push(Work("adapt", None, None, 6, 6, math.inf, clock.now, future))
    before = waiting.take()
    assert before is not None
    with waiting.lock:
        waiting.took(before[0], clock.now - 1.0)
        for slack in (0.2, 0.4, 0.6, 2.0):
            waiting.push(Work("adapt", None, None, 6, 6, clock.now + slack, clock.now, future))
    taken = waiting.take()
    assert taken is not None and [work.deadline - clock.now for work in taken[0]] == pytest.approx([2.0, 0.6])


def test_what_will_hardly_end_in_time_runs_where_lanes_are_left() -> None:
    clock = Clock()

    async def test() -> None:
        async with serving(clock=clock, lanes=(1, 4), max_delay_s=0.0) as engine:
            gate = Gate(engine)
            first = await gate.hold(engine)
            clock.now += 100.0
            gate.open()
            await first
            calls = [engine.adapt(name, data(index), 1.0 + index) for index, name in enumerate(("ann", "bob"))]
            assert all(outcome.kept for outcome in await asyncio.gather(*calls))

    run(test)


@pytest.mark.parametrize("deadline_s", [3.0, 10.0])
def test_twice_as_many_requests_as_can_be_answered_do_not_lower_the_number_of_answers(deadline_s: float) -> None:
    """In the time of a clock that this test moves: a batch of four takes a second, and eight requests come meanwhile."""
    clock, num_in_time, num_seconds = Clock(), 0, 100
    waiting = WorkQueue(4, 0.0, 10_000, 64, clock)
    future: Any = None  # nobody waits
    for _ in range(num_seconds):
        for number in range(8):
            with waiting.lock:
                came = clock.now - number / 8
                work = Work("adapt", None, None, 6, 6, came + deadline_s, came, future)
                waiting.admit(work)
                waiting.push(work)
        taken = waiting.take()
        assert taken is not None
        began, clock.now = clock.now, clock.now + 1.0
        with waiting.lock:
            waiting.took(taken[0], began)
        num_in_time += sum(clock.now < work.deadline for work in taken[0])
    assert num_in_time > 0.9 * 4 * num_seconds
    assert waiting.length < 8 * (deadline_s + 1)


def test_what_waits_for_the_store_counts_as_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a store that is slower than the computing gets a queue without bound."""
    store = SQLiteStore(tmp_path / "states.db")
    stalls, goes_on = threading.Event(), threading.Event()
    commit_all = store.commit_all

    def stalled(changes: Sequence[Change]) -> list[bool]:
        stalls.set()
        assert goes_on.wait(20)
        return commit_all(changes)

    async def test() -> None:
        async with serving(store=store, max_queue=8) as engine:
            names = [f"tenant {index}" for index in range(12)]
            await asyncio.gather(*[engine.adapt(name, SUPPORT) for name in names[:8]])
            await asyncio.gather(*[engine.adapt(name, SUPPORT) for name in names[8:]])
            monkeypatch.setattr(store, "commit_all", stalled)
            tasks = [asyncio.create_task(engine.adapt(names[0], SUPPORT))]
            await asyncio.to_thread(stalls.wait, 20)
            for name in names[1:9]:
                tasks.append(asyncio.create_task(engine.adapt(name, SUPPORT)))
                await tick()
            try:
                async with asyncio.timeout(5):
                    while engine.stats().events["adapt"] < 12 + 9 or engine.stats().num_waiting < 8:  # all were computed, and wait
                        await asyncio.sleep(0.001)
                    with pytest.raises(Overloaded):
                        await engine.adapt(names[9], SUPPORT)
            finally:
                goes_on.set()
            assert all(outcome.kept for outcome in await asyncio.gather(*tasks))
            assert engine.stats().num_waiting == 0

    run(test)
    store.close()


@pytest.mark.parametrize("begun", [False, True])
def test_a_cancelled_adaptation_commits_nothing(begun: bool) -> None:
    async def test() -> None:
        async with serving() as engine:
            gate = Gate(engine)
            first = await gate.hold(engine)
            if begun:
                gate.open()
                await first
                gate.reached.clear()
                gate._open.clear()
            task = asyncio.create_task(engine.adapt("ann", SUPPORT))
            after = asyncio.create_task(engine.adapt("ann", data(1)))
            await tick()
            if begun:
                await asyncio.to_thread(gate.reached.wait, 20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert engine.stats().num_waiting == 1
            gate.open()
            outcome = await after
            torch.testing.assert_close(list(outcome.losses), Alone(shared_unroll()).adapt(data(1)))  # as the first
            await first
            assert engine.stats().events["committed"] == 1

    run(test)


def test_a_full_queue_refuses_at_once() -> None:
    async def test() -> None:
        async with serving(max_queue=6, max_per_tenant=3) as engine:
            gate = Gate(engine)
            first = await gate.hold(engine)
            tasks = [asyncio.create_task(engine.adapt("ann", data(index))) for index in range(3)]
            await tick()
            with pytest.raises(Overloaded, match=r"this tenant has 3 requests"):
                await engine.predict("ann", INPUTS)
            tasks += [asyncio.create_task(engine.predict(f"{index}", INPUTS)) for index in range(3)]
            await tick()
            with pytest.raises(Overloaded, match=r"6 requests wait already \(max_queue=6\)"):
                await engine.predict("bob", INPUTS)
            tasks[-1].cancel()  # which makes room
            await tick()
            tasks.append(asyncio.create_task(engine.predict("bob", INPUTS)))
            await tick()
            gate.open()
            found = await asyncio.gather(*tasks, first, return_exceptions=True)
            assert [each for each in found if isinstance(each, Exception)] == []
            assert engine.stats().events["overloaded"] == 2

    run(test)


def test_adaptations_of_one_tenant_run_in_order_one_at_a_time() -> None:
    async def test() -> None:
        async with serving() as engine:
            gate = Gate(engine)
            outcomes = await asyncio.gather(*[engine.adapt("ann", data(index)) for index in range(6)])
            alone = Alone(shared_unroll())
            for index, outcome in enumerate(outcomes):
                require_close(outcome.losses, alone.adapt(data(index)))
            assert gate.log == [("adapt", ["ann"])] * 6
            versions = [outcome.version for outcome in outcomes if outcome.kept]
            assert versions == list(range(versions[0], versions[0] + len(versions)))

    run(test)


def test_earlier_deadlines_go_first() -> None:
    async def test() -> None:
        async with serving(lanes=(1,)) as engine:
            gate = Gate(engine)
            first = await gate.hold(engine)
            deadlines = {"none": None, "late": 25.0, "soon": 5.0, "later": 15.0}
            tasks = [asyncio.create_task(engine.adapt(name, SUPPORT, deadline)) for name, deadline in deadlines.items()]
            await tick()
            gate.open()
            await asyncio.gather(*tasks, first)
            assert [names[0] for kind, names in gate.log if kind == "adapt"] == ["soon", "later", "late", "none"]

    run(test)


def test_a_tenant_with_many_requests_does_not_hold_up_the_others() -> None:
    async def test() -> None:
        async with serving(lanes=(1,)) as engine:
            gate = Gate(engine)
            first = await gate.hold(engine)
            flood = [asyncio.create_task(engine.predict("flood", INPUTS)) for _ in range(20)]
            await tick()
            others = [asyncio.create_task(engine.predict(name, INPUTS)) for name in ("ann", "bob")]
            await tick()
            gate.open()
            await asyncio.gather(*flood, *others, first)
            order = [names[0] for kind, names in gate.log if kind == "predict" and names != [""]]
            assert max(order.index("ann"), order.index("bob")) <= 3

    run(test)


def test_adaptations_and_predictions_take_turns() -> None:
    async def test() -> None:
        async with serving(lanes=(1,)) as engine:
            gate = Gate(engine)
            first = await gate.hold(engine)
            tasks = [asyncio.create_task(engine.adapt(f"{index}", SUPPORT)) for index in range(8)]
            tasks += [asyncio.create_task(engine.predict(f"p{index}", INPUTS)) for index in range(8)]
            await tick()
            gate.open()
            await asyncio.gather(*tasks, first)
            kinds = [kind for kind, _ in gate.log]
            assert kinds[:16] == ["predict", "adapt"] * 8

    run(test)


def test_a_lone_request_is_not_delayed_and_a_batch_waits_for_as_many_as_before() -> None:
    async def test() -> None:
        async with serving(max_delay_s=5.0) as engine:  # within the time limit of the test only if nothing waits
            for _ in range(3):
                await engine.predict("ann", INPUTS)
            gate = Gate(engine)
            first = await gate.hold(engine)
            tasks = [asyncio.create_task(engine.predict(f"{index}", INPUTS)) for index in range(3)]
            await tick()
            gate.open()
            await asyncio.gather(*tasks, first)
            gate.log.clear()
            tasks = [asyncio.create_task(engine.predict(f"{index}", INPUTS)) for index in range(2)]
            await asyncio.sleep(0.1)
            assert gate.log == []
            tasks += [asyncio.create_task(engine.predict(name, INPUTS)) for name in ("2", "3")]
            await asyncio.gather(*tasks)
            assert gate.log == [("predict", ["0", "1", "2", "3"])]
            began = time.monotonic()
            await engine.predict("ann", INPUTS, 0.05)  # which it does not miss by waiting
            assert time.monotonic() - began < 4

    run(test)


def test_drain_answers_what_is_there_and_refuses_what_comes() -> None:
    async def test() -> None:
        async with serving() as engine:
            gate = Gate(engine)
            first = await gate.hold(engine)
            tasks = [asyncio.create_task(engine.adapt("ann", data(index))) for index in range(3)]
            await tick()
            drained = asyncio.create_task(engine.drain())
            await tick()
            assert engine.stats().lifecycle is Lifecycle.DRAINING
            with pytest.raises(NotServing, match="the engine is draining"):
                await engine.predict("ann", INPUTS)
            gate.open()
            assert len([await task for task in tasks]) == 3
            await drained
            await first
            with pytest.raises(NotServing, match="stopped"):
                await engine.adapt("ann", SUPPORT)
        assert not [thread for thread in threading.enumerate() if thread.name == "adaptrt-compute"]

    run(test)


# Stores


class Faulty(Store):
    """A store around another that can be down, can be slow, and counts what it is asked."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.is_down = False
        self.counts = {"get": 0, "commit": 0}

    def _ask(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.is_down:
            raise StoreUnavailable("down")

    def get(self, tenant: str) -> Record | None:
        self._ask("get")
        return self.inner.get(tenant)

    def commit(self, tenant: str, expected_version: int, record: Record) -> bool:
        self._ask("commit")
        return self.inner.commit(tenant, expected_version, record)

    def delete(self, tenant: str) -> bool:
        self._ask("delete")
        return self.inner.delete(tenant)

    def close(self) -> None:
        self.inner.close()


def no_pause(engine: Engine) -> None:
    """Has the engine ask a store again that did not answer."""
    engine._core._states._is_down_until = 0.0


def test_states_outlive_the_engine(tmp_path: Path) -> None:
    async def test() -> None:
        versions = []
        for _ in range(2):
            store = SQLiteStore(tmp_path / "tenants.db", synchronous="normal")
            async with serving(store=store, keep="finite") as engine:
                for seed in range(2):
                    versions.append((await engine.adapt("ann", data(seed))).version)
            store.close()
        assert versions == list(range(versions[0], versions[0] + 4))
        alone = Alone(shared_unroll(), "finite")
        for seed in (0, 1, 0, 1):
            alone.adapt(data(seed))
        store = SQLiteStore(tmp_path / "tenants.db")
        async with serving(store=store) as engine:
            torch.testing.assert_close(await engine.predict("ann", INPUTS), alone.predict(INPUTS))
            assert await engine.forget("ann")
            assert not await engine.forget("ann")
            torch.testing.assert_close(await engine.predict("ann", INPUTS), Alone(shared_unroll()).predict(INPUTS))
        assert store.get("ann") is None
        store.close()

    run(test)


def test_known_tenants_are_not_read_again(tmp_path: Path) -> None:
    async def test() -> None:
        store = Faulty(SQLiteStore(tmp_path / "tenants.db", synchronous="normal"))
        async with serving(store=store, keep="finite") as engine:
            for _ in range(3):
                await engine.adapt("ann", SUPPORT)
                await engine.predict("ann", INPUTS)
            assert store.counts == {"get": 1, "commit": 3}
        store.close()

    run(test)


def test_while_the_store_is_down_predictions_go_on_and_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    async def test() -> None:
        store = Faulty(SQLiteStore(tmp_path / "tenants.db", synchronous="normal"))
        async with serving(store=store) as engine:
            outcome = await engine.adapt("ann", SUPPORT)
            before = await engine.predict("ann", INPUTS)
            store.is_down = True
            for name in ("ann", "bob"):
                with pytest.raises(StoreUnavailable):
                    await engine.adapt(name, data(1))
                with pytest.raises(StoreUnavailable):
                    await engine.forget(name)
            assert torch.equal(await engine.predict("ann", INPUTS), before)  # from memory
            torch.testing.assert_close(await engine.predict("bob", INPUTS), Alone(shared_unroll()).predict(INPUTS))
            assert (await engine.adapt_predict(SUPPORT, INPUTS)).kept
            asked = dict(store.counts)
            await engine.predict("bob", INPUTS)
            assert store.counts == asked  # it is left alone for a while
            store.is_down = False
            no_pause(engine)
            assert (await engine.adapt("ann", data(1))).version == outcome.version + 1
        async with serving(store=store, unknown="error") as engine:
            with pytest.raises(UnknownTenant, match="the tenant 'bob' has no state"):
                await engine.predict("bob", INPUTS)
            store.is_down = True
            with pytest.raises(StoreUnavailable):
                await engine.predict("bob", INPUTS)
        store.close()

    run(test)


def test_two_engines_on_one_store_go_on_from_each_other(tmp_path: Path) -> None:
    async def test() -> None:
        alone = Alone(shared_unroll())
        store = SQLiteStore(tmp_path / "tenants.db", synchronous="normal")
        async with serving(store=store) as one, serving(store=store) as other:
            for seed in range(6):
                found = await (one, other)[seed % 2].adapt("ann", data(seed))
                require_close(found.losses, alone.adapt(data(seed)))
            assert other.stats().events["conflicts"] >= 1
            await one.forget("ann")
            found = await other.adapt("ann", data(7))  # not from the state that is forgotten
            require_close(found.losses, Alone(shared_unroll()).adapt(data(7)))
        store.close()

    run(test)


def test_two_engines_on_one_memory_go_on_from_each_other() -> None:
    """As with any store: each takes the other's states, through bytes, and nothing that was acknowledged is lost."""

    async def test() -> None:
        alone, names = Alone(shared_unroll()), [f"tenant {index}" for index in range(4)]
        store = MemoryStore(2**20)
        async with serving(store=store) as one, serving(store=store) as other:
            for seed in range(6):
                found = await asyncio.gather(*[(one, other)[seed % 2].adapt(name, data(seed)) for name in names])
                expected = alone.adapt(data(seed))
                for outcome in found:
                    require_close(outcome.losses, expected)
                for engine in (one, other):
                    torch.testing.assert_close(await engine.predict(names[0], INPUTS), alone.predict(INPUTS))
            versions = [record.version for record in map(store.get, names) if record is not None]
            # Both at once: each of the adaptations goes on from the one before, whoever computed that.
            found = await asyncio.gather(*[engine.adapt(name, SUPPORT) for engine in (one, other) for name in names])
            assert sorted(outcome.version for outcome in found if outcome.kept) == sorted(
                [*[v + 1 for v in versions], *[v + 2 for v in versions]]
            )
            assert await one.forget(names[0])
            again = await other.adapt(names[0], data(7))
            require_close(again.losses, Alone(shared_unroll()).adapt(data(7)))
            assert len(store) == store.num_tenants() == 3 + again.kept

    run(test)


class Contended(Faulty):
    """A store in which somebody else always has committed before."""

    def commit(self, tenant: str, expected_version: int, record: Record) -> bool:
        super()._ask("commit")
        return False


def test_endless_conflicts_end() -> None:
    async def test() -> None:
        store = Contended(MemoryStore(2**20))
        async with serving(store=store, max_tries=3) as engine:
            with pytest.raises(CommitConflict, match="3 times"):
                await engine.adapt("ann", SUPPORT)
            assert store.counts["commit"] == 3

    run(test)


def test_fingerprints() -> None:
    """They tell weights apart, also those that adapt and those that do not, and not one making of a model from another."""

    def fingerprint(unroll: CompiledUnroll, **changes: Any) -> dict[str, str]:
        return Engine(unroll, (SUPPORT, INPUTS), lanes=(1,), **changes).fingerprint

    def other(name: str) -> CompiledUnroll:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
        model.get_parameter(name).data[0] += 1e-6
        return adaptrt.compile_unroll(model, adaptrt.optim.adam(lr=0.3), 2, loss=F.cross_entropy, params="2.*", backend="eager")

    same = fingerprint(make())
    assert fingerprint(shared_unroll()) == fingerprint(make(), keep=None, policy="episodic") == same
    found = [same, *[fingerprint(other(name)) for name in ("0.weight", "0.bias", "2.weight", "2.bias")]]
    assert len({tuple(sorted(each.items())) for each in found}) == 5


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_states_that_were_adapted_from_other_weights_are_refused_or_dropped(kind: str, tmp_path: Path) -> None:
    """They would fit, as all parameters adapt, but are of another model."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    other = adaptrt.compile_unroll(model, adaptrt.optim.adam(lr=0.3), 2, loss=F.cross_entropy, backend="eager")

    async def test() -> None:
        store: Store = MemoryStore(2**20) if kind == "memory" else SQLiteStore(tmp_path / "tenants.db", synchronous="normal")
        async with serving(store=store) as engine:
            await engine.adapt("ann", SUPPORT)
            await engine.adapt("bob", SUPPORT)
            before = await engine.predict("bob", INPUTS)
        async with serving(other, store=store) as engine:
            for call in (lambda: engine.adapt("ann", SUPPORT), lambda: engine.predict("ann", INPUTS)):
                with pytest.raises(InvalidState, match="another base"):
                    await call()
            assert await engine.forget("ann")
            require_close((await engine.adapt("ann", SUPPORT)).losses, Alone(other).adapt(SUPPORT))
        async with serving(store=store) as engine:  # what was refused is as it was
            assert torch.equal(await engine.predict("bob", INPUTS), before)
        async with serving(other, store=store, other_base="drop") as engine:
            torch.testing.assert_close(await engine.predict("bob", INPUTS), Alone(other).predict(INPUTS))
            assert store.get("bob") is None
        store.close()

    run(test)


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_a_bound_of_tenants(kind: str, tmp_path: Path) -> None:
    async def test() -> None:
        store: Store = MemoryStore(2**20) if kind == "memory" else SQLiteStore(tmp_path / "tenants.db", synchronous="normal")
        async with serving(store=store, max_tenants=3) as engine:
            gate = Gate(engine)
            first = await gate.hold(engine)
            tasks = [asyncio.create_task(engine.adapt(f"tenant {index}", SUPPORT)) for index in range(4)]  # one batch
            await tick()
            gate.open()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            refused = [index for index, each in enumerate(found) if isinstance(each, TooManyTenants)]
            assert len(refused) == 1 and store.num_tenants() == 3
            await first
            name = f"tenant {refused[0]}"
            with pytest.raises(TooManyTenants, match="3 tenants"):
                await engine.adapt(name, SUPPORT)
            assert (await engine.adapt_predict(SUPPORT, INPUTS)).kept  # needs no state
            torch.testing.assert_close(await engine.predict(name, INPUTS), Alone(shared_unroll()).predict(INPUTS))
            known = next(f"tenant {index}" for index in range(4) if index not in refused)
            assert (await engine.adapt(known, data(1))).version > 0  # who has a state goes on
            assert await engine.forget(known)
            assert (await engine.adapt(name, SUPPORT)).kept
            with pytest.raises(TooManyTenants):
                await engine.adapt(known, SUPPORT)
        store.close()

    run(test)


@pytest.mark.parametrize(("bound", "error"), [(0, InvalidArgument), (True, InvalidType), (1.0, InvalidType)])
def test_bounds_of_tenants_that_are_none(bound: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_tenants"):
        Engine(shared_unroll(), (SUPPORT, INPUTS), lanes=(1,), max_tenants=bound)
    store = Faulty(MemoryStore(2**20))
    with pytest.raises(InvalidArgument, match="Faulty does not tell how many"):
        Engine(shared_unroll(), (SUPPORT, INPUTS), lanes=(1,), store=store, max_tenants=3)


def test_what_an_engine_says_of_itself() -> None:
    async def test() -> None:
        async with serving(support_sizes=(6, 8), query_sizes=(2, 4)) as engine:
            assert engine.k == 2
            assert engine.support_sizes == SizesTaken((6, 8), False)
            assert engine.query_sizes == SizesTaken((2, 4), True)  # found out by the start
            params = 3 * 5 + 5 + 5 * 2 + 2
            assert 3 * 4 * params <= engine.num_state_bytes <= 3 * 4 * params + 64  # weights, two moments and counts
            engine.fingerprint.clear()
            assert engine.fingerprint

    run(test)
    weighted = adaptrt.compile_unroll(nn.Linear(3, 2), adaptrt.optim.sgd(lr=0.1), 3, loss=losses, examples="weighted", backend="eager")
    assert Engine(weighted, (SUPPORT, INPUTS), lanes=(1,)).support_sizes == SizesTaken((6,), True)


@pytest.mark.parametrize("damage", ["other base", "damaged"])
def test_states_of_another_base_are_refused_or_dropped(damage: str, tmp_path: Path) -> None:
    def frozen(seed: int) -> CompiledUnroll:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
        return adaptrt.compile_unroll(model, adaptrt.optim.sgd(lr=0.1), 1, loss=F.cross_entropy, params="1.*", backend="eager")

    async def test() -> None:
        store = SQLiteStore(tmp_path / "tenants.db", synchronous="normal")
        async with serving(frozen(0), store=store) as engine:
            await engine.adapt("ann", SUPPORT)
        if damage == "damaged":
            store._db.execute("UPDATE tenants SET record = zeroblob(100)")
        unroll = frozen(1 if damage == "other base" else 0)
        async with serving(unroll, store=store) as engine:
            for call in (lambda: engine.adapt("ann", SUPPORT), lambda: engine.predict("ann", INPUTS)):
                with pytest.raises(InvalidState, match=damage.replace("other", "another")):
                    await call()
        async with serving(unroll, store=store, other_base="drop") as engine:
            torch.testing.assert_close(await engine.predict("ann", INPUTS), unroll.start()(INPUTS))
            assert (await engine.adapt("ann", SUPPORT)).version > 0
        store.close()

    run(test)


def test_a_state_that_cannot_be_read_can_be_forgotten(tmp_path: Path) -> None:
    async def test() -> None:
        store = SQLiteStore(tmp_path / "tenants.db", synchronous="normal")
        assert store.commit("ann", 0, Record.of(1, b"no state"))
        async with serving(store=store) as engine:
            found = await asyncio.gather(engine.adapt("ann", SUPPORT), engine.forget("ann"), return_exceptions=True)
            assert isinstance(found[0], InvalidState) and found[1] is True
            assert (await engine.adapt("ann", SUPPORT)).version > 0
        store.close()

    run(test)


def test_many_tenants_through_a_small_memory(tmp_path: Path) -> None:
    async def test() -> None:
        store = SQLiteStore(tmp_path / "tenants.db", synchronous="normal")
        async with serving(store=store, cache_bytes=3000) as engine:
            for seed in range(3):
                await asyncio.gather(*[engine.adapt(f"{index}", data(seed + index)) for index in range(20)])
            assert engine.stats().cached_bytes <= 3000
            assert engine.stats().num_cached_tenants < 20
            for index in range(20):
                alone = Alone(shared_unroll())
                for seed in range(3):
                    alone.adapt(data(seed + index))
                torch.testing.assert_close(await engine.predict(f"{index}", INPUTS), alone.predict(INPUTS))
        store.close()

    run(test)


# Policies


def fresh(losses: Sequence[float], seed: int) -> bool:
    """Whether an adaptation to `data(seed)` with these losses started from the base."""
    return losses[0] == pytest.approx(Alone(shared_unroll()).adapt(data(seed))[0], abs=1e-6)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("continual", [True, False, False, False]),
        ("episodic", [True, True, True, True]),
        (("reset_after", 2), [True, False, True, False]),
        (("max_age_s", 1000.0), [True, False, False, False]),
        (("max_age_s", 0), [True, True, True, True]),
        (lambda history: history.num_adaptations != 1, [True, True, True, True]),
    ],
)
def test_policies(policy: Any, expected: list[bool]) -> None:
    async def test() -> None:
        async with serving(policy=policy, keep="finite") as engine:
            found = [await engine.adapt("ann", data(seed)) for seed in range(4)]
            assert [fresh(outcome.losses, seed) for seed, outcome in enumerate(found)] == expected
            is_kept = policy != "episodic"
            assert all((outcome.version > 0) is is_kept for outcome in found)
            assert (engine._core._states.cache.get("ann") is not None) is is_kept

    run(test)


def test_a_policy_sees_the_history() -> None:
    seen: list[History] = []

    def policy(history: History) -> bool:
        seen.append(history)
        return True

    async def test() -> None:
        async with serving(policy=policy, keep="finite") as engine:
            for seed in range(3):
                await engine.adapt("ann", data(seed))
            assert [history.num_adaptations for history in seen] == [1, 2]
            assert 0 <= seen[1].idle_s <= seen[1].age_s < 60

    run(test)


def test_a_refused_adaptation_resets_where_that_is_the_policy() -> None:
    async def test() -> None:
        async with serving(policy="reset_on_guard") as engine:
            assert (await engine.adapt("ann", SUPPORT)).version > 0
            refused = await engine.adapt("ann", data(5, 1e30))
            assert (refused.kept, refused.version) == (False, 0)
            torch.testing.assert_close(await engine.predict("ann", INPUTS), Alone(shared_unroll()).predict(INPUTS))

    run(test)


# Exports, and code without an event loop


@pytest.mark.parametrize("num_tasks", [None, 3])
def test_an_export_serves(num_tasks: int | None, tmp_path: Path) -> None:
    unroll = shared_unroll()
    if num_tasks is None:
        unroll.export(tmp_path / "program", SUPPORT, INPUTS, formats="torchscript")
    else:
        supports = SUPPORT[0].expand(num_tasks, -1, -1).clone(), SUPPORT[1].expand(num_tasks, -1).clone()
        unroll.vmap().export(tmp_path / "program", supports, INPUTS.expand(num_tasks, -1, -1).clone(), formats="torchscript")

    async def test() -> None:
        async with Engine(tmp_path / "program", (SUPPORT, INPUTS), max_delay_s=0.02) as engine:
            alone = [Alone(unroll) for _ in range(5)]
            for round in range(2):
                found = await asyncio.gather(*[engine.adapt(f"{index}", data(round + index)) for index in range(5)])
                for index, outcome in enumerate(found):
                    require_close(outcome.losses, alone[index].adapt(data(round + index)))
            torch.testing.assert_close(await engine.predict("4", INPUTS), alone[4].predict(INPUTS))
            assert max(engine.stats().lanes) == (num_tasks or 1)

    run(test)
    with pytest.raises(InvalidArgument, match="leave lanes= out"):
        Engine(tmp_path / "program", (SUPPORT, INPUTS), lanes=(1, 7))


def test_the_engine_without_an_event_loop() -> None:
    made = Engine(shared_unroll(), (SUPPORT, INPUTS), lanes=(1, 4))
    with pytest.raises(NotServing, match="not started"):
        made.sync.adapt("ann", SUPPORT)
    with made.sync as engine:
        results: dict[int, Any] = {}

        def of_thread(index: int) -> None:
            results[index] = engine.adapt(f"{index}", data(index)), engine.predict(f"{index}", INPUTS)

        threads = [threading.Thread(target=of_thread, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, (outcome, outputs) in results.items():
            alone = Alone(shared_unroll())
            require_close(outcome.losses, alone.adapt(data(index)))
            torch.testing.assert_close(outputs, alone.predict(INPUTS))
        assert engine.forget("0")
        assert engine.adapt_predict(SUPPORT, INPUTS).kept
        with pytest.raises(DeadlineExceeded):
            engine.adapt("ann", SUPPORT, 0.0)
        with pytest.raises(NotServing, match="started already"):
            engine.start()
    with pytest.raises(NotServing):
        engine.adapt("ann", SUPPORT)


def test_another_event_loop_is_refused() -> None:
    async def test() -> None:
        async with serving() as engine:
            assert (await asyncio.to_thread(engine.sync.adapt, "ann", SUPPORT)).kept
            with pytest.raises(NotServing, match="another event loop"):
                await asyncio.to_thread(asyncio.run, engine.adapt("ann", SUPPORT))
            with pytest.raises(NotServing, match="this thread's event loop"):
                engine.sync.adapt("ann", SUPPORT)

    run(test)


# What callers get


def test_outputs_are_the_callers_own() -> None:
    async def test() -> None:
        async with serving() as engine:
            gate = Gate(engine)
            first = await gate.hold(engine)
            tasks = [asyncio.create_task(engine.predict(f"{index}", INPUTS)) for index in range(3)]
            await tick()
            gate.open()
            for outputs in await asyncio.gather(*tasks):
                assert outputs.untyped_storage().nbytes() == outputs.numel() * 4  # nothing of other tenants
                assert not outputs.is_inference() and not outputs.requires_grad
            await first

    run(test)


def test_several_adaptations_in_one_call() -> None:
    async def test() -> None:
        async with serving(lanes=(4,), max_queue=5) as engine:
            found = await engine.adapt_all([("ann", data(0)), ("bob", (X, Y + 5)), ("ann", data(1)), ("cyd", data(2))])
            ann = Alone(shared_unroll())
            assert isinstance(found[1], LabelOutOfRange)
            for place, seed, alone in ((0, 0, ann), (2, 1, ann), (3, 2, Alone(shared_unroll()))):
                outcome = found[place]
                assert isinstance(outcome, Outcome)
                require_close(outcome.losses, alone.adapt(data(seed)))
            assert await engine.adapt_all([]) == []
            for requests, error in (
                ([("ann", data(0)), ("bob", (X,))], InvalidType),
                ([(f"{index}", data(0)) for index in range(6)], Overloaded),
                ("ann", InvalidType),
            ):
                with pytest.raises(error):
                    await engine.adapt_all(requests)  # pyright: ignore[reportArgumentType]
            assert engine.stats().num_open == 0
            assert [type(each) for each in await engine.adapt_all([("ann", data(0))], 0.0)] == [DeadlineExceeded]

    run(test)


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Any]:
        return {"logits": self.layer(x) * scale[:, None], "parts": (x.sum(-1), [x])}


def test_structured_inputs_and_outputs() -> None:
    def loss(output: dict[str, Any], target: Tensor) -> Tensor:
        return F.cross_entropy(output["logits"], target)

    unroll = adaptrt.compile_unroll(Structured(), adaptrt.optim.sgd(lr=0.1), 1, loss=loss, backend="eager")
    inputs = {"x": INPUTS, "scale": torch.ones(4)}
    support = {"x": SUPPORT[0], "scale": torch.ones(6)}, SUPPORT[1]

    async def test() -> None:
        async with Engine(unroll, (support, inputs), lanes=(2,)) as engine:
            await engine.adapt("ann", support)
            few = {name: value[:3] for name, value in inputs.items()}
            found = await engine.predict("ann", few)
            expected = unroll.adapt(support)(few)
            torch.testing.assert_close(found["logits"], expected["logits"].detach())
            torch.testing.assert_close(found["parts"], (few["x"].sum(-1), [few["x"]]))
            with pytest.raises(InvalidType, match="must be like the example"):
                await engine.predict("ann", {"x": INPUTS})

    run(test)


@dataclasses.dataclass
class Fields:
    one: Tensor
    other: Any


def test_paths_lead_to_the_leaves() -> None:
    zero, one, two, three, four = torch.arange(5.0).unbind()
    value = {"a": (zero, [one]), 7: Fields(two, {"deep": (three, None)}), "text": "none", "empty": ()}, four
    found = trees.paths(value)
    assert found == [(0, "a", 0), (0, "a", 1, 0), (0, 7, "one"), (0, 7, "other", "deep", 0), (1,)]
    for path, leaf in zip(found, trees.leaves(value), strict=True):
        at: Any = value
        for step in path:
            at = getattr(at, step) if dataclasses.is_dataclass(at) else at[step]
        assert at is leaf
    assert trees.paths(zero) == [()] and trees.paths(None) == trees.paths("text") == trees.paths(Fields) == []


BAD_REQUESTS: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("adapt", ("ann", X), InvalidType, "must be like the example"),
    ("adapt", ("ann", (X,)), InvalidType, "must be like the example"),
    ("adapt", ("ann", [X, Y]), InvalidType, "must be like the example"),
    ("adapt", ("ann", (X, Y, torch.ones(6))), InvalidType, "must be like the example"),
    ("adapt", ("ann", (X.numpy(), Y)), InvalidType, "must be like the example"),
    ("adapt", ("ann", (X[:, :2], Y)), InvalidBatch, r"must have the shape \[examples, 3\], got \[6, 2\]"),
    ("adapt", ("ann", (X[0], Y)), InvalidBatch, r"must have the shape \[examples, 3\], got \[3\]"),
    ("adapt", ("ann", (X, Y[0])), InvalidBatch, r"must have the shape \[examples\], got \[\]"),
    ("adapt", ("ann", (X, Y[:5])), InvalidBatch, "as many examples each, got 6, 5"),
    ("adapt", ("ann", (X[:0], Y[:0])), ShapeChanged, "0 examples"),
    ("adapt", ("ann", (X.double(), Y)), InvalidType, r"call .to\(torch.float32\)"),
    ("adapt", ("ann", (X, Y.int())), InvalidType, r"call .to\(torch.int64\)"),
    ("adapt", ("ann", (X.to("meta"), Y)), DeviceMismatch, "on meta"),
    ("adapt", ("ann", (X, -Y - 7)), LabelOutOfRange, "label|class"),
    ("adapt", ("", SUPPORT), InvalidArgument, "1 to 256 characters"),
    ("adapt", ("a\nb", SUPPORT), InvalidArgument, "printable"),
    ("adapt", (17, SUPPORT), InvalidType, "named by a string"),
    ("adapt", ("ann", SUPPORT, -1.0), InvalidArgument, "not negative"),
    ("adapt", ("ann", SUPPORT, float("nan")), InvalidArgument, "finite"),
    ("adapt", ("ann", SUPPORT, "soon"), InvalidType, "number of seconds"),
    ("adapt", ("ann", SUPPORT, 0.0), DeadlineExceeded, "adaptation"),
    ("predict", ("ann", INPUTS.double()), InvalidType, "float32"),
    ("predict", ("ann", torch.randn(9, 3)), ShapeChanged, "9 examples, and programs are warmed for 4"),
    ("predict", ("ann", (INPUTS,)), InvalidType, "must be like the example"),
    ("predict", (None, INPUTS), InvalidType, "named by a string"),
    ("predict", ("ann", INPUTS, 0.0), DeadlineExceeded, "prediction"),
    ("adapt_predict", (SUPPORT, INPUTS[0]), InvalidBatch, "query tensor 0"),
    ("adapt_predict", (INPUTS, INPUTS), InvalidType, "support data"),
    ("forget", ("x" * 300,), InvalidArgument, "got 300"),
]


def test_wrong_requests_are_refused_in_words() -> None:
    async def test() -> None:
        async with serving() as engine:
            for method, args, error, words in BAD_REQUESTS:
                with pytest.raises(error, match=words) as raised:
                    await getattr(engine, method)(*args)
                assert type(raised.value) is error, words
            assert engine.stats().num_open == 0
            assert (await engine.adapt("ann", SUPPORT)).kept

    run(test)


BAD_ENGINES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lanes": ()}, InvalidArgument, "lanes is empty"),
    ({"lanes": (0, 1)}, InvalidArgument, "at least 1"),
    ({"lanes": (1.5,)}, InvalidType, "ints"),
    ({"lanes": 4}, InvalidType, "tuple of ints"),
    ({"support_sizes": (-1,)}, InvalidArgument, "support_sizes"),
    ({"query_sizes": ("4",)}, InvalidType, "query_sizes"),
    ({"max_delay_s": -0.1}, InvalidArgument, "max_delay_s"),
    ({"max_queue": 0}, InvalidArgument, "max_queue"),
    ({"max_per_tenant": None}, InvalidType, "max_per_tenant"),
    ({"keep": "worse"}, InvalidArgument, "keep must be"),
    ({"keep": -1.0}, InvalidArgument, "more than 0"),
    ({"store": "redis://"}, InvalidType, "must be a Store"),
    ({"policy": "sometimes"}, InvalidArgument, "no policy 'sometimes'"),
    ({"policy": ("reset_after", 0)}, InvalidArgument, "at least 1"),
    ({"policy": ("reset_after", 1.5)}, InvalidArgument, "reset_after"),
    ({"policy": 3}, InvalidType, "policy=3"),
    ({"unknown": "maybe"}, InvalidArgument, "unknown must be"),
    ({"other_base": "keep"}, InvalidArgument, "other_base must be"),
    ({"max_tries": 0}, InvalidArgument, "max_tries"),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD_ENGINES)
def test_wrong_engines_are_refused_in_words(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    async def test() -> None:
        with pytest.raises(error, match=words):
            async with serving(**changes):
                raise AssertionError("it started")

    run(test)


@pytest.mark.parametrize(
    ("target", "example", "error", "words"),
    [
        (make, (SUPPORT, INPUTS), InvalidType, "runs an unroll"),
        (shared_unroll().vmap(), (SUPPORT, INPUTS), InvalidArgument, "before vmap"),
        (make(per_step=True), (SUPPORT, INPUTS), InvalidArgument, "per_step"),
        (shared_unroll(), SUPPORT[0], InvalidType, "example must be"),
        (shared_unroll(), (X, INPUTS), InvalidType, "example must be"),
        (shared_unroll(), (SUPPORT, "inputs"), InvalidType, "must hold tensors"),
        (shared_unroll(), ((X, Y[:3]), INPUTS), InvalidBatch, "as many examples"),
    ],
)
def test_wrong_targets_and_examples(target: Any, example: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Engine(target, example)


def test_an_engine_that_cannot_warm_up_says_why() -> None:
    async def test() -> None:
        engine = Engine(shared_unroll(), ((torch.randn(6, 4), Y), INPUTS), lanes=(1,))
        with pytest.raises(adaptrt.errors.AdaptrtError):
            await engine.start()
        with pytest.raises(NotServing):
            await engine.start()
        with pytest.raises(NotServing):
            await engine.forget("ann")

    run(test)


def test_a_start_that_is_cancelled_ends_its_threads() -> None:
    """Also if the event loop has ended when the programs are compiled."""
    engine = Engine(shared_unroll(), (SUPPORT, INPUTS), lanes=(1,))
    reached, go_on = threading.Event(), threading.Event()

    def warm() -> int:
        reached.set()
        assert go_on.wait(20)
        return 1

    async def test() -> None:
        starting = asyncio.create_task(engine._core.start(warm))
        await asyncio.to_thread(reached.wait, 20)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert engine.stats().lifecycle is Lifecycle.STOPPED

    run(test)
    go_on.set()
    assert engine._core._compute_thread is not None
    engine._core._compute_thread.join(20)
    assert not engine._core._compute_thread.is_alive()


def test_a_change_that_a_store_refuses_reaches_its_caller() -> None:
    async def test() -> None:
        async with serving(store=MemoryStore(max_bytes=100)) as engine:
            with pytest.raises(InvalidArgument, match="does not fit"):
                await engine.adapt("ann", SUPPORT)
            assert Change("ann", 0, Record.of(1, b"")).expected_version == 0

    run(test)
