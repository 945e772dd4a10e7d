"""Stores: compare-and-swap, expiry, bounds, pins, and what survives kills and outages. One table of stores drives what all must do."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptrt
from adaptrt.errors import InvalidArgument, InvalidState, InvalidType, StoreUnavailable
from adaptrt.serve import Change, MemoryStore, Record, RedisStore, SQLiteStore, Store
from adaptrt.serve.records import Shared, Stamp

REDIS = shutil.which("redis-server") or shutil.which("valkey-server")
needs_redis = pytest.mark.skipif(REDIS is None, reason="neither redis-server nor valkey-server is installed")


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.stamp = Stamp(1e9, "boot", 50.0)

    def __call__(self) -> Stamp:
        return self.stamp

    def move(self, wall_s: float = 0.0, boot_s: float = 0.0, boot_id: str = "boot") -> None:
        self.stamp = Stamp(self.stamp.wall_s + wall_s, boot_id, self.stamp.boot_s + boot_s)


class Server:
    """A server of Redis on a free port of this machine."""

    def __init__(self, folder: Path) -> None:
        assert REDIS is not None
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        command = [REDIS, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "yes"]
        self._command = [*command, "--appendfsync", "always"]
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise RuntimeError("the server did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("redis"))
    yield started
    started.kill()


@pytest.fixture(params=["memory", "sqlite", pytest.param("redis", marks=needs_redis)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made: Store
    if request.param == "memory":
        made = MemoryStore(2**20)
    elif request.param == "sqlite":
        made = SQLiteStore(tmp_path / "tenants.db", synchronous="normal")
    else:
        made = RedisStore(request.getfixturevalue("server").url, prefix=f"test-{tmp_path.name}")
    yield made
    made.close()


def record(version: int, state: bytes = b"state", now: Stamp | None = None) -> Record:
    return Record.of(version, state, now)


def held(store: Store, tenant: str) -> tuple[int, Any] | None:
    found = store.get(tenant)
    return None if found is None else (found.version, found.state)


def test_a_commit_replaces_only_the_version_that_is_expected(store: Store) -> None:
    assert store.get("ann") is None
    assert not store.commit("ann", 3, record(4))
    assert store.commit("ann", 0, record(7, b"one"))
    assert not store.commit("ann", 0, record(1, b"two"))
    assert not store.commit("ann", 6, record(7, b"two"))
    assert held(store, "ann") == (7, b"one")
    assert store.commit("ann", 7, record(8, b"\0\xff" * 1000))
    assert held(store, "ann") == (8, b"\0\xff" * 1000)


def test_all_of_a_record_comes_back(store: Store) -> None:
    written = dataclasses.replace(record(2**40), num_adaptations=5, created=Stamp(1.5, "a", 2.5), updated=Stamp(3.5, "b", 4.5))
    assert store.commit("ann", 0, written)
    assert store.get("ann") == written


def test_several_commits_are_each_for_itself(store: Store) -> None:
    assert store.commit("bob", 0, record(1))
    changes = [Change("ann", 0, record(5)), Change("bob", 9, record(10)), Change("cyd", 0, record(6)), Change("cyd", 6, record(7))]
    assert store.commit_all(changes) == [True, False, True, True]
    assert [held(store, name) for name in ("ann", "bob", "cyd")] == [(5, b"state"), (1, b"state"), (7, b"state")]


def test_delete_forgets_one_tenant(store: Store) -> None:
    store.commit("ann", 0, record(1))
    store.commit("bob", 0, record(1))
    assert store.delete("ann")
    assert not store.delete("ann")
    assert store.get("ann") is None
    assert held(store, "bob") == (1, b"state")
    assert store.commit("ann", 0, record(2))


def test_stores_that_can_tell_how_many_tenants_they_have(store: Store) -> None:
    if isinstance(store, RedisStore):
        assert store.num_tenants() is None
        return
    assert store.num_tenants() == 0
    for name in ("ann", "bob", "cyd"):
        assert store.commit(name, 0, record(1))
    assert not store.commit("ann", 0, record(1))
    assert store.commit("ann", 1, record(2))
    assert store.num_tenants() == 3
    assert store.delete("bob")
    assert store.num_tenants() == 2


NAMES = ["ann", "ANN", "ann ", "ann:1", "ann*", "a/../ann", "ánn", "a\u0301nn", "' OR 1=1 --", "%", "{ann}", "x" * 256]


def test_no_name_reaches_another_tenant(store: Store) -> None:
    for number, name in enumerate(NAMES):
        assert store.commit(name, 0, record(1, f"{number}".encode()))
    assert [held(store, name) for name in NAMES] == [(1, f"{number}".encode()) for number in range(len(NAMES))]
    assert store.delete("%")
    assert sum(store.get(name) is None for name in NAMES) == 1


@pytest.mark.parametrize(
    ("name", "error"),
    [("", InvalidArgument), ("x" * 257, InvalidArgument), ("a\nb", InvalidArgument), ("a\0b", InvalidArgument), ("\ud800", InvalidArgument)]
    + [(name, InvalidType) for name in (None, 3, b"ann", ["ann"])],
)
def test_names_that_are_none(store: Store, name: Any, error: type[Exception]) -> None:
    for call in (store.get, store.delete, lambda name: store.commit(name, 0, record(1))):
        with pytest.raises(error, match="tenant"):
            call(name)


def test_of_threads_that_commit_at_once_one_wins(store: Store) -> None:
    wins: list[int] = []

    def count() -> None:
        for _ in range(20):
            while True:
                found = store.get("ann")
                version = 0 if found is None else found.version
                if store.commit("ann", version, record(version + 1)):
                    wins.append(version + 1)
                    break

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == list(range(1, 81))
    assert held(store, "ann") == (80, b"state")


# Expiry


@pytest.fixture(params=["memory", "sqlite"])
def aging(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Clock, Callable[[], Store]]]:
    """A clock, and a function that opens the store; what is in memory stays open."""
    clock, opened = Clock(), contextlib.ExitStack()
    memory = MemoryStore(2**20, ttl_s=10.0, clock=clock)

    def open_store() -> Store:
        if request.param == "memory":
            return memory
        return opened.enter_context(contextlib.closing(SQLiteStore(tmp_path / "tenants.db", 10.0, synchronous="normal", clock=clock)))

    with opened:
        yield clock, open_store


def test_a_record_expires_after_its_last_commit(aging: tuple[Clock, Callable[[], Store]]) -> None:
    clock, open_store = aging
    store = open_store()
    store.commit("ann", 0, record(1, now=clock()))
    clock.move(boot_s=9.9)
    assert store.commit("ann", 1, record(2, now=clock()))
    clock.move(boot_s=9.9)
    assert held(open_store(), "ann") == (2, b"state")
    assert store.num_tenants() == 1
    clock.move(boot_s=0.2)
    assert store.num_tenants() == 0
    assert store.get("ann") is None
    assert not store.commit("ann", 2, record(3, now=clock()))
    assert store.commit("ann", 0, record(9, now=clock()))
    assert held(open_store(), "ann") == (9, b"state")


@pytest.mark.parametrize("step_s", [-1e8, 1e8])
def test_a_wall_clock_that_steps_changes_nothing(aging: tuple[Clock, Callable[[], Store]], step_s: float) -> None:
    clock, open_store = aging
    open_store().commit("ann", 0, record(1, now=clock()))
    clock.move(wall_s=step_s, boot_s=5.0)
    assert held(open_store(), "ann") == (1, b"state")
    clock.move(boot_s=5.0)
    assert open_store().get("ann") is None


def test_after_a_start_of_the_machine_the_wall_clock_counts(tmp_path: Path) -> None:
    clock = Clock()
    for wall_s, expected in ((9.0, (1, b"state")), (1.0, None)):
        store = SQLiteStore(tmp_path / "tenants.db", 10.0, clock=clock)
        store.commit("ann", 0, record(1, now=clock()))
        clock.move(wall_s=wall_s, boot_s=-40.0, boot_id=f"boot {wall_s}")
        assert held(store, "ann") == expected
        store.close()


def test_expired_rows_leave_the_file(tmp_path: Path) -> None:
    clock = Clock()
    store = SQLiteStore(tmp_path / "tenants.db", 10.0, clock=clock)
    for name in ("ann", "bob"):
        store.commit(name, 0, record(1, now=clock()))
        clock.move(boot_s=6.0)
    store.close()
    SQLiteStore(tmp_path / "tenants.db", 10.0, clock=clock).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "tenants.db")) as db:
        assert db.execute("SELECT count(*) FROM tenants").fetchone() == (1,)


# In memory


def test_memory_drops_what_was_used_least_recently() -> None:
    store = MemoryStore(max_bytes=30)
    for name in ("ann", "bob", "cyd"):
        store.commit(name, 0, record(1, b"0123456789"))
    store.get("ann")
    store.commit("dan", 0, record(1, b"0123456789"))
    assert [name for name in ("ann", "bob", "cyd", "dan") if store.get(name)] == ["ann", "cyd", "dan"]
    assert (store.num_bytes, len(store)) == (30, 3)
    store.commit("eve", 0, record(1, b"0" * 25))
    assert (store.num_bytes, len(store)) == (25, 1)


def test_a_record_is_replaced_only_where_it_is_the_one_that_is_known() -> None:
    store = MemoryStore(2**20)
    first, other = record(1, b"one"), record(1, b"two, which is longer")
    store.replace("ann", first, other)
    assert store.get("ann") is None
    store.commit("ann", 0, first)
    store.replace("ann", record(1, b"one"), other)  # it is equal, and another one
    assert store.get("ann") is first
    store.replace("ann", first, other)
    assert store.get("ann") is other and store.num_bytes == other.num_bytes
    store.replace("ann", first, first)
    assert store.get("ann") is other


def test_pinned_tenants_are_not_dropped() -> None:
    store = MemoryStore(max_bytes=20)
    store.pin("ann")
    store.pin("ann")
    for name in ("ann", "bob", "cyd", "dan"):
        store.commit(name, 0, record(1, b"0123456789"))
    assert [name for name in ("ann", "bob", "cyd", "dan") if store.get(name)] == ["ann", "dan"]
    store.unpin("ann")
    store.commit("eve", 0, record(1, b"0123456789"))
    assert store.get("ann") is not None
    store.pin("eve")
    store.commit("fay", 0, record(1, b"0123456789"))
    assert store.num_bytes == 30  # pinned ones take it beyond
    store.unpin("ann")
    assert store.num_bytes == 20
    assert store.get("ann") is None


def test_a_state_that_never_fits_is_refused() -> None:
    store = MemoryStore(max_bytes=10)
    store.commit("ann", 0, record(1, b"old"))
    with pytest.raises(InvalidArgument, match=r"11 bytes does not fit into max_bytes=10"):
        store.commit("ann", 1, record(2, b"0123456789!"))
    assert held(store, "ann") == (1, b"old")


def rows(num_rows: int) -> list[Any]:
    unroll = adaptrt.compile_unroll(nn.Linear(2, 1), adaptrt.optim.sgd(lr=0.1), k=1, backend="eager").vmap()
    with torch.inference_mode():
        return unroll.adapt((torch.randn(num_rows, 3, 2), torch.randn(num_rows, 3, 1))).unbind()


def own_memory(store: MemoryStore, names: list[str]) -> list[bool]:
    """For each tenant whether its state has memory for one row only."""
    states = [found.state for name in names if (found := store.get(name)) is not None]
    assert all(isinstance(state, adaptrt.Adapted) for state in states)
    weights: list[torch.Tensor] = [state.params["weight"] for state in states]  # pyright: ignore[reportAttributeAccessIssue]
    return [weight.untyped_storage().nbytes() == weight.numel() * weight.element_size() for weight in weights]


def test_rows_of_a_batch_share_memory_while_half_of_them_are_kept() -> None:
    made, names, shared, now = rows(4), ["a", "b", "c", "d"], Shared(4), Stamp.now()
    before = [row.params["weight"].clone() for row in made]
    store = MemoryStore(2**20)
    store.commit_all([Change(name, 0, Record(1, row, 12, 1, now, now, shared)) for name, row in zip(names, made, strict=True)])
    assert own_memory(store, names) == [False] * 4
    store.delete("a")
    store.commit("b", 1, record(2))
    assert own_memory(store, ["c", "d"]) == [False] * 2
    store.delete("d")
    assert own_memory(store, ["c"]) == [True]
    found = store.get("c")
    assert found is not None and isinstance(found.state, adaptrt.Adapted)
    assert torch.equal(found.state.params["weight"], before[2])


def test_a_few_rows_of_a_large_batch_get_their_own_memory_at_once() -> None:
    made, shared, now = rows(8), Shared(8), Stamp.now()
    store = MemoryStore(2**20)
    store.commit_all([Change(str(index), 0, Record(1, made[index], 12, 1, now, now, shared)) for index in range(3)])
    assert own_memory(store, ["0", "1", "2"]) == [True] * 3


# In a file


COMMITS = """
    import sys
    from adaptrt.serve import Record, SQLiteStore

    store = SQLiteStore(sys.argv[1])
    versions = {name: (store.get(name).version if store.get(name) else 0) for name in ("ann", "bob")}
    while True:
        for name in versions:
            version = versions[name] + 1
            assert store.commit(name, versions[name], Record.of(version, version.to_bytes(8, "little") * 20_000))
            versions[name] = version
            print(name, version, flush=True)
