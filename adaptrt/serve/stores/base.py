"""What every store does: it keeps one record for each tenant, and replaces it only if it is the one that the caller knows."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from adaptrt.errors import InvalidArgument, InvalidType
from adaptrt.serve.records import Record, Stamp

Clock = Callable[[], Stamp]


class Change(NamedTuple):
    """A record to commit.

    Attributes:
      tenant: its name.
      expected_version: of the record to be replaced; 0 if there is none.
      record: what to keep.
    """

    tenant: str
    expected_version: int
    record: Record


class Store(abc.ABC):
    """Keeps the states of tenants. Methods may be called from several threads, and return when they are done.

    All raise `StoreUnavailable` if the store cannot be reached or written now.

    Attributes:
      holds_live: whether records hold adaptations as they are, in this process. Such a store answers at once and is called from anywhere;
        others get bytes, from a thread of their own.
      ttl_s: how many seconds a record lives after its last commit, None without limit.
    """

    holds_live: bool = False
    ttl_s: float | None = None

    @abc.abstractmethod
    def get(self, tenant: str) -> Record | None:
        """Returns the record of a tenant, None if there is none or it has expired.

        Raises:
          InvalidState: it is damaged.
        """

    @abc.abstractmethod
    def commit(self, tenant: str, expected_version: int, record: Record) -> bool:
        """Keeps a record if the one that is there has the version expected, 0 for none. Returns whether it has; if not, nothing changes.

        When it returns True the record is kept.
        """

    def commit_all(self, changes: Sequence[Change]) -> list[bool]:
        """Commits several records, each for itself, and returns for each what `commit` returns."""
        return [self.commit(*change) for change in changes]

    @abc.abstractmethod
    def delete(self, tenant: str) -> bool:
        """Forgets a tenant. Returns whether there was a record."""

    def num_tenants(self) -> int | None:
        """Returns how many tenants have a record, None if the store cannot tell."""
        return None

    @abc.abstractmethod
    def close(self) -> None:
        """Closes connections and files. No method may be called afterwards."""


def checked_ttl(ttl_s: float | None) -> float | None:
    """Returns how long records live, after checking it.

    Raises:
      InvalidType, InvalidArgument: it is no positive number.
    """
    if ttl_s is None:
        return None
    if isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float):
        raise InvalidType(f"ttl_s must be seconds or None, got {type(ttl_s).__name__}")
    if not 0 < ttl_s < math.inf:
        raise InvalidArgument(f"ttl_s must be more than 0 and finite, got {ttl_s}; pass None to keep records without limit")
    return float(ttl_s)
