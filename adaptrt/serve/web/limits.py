"""What a tenant may ask for, and how much of it at the same time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

from adaptrt.serve.web.errors import RETRY_AFTER_S, HTTPError, Invalid


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What one request or tenant may ask for.

    Attributes:
      max_body_bytes: of a request, packed or not; None for what the largest batch takes as JSON.
      body_timeout_s: how long the body may take.
      max_requests: with tensors, of one tenant at the same time; their bodies are in memory.
      max_adaptations: how many of these may adapt.
      max_wait_s: how long a request waits that names no shorter time.
    """

    max_body_bytes: int | None = None
    body_timeout_s: float = 10.0
    max_requests: int = 64
    max_adaptations: int = 8
    max_wait_s: float = 30.0

    def deadline_s(self, timeout_us: Any) -> float:
        """Returns after how many seconds an answer is not wanted any more. `timeout_us`: what the request says, None or 0 for nothing.

        Raises:
          Invalid: it is no whole number of microseconds.
        """
        if timeout_us is None or timeout_us == 0:
            return self.max_wait_s
        if type(timeout_us) is not int or timeout_us < 0:
            raise Invalid("the parameter timeout must be a whole number of microseconds")
        return min(timeout_us, 10**6 * self.max_wait_s) / 1e6  # a number of hundreds of digits is no float


class UnderWay:
    """Counts something of each tenant while it is under way.

    Args:
      what: is counted, such as "requests".
      bound: how many a tenant may have.
    """

    def __init__(self, what: str, bound: int) -> None:
        self._what = what
        self._bound = bound
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        """The number of tenants that have any."""
        return len(self._counts)

    def num_of(self, tenant: str) -> int:
        """Returns how many a tenant has."""
        return self._counts[tenant]

    @contextlib.contextmanager
    def of(self, tenant: str) -> Iterator[None]:
        """Counts one more of a tenant.

        Raises:
          HTTPError: 429, the tenant has as many as it may.
        """
        counts = self._counts
        if counts[tenant] >= self._bound:
            message = f"{self._bound} {self._what} of yours are under way; wait for one of them"
            raise HTTPError(429, message, {"Retry-After": str(RETRY_AFTER_S)})
        counts[tenant] += 1
        try:
            yield
        finally:
            counts[tenant] -= 1
            if not counts[tenant]:
                del counts[tenant]
