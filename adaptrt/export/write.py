"""Writes an export: captures the programs, then writes them, their weights and the manifest into a new folder."""

from __future__ import annotations

import importlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from adaptrt import tree
from adaptrt.backend.inductor import processor
from adaptrt.errors import InvalidArgument, InvalidType, NotExportable
from adaptrt.export import manifest as manifests
from adaptrt.export import trees
from adaptrt.export.formats import FORMATS, Format
from adaptrt.export.manifest import Entry, Manifest, ProgramEntry
from adaptrt.graph.signature import Role
from adaptrt.runtime.exportable import Exportable, Exporter
from adaptrt.runtime.settings import Settings
from adaptrt.tree import Spec

Progress = Callable[[str], None]


def write(
    directory: str | os.PathLike[str],
    exporter: Exporter,
    settings: Settings,
    support: Any,
    query: Any,
    formats: Sequence[str] | str,
    weights: bool,
    overwrite: bool,
    progress: Progress,
) -> Path:
    """Writes the folder, as `CompiledUnroll.export` documents. `progress` is told what is done next.

    The folder is written under another name and renamed when it is whole.
    """
    target = Path(directory)
    if target.exists() and not overwrite:
        raise InvalidArgument(f"{target} exists already; give another directory, or pass overwrite=True")
    captured = capture(exporter, settings, support, query, formats, progress)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    temporary.mkdir(parents=True)
    try:
        files: dict[str, dict[str, str]] = {program.name: {} for program in captured.programs}
        for chosen in captured.formats:
            progress(f"writing {chosen.name}")
            written = chosen.write(captured.prepared[chosen.name], temporary, progress)
            for name, file in written.items():
                files[name][chosen.name] = file
        if weights:
            progress("writing weights")
            values = {name: value.detach().cpu().contiguous().clone() for name, value in captured.weights.items()}
            (temporary / manifests.WEIGHTS).write_bytes(save(values))  # `save_file` lets nobody else read it
        manifests.write(temporary / manifests.NAME, captured.manifest(files, temporary))
        if target.exists():
            old = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


class _Program:
    """A program of the export: its name, and what was captured of it, with and without fusion."""

    def __init__(self, name: str, of: dict[bool, Exportable]) -> None:
        self.name = name
        self.of = of

    @property
    def any(self) -> Exportable:
        return next(iter(self.of.values()))