"""


def test_a_killed_process_loses_and_tears_nothing(tmp_path: Path) -> None:
    path = tmp_path / "tenants.db"
    script = tmp_path / "commits.py"
    script.write_text(textwrap.dedent(COMMITS))
    known = {"ann": 0, "bob": 0}
    for round in range(3):
        process = subprocess.Popen([sys.executable, script, path], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})
        assert process.stdout is not None
        acknowledged = dict(known)
        for _ in range(7 + 6 * round):
            name, version = process.stdout.readline().split()
            acknowledged[name] = int(version)
        time.sleep(0.003 * round)
        process.send_signal(signal.SIGKILL)
        for line in process.stdout.read().splitlines():
            if len(parts := line.split()) == 2:
                acknowledged[parts[0]] = int(parts[1])
        process.wait()
        process.stdout.close()
        assert process.returncode == -signal.SIGKILL
        store = SQLiteStore(path)
        for name, version in acknowledged.items():
            found = store.get(name)  # compares the digest
            assert found is not None
            # One more may have been committed and not yet been printed.
            assert version <= found.version <= version + 1
            assert found.state == found.version.to_bytes(8, "little") * 20_000
            known[name] = found.version
        store.close()


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "tenants.db")
    store.commit("ann", 0, record(1, b"0123456789"))
    with contextlib.closing(sqlite3.connect(tmp_path / "tenants.db")) as db:
        (data,) = db.execute("SELECT record FROM tenants").fetchone()
        for position in range(0, len(data), 7):
            torn = bytearray(data)
            torn[position] ^= 1
            db.execute("UPDATE tenants SET record = ?", (bytes(torn),))
            db.commit()
            with pytest.raises(InvalidState, match="damaged"):
                store.get("ann")
    store.close()


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as db:
        db.execute("CREATE TABLE notes (text TEXT)")
    with pytest.raises(InvalidState, match="database of something else"):
        SQLiteStore(tmp_path / "other.db")
    (tmp_path / "text.db").write_text("no database" * 100)
    with pytest.raises(StoreUnavailable, match=r"text\.db"):
        SQLiteStore(tmp_path / "text.db")
    SQLiteStore(tmp_path / "new.db").close()
    with contextlib.closing(sqlite3.connect(tmp_path / "new.db")) as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(InvalidState, match="format 9"):
        SQLiteStore(tmp_path / "new.db")


def test_a_file_that_another_process_writes_to_is_unavailable(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "tenants.db", timeout_s=0.05)
    store.commit("ann", 0, record(1))
    with contextlib.closing(sqlite3.connect(tmp_path / "tenants.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked"):
            store.commit("ann", 1, record(2))
        assert held(store, "ann") == (1, b"state")
        db.execute("ROLLBACK")
    assert store.commit("ann", 1, record(2))
    store.close()


def test_a_full_disk_is_unavailable_and_tears_nothing(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "tenants.db")
    store.commit("ann", 0, record(1))
    store._db.execute("PRAGMA max_page_count = 8")  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(StoreUnavailable, match="full"):
        store.commit_all([Change("bob", 0, record(1)), Change("ann", 1, record(2, b"0" * 100_000))])
    assert (held(store, "ann"), held(store, "bob")) == ((1, b"state"), None)
    assert store.commit("ann", 1, record(2))
    store.close()


# In a server


@needs_redis
def test_an_outage_of_the_server_loses_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path)
    store = RedisStore(server.url, timeout_s=0.2)
    try:
        assert store.commit("ann", 0, record(1, b"one"))
        server.kill()
        for call in (lambda: store.get("ann"), lambda: store.commit("ann", 1, record(2)), lambda: store.delete("ann")):
            with pytest.raises(StoreUnavailable, match="does not answer"):
                call()
        server.start()
        assert held(store, "ann") == (1, b"one")
        assert store.commit("ann", 1, record(2, b"two"))
    finally:
        store.close()
        server.kill()


@needs_redis
def test_a_commit_that_is_sent_twice_counts_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RedisStore(server.url, prefix="twice")
    monkeypatch.setattr("secrets.token_bytes", bytes)  # as where the client sends the same message again
    assert store.commit("ann", 0, record(1, now=Stamp(1.0, "a", 1.0)))
    assert store.commit("ann", 0, record(1, now=Stamp(1.0, "a", 1.0)))
    monkeypatch.undo()
    assert not store.commit("ann", 0, record(1, now=Stamp(1.0, "a", 1.0)))  # another process with the same record
    store.close()


@needs_redis
def test_the_server_forgets_after_the_ttl(server: Server) -> None:
    store = RedisStore(server.url, ttl_s=0.2, prefix="ttl")
    store.commit("ann", 0, record(1))
    assert held(store, "ann") == (1, b"state")
    time.sleep(0.3)
    assert store.get("ann") is None
    store.close()


BAD = [
    (lambda path: MemoryStore(0), InvalidArgument, "at least 1"),
    (lambda path: MemoryStore(1.5), InvalidType, "int"),  # pyright: ignore[reportArgumentType]
    (lambda path: MemoryStore(True), InvalidType, "int"),
    (lambda path: MemoryStore(10, ttl_s=0), InvalidArgument, "more than 0"),
    (lambda path: MemoryStore(10, ttl_s=float("nan")), InvalidArgument, "more than 0"),
    (lambda path: MemoryStore(10, ttl_s="1"), InvalidType, "seconds"),  # pyright: ignore[reportArgumentType]
    (lambda path: SQLiteStore(3), InvalidType, "path"),  # pyright: ignore[reportArgumentType]
    (lambda path: SQLiteStore(path / "no" / "such.db"), StoreUnavailable, "cannot be read or written"),
    (lambda path: SQLiteStore(path / "a.db", synchronous="off"), InvalidArgument, "'full' or 'normal'"),
    (lambda path: RedisStore("nowhere"), InvalidArgument, "no URL"),
    (lambda path: RedisStore("redis://localhost", prefix=""), InvalidArgument, "prefix"),
]


@pytest.mark.parametrize(("make", "error", "words"), BAD)
def test_arguments_that_are_none(make: Callable[[Path], Store], error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        make(tmp_path)


def test_only_bytes_are_written(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "tenants.db")
    with pytest.raises(InvalidType, match="keeps bytes"):
        store.commit("ann", 0, dataclasses.replace(record(1), state=rows(1)[0]))
    store.close()


def test_a_state_goes_through_bytes() -> None:
    unroll = adaptrt.compile_unroll(nn.Linear(2, 1), adaptrt.optim.adam(lr=0.1), k=2, backend="eager")
    adapted = unroll.adapt((torch.randn(3, 2), torch.randn(3, 1)))
    file = io.BytesIO()
    adapted.save(file, fingerprint=unroll.fingerprint())
    loaded = unroll.load(file.getvalue(), fingerprint=unroll.fingerprint())
    for name, value in adapted.params.items():
        assert torch.equal(loaded.params[name], value)
    with pytest.raises(InvalidState, match="the saved state is damaged"):
        unroll.load(file.getvalue()[:-3])
    with pytest.raises(InvalidState, match="another base"):
        unroll.load(file.getvalue(), fingerprint={name: "0" for name in unroll.fingerprint()})
