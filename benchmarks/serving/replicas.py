"""Replicas of the engine in Ray Serve, one of which is killed under load: what is lost, how many calls fail, and when all is as before.

Two replicas on this machine share a store. Each tenant adapts and predicts in turn, and calls again what failed. One of the replicas is
killed by SIGKILL, and Ray starts another. Then that one is killed as well, so that tenants return to a replica that has seen them before.
At the end the states in the store, and all predictions, are compared with those of an engine alone.

python -m benchmarks.serving.replicas

The file is not called ray.py, because Ray puts the folder of the script on the path of its workers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import logging
import os
import platform
import secrets
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt.serve import Engine, MemoryStore, RedisStore, SQLiteStore, Store
from adaptrt.serve.ray import deployment

LANES = 4
SUPPORT = torch.linspace(-1, 1, 18).view(6, 3), torch.arange(6) % 2
INPUTS = torch.linspace(-2, 2, 12).view(4, 3)


def build_engine(store: Store, config: dict[str, Any]) -> Engine:
    """Returns an engine of a tiny network; `config`: its numbers of lanes, and other settings."""
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(lr=0.1), 2, loss=F.cross_entropy, backend="eager")
    return Engine(unroll, (SUPPORT, INPUTS), store=store, **{"lanes": [LANES], "keep": "finite", **config})


def data(tenant: str, number: int) -> tuple[Tensor, Tensor]:
    """Returns what a tenant adapts to, the same in every process."""
    generator = torch.Generator().manual_seed(int.from_bytes(tenant.encode(), "big") % 2**31 + number)
    return torch.randn(6, 3, generator=generator), torch.randint(2, (6,), generator=generator)


@contextlib.contextmanager
def ray_on_this_machine(num_cpus: int = 2) -> Iterator[None]:
    """Starts Ray and Ray Serve, on loopback and without HTTP, and ends both."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # otherwise Ray writes one into the home directory
    import ray  # pyright: ignore[reportMissingImports]
    from ray import serve  # pyright: ignore[reportMissingImports]

    folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)  # paths of sockets must be short
    ray.init(
        address="local",
        _temp_dir=folder.name,
        _node_ip_address="127.0.0.1",
        num_cpus=num_cpus,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR", "enable_access_log": False})
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
        folder.cleanup()


class Client:
    """A tenant that adapts once and predicts twice in turn, and calls again with the same data where it got an error.

    Versions count commits, so that the next answer tells how many of the calls that failed were committed.

    Args:
      tenant: its name.
      handle: of the deployment.
      pause_s: what it waits between two calls of three.

    Attributes:
      applied: for each piece of data, how often it was adapted to.
      acknowledged: the newest version that it was told of.
      predictions: after each piece of data, two.
      errors: when which error came.
      answers: when answers came.
    """

    def __init__(self, tenant: str, handle: Any, pause_s: float) -> None:
        self.tenant = tenant
        self.applied: list[int] = []
        self.acknowledged = 0
        self.predictions: list[tuple[Tensor, Tensor]] = []
        self.errors: list[tuple[float, str]] = []
        self.answers: list[float] = []
        self._handle = handle
        self._pause_s = pause_s

    async def run(self, is_over: asyncio.Event) -> None:
        """Calls until it is over."""
        while not is_over.is_set():
            support = data(self.tenant, len(self.applied))
            outcome = await self._until_answered(functools.partial(self._handle.adapt.remote, self.tenant, support))
            # The first version of a tenant is drawn at random; it is made by a call of its own, before anything is killed.
            self.applied.append(outcome.version - self.acknowledged if self.acknowledged else 1)
            self.acknowledged = outcome.version
            # The second is the first request of a tenant that has moved meanwhile: an old state in memory would show.
            first = await self._until_answered(functools.partial(self._handle.predict.remote, self.tenant, INPUTS))
            await asyncio.sleep(self._pause_s)
            second = await self._until_answered(functools.partial(self._handle.predict.remote, self.tenant, INPUTS))
            self.predictions.append((first, second))

    async def _until_answered(self, call: Callable[[], Any]) -> Any:
        while True:
            try:
                answer = await asyncio.wait_for(call(), 60)
            except Exception as error:
                self.errors.append((time.monotonic(), type(error).__name__))
                if len(self.errors) > 200:
                    raise
                await asyncio.sleep(0.02)
            else:
                self.answers.append(time.monotonic())
                return answer


class Kill(NamedTuple):
    """What followed a SIGKILL.

    Attributes:
      num_moved: how many tenants the replica had.
      errors: how often which error was raised afterwards.
      recovery_s: for each of these tenants, seconds until its next answer.
      replaced_s: seconds until as many replicas ran as before.
    """

    num_moved: int
    errors: dict[str, int]
    recovery_s: list[float]
    replaced_s: float


class Report(NamedTuple):
    """What a run has found.

    Attributes:
      num_answers: calls that were answered.
      errors: how often which error was raised.
      call_s: the median time between two answers of a tenant.
      kills: what followed each kill.
    """

    num_answers: int
    errors: dict[str, int]
    call_s: float
    kills: list[Kill]


async def replica_of(handle: Any, tenant: str) -> tuple[str, int]:
    """Returns the name and the process of the replica that serves a tenant."""
    found = await handle.stats.remote(tenant)
    return found.replica, found.pid


async def replicas(handle: Any) -> set[str]:
    """Returns the names of replicas that serve one of 32 names."""
    return {name for name, _ in await asyncio.gather(*[replica_of(handle, f"probe {number}") for number in range(32)])}


async def kill_under_load(handle: Any, num_tenants: int, num_kills: int, seconds: float, pause_s: float) -> tuple[Report, list[Client]]:
    """Kills replicas one after the other while tenants call.

    Args:
      handle: of two replicas.
      num_tenants: each of which makes one call at a time.
      num_kills: each after the last one was replaced. The replica that lived is spared, so that tenants return to it.
      seconds: of load before each kill and after the last.
      pause_s: what a tenant waits between two calls of three.
    """
    clients = [Client(f"tenant {number}", handle, pause_s) for number in range(num_tenants)]
    is_over = asyncio.Event()
    before = await replicas(handle)
    first, _ = await replica_of(handle, clients[0].tenant)
    spared = next(name for name in before if name != first)
    tasks = [asyncio.create_task(client.run(is_over)) for client in clients]
    while not all(client.answers for client in clients):
        await asyncio.sleep(0.02)
    kills: list[Kill] = []
    try:
        for _ in range(num_kills):
            await asyncio.sleep(seconds)
            kills.append(await _kill(handle, clients, spared, len(before)))
        await asyncio.sleep(seconds)
    finally:
        is_over.set()
        await asyncio.gather(*tasks)
    gaps = [after - before for client in clients for before, after in zip(client.answers, client.answers[1:], strict=False)]
    errors = Counter(name for client in clients for _, name in client.errors)
    return Report(sum(len(client.answers) for client in clients), dict(errors), statistics.median(gaps), kills), clients


async def _kill(handle: Any, clients: list[Client], spared: str, num_replicas: int) -> Kill:
    homes = await asyncio.gather(*[replica_of(handle, client.tenant) for client in clients])
    victims = {home for home in homes if home[0] != spared}
    if len(victims) != 1:
        raise RuntimeError(f"of the replicas, {len(victims)} serve tenants and are not to be spared; take more tenants")
    ((name, pid),) = victims
    moved = [client for client, home in zip(clients, homes, strict=True) if home[0] == name]
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    while True:
        await asyncio.sleep(0.25)
        with contextlib.suppress(Exception):
            if await asyncio.to_thread(_num_running, handle) == num_replicas:
                running = await replicas(handle)
                if name not in running and len(running) == num_replicas:
                    break
        if time.monotonic() > began + 90:
            raise RuntimeError("the replica was not replaced within 90 s")
    replaced_s = time.monotonic() - began
    while not all(client.answers[-1] > began for client in moved):
        await asyncio.sleep(0.02)
    errors = Counter(name for client in clients for moment, name in client.errors if moment > began)
    return Kill(len(moved), dict(errors), [next(at for at in client.answers if at > began) - began for client in moved], replaced_s)


def _num_running(handle: Any) -> int:
    from ray import serve  # pyright: ignore[reportMissingImports]

    deployments: Any = serve.status().applications[handle.app_name].deployments
    return deployments[handle.deployment_name].replica_states.get("RUNNING", 0)


async def require_nothing_lost(clients: list[Client], store: Store) -> None:
    """Raises unless the store has what each tenant was told, and all predictions and states are those of an engine alone."""
    for client in clients:
        found = store.get(client.tenant)
        if found is None or found.version != client.acknowledged:
            raise RuntimeError(f"{client.tenant} was told of version {client.acknowledged}, the store has {found and found.version}")
    alone = build_engine(MemoryStore(2**24), {})
    async with alone, build_engine(store, {}) as reader:
        for client in clients:
            for number, (times, predictions) in enumerate(zip(client.applied, client.predictions, strict=True)):
                for _ in range(times):
                    await alone.adapt(client.tenant, data(client.tenant, number))
                expected = await alone.predict(client.tenant, INPUTS)
                if not all(torch.equal(expected, found) for found in predictions):
                    raise RuntimeError(f"a prediction after adaptation {number} of {client.tenant} is not that of the state acknowledged")
            if not torch.equal(await reader.predict(client.tenant, INPUTS), client.predictions[-1][0]):
                raise RuntimeError(f"the state of {client.tenant} in the store is not the one that was acknowledged last")


def store_opener(url_or_path: str) -> Callable[[], Store]:
    """Returns what opens a store: of Redis for a URL, else of SQLite."""
    if "://" in url_or_path:
        return lambda: RedisStore(url_or_path, timeout_s=10.0)
    return lambda: SQLiteStore(url_or_path, synchronous="normal", timeout_s=10.0)


def measure(where: str, *, num_tenants: int, num_kills: int, seconds: float, pause_s: float, health_check_period_s: float) -> Report:
    """Runs two replicas on a store, kills, and requires that nothing was lost."""
    from ray import serve  # pyright: ignore[reportMissingImports]

    open_store = store_opener(where)
    options = {"ray_actor_options": {"num_cpus": 1}, "health_check_period_s": health_check_period_s}
    handle: Any = serve.run(deployment(build_engine, open_store, num_replicas=2, **options), name="killed", route_prefix=None)
    try:
        report, clients = asyncio.run(kill_under_load(handle, num_tenants, num_kills, seconds, pause_s))
    finally:
        serve.delete("killed")
    store = open_store()
    try:
        asyncio.run(require_nothing_lost(clients, store))
    finally:
        store.close()
    return report


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tenants", type=int, default=16)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="of load before each kill and after the last")
    parser.add_argument("--pause-s", type=float, default=0.03, help="what a tenant waits between two calls of three")
    parser.add_argument("--store", help="a URL of Redis, or the path of a file; a temporary file without it")
    parser.add_argument("--health-check-period-s", type=float, default=1.0, help="how often Ray looks for dead replicas")
    parser.add_argument("--json", type=Path, help="also write the report here")
    chosen = parser.parse_args()
    import ray  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder, ray_on_this_machine():
        where = chosen.store or f"{folder}/tenants.db"
        report = measure(
            where,
            num_tenants=chosen.tenants,
            num_kills=chosen.kills,
            seconds=chosen.seconds,
            pause_s=chosen.pause_s,
            health_check_period_s=chosen.health_check_period_s,
        )
    num_errors = sum(report.errors.values())
    print(f"{os.cpu_count()} cores; ray {ray.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{chosen.tenants} tenants, two replicas, {'Redis' if chosen.store and '://' in chosen.store else 'SQLite'}; nothing was lost.")
    print(
        f"{report.num_answers} calls answered, {num_errors} failed ({num_errors / (report.num_answers + num_errors):.2%}): {report.errors}"
    )
    print(f"median time between two answers of a tenant: {1000 * report.call_s:.1f} ms\n")
    print(
        "| kill | tenants moved | calls failed | their next answer, median | the last of them | replaced after |\n|---|---|---|---|---|---|"
    )
    for number, kill in enumerate(report.kills, 1):
        median, last = statistics.median(kill.recovery_s), max(kill.recovery_s)
        failed = sum(kill.errors.values())
        print(f"| {number} | {kill.num_moved} | {failed} | {1000 * median:.0f} ms | {1000 * last:.0f} ms | {kill.replaced_s:.1f} s |")
    if chosen.json:
        chosen.json.write_text(json.dumps({**report._asdict(), "kills": [kill._asdict() for kill in report.kills]}, indent=1))


if __name__ == "__main__":
    main()
