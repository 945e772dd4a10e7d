"""The engine in Ray Serve. Replicas alone are tested here; what needs Ray is in `tests/ray_scenarios.py`, which one process runs."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from adaptrt.errors import InvalidArgument, InvalidType, NotServing
from adaptrt.serve import Engine, Lifecycle, MemoryStore, Outcome, SQLiteStore
from adaptrt.serve.ray import Replica, deployment
from benchmarks.serving.replicas import INPUTS, build_engine, data
from tests.test_serve_stores import REDIS, Server

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 900


def run(test: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(test(), 60))


@contextlib.asynccontextmanager
async def replicas_on(path: Path, number: int, **settings: Any) -> AsyncIterator[list[Replica]]:
    """Replicas as Ray makes them, all in this process."""
    made = [Replica(build_engine, lambda: SQLiteStore(path, synchronous="normal"), **settings) for _ in range(number)]
    try:
        for replica in made:
            await replica.reconfigure({})
            await replica.check_health()
        yield made
    finally:
        for replica in made:
            await replica.close()


def serving(replica: Replica) -> Engine:
    return replica._serving  # pyright: ignore[reportPrivateUsage]


# A replica


@pytest.mark.parametrize("reread", [True, False])
def test_a_tenant_that_returns_to_a_replica(tmp_path: Path, reread: bool) -> None:
    """What another replica has committed meanwhile is what the first one predicts with; but not without `reread`."""

    async def test() -> None:
        async with replicas_on(tmp_path / "tenants.db", 2, reread=reread) as (first, second):
            for number in range(3):
                await first.adapt("ann", data("ann", number))
                old = await first.predict("ann", INPUTS)
                await second.adapt("ann", data("ann", 100 + number))
                new = await second.predict("ann", INPUTS)
                assert not torch.equal(old, new)
                assert torch.equal(await first.predict("ann", INPUTS), new if reread else old)
            await second.forget("ann")
            base = await second.predict("nobody", INPUTS)
            assert torch.equal(await first.predict("ann", INPUTS), base) is reread

    run(test)


def test_of_replicas_that_adapt_one_tenant_at_once_none_is_lost(tmp_path: Path) -> None:
    async def test() -> None:
        async with replicas_on(tmp_path / "tenants.db", 2) as made:
            outcomes = await asyncio.gather(*[made[number % 2].adapt("ann", data("ann", number)) for number in range(4)])
            versions = sorted(outcome.version for outcome in outcomes)
            assert versions == list(range(versions[0], versions[0] + 4))

    run(test)


def test_a_new_configuration_is_warm_before_it_serves(tmp_path: Path) -> None:
    """Requests that are there go to the old engine, later ones to the new; none fails."""

    async def test() -> None:
        async with replicas_on(tmp_path / "tenants.db", 1) as (replica,):
            versions: list[int] = []
            is_over = asyncio.Event()

            async def call() -> None:
                while not is_over.is_set():
                    versions.append((await replica.adapt("ann", data("ann", len(versions)))).version)

            task = asyncio.create_task(call())
            for lanes in ([2], [1, 3]):
                before = serving(replica)
                reconfigured = asyncio.create_task(replica.reconfigure({"lanes": lanes}))
                while not reconfigured.done():
                    await replica.check_health()
                    await asyncio.sleep(0)
                await reconfigured
                assert before.stats().lifecycle is Lifecycle.STOPPED
                assert serving(replica).stats().num_compiled_after_ready == 0
            is_over.set()
            await task
            assert versions == list(range(versions[0], versions[0] + len(versions)))

    run(test)


def test_a_configuration_that_fails_leaves_the_engine(tmp_path: Path) -> None:
    async def test() -> None:
        async with replicas_on(tmp_path / "tenants.db", 1) as (replica,):
            with pytest.raises(TypeError):
                await replica.reconfigure({"no such setting": 1})
            assert (await replica.adapt("ann", data("ann", 0))).kept

    run(test)


def test_health_is_that_of_the_engine(tmp_path: Path) -> None:
    async def test() -> None:
        replica = Replica(build_engine, lambda: SQLiteStore(tmp_path / "tenants.db"))
        with pytest.raises(NotServing, match="no engine yet"):
            await replica.check_health()
        await replica.reconfigure({})
        engine = serving(replica)
        late = asyncio.create_task(replica.adapt("ann", data("ann", 0)))
        await asyncio.sleep(0)
        await replica.__del__()  # as Ray calls it
        assert isinstance(await late, Outcome)
        assert engine.stats().lifecycle is Lifecycle.STOPPED
        assert replica.__del__() is None
        with pytest.raises(NotServing, match="stopped"):
            await replica.check_health()
        with pytest.raises(NotServing, match="closed"):
            await replica.reconfigure({})

    run(test)


class Points(NamedTuple):
    """A batch with names."""

    x: Any
    y: Any


def test_arrays_are_taken(tmp_path: Path) -> None:
    async def test() -> None:
        async with replicas_on(tmp_path / "tenants.db", 1) as (replica,):
            x, y = data("ann", 0)
            frozen = x.numpy().copy()
            frozen.flags.writeable = False  # as what Ray has in shared memory
            await replica.adapt("ann", (frozen, y.numpy()))
            await replica.adapt("bob", (x, y))
            by_arrays, by_tensors = await replica.predict("ann", INPUTS.numpy()), await replica.predict("bob", INPUTS)
            assert torch.equal(by_arrays, by_tensors)
            prediction = await replica.adapt_predict((frozen, y), INPUTS.numpy())
            assert torch.equal(prediction.outputs, by_tensors)
            with pytest.raises(InvalidType, match="float64"):
                await replica.predict("ann", INPUTS.numpy().astype(np.float64))
            with pytest.raises(InvalidType, match="support data must be like the example"):
                await replica.adapt("ann", Points(frozen, y))

    run(test)


@pytest.mark.parametrize("store", [MemoryStore(2**20), "tenants.db"])
def test_stores_that_replicas_cannot_share(store: Any) -> None:
    with pytest.raises(InvalidArgument if isinstance(store, MemoryStore) else InvalidType, match="SQLiteStore"):
        Replica(build_engine, lambda: store)


def test_what_builds_no_engine(tmp_path: Path) -> None:
    async def test() -> None:
        replica = Replica(lambda store, config: "engine", lambda: SQLiteStore(tmp_path / "tenants.db"))  # pyright: ignore[reportArgumentType]
        with pytest.raises(InvalidType, match="build_engine must return an Engine, got str"):
            await replica.reconfigure({})
        await replica.close()

    run(test)


# A deployment


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"build_engine": Engine.__new__(Engine)}, InvalidType, "build_engine must be a function"),
        ({"open_store": "tenants.db"}, InvalidType, "open_store must be a function"),
        ({"config": [1]}, InvalidType, "config must be a dict"),
        ({"user_config": {}}, InvalidArgument, "pass config="),
        ({"request_router_config": {}}, InvalidArgument, "request_router_config"),
    ],
)
def test_arguments_of_a_deployment(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        deployment(**{"build_engine": build_engine, "open_store": lambda: SQLiteStore("tenants.db"), **changes})


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'adaptrt\[ray\]'"):
        deployment(build_engine, lambda: SQLiteStore("tenants.db"))


def test_ray_is_imported_on_demand() -> None:
    script = "import sys, adaptrt, adaptrt.serve, adaptrt.serve.ray; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)


# Ray


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What each scenario found, of one process that starts Ray once."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("the package ray is not installed; pip install 'adaptrt[ray]'")
    folder = tmp_path_factory.mktemp("ray")
    server = Server(folder) if REDIS else None
    command = [sys.executable, "-m", "tests.ray_scenarios", str(folder), *([server.url] if server else [])]
    # A session of its own: what Ray leaves, if it does not end well, ends with the group.
    output, errors = folder / "output", folder / "errors"
    with output.open("w") as out, errors.open("w") as err:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(TIMEOUT_S)
        assert process.poll() == 0, errors.read_text()[-5000:]
        yield json.loads(output.read_text().splitlines()[-1])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if server is not None:
            server.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["affinity", "wrong_input", "back_pressure", "a_busy_replica", "draining", "rolling_update", "outage", "killed", "page"]
)
def test_in_ray(scenarios: dict[str, Any], name: str) -> None:
    """Each scenario says what it requires. What was measured when replicas were killed is printed, and not compared with anything."""
    found = scenarios[name]
    assert found["error"] is None, found["error"]
    print(name, round(found["took_s"], 1), "s", found["result"] or "")
    if isinstance(found["result"], str):
        pytest.skip(found["result"])
