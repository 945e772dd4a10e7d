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
import io
import json
import os
import secrets
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Generator
from pathlib import Path

from adaptrt.errors import DamagedCache
from adaptrt.process import after_fork

LOCK_TIMEOUT_S = 300.0

_RECORD = "record.json"

_LEFT_S = 24 * 3600.0

NOT_AS_WRITTEN = "is not what was written there: the disk may be full or failing, or a process was killed"


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
        """Whether there is an entry whose key is a hash only, which need not be intact."""
        return self._folder.is_dir() and any(path.is_dir() and path.name.isalnum() for path in self._folder.iterdir())

    def get_or_build(self, key: str, build: Callable[[Path], None]) -> Path:
        """Returns the folder of an entry. If there is none, or it is damaged, `build` makes its files in the folder that it is given.

        Raises:
          OSError: the entry cannot be written.
        """
        entry = self.find(key)
        if entry is not None:
            return entry
        with _locked(self._folder / f"{key}.lock") as is_alone:
            entry = self.find(key)
            if entry is not None:
                return entry
            self._sweep(f".{key}." if is_alone else None)
            self.discard(key, NOT_AS_WRITTEN)
            return self._build(key, build)

    def discard(self, key: str, reason: str) -> None:
        """Removes an entry that is no good, with a warning. There need not be one.

        Raises:
          OSError: it cannot be removed.
        """
        entry, removed = self._folder / key, self._another_name(key)
        try:
            entry.rename(removed)
        except FileNotFoundError:
            return
        warn_of_damage(entry, reason)
        shutil.rmtree(removed, ignore_errors=True)

    def _build(self, key: str, build: Callable[[Path], None]) -> Path:
        entry, unfinished = self._folder / key, self._another_name(key)
        unfinished.mkdir()
        try:
            build(unfinished)
            _record(unfinished)
            try:
                unfinished.rename(entry)
            except OSError:  # another process was first
                if not _is_intact(entry):
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return entry

    def _sweep(self, prefix: str | None) -> None:
        """Removes what processes have left that were killed: what has this prefix, and what is older than any build can be."""
        for left in self._folder.iterdir():
            if left.name.startswith(".") or left.suffix == ".lock":
                with contextlib.suppress(OSError):
                    if (prefix is not None and left.name.startswith(prefix)) or time.time() - left.stat().st_mtime > _LEFT_S:
                        left.unlink() if left.suffix == ".lock" else shutil.rmtree(left)

    def _another_name(self, key: str) -> Path:
        return self._folder / f".{key}.{os.getpid()}-{secrets.token_hex(4)}"


_warned: set[str] = set()


def warn_of_damage(path: Path, reason: str = NOT_AS_WRITTEN) -> None:
    """Says once a process that files of compiled programs are damaged, and names the first."""
    if not _warned:
        _warned.add(str(path))
        warnings.warn(
            f"{path} {reason}. It is made again, and so is whatever else is found damaged",
            DamagedCache,
            stacklevel=2,
        )


def _record(entry: Path) -> None:
    files = {file.name: _fingerprint(file) for file in sorted(entry.iterdir())}
    (entry / _RECORD).write_text(json.dumps(files), encoding="utf-8")


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


def only_ours(*paths: Path) -> bool:
    """Whether nobody but this user and the system's can change these files and folders, or put others in the place of the first."""
    if not hasattr(os, "geteuid"):  # Windows
        return False
    # Where a link is followed, both it and what it leads to have to be safe.
    own = [found for path in paths for found in (path.lstat(), path.stat())]
    above = [part.lstat() for path in (paths[0].absolute(), paths[0].resolve()) for part in path.parents]
    return all(found.st_uid == os.geteuid() and not _others_write(found) for found in own) and all(
        found.st_uid in (0, os.geteuid()) and (not _others_write(found) or bool(found.st_mode & stat.S_ISVTX)) for found in above
    )


def _others_write(found: os.stat_result) -> bool:
    return not stat.S_ISLNK(found.st_mode) and bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


_held: set[io.FileIO] = set()
"""Lock files that are open in this process."""


@after_fork
def _close() -> None:
    """A lock is held as long as anybody has its file open, also a child that does not know of it."""
    while _held:
        _held.pop().close()


@contextlib.contextmanager
def _locked(path: Path) -> Generator[bool]:
    """Waits until no other process or thread is in such a block. Whether that is known in the block.

    A process that ends, however it does, gives up its lock. Who leaves the block removes the file, which those who wait for it notice.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    deadline_s, is_alone, file = time.monotonic() + LOCK_TIMEOUT_S, False, _open(path)
    try:
        while not is_alone and time.monotonic() < deadline_s:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)
                continue
            except OSError:  # a file system without locks
                break
            is_alone = _is_at(path, file)
            if not is_alone:
                file.close()
                _held.discard(file)
                file = _open(path)
        yield is_alone
    finally:
        if is_alone and not file.closed:  # as it is in a child that was forked meanwhile
            with contextlib.suppress(OSError):
                path.unlink()
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a child that was not forked by Python has the file open
        file.close()
        _held.discard(file)


def _open(path: Path) -> io.FileIO:
    path.parent.mkdir(parents=True, exist_ok=True)  # the folder may be removed at any time
    file = io.FileIO(path, "a")
    _held.add(file)
    return file


def _is_at(path: Path, file: io.FileIO) -> bool:
    """Whether a file that was opened is still there under its name. If so, it counts as new."""
    try:
        os.utime(path)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
