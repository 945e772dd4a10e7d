"""The model that a server serves: an engine, what its tensors are called, and its successor while that one warms up."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptrt.errors import InvalidArgument, InvalidType
from adaptrt.serve import trees
from adaptrt.serve.core import Stats
from adaptrt.serve.engine import Engine
from adaptrt.serve.web.errors import HTTPError, unavailable
from adaptrt.serve.web.names import Form, named
from adaptrt.serve.web.protocol import datatype_of, has_datatype

LOSSES, KEPT, OUTPUT = "losses", "kept", "output"
"""Names of outputs: losses before each step, whether the guard kept the result, and what the names of predictions begin with."""


class Stage(enum.StrEnum):
    """What a server does at the moment."""

    STARTING = "starting"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"


class Built(NamedTuple):
    """An engine that is not started yet, and the example `(support, inputs)` that it was made with."""

    engine: Engine
    example: tuple[Any, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Ready:
    """An engine that serves.

    Attributes:
      engine: the engine.
      version: `Engine.version`.
      support, query: names of its inputs.
      outputs: names, datatypes and shapes of predictions, as metadata has them.
    """

    engine: Engine
    version: str
    support: Form
    query: Form
    outputs: list[dict[str, Any]]

    def metadata(self, name: str, extensions: dict[str, str]) -> dict[str, Any]:
        """Returns the model's metadata in the form of the protocol."""
        k = self.engine.k
        return {
            "name": name,
            "versions": [self.version],
            "platform": "adaptrt",
            "inputs": [*self.support.metadata(optional=True), *self.query.metadata(optional=True)],
            "outputs": [
                *self.outputs,
                {"name": LOSSES, "datatype": "FP32", "shape": [k]},
                {"name": KEPT, "datatype": "BOOL", "shape": [1]},
            ],
            "extensions": extensions,
            "parameters": {
                "steps": k,
                "support_examples": list(self.engine.support_sizes.sizes),
                "support_examples_may_be_fewer": self.engine.support_sizes.pads,
                "query_examples": list(self.engine.query_sizes.sizes),
                "query_examples_may_be_fewer": self.engine.query_sizes.pads,
            },
        }


class Served:
    """A model that is served under a name, and can be replaced while it is.

    Args:
      name: in the addresses of the protocol.
      build: makes an engine; it is called again for each new version.
      max_state_bytes: how large the state of a tenant may be, None without limit.
      max_steps: how many inner steps it may have, None without limit.
    """

    def __init__(self, name: str, build: Callable[[], Built], *, max_state_bytes: int | None = None, max_steps: int | None = None) -> None:
        self.name = name
        self.stage = Stage.STARTING
        self._build = build
        self._max_state_bytes = max_state_bytes
        self._max_steps = max_steps
        self._ready: Ready | None = None
        self._loading = asyncio.Lock()
        self._num_uses = 0
        self._may_use = asyncio.Event()
        self._is_unused = asyncio.Event()
        self._may_use.set()
        self._is_unused.set()
        self._past_events: Counter[str] = Counter()
        self._past_lanes: Counter[int] = Counter()

    async def start(self) -> None:
        """Builds and warms the engine. Afterwards it is ready.

        Raises:
          AdaptrtError: it cannot be built, or is beyond a limit.
        """
        async with self._loading:
            self._ready = await self._made()
            if self.stage is Stage.WARMING:
                self.stage = Stage.READY

    async def load(self) -> str:
        """Builds and warms another engine beside the one that serves, and then serves with it.

        Requests that come at that moment wait until the old engine has answered those before them. So each is answered by one version, and
        what the old one has committed is there for the new one.

        Returns:
          The new version.
        Raises:
          HTTPError: the model is not ready, or is being loaded already.
          AdaptrtError: it cannot be built; the old one serves on.
        """
        self.ready()
        if self._loading.locked():
            raise HTTPError(409, "the model is being loaded already; wait for that")
        async with self._loading:
            made = await self._made()
            self._may_use.clear()
            try:
                await self._is_unused.wait()
                old, self._ready = self.ready(), made
                self._past_events.update(old.engine.stats().events)
                self._past_lanes.update(old.engine.stats().lanes)
            except BaseException:
                await made.engine.drain()
                raise
            finally:
                self._may_use.set()
            await old.engine.drain()
            return made.version

    async def drain(self) -> None:
        """Answers what was accepted, and ends the engine."""
        self.stage = Stage.DRAINING
        async with self._loading:
            if self._ready is not None:
                await self._ready.engine.drain()

    @contextlib.asynccontextmanager
    async def use(self) -> AsyncIterator[Ready]:
        """Gives a request the engine that serves; it stays until the request has ended. A server that drains still has one.

        Raises:
          HTTPError: 503 if there is none.
        """
        await self._may_use.wait()
        ready = self._ready or self.ready()
        self._num_uses += 1
        self._is_unused.clear()
        try:
            yield ready
        finally:
            self._num_uses -= 1
            if not self._num_uses:
                self._is_unused.set()

    def ready(self) -> Ready:
        """Returns the engine that serves. Raises HTTPError 503 if there is none."""
        if self._ready is None or self.stage is not Stage.READY:
            raise unavailable(f"the model is {self.stage}; try again, or ask another replica")
        return self._ready

    def stats(self) -> Stats | None:
        """Returns counts of the engine, with those of the ones before it; None before the first."""
        if self._ready is None:
            return None
        found = self._ready.engine.stats()
        events, lanes = self._past_events + Counter(found.events), self._past_lanes + Counter(found.lanes)
        return dataclasses.replace(found, events=dict(events), lanes=dict(lanes))

    async def _made(self) -> Ready:
        built = await asyncio.to_thread(self._build)
        if self.stage is Stage.STARTING:
            self.stage = Stage.WARMING
        engine = built.engine
        _require(self._max_state_bytes, engine.num_state_bytes, "the state of a tenant has {} bytes, and max_state_bytes is {}")
        _require(self._max_steps, engine.k, "the model makes {} steps, and max_steps is {}")
        support, query = Form("support", built.example[0]), Form("query", built.example[1])
        await engine.start()
        try:
            outputs = await _outputs(engine, built.example)
        except BaseException:
            await engine.drain()
            raise
        return Ready(engine, engine.version, support, query, outputs)


async def _outputs(engine: Engine, example: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Predicts for the example, and returns what metadata says of the outputs; -1 is the number of examples."""
    support, inputs = example
    size = engine.query_sizes.sizes[0]
    found = await engine.adapt_predict(_of_size(support, engine.support_sizes.sizes[0]), _of_size(inputs, size))
    entries: list[dict[str, Any]] = []
    for name, tensor in named(OUTPUT, found.outputs).items():
        if not has_datatype(tensor.dtype):
            raise InvalidType(f"the model's output {name} is {tensor.dtype}, which the protocol does not have; return another dtype")
        shape = list(tensor.shape)
        entries.append({"name": name, "datatype": datatype_of(tensor.dtype), "shape": [-1, *shape[1:]] if shape[:1] == [size] else shape})
    if not entries:
        raise InvalidType("the model's outputs hold no tensors; return some from forward()")
    return entries


def _of_size(tree: Any, size: int) -> Any:
    def repeat(leaf: Tensor) -> Tensor:
        return leaf[torch.arange(size) % len(leaf)]

    return trees.map_leaves(repeat, tree)


def _require(bound: int | None, value: int, message: str) -> None:
    if bound is not None and value > bound:
        raise InvalidArgument(message.format(f"{value:,}", f"{bound:,}"))
