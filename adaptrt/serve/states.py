"""Tenants' states: the store, and in front of it those used last as adaptations, so that a batch of known tenants reads nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from adaptrt import Adapted
from adaptrt.errors import InvalidState, StoreUnavailable
from adaptrt.serve.programs import Programs
from adaptrt.serve.records import Record
from adaptrt.serve.stores import Change, MemoryStore, Store

RETRY_S = 0.5
"""How long a store that did not answer is left alone; calls fail at once meanwhile."""

Result = TypeVar("Result")


class States:
    """Reads and commits states. Methods may block, but for `cached`; one thread calls them at a time unless the store `is_local`.

    Args:
      store: of all tenants.
      programs: whose states they are.
      cache_bytes: bounds the states in memory, in front of a store that is not in memory itself.
      drops: whether a state that is damaged or of another base is forgotten; otherwise it is refused.

    Attributes:
      is_local: whether the store keeps adaptations in this process, so that nothing blocks.
      cache: states in memory; the store itself if it is local.
      num_bytes: of one state.
      save: as `Record.save`.
    """

    def __init__(self, store: Store, programs: Programs, cache_bytes: int, drops: bool) -> None:
        self.is_local = store.holds_live
        self.cache = store if isinstance(store, MemoryStore) else MemoryStore(cache_bytes, store.ttl_s)
        self.num_bytes = programs.num_bytes
        self.save = programs.save
        self._store = store
        self._programs = programs
        self._drops = drops
        self._is_down_until = 0.0

    def cached(self, tenant: str) -> tuple[Record | None, bool]:
        """Returns the record in memory, with an adaptation as its state, and whether the store must be read instead."""
        record = self.cache.get(tenant)
        if record is None:
            return None, not self.is_local
        return (record, False) if isinstance(record.state, Adapted) and record.save is self.save else (None, True)

    def load(self, tenant: str) -> Record | None:
        """Reads the record of a tenant, with an adaptation as its state.

        Raises:
          StoreUnavailable: the store does not answer.
          InvalidState: the state is damaged or of another base, and is not to be dropped.
        """
        try:
            found = self._ask(lambda: self._store.get(tenant))
            if found is None:
                self.cache.delete(tenant)
                return None
            record = self._of_this_base(found)
        except InvalidState:
            if not self._drops:
                raise
            self.forget(tenant)
            return None
        if not self.is_local:
            self.cache.put_all([(tenant, record)])
        elif record is not found:
            self.cache.replace(tenant, found, record)
        return record

    def _of_this_base(self, record: Record) -> Record:
        """Returns the record with an adaptation of these programs as its state. Raises InvalidState if it is of another base."""
        state = record.state
        if isinstance(state, Adapted):
            if record.save is self.save:
                return record
            if record.save is None:
                raise InvalidState("the store holds an adaptation, and does not know of which base; forget the tenant")
            state = record.save(state)  # by another engine on the same store
        row = self._programs.load(state)
        return dataclasses.replace(record, state=row, num_bytes=self.num_bytes, shared=None, save=self.save)

    def commit(self, changes: Sequence[Change]) -> list[bool]:
        """Commits records that have adaptations as their states. Returns for each whether it has; if not, the tenant is to be loaded again.

        Raises:
          StoreUnavailable: the store does not answer. Some may have been committed nevertheless; the next commits of these then find
            another version.
        """
        if self.is_local:
            return self._store.commit_all(changes)
        written = [change._replace(record=self._as_bytes(change.record)) for change in changes]
        found = self._ask(lambda: self._store.commit_all(written))
        self.cache.put_all([(change.tenant, change.record) for change, ok in zip(changes, found, strict=True) if ok])
        return found

    def has(self, tenant: str) -> bool:
        """Whether the store has a record of a tenant. Raises StoreUnavailable if it does not answer."""
        return self._ask(lambda: self._store.get(tenant)) is not None

    def num_tenants(self) -> int:
        """Returns how many tenants have a record.

        Raises:
          StoreUnavailable: the store does not answer.
        """
        return self._ask(self._store.num_tenants) or 0

    def forget(self, tenant: str) -> bool:
        """Deletes a tenant's record. Returns whether there was one.

        Raises:
          StoreUnavailable: the store does not answer, and the record is there still.
        """
        found = self._ask(lambda: self._store.delete(tenant))
        self.cache.delete(tenant)
        return found

    def _as_bytes(self, record: Record) -> Record:
        assert isinstance(record.state, Adapted)
        return dataclasses.replace(record, state=self._programs.save(record.state), shared=None, save=None)

    def _ask(self, call: Callable[[], Result]) -> Result:
        if time.monotonic() < self._is_down_until:
            raise StoreUnavailable(f"the store did not answer within the last {RETRY_S} s; try again later")
        try:
            return call()
        except StoreUnavailable:
            self._is_down_until = time.monotonic() + RETRY_S
            raise
