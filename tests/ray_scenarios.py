"""What `tests/test_serve_ray.py` has done by Ray, in one process for all, as Ray leaves threads behind: each scenario by name.

python -m tests.ray_scenarios FOLDER [URL of a Redis server, or an empty string [NAMES, by commas]]
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import serve  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayTaskError  # pyright: ignore[reportMissingImports]
from ray.serve.exceptions import BackPressureError  # pyright: ignore[reportMissingImports]

from adaptrt.errors import InvalidArgument, InvalidType, LabelOutOfRange, NonFiniteInput, ShapeChanged, StoreUnavailable
from adaptrt.serve import Engine, Lifecycle, Outcome, Record, Store
from adaptrt.serve.ray import deployment
from adaptrt.serve.ray.reread import Reread
from benchmarks.serving.replicas import INPUTS, Client, build_engine, data, measure, ray_on_this_machine, replicas, store_opener

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
OPTIONS: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0.1}, "health_check_period_s": 1.0}


def started(name: str, folder: Path, **changes: Any) -> Any:
    """Returns the handle of an application on a store of its own."""
    open_store = changes.pop("open_store", store_opener(str(folder / f"{name}.db")))
    return serve.run(deployment(build_engine, open_store, **{**OPTIONS, **changes}), name=name, route_prefix=None)


async def errors_of(*calls: Any) -> list[Any]:
    """Returns what each call returns or raises."""
    return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)


def affinity(folder: Path) -> None:
    """All requests of a tenant go to one replica, whichever way they are made; those without a tenant go to any."""
    handle = started("affinity", folder)
    names = [f"tenant {number}" for number in range(24)] + ["ünï" * 20]

    async def use() -> None:
        homes = {name: (await handle.stats.remote(name)).replica for name in names}
        assert len(set(homes.values())) == 2
        other = serve.get_app_handle("affinity")
        for name in names:
            for call in (handle.adapt.remote, other.adapt.remote):
                outcome = await call(name, data(name, 0))
                assert isinstance(outcome, Outcome) and outcome.kept
            assert (await handle.adapt.remote(tenant=name, support=data(name, 1))).version == outcome.version + 1
            assert (await other.stats.remote(tenant=name)).replica == homes[name]
            await handle.predict.remote(name, INPUTS)
        counts = Counter(homes.values())
        found = {stats.replica: stats.engine for stats in await asyncio.gather(*[handle.stats.remote(name) for name in names])}
        for replica, engine in found.items():
            assert engine.events["committed"] == 3 * counts[replica]
            assert engine.events["predict"] == counts[replica]
            assert engine.lifecycle is Lifecycle.READY and engine.num_compiled_after_ready == 0
        before = await handle.predict.remote("nobody", INPUTS)
        support = data("x", 0)
        predictions = await asyncio.gather(*[handle.adapt_predict.remote(support, INPUTS) for _ in range(20)])
        await handle.adapt.remote("x", support)
        for prediction in predictions:
            assert torch.equal(prediction.outputs, await handle.predict.remote("x", INPUTS))
            assert not torch.equal(prediction.outputs, before)
        assert await handle.forget.remote("x")
        assert torch.equal(await handle.predict.remote("x", INPUTS), before)
        assert not await handle.forget.remote("x")

    asyncio.run(use())


def wrong_input(folder: Path) -> None:
    """Errors are those of the engine, and no wrong request disturbs another."""
    handle = started("wrong_input", folder)
    inputs, target = data("ann", 0)

    async def use() -> None:
        cases: list[tuple[Any, type[Exception]]] = [
            (handle.adapt.remote("ann", (inputs[:3], target[:3])), ShapeChanged),
            (handle.adapt.remote("ann", (inputs, target.double())), InvalidType),
            (handle.adapt.remote("ann", (inputs, target + 7)), LabelOutOfRange),
            (handle.adapt.remote("ann", (inputs * np.nan, target)), NonFiniteInput),
            (handle.adapt.remote("ann", "support"), InvalidType),
            (handle.adapt.remote("ann"), TypeError),
            (handle.adapt.remote("", (inputs, target)), InvalidArgument),
            (handle.adapt.remote("a\ud800", (inputs, target)), InvalidArgument),
            (handle.adapt.remote(3, (inputs, target)), InvalidType),
            (handle.predict.remote(None, INPUTS), InvalidType),
            (handle.adapt_predict.remote((inputs, target), INPUTS[:, :2]), Exception),
            (handle.predict.remote("x" * 300, INPUTS), InvalidArgument),
            (handle.adapt.remote("ann", (inputs, target), deadline_s=-1.0), InvalidArgument),
            (handle.nothing.remote("ann"), Exception),
        ]
        right = handle.adapt.remote("bob", (inputs.numpy(), target.numpy()))
        *found, outcome = await errors_of(*[call for call, _ in cases], right)
        for error, (_, expected) in zip(found, cases, strict=True):
            assert isinstance(error, expected), (error, expected)
        assert outcome.kept
        assert isinstance(found[0], RayTaskError) and "6" in str(found[0])
        by_arrays, by_tensors = await handle.predict.remote("bob", INPUTS.numpy()), await handle.predict.remote("bob", INPUTS)
        assert torch.equal(by_arrays, by_tensors)
        assert not by_arrays.is_inference()
        assert len(await replicas(handle)) == 2

    asyncio.run(use())


class Slow(Reread):
    """A store that takes its time to read."""

    def get(self, tenant: str) -> Record | None:
        time.sleep(0.5)
        return super().get(tenant)


def back_pressure(folder: Path) -> None:
    """More requests than a replica and the handle's queue have room for are refused at once; the others are answered."""
    opener = store_opener(str(folder / "back_pressure.db"))
    settings = {"num_replicas": 1, "max_ongoing_requests": 1, "max_queued_requests": 2}
    handle = started("back_pressure", folder, open_store=lambda: Slow(opener()), **settings)

    async def use() -> None:
        found = await errors_of(*[handle.adapt.remote(f"tenant {number}", data("a", number)) for number in range(8)])
        refused = [error for error in found if isinstance(error, BackPressureError)]
        answered = [outcome for outcome in found if isinstance(outcome, Outcome)]
        assert refused and answered and len(refused) + len(answered) == 8, found
        (stats,) = [await handle.stats.remote()]
        assert stats.engine.events["committed"] == len(answered)

    asyncio.run(use())


