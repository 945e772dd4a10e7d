"""The queue: which requests run next, and together.

Earliest deadline first; among equal deadlines, or without, in an order that is fair between tenants (start-time fair queueing: each request
of a tenant counts behind the tenant's one before it, and a tenant that comes anew begins where the others are). Adaptations and predictions
wait apart, and take turns. A tenant has at most one adaptation in the queue, which the engine sees to.

A request whose deadline is nearer than the time that the last batch took, and a quarter more, will hardly be answered in time. Others that
have a deadline, too, go before it. Without that, an engine with more requests than it can answer would begin each of them just before its
deadline, and answer none.

A batch begins at once if as many requests wait as were in the last batch of its kind and size, so an idle engine does not delay a lone
request; otherwise it waits for these, `max_delay_s` at most.
"""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections.abc import Callable, Sequence

from adaptrt.errors import AdaptrtError, DeadlineExceeded, Overloaded
from adaptrt.serve.work import Work

Refused = tuple[Work, AdaptrtError | None]
"""A request that will not run, and why; None if its caller has gone."""

_LATE = 1.25
"""A request whose deadline is nearer than so many times what the last batch took may come too late."""

_Key = tuple[str, int]
_Entry = tuple[float, int, int, Work]


class _Group:
    """Requests of one kind and size, which can run together."""

    __slots__ = ("enough", "heap", "since", "took_s")

    def __init__(self) -> None:
        self.heap: list[_Entry] = []
        self.enough = 1
        self.since = 0.0
        self.took_s = 0.0


