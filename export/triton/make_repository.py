"""Turns a folder that `unroll.export(FOLDER, ..., formats="onnx")` wrote into a model repository for NVIDIA Triton Inference Server.

    python make_repository.py FOLDER REPOSITORY [--weights optional] [--program adapt --program predict] [--prefix digits_]

Each program becomes a model for Triton's ONNX Runtime back end: `REPOSITORY/NAME/config.pbtxt` and `REPOSITORY/NAME/1/model.onnx`. The
manifest and the weights of the folder lie beside the models. `--weights` says where the models take their weights from:

    inputs    every request brings all of them
    optional  the model holds those of the folder, and a request may bring others, such as a user's state
    fixed     the model holds those of the folder, and requests bring the data only

Triton has no tensors without an axis: a number, such as a learning rate, gets one axis of length 1. Wrong input ends with one line and
exit code 1, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from safetensors.numpy import load_file

from adaptrt.errors import InvalidExport
from adaptrt.export import manifest as manifests
from adaptrt.export.manifest import Entry, Manifest, ProgramEntry

WEIGHTS = ("inputs", "optional", "fixed")
TYPES = {
    **{"float64": "TYPE_FP64", "float32": "TYPE_FP32", "float16": "TYPE_FP16", "bool": "TYPE_BOOL"},
    **{"int64": "TYPE_INT64", "int32": "TYPE_INT32", "int16": "TYPE_INT16", "int8": "TYPE_INT8", "uint8": "TYPE_UINT8"},
}
_MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class WrongInput(Exception):
    """Something that was given cannot become a repository."""


def dims(entry: Entry) -> list[int]:
    """The shape of an input or output in Triton, where a shape has at least one axis and no axis is empty.

    Raises:
      WrongInput: an axis is empty.
    """
    if 0 in entry.spec.shape:
        raise WrongInput(f"'{entry.name}' has the shape {list(entry.spec.shape)}, and Triton has no tensors without elements")
    return list(entry.spec.shape) or [1]


def config(name: str, program: ProgramEntry, left_out: Sequence[str], optional: Sequence[str]) -> str:
    """Returns the text of a config.pbtxt. `left_out` and `optional`: names of inputs."""

    def described(entry: Entry) -> str:
        dtype = TYPES[str(entry.spec.dtype).removeprefix("torch.")]
        flag = "\n    optional: true" if entry.name in optional else ""
        return f"  {{\n    name: {json.dumps(entry.name)}\n    data_type: {dtype}\n    dims: {dims(entry)}{flag}\n  }}"

    inputs = [described(entry) for entry in program.inputs if entry.name not in left_out]
    outputs = [described(entry) for entry in program.outputs]
    # The number of examples is a part of the program, so Triton must not put requests together on the first axis.
    head = [f"name: {json.dumps(name)}", 'backend: "onnxruntime"', 'default_model_filename: "model.onnx"', "max_batch_size: 0"]
    lists = [f"{key} [\n" + ",\n".join(entries) + "\n]" for key, entries in (("input", inputs), ("output", outputs)) if entries]
    return "\n".join([*head, *lists, "instance_group [ { count: 1 kind: KIND_CPU } ]\n"])


def with_axes(model: onnx.ModelProto, program: ProgramEntry, fixed: Mapping[str, np.ndarray]) -> None:
    """Gives inputs and outputs that are numbers an axis of length 1, but for those that are no inputs any more."""
    graph = model.graph
    inputs = [entry.name for entry in program.inputs if not entry.spec.shape and entry.name not in fixed]
    outputs = [entry.name for entry in program.outputs if not entry.spec.shape]
    inner = {name: f"{name}/number" for name in [*inputs, *outputs]}
    for node in graph.node:
        node.input[:] = [inner.get(name, name) for name in node.input]
        node.output[:] = [inner.get(name, name) for name in node.output]
    for value in [*graph.input, *graph.output]:
        if value.name in inner:
            value.type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto(dim=[onnx.TensorShapeProto.Dimension(dim_value=1)]))
    if outputs:
        graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "one_axis"))
    before = [helper.make_node("Squeeze", [name], [inner[name]], name=f"{name}/Squeeze") for name in inputs]
    after = [helper.make_node("Reshape", [inner[name], "one_axis"], [name], name=f"{name}/Reshape") for name in outputs]
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)


def model_of(path: Path, program: ProgramEntry, held: Mapping[str, np.ndarray], weights: str) -> onnx.ModelProto:
    """Returns the model of a program for Triton. `held`: by name the inputs whose values it holds."""
    model = onnx.load(path)
    fixed = held if weights == "fixed" else {}
    for name, value in held.items():
        array = value if name in fixed else value.reshape(value.shape or (1,))
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
    inputs = [value for value in model.graph.input if value.name not in fixed]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    with_axes(model, program, fixed)
    onnx.checker.check_model(model, full_check=True)
    return model


def values_of(program: ProgramEntry, manifest: Manifest, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the weights of a program by the names of its inputs. Every task has the state that the folder has for all."""
    found: dict[str, np.ndarray] = {}
    for entry in program.inputs:
        if entry.weight is not None:
            value = weights[entry.weight]
            found[entry.name] = np.broadcast_to(value, entry.spec.shape) if entry.weight in manifest.state else value
    return found


