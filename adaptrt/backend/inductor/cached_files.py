"""Keeps Inductor's cache on disk right, and Inductor's tables in memory small, while a program is compiled.

Inductor takes a file to be what it wrote as soon as there is one of that name. Here the file is compared with what it should be: generated
Python with its source, which is known, and a compiled graph with the hash that is its name. What differs is written or compiled again.

Inductor also keeps a reference to every module that it has loaded, and to every compiled graph that it has written, as long as the process
lives. Those of our programs are taken out again, so that a program is freed when its shape is dropped.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from adaptrt.backend.inductor.exchange import FORGOTTEN_PROGRAMS, INTACT_FILES
from adaptrt.backend.inductor.store import warn_of_damage
from adaptrt.graph.exchange import exchanged


@contextlib.contextmanager
def cached_files() -> Generator[None]:
    """Within the block, files that Inductor finds are looked at, and what it loads is not kept by its tables."""
    with exchanged(INTACT_FILES, _write, _write_to_disk, _folder_of), exchanged(FORGOTTEN_PROGRAMS, _load, lambda original: _not_kept):
        yield


def free_with(compiled: Any) -> None:
    """Frees the kernels of a compiled graph when it is dropped.

    The generated module and its functions refer to each other, so that only Python's garbage collection would free them. It may be off.
    """
    call = getattr(compiled, "current_callable", None)
    module: dict[str, Any] = getattr(getattr(call, "__func__", call), "__globals__", {})
    name = module.get("__name__", "")
    if name.startswith(_GENERATED) and name not in sys.modules:  # otherwise somebody else has it, too
        weakref.finalize(compiled, module.clear).atexit = False


_GENERATED = "torch._inductor.runtime.compile_tasks."


def _write(original: Callable[..., tuple[str, str]]) -> Callable[..., tuple[str, str]]:
    def write(source_code: str, extra: str = "") -> tuple[str, str]:
        key, path = original(source_code, extra)
        _put_right(path, source_code)
        return key, path

    return write


def _write_to_disk(original: Callable[[Any], str]) -> Callable[[Any], str]:
    def write_to_disk(self: Any) -> str:
        path = original(self)
        _put_right(path, self.source_code)
        return path

    return write_to_disk


def _put_right(path: str, source: str) -> None:
    """Makes sure that a file of generated code holds what it should."""
    from torch._inductor.codecache import write_atomic

    try:
        found = Path(path).read_text()  # in the encoding in which Inductor writes, and reads again
    except FileNotFoundError:  # the cache is being removed
        write_atomic(path, source, make_dirs=True)
        return
    except ValueError:
        found = ""
    if found.strip() != source.strip():  # which is what Inductor's name for the file depends on
        warn_of_damage(Path(path))
        write_atomic(path, source)


def _folder_of(original: Callable[[str], str]) -> Callable[[str], str]:
    from torch._inductor.codecache import sha256_hash

    def folder_of(key: str) -> str:
        folder = Path(original(key))
        for file in folder.iterdir() if folder.is_dir() else ():
            if file.name.startswith("."):  # of a process that writes at present
                continue
            try:
                if sha256_hash(file.read_bytes()) != file.name:
                    warn_of_damage(file)
                    file.unlink()
            except FileNotFoundError:  # another process has removed it
                continue
            except OSError:  # what cannot be read or removed must not be found
                return f"{folder}-not-used"
        return str(folder)

    return folder_of


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    from torch._inductor.codecache import PyCodeCache

    def load(key: str, path: str, *args: Any, **kwargs: Any) -> Any:
        module = original(key, path, *args, **kwargs)
        with contextlib.suppress(ValueError):
            PyCodeCache.modules.remove(module)
        if PyCodeCache.modules_no_attr.get(path) is module:
            del PyCodeCache.modules_no_attr[path]
        PyCodeCache.linemaps.pop(path, None)
        if sys.modules.get(module.__name__) is module:
            del sys.modules[module.__name__]
        return module

    return load


def _not_kept(artifact_type: str, key: str, content: object) -> None:
    """In place of `CacheArtifactManager.record_artifact`."""
    del artifact_type, key, content
