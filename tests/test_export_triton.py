"""The model repository for NVIDIA Triton: the form of its files, and the numbers of its models in ONNX Runtime. No server is run here."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

import adaptrt
from adaptrt import Exported, compile_unroll, optim
from tests.exports import session
from tests.test_export import T, data, generator, inputs, make, model
from tests.tolerances import assert_near

SCRIPT = Path(__file__).parents[1] / "export" / "triton" / "make_repository.py"
NUMPY = {"TYPE_FP32": np.float32, "TYPE_FP64": np.float64, "TYPE_INT64": np.int64, "TYPE_BOOL": np.bool_}
ONNX = {"TYPE_FP32": "tensor(float)", "TYPE_FP64": "tensor(double)", "TYPE_INT64": "tensor(int64)", "TYPE_BOOL": "tensor(bool)"}
Config = dict[str, Any]
Arrays = dict[str, np.ndarray]


def script() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("make_repository", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Reader:
    """Reads the text form of Protocol Buffers, as far as a config.pbtxt uses it: every field is a list of its values."""

    def __init__(self, text: str) -> None:
        self._words = re.findall(r'"(?:[^"\\]|\\.)*"|[A-Za-z_][A-Za-z0-9_]*|-?[0-9]+|[\[\]{}:,]', text)
        assert "".join(self._words) == re.sub(r"\s", "", text), "something that is no word"
        self._place = 0

    def message(self, end: str | None = None) -> Config:
        fields: Config = {}
        while self._peek() != end:
            name = self._next()
            assert re.fullmatch("[a-z_]+", name)
            has_colon = self._skip(":")
            fields.setdefault(name, []).extend(self._values(has_colon))
        self._place += end is not None
        return fields

    def _values(self, has_colon: bool) -> list[Any]:
        if not self._skip("["):
            return [self._value(has_colon)]
        values: list[Any] = []
        while not self._skip("]"):
            values.append(self._value(has_colon))
            assert self._skip(",") or self._peek() == "]"
        return values

    def _value(self, has_colon: bool) -> Any:
        if self._skip("{"):
            return self.message("}")
        assert has_colon, "only a message may follow a name without a colon"
        word = self._next()
        if word[0] == '"':
            return word[1:-1]
        return int(word) if word.lstrip("-").isdigit() else {"true": True, "false": False}.get(word, word)

    def _peek(self) -> str | None:
        return self._words[self._place] if self._place < len(self._words) else None

    def _next(self) -> str:
        self._place += 1
        return self._words[self._place - 1]

    def _skip(self, word: str) -> bool:
        found = self._peek() == word
        self._place += found
        return found


def read(repository: Path, name: str) -> tuple[Config, onnxruntime.InferenceSession]:
    """The configuration and the model of a name, after checking that one describes the other."""
    assert sorted(entry.name for entry in (repository / name).iterdir()) == ["1", "config.pbtxt"]
    assert [entry.name for entry in (repository / name / "1").iterdir()] == ["model.onnx"]
    found = Reader((repository / name / "config.pbtxt").read_text()).message()
    assert found["name"] == [name] and found["backend"] == ["onnxruntime"] and found["max_batch_size"] == [0]
    assert found["default_model_filename"] == ["model.onnx"] and found["instance_group"] == [{"count": [1], "kind": ["KIND_CPU"]}]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    ready = onnxruntime.InferenceSession(repository / name / "1" / "model.onnx", options, providers=["CPUExecutionProvider"])
    described: dict[bool, list[Any]] = {False: [], True: []}
    for entry in found.get("input", []):
        described[entry.get("optional") == [True]].append(entry)
    for entries, values in (
        (described[False], ready.get_inputs()),
        (described[True], ready.get_overridable_initializers()),
        (found["output"], ready.get_outputs()),
    ):
        assert [(*entry["name"], ONNX[entry["data_type"][0]], entry["dims"]) for entry in entries] == [
            (value.name, value.type, value.shape) for value in values
        ]
        assert all(size > 0 for entry in entries for size in [*entry["dims"], len(entry["dims"])])
    return found, ready


def run(ready: onnxruntime.InferenceSession, values: Mapping[str, np.ndarray]) -> Arrays:
    names = [entry.name for entry in ready.get_outputs()]
    found: Any = ready.run(names, dict(values))
    return dict(zip(names, found, strict=True))


def named(exported: Exported, program: str, support: Any = None, query: Any = None) -> Arrays:
    """Data, and noise that `generator()` draws, by the names of a program's inputs."""
    entry = next(each for each in exported.manifest.programs if each.name == program)
    given = {} if query is None else {"query.0": query[0], "query.1": query[1]}
    if support is not None:
        lead = "batch" if entry.kind == "loss" else "support"
        given |= {f"{lead}.inputs.0": support[0][0], f"{lead}.inputs.1": support[0][1], f"{lead}.target": support[1]}
    drawn = iter([value for part in exported._programs[program].draw(generator()) for value in part])
    given |= {each.name: next(drawn) for each in entry.inputs if each.role == "noise"}
    return {name: value.numpy() for name, value in given.items()}


