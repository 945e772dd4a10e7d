"""Requests that wait, the tenants they are of, and what callers get."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from adaptrt import Adapted
from adaptrt.serve.records import Record


class Outcome(NamedTuple):
    """What `Engine.adapt` returns.

    Attributes:
      kept: whether the guard kept the result. If not, nothing was committed.
      losses: the support loss before each step, k numbers.
      version: of the tenant's state after the call; 0 for the base. Versions of a tenant grow by one. The first is drawn at random, so that
        the state of a tenant that was forgotten is never taken for that of its return.
      took_s: seconds from the call to the result.
    """

    kept: bool
    losses: tuple[float, ...]
    version: int
    took_s: float


class Prediction(NamedTuple):
    """What `Engine.adapt_predict` returns.

    Attributes:
      outputs: of the adapted model for the query inputs; of the base where the guard did not keep the adaptation.
      kept: whether it did.
      losses: the support loss before each step, k numbers.
      took_s: seconds from the call to the result.
    """

    outputs: Any
    kept: bool
    losses: tuple[float, ...]
    took_s: float


class Tenant:
    """A tenant that has requests in the engine. It is changed under the engine's lock.

    Attributes:
      name: of the tenant.
      record: what was committed last, with the adaptation itself as its state; None for the base.
      waiting: its adaptations and `forget` calls, in order of arrival; without the one that is under way.
      is_busy: whether one is under way.
      is_loading: whether its record is still being read.
      held: predictions that wait for the record.
      num_requests: of all kinds that are not answered yet.
      tag: place of its newest request in the order that is fair between tenants.
    """

    __slots__ = ("held", "is_busy", "is_loading", "name", "num_requests", "record", "tag", "waiting")

    def __init__(self, name: str) -> None:
        self.name = name
        self.record: Record | None = None
        self.waiting: deque[Work] = deque()
        self.held: list[Work] = []
        self.is_busy = False
        self.is_loading = False
        self.num_requests = 0
        self.tag = 0

    @property
    def version(self) -> int:
        """Of its state, 0 for the base."""
        return 0 if self.record is None else self.record.version

    def row(self, base: Adapted) -> Adapted:
        """Returns its newest state."""
        if self.record is None:
            return base
        assert isinstance(self.record.state, Adapted)
        return self.record.state


class Work:
    """A request.

    Attributes:
      kind: "adapt", "predict" or "forget".
      tenant: whose it is, None for a stateless one.
      data: support data or query inputs of one task.
      length, size: its number of examples, and the size that it gets.
      deadline: by the engine's clock, infinite without one.
      began: when it came, by the same clock.
      reply: takes the result, on the event loop.
      then: the prediction that a stateless adaptation is for.
      row, outcome: of a prediction after a stateless adaptation: the state, and what is known of that adaptation.
      tag, number: its place in the order that is fair between tenants, and in the order of arrival.
      num_tries: how often its commit met another's.
      is_waiting: whether it counts for the queue's length.
      is_cancelled: whether its caller has gone.
    """

    __slots__ = (
        "began",
        "data",
        "deadline",
        "is_cancelled",
        "is_waiting",
        "kind",
        "length",
        "num_tries",
        "number",
        "outcome",
        "reply",
        "row",
        "size",
        "tag",
        "tenant",
        "then",
    )

    def __init__(
        self,
        kind: str,
        tenant: Tenant | None,
        data: Any,
        length: int,
        size: int,
        deadline: float,
        began: float,
        reply: asyncio.Future[Any] | Together,
    ) -> None:
        self.kind = kind
        self.tenant = tenant
        self.data = data
        self.length = length
        self.size = size
        self.deadline = deadline
        self.began = began
        self.reply = reply
        self.then: Work | None = None
        self.row: Adapted | None = None
        self.outcome: Outcome | None = None
        self.tag = 0
        self.number = 0
        self.num_tries = 0
        self.is_waiting = False
        self.is_cancelled = False


class Together:
    """Collects the results of several requests of one caller, on the event loop.

    Args:
      works: the requests, which get this as their reply.
      future: gets the list of results when the last is there; errors are results, too.
    """

    def __init__(self, works: Sequence[Work], future: asyncio.Future[Any]) -> None:
        self._places = {id(work): place for place, work in enumerate(works)}
        self._results: list[Any] = [None] * len(works)
        self._num_left = len(works)
        self._future = future
        for work in works:
            work.reply = self

    def settle(self, work: Work, result: Any, error: BaseException | None) -> None:
        """Takes the result of one request, or the error in its place."""
        self._results[self._places[id(work)]] = result if error is None else error
        self._num_left -= 1
        if self._num_left == 0 and not self._future.done():
            self._future.set_result(self._results)


class Answer(NamedTuple):
    """What a request is answered with: a result, or an error in its place."""

    work: Work
    result: Any
    error: BaseException | None