def a_busy_replica(folder: Path) -> None:
    """Requests wait for the replica of their tenant, though another one has nothing to do."""
    opener = store_opener(str(folder / "a_busy_replica.db"))
    handle = started("a_busy_replica", folder, open_store=lambda: Slow(opener()), max_ongoing_requests=1)

    async def use() -> None:
        home = (await handle.stats.remote("ann")).replica
        found = await errors_of(*[handle.adapt.remote("ann", data("ann", number)) for number in range(6)])
        versions = sorted(outcome.version for outcome in found)
        assert versions == list(range(versions[0], versions[0] + 6))
        stats = await handle.stats.remote("ann")
        assert (stats.replica, stats.engine.events["committed"]) == (home, 6)
        assert len(await replicas(handle)) == 2

    asyncio.run(use())


def draining(folder: Path) -> None:
    """A replica that is stopped answers what it has, and what it answers is in the store."""
    opener = store_opener(str(folder / "draining.db"))
    handle = started("draining", folder, open_store=lambda: Slow(opener()), num_replicas=1)

    async def use() -> None:
        calls = [asyncio.ensure_future(_awaited(handle.adapt.remote(f"tenant {number}", data("a", number)))) for number in range(3)]
        while (found := (await handle.stats.remote()).engine).num_open + found.events.get("committed", 0) < 3:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(serve.delete, "draining")
        outcomes = await errors_of(*calls)
        store = opener()
        for number, outcome in enumerate(outcomes):
            assert isinstance(outcome, Outcome), outcome
            record = store.get(f"tenant {number}")
            assert record is not None and record.version == outcome.version
        store.close()

    asyncio.run(use())


async def _awaited(call: Any) -> Any:
    return await call