class Captured:
    """Everything that an export consists of, before anything is written."""

    def __init__(
        self,
        exporter: Exporter,
        settings: Settings,
        formats: Sequence[Format],
        programs: Sequence[_Program],
        prepared: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.formats = formats
        self.prepared = prepared
        self.programs = programs
        self._settings = settings
        self._exporter = exporter
        begin = exporter.start()
        self._state = [f"state.{path}" for path in tree.paths(begin.carry)]
        self._fixed = [f"fixed.{path}" for path in tree.paths(begin.fixed)]
        self._carry = begin.carry
        values = [*begin.carry_leaves, *begin.fixed_leaves]
        self.weights: dict[str, Tensor] = dict(zip([*self._state, *self._fixed], values, strict=True))
        self._constants: dict[int, str] = {}
        for program in programs:
            for captured in program.of.values():
                for value in captured.graph.constants:
                    if id(value) not in self._constants:
                        name = self._constants[id(value)] = f"constant.{len(self._constants)}"
                        self.weights[name] = value

    def manifest(self, files: Mapping[str, Mapping[str, str]], folder: Path) -> Manifest:
        """Returns the manifest. `files`: by program and format; `folder`: where they are."""
        settings = self._settings

        def specs(names: Sequence[str]) -> dict[str, Spec]:
            return {name: Spec.of(self.weights[name]) for name in names}

        of_opt = tree.flatten(self._carry.opt_state)[1]
        return Manifest(
            made_by={"adaptrt": importlib.import_module("adaptrt").__version__, "torch": torch.__version__},
            machine=manifests.machine(settings.device, processor.instruction_sets()),
            k=settings.k,
            per_step=settings.per_step,
            weighted=settings.weighted,
            num_tasks=self.programs[0].any.num_tasks,
            check_finite=settings.check_finite,
            optimizer={
                "class": type(settings.opt).__name__,
                "hyperparameters": [name for name in self._fixed if name.startswith("fixed.hyper")],
            },
            state=specs(self._state),
            fixed=specs(self._fixed),
            constants=specs(list(self._constants.values())),
            opt_state=trees.to_json(of_opt, "the optimiser's state"),
            state_dict={key: self._weight_of(name) for key, name in self._exporter.state_dict_names().items()},
            fingerprint=self._exporter.fingerprint(),
            programs=tuple([self._entry(program, files[program.name]) for program in self.programs]),
            files={path.name: manifests.digest_of(path) for path in sorted(folder.iterdir())},
        )

    def _weight_of(self, name: str) -> str:
        candidates = f"state.params.{name}", f"fixed.params.{name}", f"state.buffers.{name}"
        return next(each for each in candidates if each in self.weights)

    def _entry(self, program: _Program, files: Mapping[str, str]) -> ProgramEntry:
        captured = program.any
        graph = captured.graph
        names = iter(self._weights_of(captured))
        inputs = [
            Entry(
                entry.name,
                entry.role.value,
                entry.spec,
                entry.strides,
                next(names) if entry.role not in (Role.NOISE, Role.DATA) else None,
            )
            for entry in graph.signature.inputs
        ]
        values = [node.meta["val"] for node in graph.module.graph.output_node().args[0]]  # type: ignore[union-attr]
        parts = self._state if captured.name == "adapt" else []
        outputs = [
            Entry(entry.name, "result", entry.spec, tuple(value.stride()), parts[place] if place < len(parts) else None)
            for place, (entry, value) in enumerate(zip(graph.signature.outputs, values, strict=True))
        ]
        what = f"program '{program.name}'"
        data = [part for place, part in enumerate(graph.arguments.children) if place in (2, 4)]
        return ProgramEntry(
            name=program.name,
            kind=captured.name,
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            data=tuple([trees.to_json(part, what) for part in data]),
            result=trees.to_json(graph.result, what),
            noise=tuple(
                [
                    {"kind": each.kind, "constants": list(each.constants), "spec": each.spec, "order": list(each.order)}
                    for each in captured.noise
                ]
            ),
            bounds=tuple([{**each._asdict(), "part": None if each.part is None else each.part.tolist()} for each in captured.bounds]),
            files=files,
        )

    def _weights_of(self, captured: Exportable) -> Iterator[str]:
        """Yields the names in the weights of the inputs that are in them, in order."""
        if captured.name == "predict":
            yield from [name for name in self._state if not name.startswith("state.opt_state")]
            yield from [name for name in self._fixed if name.startswith("fixed.params.")]
        else:
            yield from self._state
            yield from self._fixed
        yield from [self._constants[id(value)] for value in captured.graph.constants]


def capture(exporter: Exporter, settings: Settings, support: Any, query: Any, formats: Sequence[str] | str, progress: Progress) -> Captured:
    """Captures all programs, and raises whatever speaks against writing them in these formats.

    Raises:
      InvalidArgument, InvalidType: a format that there is not, or lists of data of different lengths.
      NotExportable: something cannot be written.
    """
    chosen = _formats(formats)
    if settings.device.type != "cpu":
        raise NotExportable(f"programs are exported for the CPU, and the model is on {settings.device}; call model.cpu() and compile anew")
    programs: list[_Program] = []
    known: dict[Any, _Program] = {}
    for number, (one_support, one_query) in enumerate(_pairs(support, query)):
        progress(f"capturing the programs of shape {number + 1}")
        found: dict[bool, list[Exportable]] = {
            for_fusion: exporter.programs(one_support, one_query, for_fusion) for for_fusion in sorted({each.for_fusion for each in chosen})
        }
        for same in zip(*found.values(), strict=True):
            of = dict(zip(found, same, strict=True))
            varieties = [of] if len({_signature(each) for each in same}) == 1 else [{key: each} for key, each in of.items()]
            for variety in varieties:  # one of them may hold other constants
                first = next(iter(variety.values()))
                key = first.name, first.graph.arguments, _signature(first)
                if key not in known:
                    count = sum(program.any.name == first.name for program in programs)
                    known[key] = _Program(first.name if not count else f"{first.name}_{count + 1}", variety)
                    programs.append(known[key])
    prepared: dict[str, dict[str, Any]] = {each.name: {} for each in chosen}
    for each in chosen:
        progress(f"preparing {each.name}")
        for program in [program for program in programs if each.for_fusion in program.of]:
            try:
                prepared[each.name][program.name] = each.prepare(program.name, program.of[each.for_fusion].graph)
            except NotExportable as error:
                raise NotExportable(f"{error}{_callers(exporter, str(error), _pairs(support, query)[0][1])}") from error
    return Captured(exporter, settings, chosen, programs, prepared)


def _callers(exporter: Exporter, message: str, query: Any) -> str:
    """Says which modules of the model call the operations that a message names, if that is known."""
    names = set(re.findall(r"\baten\.(\w+)", message))
    callers = {name: path for name, path in exporter.callers(query).items() if name in names and path}
    return "".join(f"\n  '{name}' is called by '{path}'" for name, path in callers.items())


def _signature(captured: Exportable) -> tuple[tuple[str, Spec], ...]:
    return tuple([(entry.name, entry.spec) for entry in captured.graph.signature.inputs])


def _formats(formats: Sequence[str] | str) -> list[Format]:
    names = [formats] if isinstance(formats, str) else list(formats)
    if not names:
        raise InvalidArgument(f"formats must name at least one of {', '.join(map(repr, FORMATS))}")
    for name in names:
        if name not in FORMATS:
            raise InvalidArgument(f"formats must be among {', '.join(map(repr, FORMATS))}, got {name!r}")
        FORMATS[name].require()
    return [FORMATS[name] for name in dict.fromkeys(names)]


def _pairs(support: Any, query: Any) -> list[tuple[Any, Any]]:
    """Returns the shapes to export: one pair of support and query, or several if both are lists of them."""
    if not (isinstance(support, list) and support and all(isinstance(each, tuple | list) for each in support)):
        return [(support, query)]
    if not isinstance(query, list) or len(query) != len(support):
        found = f"a list of {len(query)}" if isinstance(query, list) else type(query).__name__
        raise InvalidType(f"support is a list of {len(support)} batches, so query must be a list of as many inputs, got {found}")
    return list(zip(support, query, strict=True))
