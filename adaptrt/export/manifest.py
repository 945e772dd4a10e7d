"""The manifest of an export: what is in its folder, and everything that a host must check before it opens any of that.

It is JSON, described by docs/manifest.schema.json. The last entry is a digest of all others, so a manifest that was changed is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from adaptrt.errors import InvalidExport
from adaptrt.export.trees import Json
from adaptrt.tree import Spec

FORMAT = "adaptrt export"
FORMAT_VERSION = 1
NAME = "manifest.json"
WEIGHTS = "weights.safetensors"

_MAX_BYTES = 1 << 26
"""Of a manifest."""
_MAX_ELEMENTS = 1 << 40
"""Of a tensor."""
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """An input or output of a program.

    Attributes:
      name: dotted, such as `carry.params.0.weight`.
      role: of an input, a value of `adaptrt.graph.signature.Role`; "result" of an output.
      spec: shape and dtype.
      strides: in elements.
      weight: of an input whose value is in the weights the name there, of an output that is part of the state the name of that part.
    """

    name: str
    role: str
    spec: Spec
    strides: tuple[int, ...]
    weight: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class ProgramEntry:
    """A program.

    Attributes:
      name: unique; the kind, and a number where there are several.
      kind: "adapt", "adapt_predict", "predict" or "loss".
      inputs, outputs: in order.
      data: the trees of the data among its inputs: a support batch, and the inputs of a prediction.
      result: the tree of its outputs.
      noise: for each input of role "noise" what it is drawn from: kind, constants, shape, dtype and order (`adaptrt.graph.noise.Noise`).
      bounds: which inputs of role "data" are indices (`adaptrt.graph.indices.IndexBound`).
      files: by format the file that holds the program.
    """

    name: str
    kind: str
    inputs: tuple[Entry, ...]
    outputs: tuple[Entry, ...]
    data: tuple[Json, ...]
    result: Json
    noise: tuple[Mapping[str, Any], ...]
    bounds: tuple[Mapping[str, Any], ...]
    files: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest says.

    Attributes:
      made_by: versions of adaptrt and torch.
      machine: architecture, operating system, instruction sets, device and number of threads that a pt2 package is for.
      k, per_step, weighted, num_tasks: as for `compile_unroll`; length of the task axis, or None.
      check_finite: whether data with NaN or infinity is refused.
      optimizer: its class or function, and the names of its hyperparameters.
      state, fixed: what steps change, and what they share: tensors by name in the weights. The state has no task axis there.
      opt_state: the tree of the optimiser's state.
      constants: other tensors among the weights, which programs take.
      state_dict: the names of the model's state dict, with the name in the weights of each.
      fingerprint: of what did not adapt, as in saved states.
      programs: all of them.
      files: SHA-256 and number of bytes of each file.
    """

    made_by: Mapping[str, str]
    machine: Mapping[str, Any]
    k: int
    per_step: bool
    weighted: bool
    num_tasks: int | None
    check_finite: bool
    optimizer: Mapping[str, Any]
    state: Mapping[str, Spec]
    fixed: Mapping[str, Spec]
    constants: Mapping[str, Spec]
    opt_state: Json
    state_dict: Mapping[str, str]
    fingerprint: Mapping[str, str]
    programs: tuple[ProgramEntry, ...]
    files: Mapping[str, Mapping[str, Any]]


def digest_of(path: Path) -> dict[str, Any]:
    """Returns SHA-256 and number of bytes of a file."""
    found = hashlib.sha256()
    size = 0
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
            size += len(part)
    return {"sha256": found.hexdigest(), "bytes": size}


def write(path: Path, manifest: Manifest) -> None:
    """Writes a manifest."""
    fields = {"format": FORMAT, "format_version": FORMAT_VERSION, **_to_json(manifest)}
    path.write_text(json.dumps({**fields, "digest": _digest(fields)}, indent=1, allow_nan=True))


def read(folder: Path) -> Manifest:
    """Reads the manifest of a folder, and compares every file in it with what the manifest says.

    Raises:
      InvalidExport: the manifest is damaged, of a newer format, or not of this form; a file is missing, one too many, or was changed.
      OSError: something cannot be read.
    """
    path = folder / NAME
    if path.stat().st_size > _MAX_BYTES:
        raise InvalidExport(f"{path} has {path.stat().st_size:,} bytes, which no manifest has; export again")
    try:
        fields: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidExport(f"{path} is damaged, or is no manifest: {error}; export again") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise InvalidExport(f"{path} is no manifest of an export; load() takes the folder that unroll.export() wrote")
    version = fields.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise InvalidExport(f"{path} was written in format {version}, this adaptrt reads formats up to {FORMAT_VERSION}; update adaptrt")
    found = fields.pop("digest", None)
    if version != FORMAT_VERSION or found != _digest(fields):
        raise InvalidExport(f"{path} is damaged: its digest is not that of what it says. Copy the folder again, or export again")
    manifest = _Reading(path).manifest(fields)
    _require_files(folder, manifest)
    return manifest


