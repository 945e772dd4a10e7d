"""A store in one file, which outlives the process: SQLite with a write-ahead log."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from adaptrt.errors import InvalidArgument, InvalidState, InvalidType, StoreUnavailable
from adaptrt.serve.records import Record, Stamp, checked_tenant, key_of
from adaptrt.serve.stores.base import Change, Clock, Store, checked_ttl

_APPLICATION_ID = 0x61647274  # "adrt"
_FORMAT = 1
_PURGE_EVERY = 1000
_TABLE = (
    "CREATE TABLE IF NOT EXISTS tenants (key BLOB PRIMARY KEY, version INTEGER NOT NULL, wall_s REAL NOT NULL, boot_id TEXT NOT NULL, "
    "boot_s REAL NOT NULL, record BLOB NOT NULL)"
)
_UPSERT = "INSERT OR REPLACE INTO tenants (key, version, wall_s, boot_id, boot_s, record) VALUES (?, ?, ?, ?, ?, ?)"
_EXPIRED = "(boot_id = ? AND ? - boot_s >= ?) OR (boot_id <> ? AND ? - wall_s >= ?)"


class SQLiteStore(Store):
    """Keeps records in a file. Several processes of one machine may use it at the same time.

    A commit that was acknowledged survives the end of the process by whatever signal; with `synchronous="full"` the end of the machine,
    too. Names of tenants are not in the file, only hashes of them.

    Args:
      path: of the file; SQLite puts two more beside it while it is open. It is made if it is not there.
      ttl_s: how many seconds a record lives after its last commit, None without limit. Until the machine is started again a clock counts
        that nobody sets, afterwards the wall clock.
      synchronous: "full" waits for the disk at every commit, "normal" leaves that to the operating system.
      timeout_s: how long to wait for another process that writes.
      clock: what tells the time.
    Raises:
      InvalidArgument, InvalidType: an argument is not as above.
      InvalidState: the file is there, and is another one or of a newer format.
      StoreUnavailable: it cannot be opened or written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     store = SQLiteStore(f"{folder}/tenants.db")
      ...     committed = store.commit("ann", 0, Record.of(1, b"state"))
      ...     store.close()
      ...     store = SQLiteStore(f"{folder}/tenants.db")
      ...     found = store.get("ann")
      ...     store.close()
      >>> committed, found.state
      (True, b'state')
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        ttl_s: float | None = None,
        *,
        synchronous: str = "full",
        timeout_s: float = 1.0,
        clock: Clock = Stamp.now,
    ) -> None:
        if not isinstance(path, str | os.PathLike):
            raise InvalidType(f"SQLiteStore takes the path of a file, got {type(path).__name__}")
        if synchronous not in ("full", "normal"):
            raise InvalidArgument(f"synchronous must be 'full' or 'normal', got {synchronous!r}")
        self._path = Path(path)
        self.ttl_s = checked_ttl(ttl_s)
        self._clock = clock
        self._lock = threading.Lock()
        self._num_commits = 0
        with self._errors():
            self._db = sqlite3.connect(self._path, timeout=timeout_s, isolation_level=None, check_same_thread=False)
        try:
            with self._errors():
                self._open(synchronous)
        except BaseException:
            self._db.close()
            raise

    def _open(self, synchronous: str) -> None:
        run = self._db.execute
        (application,), (version,) = run("PRAGMA application_id").fetchone(), run("PRAGMA user_version").fetchone()
        (num_tables,) = run("SELECT count(*) FROM sqlite_master").fetchone()
        if application != _APPLICATION_ID and (application or version or num_tables):
            raise InvalidState(f"{self._path} is a database of something else; pass another path")
        if version > _FORMAT:
            raise InvalidState(f"{self._path} is of format {version}, this adaptrt reads formats up to {_FORMAT}; update adaptrt")
        run("PRAGMA journal_mode = WAL")
        run(f"PRAGMA synchronous = {synchronous}")
        run("BEGIN IMMEDIATE")
        run(f"PRAGMA application_id = {_APPLICATION_ID}")
        run(f"PRAGMA user_version = {_FORMAT}")
        run(_TABLE)
        self._purge()
        run("COMMIT")

    def get(self, tenant: str) -> Record | None:
        """As `Store.get`."""
        key = key_of(checked_tenant(tenant))
        with self._lock, self._errors():
            row = self._db.execute("SELECT record FROM tenants WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        record = Record.from_bytes(row[0])
        return None if self._has_expired(record.updated) else record

    def commit(self, tenant: str, expected_version: int, record: Record) -> bool:
        """As `Store.commit`."""
        return self.commit_all([Change(tenant, expected_version, record)])[0]

    def commit_all(self, changes: Sequence[Change]) -> list[bool]:
        """As `Store.commit_all`, in one transaction: the disk is waited for once."""
        rows = [(key_of(checked_tenant(change.tenant)), change, change.record.to_bytes()) for change in changes]
        with self._lock, self._errors(), self._transaction():
            self._num_commits += 1
            if self._num_commits % _PURGE_EVERY == 0:
                self._purge()
            return [self._commit(*row) for row in rows]

    def _commit(self, key: bytes, change: Change, data: bytes) -> bool:
        row = self._db.execute("SELECT version, wall_s, boot_id, boot_s FROM tenants WHERE key = ?", (key,)).fetchone()
        known = 0 if row is None or self._has_expired(Stamp(*row[1:])) else row[0]
        if known != change.expected_version:
            return False
        record = change.record
        self._db.execute(_UPSERT, (key, record.version, *record.updated, data))
        return True

    def delete(self, tenant: str) -> bool:
        """As `Store.delete`."""
        key = key_of(checked_tenant(tenant))
        with self._lock, self._errors():
            return self._db.execute("DELETE FROM tenants WHERE key = ?", (key,)).rowcount > 0

    def num_tenants(self) -> int:
        """As `Store.num_tenants`."""
        with self._lock, self._errors():
            self._purge()
            return self._db.execute("SELECT count(*) FROM tenants").fetchone()[0]

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._db.close()

    def _has_expired(self, updated: Stamp) -> bool:
        return self.ttl_s is not None and updated.age_s(self._clock()) >= self.ttl_s

    def _purge(self) -> None:
        if self.ttl_s is not None:
            now = self._clock()
            values = (now.boot_id, now.boot_s, self.ttl_s, now.boot_id, now.wall_s, self.ttl_s)
            self._db.execute(f"DELETE FROM tenants WHERE {_EXPIRED}", values)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreUnavailable(f"{self._path} cannot be read or written: {error}") from error
