"""The engine: one thread computes, asyncio stands in front, and a store keeps what was committed."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from adaptrt.errors import InvalidArgument, InvalidType
from adaptrt.serve.core import Core, Lifecycle, Stats
from adaptrt.serve.lanes import Lanes
from adaptrt.serve.policies import policy_of
from adaptrt.serve.programs import Keep, programs_of, rows_depend_on_each_other
from adaptrt.serve.queue import WorkQueue
from adaptrt.serve.records import checked_tenant
from adaptrt.serve.sizes import Sizes, SizesTaken, positive_ints
from adaptrt.serve.states import States
from adaptrt.serve.stores import MemoryStore, Store
from adaptrt.serve.sync import Sync
from adaptrt.serve.work import Outcome, Prediction, Together, Work


class Engine:
    """Adapts a model to many tenants at once, and predicts with the state of each. It has no HTTP; any service can hold one.

    Requests of different tenants are computed together, as tasks of one batch. Their numbers are those that each would have alone, bit for
    bit where the batch has the same number of lanes, up to rounding elsewhere. All programs are compiled by `start`, none afterwards.

    Args:
      target: an unroll of one task, what `adaptrt.load` returned, or the folder of an export. Model and optimiser must not change while the
        engine serves.
      example: `(support, inputs)` of one task: a support batch as for `unroll.adapt`, without weights of examples, and the inputs of
        a prediction. Requests have its structure, dtypes and shapes; values do not matter but for being possible.
      lanes: how many tasks a batch may have; a batch is filled up to the next of these. None: (1, 2, 4, 8, 16, 32), or for an export what
        it holds.
      together: whether the tasks of a batch are computed by one program over tasks, or one after the other by that of one task. None: a
        batch of one has the latter, and larger ones what `start` finds to be faster, which is a matter of rounding only. Convolutions often
        are faster one by one. An export has what it was exported with.
      support_sizes, query_sizes: numbers of examples; empty for those of the example. A smaller request gets the next larger size where
        that does not change its numbers: for support data with `examples="weighted"`, for inputs where the model treats rows on their own,
        which `start` tries out. Otherwise the size must be one of these.
      max_delay_s: how long a batch that has room waits for more requests. A batch waits only for as many as its predecessor had.
      max_queue, max_per_tenant: how many requests may wait for their batch or for the store, of all tenants, and how many of one
        may be in the engine.
      keep: the guard, as for `unroll.adapt`; a number is the largest norm that the change of the parameters may have. Each lane is decided
        by itself.
      store: keeps the states; None for a `MemoryStore` of 1 GiB. The engine does not close it.
      policy: what an adaptation starts from: "continual", the tenant's state; "episodic", the base, and nothing is kept; "reset_on_guard",
        as continual, but a refused adaptation has the tenant forgotten; ("reset_after", n) and ("max_age_s", seconds), the base after n
        adaptations or so many seconds from it; or a function of a `History` that returns whether to go on.
      unknown: predictions for a tenant without a state: "base" predicts with the base, "error" raises `UnknownTenant`.
      other_base: a stored state that is damaged or was adapted from another base: "error" refuses it, "drop" forgets it.
      cache_bytes: bounds the states in memory, in front of a store that is not in memory itself.
      max_tries: how often an adaptation is computed if others commit for the same tenant meanwhile, in other engines on the same store.
      max_tenants: how many tenants may have a state; another one's first adaptation raises `TooManyTenants`. Engines that share a store
        can be a few beyond it together. None for no bound but that of the store.
      clock: what deadlines are compared with, in seconds.
    Raises:
      InvalidType, InvalidArgument: an argument is not as above.

    Example:
      >>> import torch
      >>> from adaptrt import compile_unroll, optim
      >>> unroll = compile_unroll(torch.nn.Linear(3, 2), optim.sgd(lr=0.1), k=2, backend="eager")
      >>> support, inputs = (torch.randn(6, 3), torch.randint(2, (6,))), torch.randn(4, 3)
      >>> async def serve():
      ...     async with Engine(unroll, (support, inputs), lanes=(1, 2)) as engine:
      ...         outcome = await engine.adapt("ann", support)
      ...         return outcome.kept, (await engine.predict("ann", inputs)).shape
      >>> asyncio.run(serve())
      (True, torch.Size([4, 2]))
    """

    def __init__(
        self,
        target: Any,
        example: tuple[Any, Any],
        *,
        lanes: Sequence[int] | None = None,
        support_sizes: Sequence[int] = (),
        query_sizes: Sequence[int] = (),
        together: bool | None = None,
        max_delay_s: float = 0.002,
        max_queue: int = 1024,
        max_per_tenant: int = 64,
        keep: Keep = "not_worse",
        store: Store | None = None,
        policy: Any = "continual",
        unknown: str = "base",
        other_base: str = "error",
        cache_bytes: int = 2**28,
        max_tries: int = 4,
        max_tenants: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not isinstance(example, tuple) or len(example) != 2 or not isinstance(example[0], tuple):
            raise InvalidType("example must be (support, inputs), with support a tuple (inputs, target) or (inputs,) of one task")
        of_lanes = None if lanes is None else positive_ints("lanes", lanes)
        for name, value in (("max_queue", max_queue), ("max_per_tenant", max_per_tenant), ("max_tries", max_tries)):
            positive_ints(name, (value,))
        _seconds("max_delay_s", max_delay_s)
        _one_of("unknown", unknown, ("base", "error"))
        _one_of("other_base", other_base, ("error", "drop"))
        if store is not None and not isinstance(store, Store):
            raise InvalidType(f"store must be a Store, such as MemoryStore or SQLiteStore, got {type(store).__name__}")
        store = MemoryStore(2**30) if store is None else store
        if max_tenants is not None:
            positive_ints("max_tenants", (max_tenants,))
            if store.num_tenants() is None:
                raise InvalidArgument(f"max_tenants cannot be held, as {type(store).__name__} does not tell how many tenants it has")
        if not (together is None or isinstance(together, bool)):
            raise InvalidType(f"together must be True, False or None, got {together!r}")
        chosen = policy_of(policy)
        num_sizes = max(len(set(support_sizes)), len(set(query_sizes)), 1)
        self._programs = programs_of(target, of_lanes, num_sizes, keep, together)
        weighted = self._programs.weighted
        self._supports = Sizes("support", example[0], support_sizes, weighted, weighted)
        self._queries = Sizes("query", example[1], query_sizes, False, False)
        self._clock = clock
        queue = WorkQueue(self._programs.lanes[-1], max_delay_s, max_queue, max_per_tenant, clock)
        states = States(store, self._programs, cache_bytes, other_base == "drop")
        compute = Lanes(self._programs, self._supports, self._queries, chosen, unknown == "error")
        self._core = Core(queue, states, compute, chosen, max_tries, max_tenants)
        self.sync = Sync(self)

    async def __aenter__(self) -> Engine:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.drain()

    async def start(self) -> None:
        """Compiles and runs the programs of all sizes once. Afterwards requests are accepted, on this event loop.

        Raises:
          NotServing: it was called before.
          AdaptrtError: what `adapt` and predictions raise for the example.
        """
        await self._core.start(self._warm)

    async def adapt(self, tenant: str, support: Any, deadline_s: float | None = None) -> Outcome:
        """Adapts to a support batch, and commits the result as the tenant's state if the guard keeps it.

        Adaptations of one tenant run one after the other, in the order in which they were called. When this returns, the state is in the
        store. The data must not be changed before.

        Args:
          tenant: 1 to 256 printable characters.
          support: as the example.
          deadline_s: seconds from now. None for no deadline.
        Raises:
          DeadlineExceeded: the deadline passed before it began, or before the commit.
          Overloaded: the queue is full.
          StoreUnavailable: the store does not answer. Unless the answer to the commit itself was lost, the state is as it was.
          TooManyTenants: the tenant has no state, and `max_tenants` others have.
          CommitConflict: other engines committed for the tenant again and again.
          InvalidState: the tenant's state is damaged or of another base; `forget` it.
          NotServing: the engine is not started, is draining, or belongs to another event loop.
          InvalidBatch, InvalidType, ShapeChanged, DeviceMismatch, NonFiniteInput, LabelOutOfRange: the data cannot be used.
          CancelledError: the caller was cancelled. Nothing is committed then unless the commit had begun.
        """
        length, size = self._supports.fit(support)
        return await self._core.call("adapt", checked_tenant(tenant), support, length, size, *self._times(deadline_s))

    async def adapt_all(self, requests: Sequence[tuple[str, Any]], deadline_s: float | None = None) -> list[Outcome | Exception]:
        """Adapts several tenants, as as many calls of `adapt` at once; it takes less time than these.

        Args:
          requests: a tenant and a support batch each.
          deadline_s: of all, as for `adapt`.
        Returns:
          For each what `adapt` returns, or the error that it raises once a request was accepted.
        Raises:
          Overloaded, NotServing, and errors of data: one of the requests is not accepted, and so none is.
        """
        if isinstance(requests, str) or not isinstance(requests, Sequence):
            raise InvalidType(f"adapt_all() takes a list of (tenant, support), got {type(requests).__name__}")
        fitted = [(checked_tenant(tenant), support, *self._supports.fit(support)) for tenant, support in requests]
        deadline, now = self._times(deadline_s)
        future = self._core.future()
        if not fitted:
            return []
        works = [Work("adapt", None, support, length, size, deadline, now, future) for _, support, length, size in fitted]
        Together(works, future)
        self._core.accept([(work, tenant) for work, (tenant, *_) in zip(works, fitted, strict=True)])
        return await self._core.answered(works, future)

    async def predict(self, tenant: str, inputs: Any, deadline_s: float | None = None) -> Any:
        """Returns what the model computes for inputs in the tenant's newest committed state.

        If the store does not answer, that is the newest state in memory, or the base. Other arguments are as for `adapt`.

        Raises:
          UnknownTenant: there is none, and the engine was made with `unknown="error"`.
          StoreUnavailable: whether there is one cannot be found out, and the engine was made so.
          DeadlineExceeded, Overloaded, NotServing and errors of data: as `adapt`.
        """
        length, size = self._queries.fit(inputs)
        return await self._core.call("predict", checked_tenant(tenant), inputs, length, size, *self._times(deadline_s))

    async def adapt_predict(self, support: Any, inputs: Any, deadline_s: float | None = None) -> Prediction:
        """Adapts the base to a support batch and predicts; nothing is kept. Arguments and errors are as for `adapt` and `predict`."""
        length, size = self._supports.fit(support)
        query = (inputs, *self._queries.fit(inputs))
        return await self._core.call("adapt", None, support, length, size, *self._times(deadline_s), query=query)

    async def forget(self, tenant: str) -> bool:
        """Deletes the tenant's state, after adaptations that were called before. Returns whether there was one.

        Raises:
          StoreUnavailable: the store does not answer, and the state is there still.
          Overloaded, NotServing: as `adapt`.
        """
        return await self._core.call("forget", checked_tenant(tenant), None, 0, 0, *self._times(None))

    async def drain(self) -> None:
        """Accepts no more requests, answers those that are there, and ends the engine's threads. It may be called more than once."""
        await self._core.drain()

    def stats(self) -> Stats:
        """Returns counts since the start. It may be called from any thread."""
        return self._core.stats(self._programs.num_programs() if self._core.lifecycle is not Lifecycle.NEW else 0)

    @property
    def k(self) -> int:
        """The number of inner steps."""
        return self._programs.k

    @property
    def num_state_bytes(self) -> int:
        """Bytes of one tenant's state in memory."""
        return self._programs.num_bytes

    @property
    def fingerprint(self) -> dict[str, str]:
        """Digests of the base: of what does not adapt, and of what adaptations start from. Saved states carry it."""
        return dict(self._programs.fingerprint)

    @property
    def version(self) -> str:
        """Twelve digits of a hash of weights, numbers among the hyperparameters and the number of steps.

        Programs that differ in code alone, such as a model's forward or a switch like `nesterov`, have the same.
        """
        return self._programs.version

    @property
    def support_sizes(self) -> SizesTaken:
        """Which numbers of support examples it takes."""
        return self._supports.taken

    @property
    def query_sizes(self) -> SizesTaken:
        """Which numbers of query examples it takes; what is known once the engine has started."""
        return self._queries.taken

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that it was started on, None before."""
        return self._core.loop

    def _warm(self) -> int:
        """Compiles and runs all programs, on the thread that will run them. Returns how many there are."""
        programs, supports, queries = self._programs, self._supports, self._queries
        for lanes in programs.lanes:
            for index in range(max(len(supports.sizes), len(queries.sizes))):
                support = supports.warm(supports.sizes[index % len(supports.sizes)], lanes)
                programs.warm(support, queries.warm(queries.sizes[index % len(queries.sizes)], lanes), lanes)
        for lanes in programs.lanes:
            programs.choose(supports.warm(supports.sizes[-1], lanes), queries.warm(queries.sizes[-1], lanes), lanes)
        for _ in range(2):  # what a call finds out about its shape, the next one like it uses
            for lanes in sorted({programs.lanes_for(1), *programs.lanes}):
                rows = [programs.base] * lanes
                for size in supports.sizes:
                    rows = programs.adapt_all(rows, supports.warm(size, lanes))
                for size in queries.sizes:
                    programs.predict_all(rows, queries.warm(size, lanes))
        queries.pads = not rows_depend_on_each_other(programs, queries)  # before the first request
        return programs.num_programs()

    def _times(self, deadline_s: float | None) -> tuple[float, float]:
        """Returns the deadline and the present moment, by the engine's clock."""
        now = self._clock()
        return (math.inf if deadline_s is None else now + _seconds("deadline_s", deadline_s)), now


def _seconds(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidType(f"{name} must be a number of seconds, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise InvalidArgument(f"{name} must be finite and not negative, got {value}")
    return value


def _one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InvalidArgument(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
