"""The values that an exported program takes, by name, and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor

import adaptrt
from adaptrt import tree
from adaptrt.graph.ir import Graph
from adaptrt.graph.noise import draw
from adaptrt.graph.signature import Role
from adaptrt.runtime.exportable import Exportable

Named = dict[str, Tensor]


def programs_of(unroll: adaptrt.CompiledUnroll, support: Any, query: Any) -> dict[str, Exportable]:
    """The programs by name, `query` being the inputs of a prediction."""
    found = unroll._execution.exporter.programs(support, query, for_fusion=False)  # pyright: ignore[reportPrivateUsage]
    return {program.name: program for program in found}


def start_of(unroll: adaptrt.CompiledUnroll) -> Named:
    """What model and optimiser hold, as a program's inputs."""
    begin = unroll._execution.exporter.start()  # pyright: ignore[reportPrivateUsage]
    paths = [*tree.paths(begin.carry, "carry"), *tree.paths(begin.fixed, "fixed")]
    leaves = [*tree.leaves(begin.carry), *tree.leaves(begin.fixed)]
    return {path: leaf.detach() for path, leaf in zip(paths, leaves, strict=True)}


def inputs_of(program: Exportable, start: Mapping[str, Tensor], data: Sequence[Any], seed: int = 0) -> Named:
    """All inputs of a program, in order: the start's, the data's, and noise by this seed.

    Hyperparameters that are no values of `start`'s own, such as those of a program that has none of the optimiser's, are left out.
    """
    inputs = program.graph.signature.inputs
    given = iter(tree.leaves(tuple(data)))
    noise = iter(draw(program.noise, torch.Generator().manual_seed(seed), program.num_tasks))
    constants = iter(program.graph.constants)
    found: Named = {}
    for entry in inputs:
        source = {Role.DATA: given, Role.NOISE: noise, Role.CONST: constants}.get(entry.role)
        value = start[entry.name] if source is None else next(source)
        found[entry.name] = value.expand(entry.spec.shape).contiguous()
    assert [*given, *noise, *constants] == []
    return found


def in_double(program: Exportable, inputs: Mapping[str, Tensor]) -> Named:
    """The same values for the same program of a model in float64."""
    entries = {entry.name: entry.spec.dtype for entry in program.graph.signature.inputs}
    assert entries.keys() == inputs.keys()
    return {name: value.to(entries[name]) for name, value in inputs.items()}


def run_graph(graph: Graph, inputs: Mapping[str, Tensor]) -> Named:
    """What the graph's own operations give."""
    with torch.no_grad():
        found = graph.function()(*inputs.values())
    return {entry.name: value for entry, value in zip(graph.signature.outputs, found, strict=True)}


def session(model: onnx.ModelProto, num_threads: int = 1) -> onnxruntime.InferenceSession:
    """A checked model, ready to run."""
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_session(ready: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor]) -> Named:
    """What ONNX Runtime gives."""
    names = [entry.name for entry in ready.get_outputs()]
    found: Any = ready.run(names, {name: value.numpy() for name, value in inputs.items()})
    return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def error(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], prefix: str = "") -> float:
    """The norm of the difference, relative to the norm of what is wanted, of all values whose names start so."""
    names = [name for name in wanted if name.startswith(prefix) and wanted[name].is_floating_point()]
    distance = sum(float((got[name].double() - wanted[name].double()).square().sum()) for name in names) ** 0.5
    return distance / max(sum(float(wanted[name].double().square().sum()) for name in names) ** 0.5, 1e-300)
