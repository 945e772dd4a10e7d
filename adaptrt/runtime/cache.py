"""A bounded cache of plans."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from adaptrt.backend.base import COMPILING
from adaptrt.process import leaving_nothing, lock

Entry = TypeVar("Entry")


class Cache(Generic[Entry]):
    """Keeps the `size` entries that were used last. It is safe to use from several threads, and makes an entry only once."""

    def __init__(self, size: int) -> None:
        self._size = size
        # Not an OrderedDict, which is left in disorder where a signal handler raises while it compares keys.
        self._entries: dict[Hashable, Entry] = {}
        self._order = lock()

    def get(self, key: Hashable) -> Entry | None:
        """Returns the entry under `key`, None if there is none."""
        entry = self._entries.get(key)
        if entry is not None and len(self._entries) > 1:
            with self._order:
                if key in self._entries:
                    self._entries[key] = self._entries.pop(key)
        return entry

    def get_or_make(self, key: Hashable, make: Callable[[], Entry]) -> Entry:
        """Returns the entry under `key`; if there is none, makes it, under the compilation lock."""
        entry = self.get(key)
        if entry is None:
            with self._order:  # another thread may have been moving it
                entry = self._entries.get(key)
        if entry is not None:
            return entry
        with COMPILING:
            entry = self.get(key)
            if entry is None:
                entry = leaving_nothing(make)()
                with self._order:
                    self._entries[key] = entry
                    while len(self._entries) > self._size:
                        del self._entries[next(iter(self._entries))]
        return entry

    def entries(self) -> list[Entry]:
        """Returns all entries, the one used last at the end."""
        with self._order:
            return list(self._entries.values())
