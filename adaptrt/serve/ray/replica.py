"""What each replica of a deployment runs: an engine on the store that all share.

Known limits: Ray does not repeat a request whose replica died, and an adaptation among these may have been committed or not. A second call
of it would adapt twice, which the engine cannot tell from two adaptations.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptrt.errors import InvalidArgument, InvalidType, NotServing
from adaptrt.serve import Engine, Lifecycle, Outcome, Prediction, Stats, Store, trees
from adaptrt.serve.ray.reread import Reread

BuildEngine = Callable[[Store, dict[str, Any]], Engine]
"""Makes an engine on a store, which it passes on as `store=`; the dict is what `deployment` was given as `config`."""


class ReplicaStats(NamedTuple):
    """What `stats` of a deployment returns.

    Attributes:
      replica: Ray's name of the replica.
      pid: of its process.
      engine: counts of its engine.
    """

    replica: str
    pid: int
    engine: Stats


class Replica:
    """What runs in each replica. Its methods are called through the handle of a deployment.

    Data are tensors or arrays of NumPy, in the structure of the engine's example. Results are tensors on the CPU. Errors are those of the
    engine, and those of Ray: `ActorDiedError` where the replica died, `BackPressureError`.

    Args:
      build_engine, open_store, reread, device: as for `deployment`.
    Raises:
      InvalidType, InvalidArgument: `open_store` returns no store, or one that replicas cannot share.
    """

    def __init__(self, build_engine: BuildEngine, open_store: Callable[[], Store], reread: bool = True, device: str = "cpu") -> None:
        self._engine: Engine | None = None
        self._store: Store | None = None
        store = open_store()
        if not isinstance(store, Store):
            raise InvalidType(f"open_store must return a Store, such as RedisStore or SQLiteStore, got {type(store).__name__}")
        if store.holds_live:
            raise InvalidArgument(f"replicas cannot share a {type(store).__name__}, which is in one process; use RedisStore or SQLiteStore")
        self._build_engine = build_engine
        self._device = torch.device(device)
        self._store = Reread(store) if reread else store

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Makes and warms the engine of a configuration, and then drains the one before. Ray calls it, first of all methods."""
        if self._store is None:
            raise NotServing("the replica was closed")
        engine = await asyncio.to_thread(self._build_engine, self._store, config)  # requests are answered meanwhile
        if not isinstance(engine, Engine):
            raise InvalidType(f"build_engine must return an Engine, got {type(engine).__name__}")
        await engine.start()
        if self._store is None:
            await engine.drain()
            raise NotServing("the replica was closed")
        before, self._engine = self._engine, engine
        if before is not None:
            await before.drain()

    async def check_health(self) -> None:
        """Raises if the engine does not accept requests. Ray calls it, and starts another replica then."""
        lifecycle = self._serving.stats().lifecycle
        if lifecycle is not Lifecycle.READY:
            raise NotServing(f"the engine is {lifecycle}, and accepts no requests")

    async def close(self) -> None:
        """Drains the engine and closes the store."""
        store, self._store = self._store, None
        if self._engine is not None:
            await self._engine.drain()
        if store is not None:
            store.close()

    def __del__(self) -> Any:
        """Returns what closes the replica. Ray calls and awaits it after the last answer; Python calls it when nothing is left to do."""
        return None if self._store is None else self.close()

    async def adapt(self, tenant: str, support: Any, deadline_s: float | None = None) -> Outcome:
        """As `Engine.adapt`. The deadline counts from the arrival at the replica."""
        return await self._serving.adapt(tenant, _tensors(support, self._device), deadline_s)

    async def predict(self, tenant: str, inputs: Any, deadline_s: float | None = None) -> Any:
        """As `Engine.predict`."""
        return _on_cpu(await self._serving.predict(tenant, _tensors(inputs, self._device), deadline_s))

    async def adapt_predict(self, support: Any, inputs: Any, deadline_s: float | None = None) -> Prediction:
        """As `Engine.adapt_predict`, on any replica."""
        found = await self._serving.adapt_predict(_tensors(support, self._device), _tensors(inputs, self._device), deadline_s)
        return found._replace(outputs=_on_cpu(found.outputs))

    async def forget(self, tenant: str) -> bool:
        """As `Engine.forget`."""
        return await self._serving.forget(tenant)

    async def stats(self, tenant: str | None = None) -> ReplicaStats:
        """Returns counts of the replica that serves a tenant, or of any."""
        from ray import serve  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        del tenant  # the router has seen it
        return ReplicaStats(serve.get_replica_context().replica_id.unique_id, os.getpid(), self._serving.stats())

    @property
    def _serving(self) -> Engine:
        if self._engine is None:
            raise NotServing("the replica has no engine yet")
        return self._engine


def _tensors(data: Any, device: torch.device) -> Any:
    """Returns data on a device, with tensors in the place of arrays."""
    if isinstance(data, Tensor):
        return data.to(device)
    if isinstance(data, Mapping):
        return {key: _tensors(part, device) for key, part in data.items()}
    if isinstance(data, tuple | list):
        parts = [_tensors(part, device) for part in data]
        return type(data)(*parts) if hasattr(data, "_fields") else type(data)(parts)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        parts = {field.name: _tensors(getattr(data, field.name), device) for field in dataclasses.fields(data)}
        return dataclasses.replace(data, **parts)
    return torch.tensor(data, device=device) if hasattr(data, "__array__") else data  # a copy: what comes from Ray's memory is read-only


def _on_cpu(outputs: Any) -> Any:
    return trees.map_leaves(Tensor.cpu, outputs)
