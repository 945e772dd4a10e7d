"""The folder of programs: who may write to it, what is locked and left there, and compilers that run while the process ends."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import os
import platform
import select
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adaptrt.backend.inductor import cpp, library, store
from adaptrt.backend.inductor.available import cannot_build, comes_from_outside
from adaptrt.backend.inductor.store import Store
from adaptrt.backend.inductor.task import Task
from adaptrt.errors import CompilerUnavailable, DamagedCache


@pytest.fixture
def inductor() -> Iterator[None]:
    """Inductor, which takes this processor's instructions for granted: trying them takes seconds."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        __import__("torch._inductor.compile_fx")
        from torch._inductor import config
    with config.patch({"cpp.vec_isa_ok": True}):
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where programs are kept."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    return tmp_path / "own" / "adaptrt"


@pytest.fixture
def other_thread() -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Runs a function in a thread, which is over when the test is."""
    threads: list[threading.Thread] = []

    def start(fn: Callable[[], Any]) -> None:
        threads.append(threading.Thread(target=fn))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()


def write(folder: Path) -> None:
    (folder / "file").write_text("what was built")


# --- a compiled header that others may have planted


def anyone_writes(folder: Path) -> None:
    folder.chmod(0o777)


def another_owns(folder: Path) -> None:
    os.chown(folder, 12345, -1)


def leads_elsewhere(folder: Path) -> None:
    elsewhere = folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(elsewhere)
    elsewhere.chmod(0o777)


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("change", [anyone_writes, another_owns, leads_elsewhere])
@pytest.mark.parametrize("place", ["default", "default/adaptrt", "entry", "file"])
def test_a_header_that_others_can_write(
    change: Callable[[Path], None], place: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime import cache_dir_utils

    if change is another_owns and os.geteuid():
        pytest.skip("only root gives files away")
    monkeypatch.setattr(cache_dir_utils, "default_cache_dir", lambda: str(tmp_path / "default"))
    monkeypatch.setattr(cpp, "_run", lambda command, folder: write(folder))
    compiler = cpp.Compiler()
    compiler._precompiles = True
    header = compiler._header()
    assert header is not None and header.is_relative_to(tmp_path / "default")
    change({"entry": header.parent, "file": header}.get(place, tmp_path / place))
    safe = compiler._header()
    assert safe is not None and safe.is_relative_to(folder) and store.only_ours(safe.parent, safe)


# --- keys


@pytest.mark.usefixtures("inductor")
def test_what_keys_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    keys = [cpp.key_of("source")]
    with config.patch({"aot_inductor.debug_symbols": True}):
        keys.append(cpp.key_of("source"))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.17"))
    keys.append(cpp.key_of("source"))
    assert len(set(keys)) == 3
    with config.patch({"cpp.threads": 7}):
        assert cpp.key_of("source") == keys[-1], "the source says how many"


# --- libraries that the system cannot load


@pytest.mark.usefixtures("inductor")
def test_a_library_that_cannot_be_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was built on another machine: the record is right."""
    monkeypatch.setattr(store, "_warned", set[str]())
    source = f"{library.ENTRIES}\nnamespace {{ void kernel(float*) {{}} }}\n{library.entry(0, 'kernel')}"
    assert library.open_later(source)()
    entry = folder / cpp.key_of(source)
    (entry / "library.so").write_text("for another machine")
    (entry / "record.json").unlink()
    store._record(entry)
    open_it = library.open_later(source)
    with pytest.warns(DamagedCache, match="cannot be loaded"):
        opened = open_it()
    assert opened
    del opened
    open_it = library.open_later(source)
    for path in (*entry.iterdir(), entry):  # removed before it is opened
        path.unlink() if path.is_file() else path.rmdir()
    assert open_it()


@pytest.mark.usefixtures("inductor")
def test_the_module_that_calls_kernels_is_no_program(folder: Path) -> None:
    Store(folder).get_or_build(library._key_of_caller(), write)
    assert not library.any_built()
    Store(folder).get_or_build(cpp.key_of("source"), write)
    assert library.any_built()


