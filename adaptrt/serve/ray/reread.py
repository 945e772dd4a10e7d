"""A store for engines of which each must see what the others commit."""

from __future__ import annotations

from collections.abc import Sequence

from adaptrt.serve import Change, Record, Store


class Reread(Store):
    """A store whose records an engine does not keep in memory beyond the requests that a tenant has, so that it asks for them again.

    An engine forgets what it has in memory when the store says that it has expired, and then asks the store itself. Here that is at once.

    Args:
      store: where records live as long as its own `ttl_s` says.
    """

    ttl_s = 1e-9

    def __init__(self, store: Store) -> None:
        self._store = store

    def get(self, tenant: str) -> Record | None:
        """As `Store.get`."""
        return self._store.get(tenant)

    def commit(self, tenant: str, expected_version: int, record: Record) -> bool:
        """As `Store.commit`."""
        return self._store.commit(tenant, expected_version, record)

    def commit_all(self, changes: Sequence[Change]) -> list[bool]:
        """As `Store.commit_all`."""
        return self._store.commit_all(changes)

    def delete(self, tenant: str) -> bool:
        """As `Store.delete`."""
        return self._store.delete(tenant)

    def num_tenants(self) -> int | None:
        """As `Store.num_tenants`."""
        return self._store.num_tenants()

    def close(self) -> None:
        """As `Store.close`."""
        self._store.close()
