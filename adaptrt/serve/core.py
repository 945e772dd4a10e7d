"""What happens to a request between its call and its answer: it waits, is computed, is committed and is answered.

Three threads take part. The event loop's accepts requests and hands answers out. The compute thread takes batches from the queue and runs
them. The store thread reads and writes a store that may block; one in memory is called by the compute thread itself. What they share is
changed under the queue's lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from adaptrt.errors import AdaptrtError, DeadlineExceeded, NotServing, StoreUnavailable, UnknownTenant
from adaptrt.serve.commits import Commits
from adaptrt.serve.lanes import Lanes
from adaptrt.serve.policies import Policy
from adaptrt.serve.queue import WorkQueue, expired
from adaptrt.serve.records import Record
from adaptrt.serve.states import States
from adaptrt.serve.work import Answer, Prediction, Tenant, Together, Work


class Lifecycle(enum.StrEnum):
    """What an engine does at the moment."""

    NEW = "new"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """Counts of an engine since its start.

    Attributes:
      lifecycle: what it does at the moment.
      num_waiting: requests that wait, for their batch or for the store.
      num_open: requests that are not answered yet.
      num_cached_tenants, cached_bytes: states in memory.
      num_programs: programs that are compiled.
      num_compiled_after_ready: how many of these came after the start; 0.
      events: how often what happened: "adapt" and "predict" (requests computed), "adapt batches" and "predict batches", "committed",
        "not kept", "expired", "cancelled", "overloaded", "conflicts", "failed" (answered by another error).
      lanes: how many batches had how many requests.
    """

    lifecycle: Lifecycle
    num_waiting: int
    num_open: int
    num_cached_tenants: int
    cached_bytes: int
    num_programs: int
    num_compiled_after_ready: int
    events: dict[str, int]
    lanes: dict[int, int]


class Core:
    """Moves requests through an engine.

    Args:
      queue: where they wait.
      states: of tenants.
      lanes: computes batches.
      policy: what is kept and forgotten.
      max_tries: how often an adaptation is computed if others commit meanwhile.
      max_tenants: how many tenants the store may have, None without limit.
    """

    def __init__(self, queue: WorkQueue, states: States, lanes: Lanes, policy: Policy, max_tries: int, max_tenants: int | None) -> None:
        self.lifecycle = Lifecycle.NEW
        self._events: Counter[str] = Counter()
        self._queue = queue
        self._lock = queue.lock
        self._states = states
        self._lanes = lanes
        self._commits = Commits(queue, states, policy, max_tries, max_tenants, self._events, self._answer, self._on_store_thread)
        self._tenants: dict[str, Tenant] = {}
        self._num_open = 0
        self._wake_is_due = False
        self._sizes_of_batches: Counter[int] = Counter()
        self._num_programs = 0
        self.loop: asyncio.AbstractEventLoop | None = None
        self._all_answered: asyncio.Event | None = None
        self._store_thread: ThreadPoolExecutor | None = None
        self._compute_thread: threading.Thread | None = None

    async def start(self, warm: Callable[[], int]) -> None:
        """Starts the threads. `warm`: compiles everything, and returns how many programs there are."""
        if self.lifecycle is not Lifecycle.NEW:
            raise NotServing(f"the engine is {self.lifecycle} already; make another one")
        self.lifecycle = Lifecycle.WARMING
        self.loop = asyncio.get_running_loop()
        self._all_answered = asyncio.Event()
        self._store_thread = ThreadPoolExecutor(1, "adaptrt-store")
        is_warm: asyncio.Future[int] = self.loop.create_future()
        self._compute_thread = threading.Thread(target=self._compute, args=(warm, is_warm), name="adaptrt-compute", daemon=True)
        self._compute_thread.start()
        try:
            self._num_programs = await is_warm
        except BaseException:
            self.lifecycle = Lifecycle.STOPPED
            with self._lock:
                self._queue.close()
            self._store_thread.shutdown(wait=False)
            raise
        self.lifecycle = Lifecycle.READY

    async def drain(self) -> None:
        """Waits until all requests are answered, and ends the threads."""
        if self.lifecycle is Lifecycle.NEW:
            self.lifecycle = Lifecycle.STOPPED
        if self.lifecycle is Lifecycle.STOPPED:
            return
        self._require_own_loop()
        assert self._all_answered is not None and self._compute_thread is not None and self._store_thread is not None
        with self._lock:
            self.lifecycle = Lifecycle.DRAINING
            if self._num_open == 0:
                self._all_answered.set()
        await self._all_answered.wait()
        with self._lock:
            self._queue.close()
        await asyncio.to_thread(self._compute_thread.join)
        self._store_thread.shutdown(wait=False)
        self.lifecycle = Lifecycle.STOPPED

    def stats(self, num_programs: int) -> Stats:
        """Returns the counts. `num_programs`: that there are now."""
        cache = self._states.cache
        with self._lock:
            after = num_programs - self._num_programs if self.lifecycle in (Lifecycle.READY, Lifecycle.DRAINING, Lifecycle.STOPPED) else 0
            counts = dict(self._events), dict(self._sizes_of_batches)
            return Stats(self.lifecycle, self._queue.length, self._num_open, len(cache), cache.num_bytes, num_programs, after, *counts)

    async def call(
        self, kind: str, name: str | None, data: Any, length: int, size: int, deadline: float, now: float, query: Any = None
    ) -> Any:
        """Has a request answered. `query`: of a stateless adaptation, inputs, length and size."""
        future = self.future()
        work = Work(kind, None, data, length, size, deadline, now, future)
        if query is not None:
            inputs, num_inputs, size_of_inputs = query
            work.then = Work("predict", None, inputs, num_inputs, size_of_inputs, deadline, now, future)
        self.accept([(work, name)])
        return await self.answered([work], future)

    def future(self) -> asyncio.Future[Any]:
        """Returns a future of the event loop, on which this is called.

        Raises:
          NotServing: it is called elsewhere, or the engine is not started.
        """
        self._require_own_loop()
        assert self.loop is not None
        return self.loop.create_future()

    async def answered(self, works: Sequence[Work], future: asyncio.Future[Any]) -> Any:
        """Waits for a future. If the caller is cancelled meanwhile, so are its requests."""
        try:
            return await future
        except asyncio.CancelledError:
            with self._lock:
                for work in works:
                    work.is_cancelled = True
                    self._queue.left(work)
                    if work.then is not None:
                        work.then.is_cancelled = True
            raise

    def _require_own_loop(self) -> None:
        if self.loop is None or asyncio.get_running_loop() is not self.loop:
            what = "is not started; await engine.start() first" if self.loop is None else "was started on another event loop; call it there"
            raise NotServing(f"the engine {what}, or use engine.sync")

    def accept(self, requests: Sequence[tuple[Work, str | None]]) -> None:
        """Takes requests in, each with the name of its tenant; none if there is no room for all. Called on the event loop.

        Raises:
          NotServing, Overloaded: it cannot.
        """
        with self._lock:
            self._queue.wake = self._wake_soon
            try:
                self._accept_all(requests)
            finally:
                self._queue.wake = self._lock.notify

    def _wake_soon(self) -> None:
        """Wakes the compute thread when callers that are ready now have been served, too: it would take the interpreter from them."""
        if not self._wake_is_due:
            assert self.loop is not None
            self._wake_is_due = True
            self.loop.call_soon(self._wake)

    def _wake(self) -> None:
        with self._lock:
            self._wake_is_due = False
            self._lock.notify()

    def _accept_all(self, requests: Sequence[tuple[Work, str | None]]) -> None:
        if self.lifecycle is not Lifecycle.READY:
            raise NotServing(f"the engine is {self.lifecycle}, and accepts no requests")
        counts: Counter[str] = Counter()
        for number, (_, name) in enumerate(requests):
            known = None if name is None else self._tenants.get(name)
            try:
                self._queue.require_room(number, 0 if known is None or name is None else known.num_requests + counts[name])
            except AdaptrtError:
                self._events["overloaded"] += 1
                raise
            if name is not None:
                counts[name] += 1
        for work, name in requests:
            self._accept(work, None if name is None else self._tenants.get(name) or self._enter(name))

    def _accept(self, work: Work, tenant: Tenant | None) -> None:
        work.tenant = tenant
        self._queue.admit(work)
        self._num_open += 1
        if tenant is None:
            self._queue.push(work)
            return
        tenant.num_requests += 1
        if work.kind != "predict":
            tenant.waiting.append(work)
            self._advance(tenant)
        elif tenant.is_loading:
            tenant.held.append(work)
        else:
            self._queue.push(work)

    def _enter(self, name: str) -> Tenant:
        """Returns a tenant that had no requests; its record is read if it is not in memory."""
        tenant = self._tenants[name] = Tenant(name)
        self._states.cache.pin(name)
        tenant.record, tenant.is_loading = self._states.cached(name)
        if tenant.is_loading:
            self._on_store_thread(self._load, tenant)
        return tenant

    def _on_store_thread(self, run: Callable[..., None], *args: Any) -> None:
        assert self._store_thread is not None
        self._store_thread.submit(run, *args)

    def _advance(self, tenant: Tenant) -> None:
        """Begins the tenant's next adaptation or `forget`, if none is under way. Called with the lock held."""
        answers: list[Answer] = []
        while tenant.waiting and not tenant.is_busy and not tenant.is_loading:
            work = tenant.waiting.popleft()
            if work.is_cancelled or self._queue.has_expired(work):
                self._queue.left(work)
                answers.append(Answer(work, None, None if work.is_cancelled else expired(work)))
                continue
            tenant.is_busy = True
            if work.kind == "forget":
                self._queue.left(work)
                self._on_store_thread(self._commits.forget, work)
            else:
                self._queue.push(work)
        if answers:
            self._answer(answers, ended=False)

    def _load(self, tenant: Tenant) -> None:
        """Reads a tenant's record, on the store thread."""
        error: BaseException | None = None
        record: Record | None = None
        try:
            record = self._states.load(tenant.name)
        except Exception as found:
            error = found
        with self._lock:
            tenant.record, tenant.is_loading = record, False
            held, tenant.held = tenant.held, []
            is_down = isinstance(error, StoreUnavailable)
            refused: list[Work] = []
            for work in held:
                # Without the store a prediction goes on with the base, unless it is to be refused for tenants that have no state.
                if error is None or (is_down and not self._lanes.is_unknown(work)):
                    self._queue.push(work)
                else:
                    refused.append(work)
            if error is not None:
                # A state that cannot be used can be forgotten.
                stays = [work for work in tenant.waiting if work.kind == "forget" and not is_down]
                refused += [work for work in tenant.waiting if work not in stays]
                tenant.waiting = deque(stays)
                for work in refused:
                    self._queue.left(work)
                self._answer([Answer(work, None, error) for work in refused], ended=False)
            self._advance(tenant)

    def _compute(self, warm: Callable[[], int], is_warm: asyncio.Future[int]) -> None:
        """Runs on the compute thread: warms up, and then runs batches until the queue is closed."""
        loop = self.loop
        assert loop is not None
        with torch.inference_mode():
            try:
                num_programs = warm()
            except BaseException as error:
                _call_soon(loop, _settle, is_warm, None, error)
                return
            _call_soon(loop, _settle, is_warm, num_programs, None)
            while (taken := self._queue.take()) is not None:
                works, refused = taken
                if refused:
                    with self._lock:
                        self._answer([Answer(work, None, error) for work, error in refused])
                if works:
                    self._run(works)

    def _run(self, works: list[Work]) -> None:
        kind, began = works[0].kind, self._queue.clock()
        with self._lock:
            self._sizes_of_batches[len(works)] += 1
            self._events[kind] += len(works)
            self._events[f"{kind} batches"] += 1
        if kind == "predict":
            self._predict(works)
            with self._lock:
                self._queue.took(works, began)
        else:
            works.sort(key=_name)  # the same tenants in the same order share the memory of the batch before
            self._commits.finish(works, self._lanes.each(works, self._lanes.adapt), began)

    def _predict(self, works: list[Work]) -> None:
        with self._lock:
            unknown = [work for work in works if self._lanes.is_unknown(work)]
        answers = [Answer(work, None, _unknown(work)) for work in unknown]
        works = [work for work in works if work not in unknown] if unknown else works
        for work, found in zip(works, self._lanes.each(works, self._lanes.predict) if works else (), strict=True):
            if isinstance(found, Exception):
                answers.append(Answer(work, None, found))
            elif work.outcome is not None:
                took_s = self._queue.clock() - work.began
                answers.append(Answer(work, Prediction(found, work.outcome.kept, work.outcome.losses, took_s), None))
            else:
                answers.append(Answer(work, found, None))
        with self._lock:
            self._answer(answers)

    def _answer(self, answers: list[Answer], ended: bool = True) -> None:
        """Hands answers to the event loop. Called with the lock held.

        `ended`: whether adaptations and `forget` calls among them were the ones of their tenants that were under way.
        """
        if not answers:
            return
        for work, _, error in answers:
            self._num_open -= 1
            if error is not None:
                self._events["expired" if isinstance(error, DeadlineExceeded) else "failed"] += 1
            elif work.is_cancelled:
                self._events["cancelled"] += 1
            tenant = work.tenant
            if tenant is None:
                continue
            tenant.num_requests -= 1
            if ended and work.kind != "predict":
                tenant.is_busy = False
                if tenant.waiting:
                    self._advance(tenant)
            if tenant.num_requests == 0 and self._tenants.pop(tenant.name, None) is not None:
                self._states.cache.unpin(tenant.name)
        assert self.loop is not None
        _call_soon(self.loop, self._deliver, answers)

    def _deliver(self, answers: Sequence[Answer]) -> None:
        for work, result, error in answers:
            if isinstance(work.reply, Together):
                work.reply.settle(work, result, error)
            else:
                _settle(work.reply, result, error)
        if self._num_open == 0 and self.lifecycle is Lifecycle.DRAINING and self._all_answered is not None:
            self._all_answered.set()


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits
        loop.call_soon_threadsafe(call, *args)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def _name(work: Work) -> str:
    return "" if work.tenant is None else work.tenant.name


def _unknown(work: Work) -> UnknownTenant:
    return UnknownTenant(f"the tenant {_name(work)!r} has no state; call adapt() for it first, or pass unknown='base' to the engine")