class WorkQueue:
    """Requests that wait. All methods but `take` are called with `lock` held.

    Args:
      max_lanes: how many requests a batch has at most.
      max_delay_s: how long a batch waits for more.
      max_length: how many requests may wait.
      max_per_tenant: how many of one tenant may.
      clock: what deadlines are compared with, in seconds.

    Attributes:
      lock: of the queue, and of all that the engine knows of requests and tenants.
      length: how many requests wait.
      clock: as given.
      wake: has `take` look at what is new; by default at once.
    """

    def __init__(self, max_lanes: int, max_delay_s: float, max_length: int, max_per_tenant: int, clock: Callable[[], float]) -> None:
        self.lock = threading.Condition(threading.RLock())
        self.wake: Callable[[], None] = self.lock.notify
        self.length = 0
        self._max_lanes = max_lanes
        self._max_delay_s = max_delay_s
        self._max_length = max_length
        self._max_per_tenant = max_per_tenant
        self.clock = clock
        self._groups: dict[_Key, _Group] = {}
        self._virtual = 0
        self._number = 0
        self._last_kind = ""
        self._is_closed = False

    def require_room(self, num_more: int, num_of_tenant: int) -> None:
        """Raises Overloaded if the queue, or a tenant's share of it, is full.

        Args:
          num_more: how many requests are to be counted besides those that wait.
          num_of_tenant: how many the tenant has in the engine.
        """
        if self.length + num_more >= self._max_length:
            raise Overloaded(
                f"{self.length + num_more} requests wait already (max_queue={self._max_length}); try again later, or at another replica"
            )
        if num_of_tenant >= self._max_per_tenant:
            raise Overloaded(f"this tenant has {num_of_tenant} requests here (max_per_tenant={self._max_per_tenant}); wait for some")

    def admit(self, work: Work) -> None:
        """Counts a request and gives it its place in the orders."""
        self._number += 1
        work.number = self._number
        tenant = work.tenant
        if tenant is None:
            work.tag = self._virtual + 1
        else:
            work.tag = tenant.tag = max(self._virtual, tenant.tag) + 1
        work.is_waiting = True
        self.length += 1

    def waits_again(self, work: Work) -> None:
        """Counts a request that was computed, and waits for the store."""
        if not work.is_waiting:
            work.is_waiting = True
            self.length += 1

    def left(self, work: Work) -> None:
        """Notes that a request does not wait any more."""
        if work.is_waiting:
            work.is_waiting = False
            self.length -= 1

    def push(self, work: Work) -> None:
        """Makes a request ready to run."""
        group = self._groups.get((work.kind, work.size))
        if group is None:
            group = self._groups[work.kind, work.size] = _Group()
        is_first = not group.heap
        if is_first:
            group.since = time.monotonic()
        heapq.heappush(group.heap, (work.deadline, work.tag, work.number, work))
        if is_first or len(group.heap) >= group.enough or work.deadline < math.inf:
            self.wake()

    def close(self) -> None:
        """Has `take` return what waits still, without delay, and then None."""
        self._is_closed = True
        self.lock.notify()

    def took(self, batch: Sequence[Work], since: float) -> None:
        """Notes how long a batch took, from `since`, by the clock of deadlines, to its answers or to its commit."""
        self._groups[batch[0].kind, batch[0].size].took_s = self.clock() - since

    def has_expired(self, work: Work) -> bool:
        """Whether the deadline of a request has passed."""
        return work.deadline < math.inf and self.clock() >= work.deadline

    def take(self) -> tuple[list[Work], list[Refused]] | None:
        """Waits for requests, and returns those that run next as one batch, and those that will not run. None after `close`."""
        with self.lock:
            while True:
                refused = self._sweep()
                batch, wait_s = self._choose(refused)
                if batch or refused:
                    return batch, refused
                if self._is_closed and wait_s is None:
                    return None
                self.lock.wait(wait_s)

    def _sweep(self) -> list[Refused]:
        """Takes out requests whose deadline has passed; they are in front."""
        refused: list[Refused] = []
        for group in self._groups.values():
            while group.heap and (group.heap[0][3].is_cancelled or self.has_expired(group.heap[0][3])):
                self._refuse(heapq.heappop(group.heap)[3], refused)
        return refused

    def _refuse(self, work: Work, refused: list[Refused]) -> None:
        self.left(work)
        refused.append((work, None if work.is_cancelled else expired(work)))

    def _choose(self, refused: list[Refused]) -> tuple[list[Work], float | None]:
        """Returns the next batch, or how many seconds to wait for more; None if nothing waits."""
        now, shortest = time.monotonic(), None
        for kind in ("adapt", "predict") if self._last_kind == "predict" else ("predict", "adapt"):
            found = [(group.heap[0][:3], group) for (of, _), group in self._groups.items() if of == kind and group.heap]
            for _, group in sorted(found, key=lambda entry: entry[0]):
                wait_s = self._wait_s(group, now)
                if wait_s <= 0:
                    self._last_kind = kind
                    return self._pop(group, refused), None
                shortest = wait_s if shortest is None else min(shortest, wait_s)
        return [], shortest

    def _wait_s(self, group: _Group, now: float) -> float:
        """Returns how long a group's next batch waits for more; 0 if it begins."""
        if self._is_closed or len(group.heap) >= min(group.enough, self._max_lanes):
            return 0.0
        wait_s = group.since + self._max_delay_s - now
        deadline = group.heap[0][0]
        if deadline < math.inf and deadline - self.clock() < wait_s + 2 * group.took_s:
            return 0.0
        return wait_s

    def _pop(self, group: _Group, refused: list[Refused]) -> list[Work]:
        batch: list[Work] = []
        late: list[_Entry] = []
        in_time = self.clock() + _LATE * group.took_s
        while group.heap and len(batch) < self._max_lanes:
            if group.heap[0][0] == math.inf and late:
                batch.append(late.pop()[3])  # the one that has most time left
                continue
            entry = heapq.heappop(group.heap)
            if entry[3].is_cancelled:
                self._refuse(entry[3], refused)
            elif entry[0] < in_time:
                late.append(entry)
            else:
                batch.append(entry[3])
        while late and len(batch) < self._max_lanes:
            batch.append(late.pop()[3])
        for entry in late:
            heapq.heappush(group.heap, entry)
        for work in batch:
            self.left(work)
            self._virtual = max(self._virtual, work.tag)
        group.enough = max(1, len(batch))
        group.since = time.monotonic()
        return batch


def expired(work: Work) -> DeadlineExceeded:
    """Returns the error for a request whose deadline has passed."""
    what = {"adapt": "adaptation", "predict": "prediction", "forget": "forget()"}[work.kind]
    return DeadlineExceeded(f"the deadline of this {what} passed before it could begin or be committed; nothing was done")