def chosen(manifest: Manifest, names: Sequence[str]) -> list[ProgramEntry]:
    """Returns the programs that have these names, or all of them.

    Raises:
      WrongInput: there is no such program.
    """
    there = {program.name: program for program in manifest.programs if "onnx" in program.files}
    if not there:
        raise WrongInput("the folder has no ONNX programs; export it with formats='onnx'")
    for name in names:
        if name not in there:
            raise WrongInput(f"the folder has no ONNX program '{name}', only {', '.join(there)}")
    return [program for name, program in there.items() if not names or name in names]


def make(folder: Path, repository: Path, weights: str = "inputs", names: Sequence[str] = (), prefix: str = "") -> list[str]:
    """Writes the repository, and returns the names of its models.

    Raises:
      WrongInput: see the message.
      InvalidExport: the folder is no export, or was changed.
    """
    if repository.exists():
        raise WrongInput(f"{repository} exists; remove it, or name another")
    manifest = manifests.read(folder)
    programs = chosen(manifest, names)
    if prefix and not _MODEL_NAME.fullmatch(prefix):
        raise WrongInput(f"the prefix {prefix!r} cannot begin the name of a folder: use letters, digits, '_', '.' and '-'")
    if weights != "inputs" and manifests.WEIGHTS not in manifest.files:
        raise WrongInput(f"the folder was exported without weights, which --weights {weights} puts into the models")
    arrays = {} if weights == "inputs" else load_file(folder / manifests.WEIGHTS)
    repository.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{repository.name}.", dir=repository.parent))
    temporary.chmod(0o755)
    try:
        for program in programs:
            held = {} if weights == "inputs" else values_of(program, manifest, arrays)
            place = temporary / f"{prefix}{program.name}"
            (place / "1").mkdir(parents=True)
            onnx.save(model_of(folder / program.files["onnx"], program, held, weights), place / "1" / "model.onnx")
            left_out, optional = (list(held), []) if weights == "fixed" else ([], list(held))
            (place / "config.pbtxt").write_text(config(place.name, program, left_out, optional))
        for name in (manifests.NAME, manifests.WEIGHTS):
            if (folder / name).exists():
                shutil.copyfile(folder / name, temporary / name)
        temporary.rename(repository)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return [f"{prefix}{program.name}" for program in programs]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--weights", choices=WEIGHTS, default="inputs", help="where the models take their weights from")
    parser.add_argument("--program", action="append", default=[], help="a program that becomes a model; all of them without it")
    parser.add_argument("--prefix", default="", help="of the models' names, which are unique in a server")
    arguments = parser.parse_args()
    try:
        names = make(arguments.folder, arguments.repository, arguments.weights, arguments.program, arguments.prefix)
    except (WrongInput, InvalidExport, OSError) as error:
        print(f"make_repository: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{arguments.repository}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
