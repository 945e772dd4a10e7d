"""The consumer of ONNX exports that has numpy and onnxruntime alone, against `adaptrt.load`."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import adaptrt
from adaptrt import Exported
from tests.test_export import T, data, generator, inputs, make, model
from tests.tolerances import assert_near

SCRIPT = Path(__file__).parents[1] / "export" / "onnxruntime" / "run_adapt.py"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("onnx") / "net"
    return adaptrt.load(make(model()).export(folder, data(), inputs(), formats="onnx"))


def arrays(exported: Exported, program: str, support: Any, query: Any) -> dict[str, np.ndarray]:
    """Data and noise by the names of the program's inputs; the noise is that of `generator()`."""
    entry = next(each for each in exported.manifest.programs if each.name == program)
    (tokens, scale), target = support
    named = {"support.inputs.0": tokens, "support.inputs.1": scale, "support.target": target}
    named |= {"query.0": query[0], "query.1": query[1]}
    drawn = iter([value for part in exported._programs[program].draw(generator()) for value in part])
    named |= {each.name: next(drawn) for each in entry.inputs if each.role == "noise"}
    return {name: value.numpy() for name, value in named.items()}


def run(folder: Path, program: str, given: dict[str, np.ndarray], tmp_path: Path, python: str = sys.executable) -> dict[str, torch.Tensor]:
    np.savez(tmp_path / "data.npz", **given)  # type: ignore[arg-type]
    command = [python, str(SCRIPT), str(folder), program, str(tmp_path / "data.npz"), str(tmp_path / "out.npz")]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert program in found.stdout
    with np.load(tmp_path / "out.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def check(exported: Exported, tmp_path: Path, python: str = sys.executable) -> None:
    """`adapt`, going on from its result, and `adapt_predict`."""
    support, query = data(), inputs()
    right = exported.adapt(support, generator=generator())
    given = arrays(exported, "adapt", support, query)
    found = run(exported.folder, "adapt", given, tmp_path, python)
    assert_near({"losses": found.pop("result.1")}, {"losses": right.losses}, torch.float32)
    assert_near(found, {f"state.{name}": value for name, value in right.state.named_tensors().items()}, torch.float32)
    more = run(exported.folder, "adapt", {**given, **{name: value.numpy() for name, value in found.items()}}, tmp_path, python)
    wanted = exported.adapt(support, start=right, generator=generator())
    assert_near({"losses": more["result.1"]}, {"losses": wanted.losses}, torch.float32)
    both = run(exported.folder, "adapt_predict", arrays(exported, "adapt_predict", support, query), tmp_path, python)
    logits = exported.adapt_predict(support, query, generator=generator()).outputs["logits"]
    assert_near({"logits": both["result.0.logits"]}, {"logits": logits}, torch.float32)


def test_its_numbers(exported: Exported, tmp_path: Path) -> None:
    check(exported, tmp_path)


@pytest.mark.slow
def test_without_pytorch(exported: Exported, tmp_path: Path) -> None:
    venv.create(tmp_path / "environment", with_pip=True)
    python = str(tmp_path / "environment" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "numpy", "onnxruntime"], check=True)
    assert subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 1
    check(exported, tmp_path, python)


def test_over_tasks_with_noise_of_its_own(tmp_path: Path) -> None:
    """A state without a task axis is that of every task."""
    support, query = data(6, T), inputs(4, T)
    exported = adaptrt.load(make(model().eval(), tasks=True).export(tmp_path / "net", support, query, formats="onnx"))
    found = run(exported.folder, "adapt", arrays(exported, "adapt", support, query), tmp_path)
    assert_near({"losses": found["result.1"]}, {"losses": exported.adapt(support).losses}, torch.float32)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"support.target": None}, "there is no array 'support.target'"),
    "shape": ({"support.inputs.1": np.zeros(5, np.float32)}, "must be float32 of shape [6], got float32 of shape [5]"),
    "dtype": ({"support.inputs.1": np.zeros(6)}, "got float64"),
    "NaN": ({"support.inputs.1": np.full(6, np.nan, np.float32)}, "holds NaN or infinity"),
    "label": ({"support.target": np.full(6, 3)}, "'support.target' holds 3"),
    "pickle": ({"support.target": np.array([object()] * 6)}, "allow_pickle"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data(name: str, exported: Exported, tmp_path: Path) -> None:
    change, message = WRONG[name]
    given = {**arrays(exported, "adapt", data(), inputs()), **change}
    np.savez(tmp_path / "data.npz", **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    command = [sys.executable, str(SCRIPT), str(exported.folder), "adapt", str(tmp_path / "data.npz"), str(tmp_path / "out.npz")]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1 and message in found.stderr and len(found.stderr.splitlines()) == 1
    assert not (tmp_path / "out.npz").exists()
