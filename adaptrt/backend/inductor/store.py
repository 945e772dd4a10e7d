"""Keeps what was built on disk, and checks it before it is used.

An entry is a folder with the files that were built and a record of their sizes and hashes. It is built under a name that no other process
knows, and renamed when it is complete. So a process that is killed, or a disk that is full, leaves no half of an entry. What is damaged
later does not agree with the record. It is removed and built again, and a warning says so.

Processes that want the same entry wait for the one that builds it. If that takes too long, or the file system has no locks, each builds
its own, and the first one to be complete is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Generator
from pathlib import Path

from adaptrt.errors import DamagedCache

LOCK_TIMEOUT_S = 300.0

_RECORD = "record.json"


class Store:
    """The entries in one folder.

    Args:
      folder: need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, key: str) -> Path | None:
        """Returns the folder of an entry whose files are as they were built. None if there is none, or it is damaged."""
        entry = self._folder / key
        return entry if _is_intact(entry) else None

    def holds_any(self) -> bool:
        """Whether there is an entry, which need not be intact."""
        return self._folder.is_dir() and any(path.is_dir() and not path.name.startswith((".", "header")) for path in self._folder.iterdir())

    def get_or_build(self, key: str, build: Callable[[Path], None]) -> Path:
        """Returns the folder of an entry. If there is none, or it is damaged, `build` makes its files in the folder that it is given.

        Raises:
          OSError: the entry cannot be written.
        """
        entry = self.find(key)
        if entry is not None:
            return entry
        self._folder.mkdir(parents=True, exist_ok=True)
        with _locked(self._folder / f"{key}.lock") as is_alone:
            entry = self.find(key)
            if entry is not None:
                return entry
            if is_alone:  # what processes have left that were killed
                for left in self._folder.glob(f".{key}.*"):
                    shutil.rmtree(left, ignore_errors=True)
            self._discard(key)
            return self._build(key, build)

    def _build(self, key: str, build: Callable[[Path], None]) -> Path:
        entry, unfinished = self._folder / key, self._another_name(key)
        unfinished.mkdir()
        try:
            build(unfinished)
            files = {file.name: _fingerprint(file) for file in sorted(unfinished.iterdir())}
            (unfinished / _RECORD).write_text(json.dumps(files), encoding="utf-8")
            try:
                unfinished.rename(entry)
            except OSError:  # another process was first
                if not _is_intact(entry):
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return entry

    def _discard(self, key: str) -> None:
        """Removes a damaged entry, with a warning."""
        entry, removed = self._folder / key, self._another_name(key)
        try:
            entry.rename(removed)
        except FileNotFoundError:
            return
        warn_of_damage(entry)
        shutil.rmtree(removed, ignore_errors=True)

    def _another_name(self, key: str) -> Path:
        return self._folder / f".{key}.{os.getpid()}-{secrets.token_hex(4)}"


_warned: set[str] = set()


def warn_of_damage(path: Path) -> None:
    """Says once a process that files of compiled programs are damaged, and names the first."""
    if not _warned:
        _warned.add(str(path))
        warnings.warn(
            f"{path} is not what was written there: the disk may be full or failing, or a process was killed. It is made again, and so is "
            "whatever else is found damaged",
            DamagedCache,
            stacklevel=2,
        )


def _is_intact(entry: Path) -> bool:
    try:
        files = json.loads((entry / _RECORD).read_text(encoding="utf-8"))
        return bool(files) and all(_fingerprint(entry / name) == expected for name, expected in files.items())
    except (OSError, ValueError, AttributeError):
        return False


_known: dict[Path, tuple[tuple[int, ...], str]] = {}
"""Hashes of large files, which this process has read, for the state in which it has read them."""

_LARGE_BYTES = 1 << 24


def _fingerprint(file: Path) -> list[int | str]:
    """Size and hash of a file, in a form that JSON keeps."""
    found = file.stat()
    if found.st_size < _LARGE_BYTES:
        return [found.st_size, _hash(file)]
    state = found.st_ino, found.st_size, found.st_mtime_ns
    if _known.get(file, ((), ""))[0] != state:
        _known[file] = state, _hash(file)
    return [found.st_size, _known[file][1]]


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Generator[bool]:
    """Waits until no other process or thread is in such a block. Whether that is known in the block.

    A process that ends, however it does, gives up its lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    with path.open("ab") as file:
        deadline_s, is_alone = time.monotonic() + LOCK_TIMEOUT_S, False
        while not is_alone:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_alone = True
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    break
                time.sleep(0.02)
            except OSError:  # a file system without locks
                break
        try:
            yield is_alone
        finally:
            if is_alone:  # closing is not enough where a child process was forked that has the file open, too
                fcntl.flock(file, fcntl.LOCK_UN)
