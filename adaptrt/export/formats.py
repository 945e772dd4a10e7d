"""The formats of exported programs: how each is written, and how it is run in Python."""

from __future__ import annotations

import abc
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptrt.backend.inductor import ahead, processor
from adaptrt.errors import InvalidArgument
from adaptrt.export import manifest as manifests
from adaptrt.export.manifest import Manifest, ProgramEntry
from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.lower_to_forward import lower_to_forward

Run = Callable[[list[Tensor]], Sequence[Tensor]]
"""From the tensors of all inputs, in order, to those of all outputs."""


class Format(abc.ABC):
    """A format.

    Attributes:
      name: by which users ask for it.
      for_fusion: whether its graphs are captured for a compiler to which small operations cost next to nothing.
    """

    name: str
    for_fusion: bool = False

    def require(self) -> None:
        """Raises InvalidArgument if a package is missing that the format needs."""
        return

    def prepare(self, name: str, graph: Graph) -> Any:
        """Returns what `write` takes of a program, before anything is written.

        Raises:
          NotExportable: it cannot be written in this format.
        """
        del name
        return graph

    @abc.abstractmethod
    def write(self, graphs: Mapping[str, Any], folder: Path, progress: Callable[[str], None]) -> dict[str, str]:
        """Writes what was prepared of programs, by name, and returns the name of the file of each."""

    @abc.abstractmethod
    def open(self, manifest: Manifest, entry: ProgramEntry, path: Path) -> Run:
        """Returns a program of a folder whose files have been checked.

        Raises:
          InvalidExport: it cannot run on this machine.
        """


class Pt2(Format):
    """An AOTInductor package: machine code, for this kind of processor and this PyTorch. The fastest; runs in C++, too."""

    name = "pt2"
    for_fusion = True

    def write(self, graphs: Mapping[str, Graph], folder: Path, progress: Callable[[str], None]) -> dict[str, str]:
        with tempfile.TemporaryDirectory() as scratch:
            files: dict[str, Sequence[Any]] = {}
            for name, graph in graphs.items():
                progress(f"compiling {name}")
                own = Path(scratch) / name
                own.mkdir()
                files[name] = ahead.compile_ahead(graph, str(own))
            ahead.package(folder / "programs.pt2", files)
        return {name: "programs.pt2" for name in graphs}

    def open(self, manifest: Manifest, entry: ProgramEntry, path: Path) -> Run:
        manifests.require_machine(manifest, processor.instruction_sets())
        return ahead.load_package(path, entry.name)


class TorchScript(Format):
    """A TorchScript program: slow, for hosts that have libtorch and nothing else."""

    name = "torchscript"

    def write(self, graphs: Mapping[str, Graph], folder: Path, progress: Callable[[str], None]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, graph in graphs.items():
            progress(f"tracing {name}")
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                traced = torch.jit.trace_module(_Module(lower_to_forward(graph)), {"forward": tuple(_examples(graph))}, check_trace=False)
                found[name] = f"{name}.ts"
                torch.jit.save(traced, str(folder / found[name]))
        return found

    def open(self, manifest: Manifest, entry: ProgramEntry, path: Path) -> Run:
        del manifest, entry
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.jit.load(str(path))
        return lambda values: program(*values)


class ExportedProgram(Format):
    """What `torch.export.save` writes, for tools that take it. `adaptrt.load` does not, because reading it may unpickle."""

    name = "exported_program"

    def write(self, graphs: Mapping[str, Graph], folder: Path, progress: Callable[[str], None]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, graph in graphs.items():
            progress(f"exporting {name}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = torch.export.export(_Module(graph), tuple(_examples(graph)), strict=False)
                found[name] = f"{name}.exported.pt2"
                torch.export.save(exported, folder / found[name])
        return found

    def open(self, manifest: Manifest, entry: ProgramEntry, path: Path) -> Run:
        del manifest, entry, path
        raise InvalidArgument("format='exported_program' is for other tools; load 'pt2', 'torchscript' or 'onnx'")


class Onnx(Format):
    """An ONNX model of each program, for ONNX Runtime on servers, devices and in browsers."""

    name = "onnx"

    def require(self) -> None:
        _require_packages(self.name, "onnx")

    def prepare(self, name: str, graph: Graph) -> Any:
        from adaptrt.export.onnx import to_onnx

        return to_onnx(graph, name)

    def write(self, graphs: Mapping[str, Any], folder: Path, progress: Callable[[str], None]) -> dict[str, str]:
        del progress
        for name, model in graphs.items():
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
        return {name: f"{name}.onnx" for name in graphs}

    def open(self, manifest: Manifest, entry: ProgramEntry, path: Path) -> Run:
        del manifest
        _require_packages(self.name, "onnxruntime")
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        inputs, outputs = ([each.name for each in part] for part in (entry.inputs, entry.outputs))

        def run(values: list[Tensor]) -> Sequence[Tensor]:
            found = session.run(outputs, {name: value.numpy() for name, value in zip(inputs, values, strict=True)})
            return [torch.from_numpy(value) for value in found]

        return run


FORMATS: dict[str, Format] = {each.name: each for each in (Pt2(), Onnx(), TorchScript(), ExportedProgram())}
"""By name, the one that `load` prefers first."""


def _require_packages(format: str, *packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InvalidArgument(f"format '{format}' needs the package {package}, which is not installed; pip install 'adaptrt[export]'")


class _Module(nn.Module):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._function = graph.function()

    def forward(self, *inputs: Tensor) -> Any:
        return tuple(self._function(*inputs))


def _examples(graph: Graph) -> list[Tensor]:
    """Returns tensors like the inputs, of zeros; what they are does not matter, as nothing in a graph depends on values."""
    return [torch.zeros(entry.spec.shape, dtype=entry.spec.dtype, device=entry.spec.device) for entry in graph.signature.inputs]