def rolling_update(folder: Path) -> None:
    """Replicas are exchanged one after the other while tenants call: none of the calls fails, and states go on."""
    handle = started("rolling_update", folder)

    async def use() -> None:
        clients = [Client(f"tenant {number}", handle, 0.1) for number in range(6)]
        is_over = asyncio.Event()
        tasks = [asyncio.create_task(client.run(is_over)) for client in clients]
        before = await replicas(handle)
        assert set((await handle.stats.remote()).engine.lanes) <= {1, 2, 3, 4}
        await asyncio.to_thread(started, "rolling_update", folder, config={"lanes": [1]})
        for _ in range(200):
            if not before & await replicas(handle):
                break
            await asyncio.sleep(0.1)
        numbers = [len(client.answers) for client in clients]
        while any(len(client.answers) < number + 4 for client, number in zip(clients, numbers, strict=True)):
            await asyncio.sleep(0.02)
        is_over.set()
        await asyncio.gather(*tasks)
        assert not before & await replicas(handle)
        for client in clients:
            assert not client.errors
            assert set(client.applied) == {1}
            engine = (await handle.stats.remote(client.tenant)).engine
            assert engine.num_compiled_after_ready == 0 and set(engine.lanes) == {1}

    asyncio.run(use())


def build_strict(store: Store, config: dict[str, Any]) -> Engine:
    """Returns an engine that says so where it does not know a tenant."""
    return build_engine(store, {**config, "unknown": "error"})


class Failing(Reread):
    """A store that does not answer while a file is there."""

    def __init__(self, store: Store, file: Path) -> None:
        super().__init__(store)
        self._file = file

    def get(self, tenant: str) -> Record | None:
        if self._file.exists():
            raise StoreUnavailable("there is a file")
        return super().get(tenant)


def outage(folder: Path) -> None:
    """Without its store a replica answers no prediction of an old state."""
    file = folder / "outage"
    opener = store_opener(str(folder / "outage.db"))
    application = deployment(build_strict, lambda: Failing(opener(), file), num_replicas=1, **OPTIONS)
    handle = serve.run(application, name="outage", route_prefix=None)

    async def use() -> None:
        await handle.adapt.remote("ann", data("ann", 0))
        before = await handle.predict.remote("ann", INPUTS)
        file.touch()
        for call in (handle.predict.remote("ann", INPUTS), handle.adapt.remote("ann", data("ann", 1))):
            (error,) = await errors_of(call)
            assert isinstance(error, StoreUnavailable), error
        file.unlink()
        await asyncio.sleep(0.6)  # an engine leaves a store alone for half a second
        assert torch.equal(await handle.predict.remote("ann", INPUTS), before)

    asyncio.run(use())


def killed(folder: Path, url: str | None) -> dict[str, Any]:
    """Replicas are killed under load; nothing that was acknowledged is lost, and no old state is served. Returns what was measured."""
    report = measure(url or str(folder / "killed.db"), num_tenants=12, num_kills=2, seconds=1.0, pause_s=0.05, health_check_period_s=1.0)
    assert set(report.errors) <= {"ActorDiedError", "ActorUnavailableError"}, report.errors
    assert all(kill.num_moved == len(kill.recovery_s) > 0 for kill in report.kills)
    return {**report._asdict(), "kills": [kill._asdict() for kill in report.kills]}


def page(folder: Path, url: str | None) -> str | None:
    """Runs what docs/serving.md shows."""
    if url is None:
        return "needs a server of Redis"
    (block,) = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    exec(compile(block.replace("redis://localhost:6379/0", url), str(PAGE), "exec"), {"__name__": "page"})
    return None


def main() -> None:
    """Runs all scenarios, and prints what each has returned and how it failed, as JSON in the last line."""
    folder, url = Path(sys.argv[1]), (sys.argv[2] if len(sys.argv) > 2 else "") or None
    scenarios: dict[str, Callable[[], Any]] = {
        scenario.__name__: lambda scenario=scenario: scenario(folder)
        for scenario in (affinity, wrong_input, back_pressure, a_busy_replica, draining, rolling_update, outage)
    }
    scenarios |= {"killed": lambda: killed(folder, url), "page": lambda: page(folder, url)}
    if len(sys.argv) > 3:
        scenarios = {name: scenarios[name] for name in sys.argv[3].split(",")}
    found: dict[str, Any] = {}
    with ray_on_this_machine(num_cpus=3):
        for name, scenario in scenarios.items():
            began = time.monotonic()
            try:
                found[name] = {"result": scenario(), "error": None}
            except Exception:
                found[name] = {"result": None, "error": traceback.format_exc()}
            found[name]["took_s"] = time.monotonic() - began
            print(name, found[name], file=sys.stderr, flush=True)
            for application in serve.status().applications:
                serve.delete(application)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