def _require_files(folder: Path, manifest: Manifest) -> None:
    """Checks that the folder has exactly the files of the manifest, and that each is what it was."""
    there = {entry.name for entry in folder.iterdir()} - {NAME}
    for name in sorted(there - manifest.files.keys()):
        raise InvalidExport(f"{folder / name} is in the folder, and the manifest does not know it; remove it, or export again")
    for name, wanted in manifest.files.items():
        path = folder / name
        if name not in there or not path.is_file():
            raise InvalidExport(f"{path} is missing; copy the folder again, or export again")
        if path.is_symlink():
            raise InvalidExport(f"{path} is a link to another place; copy the file itself")
        if path.stat().st_size != wanted["bytes"] or digest_of(path) != dict(wanted):
            raise InvalidExport(f"{path} is not the file that was exported: its hash differs. Copy the folder again, or export again")


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _to_json(value: Any) -> Json:
    if isinstance(value, Spec):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if dataclasses.is_dataclass(value):
        return {field.name: _to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _to_json(entry) for key, entry in value.items()}
    return [_to_json(entry) for entry in value] if isinstance(value, tuple | list) else value


class _Reading:
    """Takes a manifest apart, and refuses whatever has another form than it must have."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def manifest(self, fields: Mapping[str, Any]) -> Manifest:
        wanted = {field.name for field in dataclasses.fields(Manifest)} | {"format", "format_version"}
        if set(fields) != wanted:
            self.refuse(f"its entries are {sorted(fields)}, and must be {sorted(wanted)}")
        num_tasks = fields["num_tasks"]
        return Manifest(
            made_by=self.texts("made_by", fields["made_by"]),
            machine=self.mapping("machine", fields["machine"]),
            k=self.count("k", fields["k"], 1),
            per_step=self.flag("per_step", fields["per_step"]),
            weighted=self.flag("weighted", fields["weighted"]),
            num_tasks=None if num_tasks is None else self.count("num_tasks", num_tasks, 1),
            check_finite=self.flag("check_finite", fields["check_finite"]),
            optimizer=self.mapping("optimizer", fields["optimizer"]),
            state=self.specs("state", fields["state"]),
            fixed=self.specs("fixed", fields["fixed"]),
            constants=self.specs("constants", fields["constants"]),
            opt_state=fields["opt_state"],
            state_dict=self.texts("state_dict", fields["state_dict"]),
            fingerprint=self.texts("fingerprint", fields["fingerprint"]),
            programs=tuple([self.program(entry) for entry in self.sequence("programs", fields["programs"])]),
            files=self.files(fields["files"]),
        )

    def program(self, found: Any) -> ProgramEntry:
        fields = self.mapping("programs", found)
        wanted = {field.name for field in dataclasses.fields(ProgramEntry)}
        if set(fields) != wanted:
            self.refuse(f"a program's entries are {sorted(fields)}, and must be {sorted(wanted)}")
        files = self.texts("files", fields["files"])
        for name in files.values():
            self.file(name)
        return ProgramEntry(
            name=self.text("name", fields["name"]),
            kind=self.text("kind", fields["kind"]),
            inputs=tuple([self.entry(entry) for entry in self.sequence("inputs", fields["inputs"])]),
            outputs=tuple([self.entry(entry) for entry in self.sequence("outputs", fields["outputs"])]),
            data=tuple(self.sequence("data", fields["data"])),
            result=fields["result"],
            noise=tuple([self.mapping("noise", entry) for entry in self.sequence("noise", fields["noise"])]),
            bounds=tuple([self.mapping("bounds", entry) for entry in self.sequence("bounds", fields["bounds"])]),
            files=files,
        )

    def entry(self, found: Any) -> Entry:
        fields = self.mapping("an input or output", found)
        if set(fields) != {"name", "role", "spec", "strides", "weight"}:
            self.refuse(f"an input or output has the entries {sorted(fields)}")
        spec = self.spec(fields["spec"])
        strides = tuple([self.count("strides", entry, 0) for entry in self.sequence("strides", fields["strides"])])
        if len(strides) != len(spec.shape):
            self.refuse(f"'{fields['name']}' has {len(spec.shape)} axes and {len(strides)} strides")
        weight = fields["weight"]
        return Entry(
            self.text("name", fields["name"]),
            self.text("role", fields["role"]),
            spec,
            strides,
            None if weight is None else self.text("weight", weight),
        )

    def spec(self, found: Any) -> Spec:
        fields = self.mapping("a tensor", found)
        if set(fields) != {"shape", "dtype"} or fields["dtype"] not in DTYPES:
            self.refuse(f"a tensor is described by {str(fields)[:80]}")
        shape = tuple([self.count("shape", entry, 0) for entry in self.sequence("shape", fields["shape"])])
        if len(shape) > 64 or math.prod(shape) > _MAX_ELEMENTS:
            self.refuse(f"a tensor has the shape {list(shape)[:8]}, which is too large")
        return Spec(shape, DTYPES[fields["dtype"]], torch.device("cpu"))

    def specs(self, name: str, found: Any) -> dict[str, Spec]:
        return {self.text(name, key): self.spec(value) for key, value in self.mapping(name, found).items()}

    def files(self, found: Any) -> dict[str, Mapping[str, Any]]:
        files: dict[str, Mapping[str, Any]] = {}
        for name, entry in self.mapping("files", found).items():
            fields = self.mapping("files", entry)
            if set(fields) != {"sha256", "bytes"}:
                self.refuse(f"file '{name}' has the entries {sorted(fields)}")
            self.count("bytes", fields["bytes"], 0)
            files[self.file(name)] = fields
        return files

    def file(self, name: str) -> str:
        if not _FILE.fullmatch(name) or name == NAME:
            self.refuse(f"{name!r} is no name of a file in the folder")
        return name

    def mapping(self, name: str, found: Any) -> Mapping[str, Any]:
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            self.refuse(f"'{name}' must be an object")
        return found

    def texts(self, name: str, found: Any) -> dict[str, str]:
        return {key: self.text(name, value) for key, value in self.mapping(name, found).items()}

    def sequence(self, name: str, found: Any) -> list[Any]:
        if not isinstance(found, list):
            self.refuse(f"'{name}' must be a list")
        return found

    def text(self, name: str, found: Any) -> str:
        if not isinstance(found, str):
            self.refuse(f"'{name}' must be a text, got {found!r}")
        return found

    def flag(self, name: str, found: Any) -> bool:
        if not isinstance(found, bool):
            self.refuse(f"'{name}' must be true or false, got {found!r}")
        return found

    def count(self, name: str, found: Any, least: int) -> int:
        if isinstance(found, bool) or not isinstance(found, int) or found < least:
            self.refuse(f"'{name}' must be a whole number of at least {least}, got {found!r}")
        return found

    def refuse(self, reason: str) -> NoReturn:
        raise InvalidExport(f"{self._path} is not of the form of a manifest: {reason}. Export again")


def machine(device: torch.device, instruction_sets: str) -> dict[str, Any]:
    """Describes this machine, for which machine code is compiled."""
    return {
        "architecture": platform.machine(),
        "system": platform.system(),
        "instruction_sets": instruction_sets.split(),
        "device": device.type,
        "threads": torch.get_num_threads(),
    }


def require_machine(manifest: Manifest, instruction_sets: str) -> None:
    """Checks that machine code of an export can run here.

    Raises:
      InvalidExport: it was compiled by another PyTorch, or for another kind of machine; says which.
    """
    here = machine(torch.device("cpu"), instruction_sets)
    advice = "Export on a machine like this one, or load another format of the export, such as format='onnx'"
    if manifest.made_by.get("torch") != torch.__version__:
        raise InvalidExport(
            f"the package was compiled with PyTorch {manifest.made_by.get('torch')}, and does not fit the libraries of this one, "
            f"{torch.__version__}. {advice}"
        )
    for key in ("architecture", "system", "device"):
        if manifest.machine.get(key) != here[key]:
            raise InvalidExport(f"the package was compiled for {key} {manifest.machine.get(key)!r}, and this is {here[key]!r}. {advice}")
    missing = sorted(set(manifest.machine.get("instruction_sets", [])) - set(here["instruction_sets"]))
    if missing:
        raise InvalidExport(f"the package was compiled for a processor with {', '.join(missing)}, which this one has not. {advice}")
