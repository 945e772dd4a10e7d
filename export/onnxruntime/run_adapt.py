"""Adapts a model that was exported as ONNX, with numpy and onnxruntime alone: neither PyTorch nor adaptrt is needed.

    python run_adapt.py FOLDER PROGRAM DATA.npz OUT.npz [--seed 0]

FOLDER is what `unroll.export(FOLDER, ..., formats="onnx")` wrote, PROGRAM one of its programs, such as adapt or adapt_predict. DATA has an
array for each input of role "data" by its name in the manifest, such as `support.inputs` and `support.target`; arrays by the names of
weights replace those of the folder, which is how a user's state goes on. OUT gets all outputs by their names, and the state that `adapt`
returns by the names that it has among the weights. Wrong input ends with one line and exit code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

FORMAT, FORMAT_VERSION = "adaptrt export", 1
DTYPES = {name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")}
SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"}
SAFETENSORS |= {"U8": "uint8", "BOOL": "bool"}


class WrongInput(Exception):
    """Something that was given is not what the programs are for."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a folder, after comparing every file with it.

    Raises:
      WrongInput: the folder is damaged, or of another format.
    """
    path = folder / "manifest.json"
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise WrongInput(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT or fields.get("format_version") != FORMAT_VERSION:
        raise WrongInput(f"{path} is not the manifest of an export in format {FORMAT_VERSION}")
    digest = fields.pop("digest", None)
    if digest != hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest():
        raise WrongInput(f"{path} is damaged: its digest is not that of what it says")
    there = {entry.name for entry in folder.iterdir()} - {path.name}
    if there != set(fields["files"]):
        raise WrongInput(f"{folder} has other files than its manifest: {', '.join(sorted(there ^ set(fields['files'])))}")
    for name, entry in fields["files"].items():
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}", name) or (folder / name).is_symlink():
            raise WrongInput(f"{name!r} is no file of the folder itself")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != entry["sha256"]:
            raise WrongInput(f"{folder / name} is not the file that was exported: its hash differs")
    return fields


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    found: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            dtype = DTYPES[SAFETENSORS[entry["dtype"]]]
            found[name] = np.frombuffer(content[begin:end], dtype).reshape(entry["shape"])
    return found


def draw(noise: Mapping[str, Any], shape: list[int], generator: np.random.Generator) -> np.ndarray:
    """Draws an array of noise. The numbers are not PyTorch's, their distribution is."""
    kind, constants, dtype = noise["kind"], noise["constants"], DTYPES[noise["spec"]["dtype"]]
    if kind == "bernoulli":
        return (generator.random(shape) < constants[0]).astype(dtype)
    if kind == "uniform":
        return generator.uniform(*constants, shape).astype(dtype)
    if kind == "normal":
        return generator.normal(*constants, shape).astype(dtype)
    if kind == "exponential":
        return generator.exponential(1 / constants[0], shape).astype(dtype)
    if kind == "randint":
        return generator.integers(int(constants[0]), int(constants[1]), shape).astype(dtype)
    rows = [generator.permutation(shape[-1]) for _ in range(int(np.prod(shape[:-1])))]
    return np.stack(rows).reshape(shape).astype(dtype)


def values_of(program: Mapping[str, Any], manifest: Mapping[str, Any], given: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Returns the arrays of all inputs of a program, by name.

    Raises:
      WrongInput: an array is missing, or has another shape or dtype, or holds what does not exist.
    """
    generator, noise = np.random.default_rng(seed), iter(program["noise"])
    found: dict[str, np.ndarray] = {}
    for entry in program["inputs"]:
        name, shape, dtype = entry["weight"] or entry["name"], entry["spec"]["shape"], DTYPES[entry["spec"]["dtype"]]
        if entry["role"] == "noise":
            drawn = next(noise)
            value = given[name] if name in given else draw(drawn, shape, generator)
        elif name not in given:
            raise WrongInput(f"there is no array '{name}', {entry['spec']['dtype']} of shape {shape}")
        else:
            value = given[name]
        has_tasks = entry["weight"] in manifest["state"] and manifest["num_tasks"] is not None
        if has_tasks and list(value.shape) == shape[1:]:  # one value for every task
            value = np.broadcast_to(value, shape)
        if list(value.shape) != shape or value.dtype != dtype:
            raise WrongInput(f"'{name}' must be {entry['spec']['dtype']} of shape {shape}, got {value.dtype} of shape {list(value.shape)}")
        if entry["role"] == "data" and manifest["check_finite"] and value.dtype.kind == "f" and not np.isfinite(value).all():
            raise WrongInput(f"'{name}' holds NaN or infinity")
        found[entry["name"]] = np.asarray(value, order="C")
    data = [entry["name"] for entry in program["inputs"] if entry["role"] == "data"]
    for bound in program["bounds"]:
        value = found[data[bound["position"]]]
        wrong = (value < 0) | (value >= bound["size"])
        if bound["ignore_index"] is not None:
            wrong &= value != bound["ignore_index"]
        if bound["part"] is not None:
            wrong &= np.asarray(bound["part"])
        if wrong.any():
            raise WrongInput(f"'{data[bound['position']]}' holds {value[wrong][0]}; {bound['of']} are 0 to {bound['size'] - 1}")
    return found


def run(folder: Path, name: str, given: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Runs a program, and returns its outputs by name, and those that are parts of the state by that name, too."""
    manifest = read_manifest(folder)
    programs = {program["name"]: program for program in manifest["programs"] if "onnx" in program["files"]}
    if name not in programs:
        raise WrongInput(f"{folder} has no ONNX program '{name}', only {', '.join(programs) or 'none'}")
    program = programs[name]
    weights = read_weights(folder / "weights.safetensors") if "weights.safetensors" in manifest["files"] else {}
    values = values_of(program, manifest, {**weights, **given}, seed)
    session = onnxruntime.InferenceSession((folder / program["files"]["onnx"]).read_bytes(), providers=["CPUExecutionProvider"])
    began = time.perf_counter()
    found = session.run([entry["name"] for entry in program["outputs"]], values)
    print(f"{name}: {(time.perf_counter() - began) * 1e3:.2f} ms")
    outputs: dict[str, np.ndarray] = {}
    for entry, value in zip(program["outputs"], found, strict=True):
        outputs[entry["weight"] or entry["name"]] = value
    return outputs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("program")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of noise that DATA does not have")
    arguments = parser.parse_args()
    try:
        with np.load(arguments.data, allow_pickle=False) as file:
            given = {name: file[name] for name in file.files}
        outputs = run(arguments.folder, arguments.program, given, arguments.seed)
    except (WrongInput, OSError, ValueError, KeyError) as error:
        print(f"run_adapt: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    np.savez(arguments.out, **outputs)
    for name, value in outputs.items():
        if name.startswith("result") and value.ndim <= 2 and value.size <= 20:
            print(f"{name}: {value.tolist()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