def test_an_entry_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(folder).get_or_build("key", write)
    read: list[Path] = []
    monkeypatch.setattr(store, "_fingerprint", lambda file, original=store._fingerprint: (read.append(file), original(file))[1])
    monkeypatch.setattr(library, "_store", lambda: Store(folder))
    assert library._begin("key", "source")() == folder / "key"
    assert len(read) == 1


# --- locks and leftovers


def test_a_forked_child_holds_no_lock(folder: Path, other_thread: Callable[[Callable[[], Any]], None]) -> None:
    """Neither after its parent has ended, nor does it take it from a parent that lives."""
    inside, go_on = threading.Event(), threading.Event()
    folder.mkdir(parents=True)
    path = folder / "key.lock"

    def hold() -> None:
        with store._locked(path):
            inside.set()
            go_on.wait(60)

    other_thread(hold)
    inside.wait(60)
    try:
        read, write_end = os.pipe()
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                os.write(write_end, b"open" if any(is_open(path)) else b"closed")
            os._exit(0)
        os.close(write_end)
        assert os.read(read, 10) == b"closed"
        os.close(read)
        os.waitpid(child, 0)
        assert any(is_open(path))
    finally:
        go_on.set()


def is_open(path: Path) -> Iterator[bool]:
    """For each descriptor of this process, whether it is the file's."""
    for descriptor in range(256):
        with contextlib.suppress(OSError):
            yield os.path.samestat(os.fstat(descriptor), path.stat())


def test_what_killed_processes_leave(folder: Path) -> None:
    folder.mkdir(parents=True)
    old, recent = time.time() - 2 * 24 * 3600, time.time() - 60
    for name, moment_s in ((".other.1-a", old), (".other.2-b", recent), (".key.3-c", recent), ("other", old)):
        (folder / name).mkdir()
        (folder / name / "file").write_text("")
        os.utime(folder / name, (moment_s, moment_s))
    for name, moment_s in (("old.lock", old), ("recent.lock", recent), ("key.lock", old)):
        (folder / name).write_text("")
        os.utime(folder / name, (moment_s, moment_s))
    Store(folder).get_or_build("key", write)
    assert sorted(path.name for path in folder.iterdir()) == [".other.2-b", "key", "other", "recent.lock"]


def test_locks_exclude_each_other_though_they_are_removed(folder: Path, other_thread: Callable[[Callable[[], Any]], None]) -> None:
    inside: list[int] = []
    most: list[int] = []

    def enter() -> None:
        for _ in range(5):
            with store._locked(folder / "key.lock") as is_alone:
                inside.append(1)
                most.append(len(inside) if is_alone else 99)
                time.sleep(0.002)
                inside.pop()

    for _ in range(4):
        other_thread(enter)
    enter()
    while len(most) < 25:
        time.sleep(0.01)
    assert max(most) == 1


# --- threads and processes


def test_the_system_has_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert Task(lambda: 3).result() == 3


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError(), RuntimeError("std::bad_alloc")], ids=repr)
def test_errors_of_the_system(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptrt.backend.inductor import available

    monkeypatch.setattr(available, "_WARNED", set[str]())
    outer = ValueError()
    outer.__cause__ = error
    assert comes_from_outside(error) and comes_from_outside(outer) and not comes_from_outside(RuntimeError("another"))
    with pytest.warns(CompilerUnavailable):
        assert cannot_build(outer)


ENDS = """
import sys, time
from pathlib import Path
from adaptrt.backend.inductor import cpp, store
from adaptrt.backend.inductor.task import Task
import torch._inductor.exc
folder = Path(sys.argv[1])
Task(lambda: cpp._run(["sh", "-c", "exec 3> fifo; touch started; sleep 100; sleep 100"], folder))
lock = store._locked(folder / "a.lock")
lock.__enter__()
Task(lambda: store._locked(folder / "a.lock").__enter__())  # waits for longer than the test may take
while not (folder / "started").exists():
    time.sleep(0.01)
"""


def test_a_process_ends_while_a_compiler_runs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    subprocess.run([sys.executable, "-W", "ignore", "-c", ENDS, str(tmp_path)], timeout=60, check=True)
    readable, _, _ = select.select([reader], [], [], 30)
    assert readable and os.read(reader, 1) == b"", "what writes to the pipe is still there"
    os.close(reader)
