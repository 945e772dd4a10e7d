"""A store in this process: bounded by bytes, least recently used first out.

Rows of one batch share its memory. As long as at least half of a batch's rows are kept, they are kept as they are, which costs no copy;
when fewer are left, these get memory of their own. So the memory in use is at most twice the bytes that are counted.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

import torch

from adaptrt import Adapted
from adaptrt.errors import InvalidArgument, InvalidType
from adaptrt.serve.records import Record, Stamp, checked_tenant
from adaptrt.serve.stores.base import Change, Clock, Store, checked_ttl

_PURGE_EVERY_S, _FEW = 1.0, 1000


class MemoryStore(Store):
    """Keeps records in memory, and drops those used least recently. What it drops is lost: the tenant starts from the base again.

    Args:
      max_bytes: of all states together. Tenants that are pinned are not dropped, and may take it beyond.
      ttl_s: how many seconds a record lives after its last commit, None without limit. The wall clock does not matter.
      clock: what tells the time.
    Raises:
      InvalidType, InvalidArgument: a bound is no positive number.

    Example:
      >>> store = MemoryStore(max_bytes=2**20)
      >>> store.commit("ann", 0, Record.of(1, b"state")), store.commit("ann", 0, Record.of(1, b"other"))
      (True, False)
    """

    holds_live = True

    def __init__(self, max_bytes: int, ttl_s: float | None = None, *, clock: Clock = Stamp.now) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int):
            raise InvalidType(f"max_bytes must be an int, got {type(max_bytes).__name__}")
        if max_bytes < 1:
            raise InvalidArgument(f"max_bytes must be at least 1, got {max_bytes}")
        self.max_bytes = max_bytes
        self.ttl_s = checked_ttl(ttl_s)
        self._clock = clock
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._pins: dict[str, int] = {}
        self._num_bytes = 0
        self._purge_due = 0.0
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """The number of tenants."""
        return len(self._records)

    @property
    def num_bytes(self) -> int:
        """Bytes of all states, as they are counted."""
        return self._num_bytes

    def get(self, tenant: str) -> Record | None:
        """As `Store.get`; the tenant is now the one used last."""
        checked_tenant(tenant)
        with self._lock:
            record = self._alive(tenant)
            if record is not None:
                self._records.move_to_end(tenant)
            return record

    def commit(self, tenant: str, expected_version: int, record: Record) -> bool:
        """As `Store.commit`.

        Raises:
          InvalidArgument: the state alone is larger than `max_bytes`.
        """
        checked_tenant(tenant)
        with self._lock:
            known = self._alive(tenant)
            if (0 if known is None else known.version) != expected_version:
                return False
            self._put(tenant, record)
            return True

    def commit_all(self, changes: Sequence[Change]) -> list[bool]:
        """As `Store.commit_all`."""
        with self._lock:
            found = super().commit_all(changes)
            self._share_or_copy([change.record for change in changes])
            return found

    def put_all(self, records: Sequence[tuple[str, Record]]) -> None:
        """Keeps records of tenants, whatever is there.

        Raises:
          InvalidArgument: as `commit`.
        """
        with self._lock:
            for tenant, record in records:
                self._put(tenant, record)
            self._share_or_copy([record for _, record in records])

    def replace(self, tenant: str, known: Record, record: Record) -> None:
        """Keeps a record in the place of the one known, if that is still there."""
        with self._lock:
            if self._records.get(tenant) is known:
                self._put(tenant, record)

    def _put(self, tenant: str, record: Record) -> None:
        if record.num_bytes > self.max_bytes:
            raise InvalidArgument(f"a state of {record.num_bytes:,} bytes does not fit into max_bytes={self.max_bytes:,}; raise it")
        self._remove(tenant)
        self._records[tenant] = record
        self._num_bytes += record.num_bytes
        if record.shared is not None:
            record.shared.owners.add(tenant)
        if self._num_bytes > self.max_bytes:
            self._evict(tenant)

    def delete(self, tenant: str) -> bool:
        """As `Store.delete`."""
        checked_tenant(tenant)
        with self._lock:
            return self._remove(tenant) is not None

    def pin(self, tenant: str) -> None:
        """Keeps the tenant's record, now and later, until `unpin` was called as often. There need be none yet."""
        checked_tenant(tenant)
        with self._lock:
            self._pins[tenant] = self._pins.get(tenant, 0) + 1

    def unpin(self, tenant: str) -> None:
        """Takes one `pin` back; without one it does nothing."""
        with self._lock:
            left = self._pins.get(tenant, 0) - 1
            if left > 0:
                self._pins[tenant] = left
            else:
                self._pins.pop(tenant, None)
            if self._num_bytes > self.max_bytes:
                self._evict(None)

    def num_tenants(self) -> int:
        """As `Store.num_tenants`; where there are many, records that have expired within the last second may count."""
        with self._lock:
            if self.ttl_s is not None and (len(self._records) <= _FEW or time.monotonic() >= self._purge_due):
                self._purge_due = time.monotonic() + _PURGE_EVERY_S
                for tenant in list(self._records):
                    self._alive(tenant)
            return len(self._records)

    def close(self) -> None:
        """Forgets all records."""
        with self._lock:
            self._records.clear()
            self._pins.clear()
            self._num_bytes = 0

    def _alive(self, tenant: str) -> Record | None:
        record = self._records.get(tenant)
        if record is None or self.ttl_s is None or record.updated.age_s(self._clock()) < self.ttl_s:
            return record
        self._remove(tenant)
        return None

    def _evict(self, newest: str | None) -> None:
        """Drops records until the rest fits, those used least recently first; neither pinned ones nor the one just written."""
        for tenant in list(self._records):
            if self._num_bytes <= self.max_bytes:
                return
            if tenant != newest and tenant not in self._pins:
                self._remove(tenant)

    def _remove(self, tenant: str) -> Record | None:
        record = self._records.pop(tenant, None)
        if record is None:
            return None
        self._num_bytes -= record.num_bytes
        shared = record.shared
        if shared is not None:
            shared.owners.discard(tenant)
            self._share_or_copy([record])
        return record

    def _share_or_copy(self, records: Sequence[Record]) -> None:
        """Gives rows memory of their own where fewer than half of their batch's are kept. `records`: some that were just written."""
        for shared in {id(record.shared): record.shared for record in records}.values():
            if shared is None or not shared.owners or 2 * len(shared.owners) >= shared.num_rows:
                continue
            with torch.inference_mode():
                for tenant in shared.owners:
                    record = self._records[tenant]
                    assert isinstance(record.state, Adapted)
                    self._records[tenant] = dataclasses.replace(record, state=record.state.clone(), shared=None)
            shared.owners.clear()