def weights(exported: Exported, program: str) -> Arrays:
    """Those of the folder by the names of a program's inputs, as Triton takes them."""
    stored = load_file(exported.folder / "weights.safetensors")
    entries = next(each for each in exported.manifest.programs if each.name == program).inputs
    return {entry.name: np.broadcast_to(stored[entry.weight], entry.spec.shape or (1,)) for entry in entries if entry.weight}


def compare(found: Arrays, wanted: Mapping[str, torch.Tensor]) -> None:
    assert_near({name: torch.from_numpy(found[name]) for name in wanted}, wanted, torch.float32)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("onnx") / "net"
    return adaptrt.load(make(model()).export(folder, [data(6), data(3)], [inputs(4), inputs(4)], formats="onnx"))


@pytest.mark.parametrize("kind", ["inputs", "optional", "fixed"])
def test_its_files_and_numbers(kind: str, exported: Exported, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    names = [program.name for program in exported.manifest.programs]
    assert script().make(exported.folder, repository, kind) == names and "adapt_2" in names
    assert sorted(entry.name for entry in repository.iterdir()) == sorted([*names, "manifest.json", "weights.safetensors"])
    for name in ("manifest.json", "weights.safetensors"):
        assert (repository / name).read_bytes() == (exported.folder / name).read_bytes()
    ready = {}
    for program in exported.manifest.programs:
        config, ready[program.name] = read(repository, program.name)
        kept = [entry for entry in program.inputs if kind != "fixed" or entry.weight is None]
        for entries, listed in ((kept, config["input"]), (program.outputs, config["output"])):
            assert [entry.name for entry in entries] == [entry["name"][0] for entry in listed]
            assert [list(entry.spec.shape) or [1] for entry in entries] == [entry["dims"] for entry in listed]
        assert [entry.name for entry in kept if entry.weight and kind == "optional"] == [
            entry["name"][0] for entry in config["input"] if "optional" in entry
        ]
        assert [NUMPY[entry["data_type"][0]] for entry in config["input"]] == [
            np.dtype(str(entry.spec.dtype).removeprefix("torch.")) for entry in kept
        ]

    def given(program: str, *of: Any) -> Arrays:
        return {**(weights(exported, program) if kind == "inputs" else {}), **named(exported, program, *of)}

    for program, support in (("adapt", data(6)), ("adapt_2", data(3))):
        right = exported.adapt(support, generator=generator())
        state = {f"result.0.{name}": value.reshape(value.shape or (1,)) for name, value in right.state.named_tensors().items()}
        compare(run(ready[program], given(program, support)), {**state, "result.1": right.losses})
    found = run(ready["adapt_predict"], given("adapt_predict", data(6), inputs(4)))
    outputs, losses = exported.adapt_predict(data(6), inputs(4), generator=generator())
    compare(found, {"result.0.logits": outputs["logits"], "result.1": losses})
    found = run(ready["predict"], given("predict", None, inputs(4)))
    compare(found, {"result.logits": exported.predict(inputs(4), generator=generator())["logits"]})
    assert run(ready["loss"], given("loss", data(6)))["result"].shape == (1,)


def test_a_request_brings_the_state_of_a_user(exported: Exported, tmp_path: Path) -> None:
    """What `adapt` gave is what it goes on from, and what `predict` takes."""
    repository = tmp_path / "models"
    command = [sys.executable, str(SCRIPT), str(exported.folder), str(repository), "--weights", "optional", "--prefix", "net_"]
    command += ["--program", "adapt", "--program", "predict"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == f"{repository}: net_adapt, net_predict", done.stderr
    adapt, predict = (read(repository, name)[1] for name in ("net_adapt", "net_predict"))
    right = exported.adapt(data(6), generator=generator())
    found = run(adapt, named(exported, "adapt", data(6)))
    state = {name.replace("result.0.", "carry."): value for name, value in found.items() if name.startswith("result.0.")}
    again = run(adapt, {**named(exported, "adapt", data(6)), **state})
    compare(again, {"result.1": exported.adapt(data(6), start=right, generator=generator()).losses})
    taken = {entry.name for entry in predict.get_overridable_initializers()}
    state = {name: value for name, value in state.items() if name in taken}
    logits = run(predict, {**named(exported, "predict", None, inputs(4)), **state})
    compare(logits, {"result.logits": right(inputs(4), generator=generator())["logits"]})


@pytest.mark.parametrize("kind", ["optional", "fixed"])
def test_over_tasks_every_task_has_the_state_of_the_folder(kind: str, tmp_path: Path) -> None:
    support, query = data(6, T), inputs(4, T)
    exported = adaptrt.load(make(model().eval(), tasks=True).export(tmp_path / "net", support, query, formats="onnx"))
    script().make(exported.folder, tmp_path / "models", kind, ["adapt"])
    _, ready = read(tmp_path / "models", "adapt")
    compare(run(ready, named(exported, "adapt", support)), {"result.1": exported.adapt(support).losses})


def test_double_precision(tmp_path: Path) -> None:
    net = nn.Linear(3, 2).double()
    unroll = compile_unroll(net, optim.sgd(lr=0.1), 2, loss=nn.CrossEntropyLoss(), backend="eager")
    support, query = (torch.randn(4, 3, dtype=torch.float64), torch.arange(4) % 2), torch.randn(2, 3, dtype=torch.float64)
    exported = adaptrt.load(unroll.export(tmp_path / "net", support, query, formats="onnx"))
    script().make(exported.folder, tmp_path / "models", "fixed")
    _, ready = read(tmp_path / "models", "adapt_predict")
    given = {"support.inputs": support[0], "support.target": support[1], "query.0": query}
    found = run(ready, {name: value.numpy() for name, value in given.items()})
    outputs, losses = exported.adapt_predict(support, query)
    assert_near({name: torch.from_numpy(value) for name, value in found.items()}, {"result.0": outputs, "result.1": losses}, torch.float64)


def test_the_models_are_checked_onnx(exported: Exported, tmp_path: Path) -> None:
    import onnx

    script().make(exported.folder, tmp_path / "models", "optional", ["loss"])
    session(onnx.load(tmp_path / "models" / "loss" / "1" / "model.onnx"))


WRONG: dict[str, tuple[list[str], str]] = {
    "no export": (["{empty}", "{target}"], "manifest.json"),
    "no folder": (["{missing}", "{target}"], "No such file"),
    "changed": (["{changed}", "{target}"], "is not the file that was exported: its hash differs"),
    "existing": (["{folder}", "{empty}"], "exists; remove it, or name another"),
    "format": (["{script}", "{target}"], "the folder has no ONNX programs; export it with formats='onnx'"),
    "weights": (["{bare}", "{target}", "--weights", "fixed"], "was exported without weights, which --weights fixed puts into the models"),
    "program": (["{folder}", "{target}", "--program", "adopt"], "has no ONNX program 'adopt', only adapt,"),
    "prefix": (["{folder}", "{target}", "--prefix", "../"], "the prefix '../' cannot begin the name of a folder"),
    "elements": (["{nothing}", "{target}"], "Triton has no tensors without elements"),
}


@pytest.fixture(scope="module")
def folders(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name in `WRONG`."""
    root = tmp_path_factory.mktemp("wrong")
    (root / "empty").mkdir()
    net = nn.Linear(2, 2)
    unroll = compile_unroll(net, optim.sgd(lr=0.1), 1, loss=nn.MSELoss(), backend="eager")
    x = torch.randn(3, 2)
    for name, format, weighted in (("script", "torchscript", True), ("bare", "onnx", False), ("changed", "onnx", True)):
        unroll.export(root / name, (x, x), x, formats=format, weights=weighted)
    net.register_buffer("nothing", torch.zeros(0))
    again = compile_unroll(net, optim.sgd(lr=0.1), 1, loss=nn.MSELoss(), backend="eager")
    again.export(root / "nothing", (x, x), x, formats="onnx")
    with open(root / "changed" / "adapt.onnx", "r+b") as file:
        file.seek(20)
        file.write(b"\xff")
    return {**{name: root / name for name in ("empty", "missing", "changed", "script", "bare", "nothing")}, "folder": exported.folder}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = WRONG[name]
    places = {key: str(path) for key, path in folders.items()} | {"target": str(tmp_path / "models")}
    monkeypatch.setattr(sys, "argv", ["make_repository.py", *(part.format_map(places) for part in arguments)])
    assert script().main() == 1
    told = capsys.readouterr().err
    assert message in told and told.startswith("make_repository: ") and len(told.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [], "something was written"
