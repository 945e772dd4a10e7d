"""States of adaptations in files or in bytes: safetensors, one state each, with what shows whether it is damaged or belongs elsewhere.

A file holds every tensor of the state under its dotted name (`State.named_tensors`), the losses, and as metadata the number of this
format, the number of tasks, the fingerprint of what did not adapt, and a digest of all of that. Nothing is unpickled, and nothing in a file
is run.

Known limits: the fingerprint covers parameters that did not adapt, tensors that modules hold as plain attributes, and parameters and
buffers of the losses. An attribute that is there on one side only, as a cache may be, is not compared. The code of the model is not
covered, and neither are tensors in lists and dicts of a module.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from adaptrt.errors import InvalidState, InvalidType
from adaptrt.tree import Spec

FORMAT_VERSION = 1

Target = str | os.PathLike[str] | BinaryIO
"""Where a state is written: a path, or a binary file that is open."""
Source = str | os.PathLike[str] | bytes
"""Where a state is read: a path, or what such a file holds."""

_FORMAT = "adaptrt state"
_LOSSES = "losses"
_FIELDS = ("format", "format_version", "num_tasks", "fingerprint")


class Saved(NamedTuple):
    """What a file holds.

    Attributes:
      tensors: of the state, by dotted name, on the CPU.
      losses: support losses, (k,) or [T, k].
      num_tasks: length of the task axis, None without one.
      fingerprint: of what did not adapt, by parts.
    """

    tensors: dict[str, Tensor]
    losses: Tensor
    num_tasks: int | None
    fingerprint: Mapping[str, str]


def write(target: Target, saved: Saved) -> None:
    """Writes a file under another name and renames it, so that there is never a half of it; replaces what is there.

    Args:
      target: the path; or a binary file that is open, which is written to as it is.
      saved: what to write.
    Raises:
      OSError: the file cannot be written.
      InvalidType: the target is neither.
    """
    data = to_bytes(saved)
    if not isinstance(target, str | os.PathLike):
        if not callable(getattr(target, "write", None)):
            raise InvalidType(f"a state is saved to a path or an open binary file, got {type(target).__name__}")
        target.write(data)
        return
    path = Path(target)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def to_bytes(saved: Saved) -> bytes:
    """Returns what a file of this state holds."""
    # Copies, as safetensors refuses tensors that share memory, such as those of one task of several.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in {**saved.tensors, _LOSSES: saved.losses}.items()}
    metadata = {
        "format": _FORMAT,
        "format_version": str(FORMAT_VERSION),
        "num_tasks": "" if saved.num_tasks is None else str(saved.num_tasks),
        "fingerprint": json.dumps(saved.fingerprint),
    }
    metadata["digest"] = _digest(metadata, tensors)
    return save(tensors, metadata)


def read(source: Source) -> Saved:
    """Reads a state, and checks that it is whole.

    Args:
      source: the path of a file, or the bytes that it holds.
    Raises:
      InvalidState: it is no such file, is damaged, or was written in a newer format.
      InvalidType: the source is neither.
      OSError: it cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        path, data = str(source), Path(source).read_bytes()
    elif isinstance(source, bytes | bytearray | memoryview):
        path, data = "the saved state", bytes(source)
    else:
        raise InvalidType(
            f"the path of a saved state must be a string or a path, got {type(source).__name__}; its content may be given as bytes"
        )
    try:
        tensors = load(data)  # which compares the header with the length and the tensors
        metadata = dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {}))
    except (SafetensorError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise InvalidState(f"{path} is damaged, or is no file that Adapted.save() wrote: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise InvalidState(
            f"{path} is a safetensors file, but none that Adapted.save() wrote; load a state dict with model.load_state_dict"
        )
    version = metadata.get("format_version", "")
    if version.isdecimal() and int(version) > FORMAT_VERSION:
        raise InvalidState(f"{path} was written in format {version}, this adaptrt reads formats up to {FORMAT_VERSION}; update adaptrt")
    digest = metadata.pop("digest", "")
    if set(metadata) != set(_FIELDS) or digest != _digest(metadata, tensors):
        raise InvalidState(f"{path} is damaged: its digest is not that of what it holds. Save the state again, or adapt anew")
    losses = tensors.pop(_LOSSES)
    num_tasks = metadata["num_tasks"]
    return Saved(tensors, losses, int(num_tasks) if num_tasks else None, json.loads(metadata["fingerprint"]))


def digest(parts: Iterable[tuple[str, Tensor]]) -> str:
    """Returns the SHA-256 of names, shapes, dtypes and values, as hexadecimal digits."""
    found = hashlib.sha256()
    for name, value in parts:
        _update(found, name, value)
    return found.hexdigest()


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(repr(sorted((key, value) for key, value in metadata.items() if key != "digest")).encode())
    for name in sorted(tensors):
        _update(found, name, tensors[name])
    return found.hexdigest()


def _update(found: hashlib._Hash, name: str, value: Tensor) -> None:  # pyright: ignore[reportPrivateUsage]
    spec = Spec.of(value)
    found.update(repr((name, spec.shape, str(spec.dtype))).encode())
    plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if plain.numel():
        found.update((ctypes.c_char * (plain.numel() * plain.element_size())).from_address(plain.data_ptr()))
