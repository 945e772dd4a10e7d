"""Computes a fingerprint of the sources that decide what Inductor makes of a graph.

Inductor keeps compiled graphs on disk, under a key that knows the graph, Inductor's settings and the version of PyTorch. It does not know
what this folder changes in Inductor. So the key also contains the fingerprint (`tag`), which is another one as soon as a source is.

Passes that change the graph before Inductor gets it need not be part of it, because the key knows the graph. A docstring is part of it like
everything else in a file: reading code for what matters takes longer, and can be wrong.

Known limits: the sources are read at a process's first compilation. If they were changed after the process had imported them, the tag is
that of the new ones.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable


@functools.cache
def tag() -> str | None:
    """The fingerprint of this installation; None if its sources cannot be read, as in a frozen application."""
    try:
        return fingerprint(files("adaptrt"))
    except (OSError, ModuleNotFoundError, NotImplementedError):
        return None


def fingerprint(package: Traversable) -> str | None:
    """As `tag`, of the package in this folder, which may be within an archive."""
    found, is_empty = hashlib.sha256(), True
    for name, file in _modules(package / "backend" / "inductor"):
        content, is_empty = file.read_bytes(), False
        found.update(f"{name} {len(content)}\n".encode() + content)
    return None if is_empty else f"adaptrt {found.hexdigest()[:32]}"


def _modules(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    """Modules in and below a folder, in an order that does not depend on the file system. Python also imports compiled ones."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir() and entry.name != "__pycache__":
            yield from _modules(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith((".py", ".pyc")):
            yield prefix + entry.name, entry
