"""The command line: what it prints, and that every wrong input ends with one clear line and exit code 2."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import adaptrt
from adaptrt.cli import app

FACTORIES = """
import torch
import torch.nn.functional as F
import adaptrt

model = torch.nn.Linear(3, 2)
support = (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
query = (torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1]))

def unroll():
    return adaptrt.compile_unroll(model, torch.optim.SGD(model.parameters(), lr=0.1), k=2, loss=F.cross_entropy, backend="eager")

def both(): return unroll(), support, query
def support_only(): return unroll(), support
class Spectrum(torch.nn.Module):
    def forward(self, x): return torch.fft.rfft(x).abs()
def spectrum():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), Spectrum(), torch.nn.Linear(3, 2))
    return adaptrt.compile_unroll(net, adaptrt.optim.sgd(lr=0.1), k=1, loss=F.cross_entropy, backend="eager"), support, query
def number(): return 3
def wrong_tuple(): return model, support, query
def raises(): raise RuntimeError("no data\\nsecond line")
def interrupted(): raise KeyboardInterrupt
def bad_labels(): return unroll(), (torch.randn(4, 3), torch.tensor([0, 1, 0, 7]))
value = 3
class Nested:
    build = staticmethod(both)
"""

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Runs the command line in a folder with a module of factories."""
    (tmp_path / "adaptrt_test_factories.py").write_text(FACTORIES)
    (tmp_path / "adaptrt_test_broken.py").write_text("import a_module_that_is_nowhere\n")
    (tmp_path / "adaptrt_test_failing.py").write_text("raise OSError('disk on fire')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "adaptrt_test_factories", raising=False)
    return lambda *arguments: CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("factory", ["both", "support_only", "Nested.build"])
def test_inspect_prints_graphs_signatures_and_explanation(invoke: Invoke, factory: str) -> None:
    result = invoke("inspect", f"adaptrt_test_factories:{factory}")
    assert result.exit_code == 0, result.output
    for expected in ("graph of", "signature of", "param", "weight", "f32[4, 3]"):
        assert expected in result.output


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("adaptrt_test_factories", "not of the form module:factory"),
        (":both", "not of the form module:factory"),
        ("adaptrt_test_factories:", "not of the form module:factory"),
        ("adaptrt_test_nowhere:both", "there is no module adaptrt_test_nowhere"),
        ("adaptrt_test_nowhere.deeper:both", "there is no module adaptrt_test_nowhere.deeper"),
        ("adaptrt_test_broken:both", "importing adaptrt_test_broken failed: No module named 'a_module_that_is_nowhere'"),
        ("adaptrt_test_failing:both", "importing adaptrt_test_failing raised OSError: disk on fire"),
        ("adaptrt_test_factories:missing", "adaptrt_test_factories has no missing"),
        ("adaptrt_test_factories:value", "is not callable: expected a function without arguments, got int"),
        ("adaptrt_test_factories:raises", "raises() raised RuntimeError: no data"),
        ("adaptrt_test_factories:number", "must return (unroll, support, query) or (unroll, support)"),
        ("adaptrt_test_factories:wrong_tuple", "got a tuple of Linear, tuple, tuple"),
        ("adaptrt_test_factories:bad_labels", "LabelOutOfRange"),
    ],
)
def test_wrong_targets_end_with_one_line(invoke: Invoke, target: str, message: str) -> None:
    result = invoke("inspect", target)
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line.startswith("adaptrt: ")
    assert message in line


def test_interrupt_leaves_cleanly(invoke: Invoke) -> None:
    result = invoke("inspect", "adaptrt_test_factories:interrupted")
    assert result.exit_code == 130
    assert result.output.splitlines() == ["adaptrt: interrupted; nothing was left running"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "no/such/folder/figure.png"], "does not exist"),
        (["--minutes", "0"], "--minutes"),
        (["--episodes", "1"], "--episodes"),
        (["--backend", "tpu"], "'auto', 'eager', 'inductor'"),
    ],
)
def test_demo_refuses_wrong_options_at_once(invoke: Invoke, arguments: list[str], message: str) -> None:
    result = invoke("demo", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_demo_without_its_extra_says_what_to_install(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = invoke("demo", "--backend", "eager")
    assert result.exit_code == 2
    assert "pip install 'adaptrt[demo]'" in result.output


def test_export_writes_and_says_what_it_does(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("export", "adaptrt_test_factories:both", "--format", "torchscript", "--out", "net")
    assert result.exit_code == 0, result.output
    for expected in ("capturing", "tracing adapt_predict", "writing weights", "wrote net"):
        assert expected in result.output
    assert adaptrt.load(tmp_path / "net").k == 2
    again = invoke("export", "adaptrt_test_factories:both", "--format", "torchscript", "--out", "net")
    assert again.exit_code == 2 and "pass overwrite=True" in again.output
    assert invoke("export", "adaptrt_test_factories:both", "--format", "torchscript", "--out", "net", "--overwrite").exit_code == 0


def test_export_checks_without_writing(invoke: Invoke, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = invoke("export", "adaptrt_test_factories:both", "--format", "torchscript", "--format", "onnx", "--out", "net", "--check")
    assert result.exit_code == 0 and "can be exported as torchscript, onnx" in result.output
    result = invoke("export", "adaptrt_test_factories:spectrum", "--format", "onnx", "--out", "net")
    assert result.exit_code == 2 and "NotExportable" in result.output and "'_fft_r2c' is called by '1'" in result.output
    result = invoke("export", "adaptrt_test_factories:support_only", "--out", "net")
    assert result.exit_code == 2 and "must return (unroll, support, query) for export" in result.output
    assert sorted(tmp_path.iterdir()) == before


def test_key_prints_a_key_and_keeps_its_hash(invoke: Invoke, tmp_path: Path) -> None:
    keys = [invoke("key", "ann").stdout.strip(), invoke("key", "bob", "--operator", "--file", "keys").stdout.strip()]
    file = tmp_path / "keys"
    lines = [line.split() for line in file.read_text().splitlines()]
    assert lines == [
        [name, role, hashlib.sha256(key.encode()).hexdigest()]
        for name, role, key in zip(["ann", "bob"], ["tenant", "operator"], keys, strict=True)
    ]
    assert file.stat().st_mode & 0o777 == 0o600 and len(set(keys)) == 2 and min(map(len, keys)) >= 43


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["key", "two words"], "no spaces"),
        (["key", ""], "1 to 256 characters"),
        (["key", "ann", "--file", "nowhere/keys"], "cannot be written"),
        (["serve", "adaptrt_test_factories:support_only"], "must return (unroll, support, query)"),
        (["serve", "adaptrt_test_factories:number"], "must return (unroll, support, query)"),
        (["serve", "nowhere"], "has no manifest.json"),
        (["serve", "adaptrt_test_factories:both", "--production"], "asks for --keys or --jwt-key"),
        (["serve", "adaptrt_test_factories:both", "--host", "0.0.0.0"], "without keys anyone"),
        (["serve", "adaptrt_test_factories:both", "--keys", "nowhere"], "cannot be read"),
        (["serve", "adaptrt_test_factories:both", "--keys", "adaptrt_test_factories.py"], "line 2"),
        (["serve", "adaptrt_test_factories:both", "--jwt-key", "adaptrt_test_broken.py", "--jwt-algorithm", "none"], "no algorithm 'none'"),
        (["serve", "adaptrt_test_factories:both", "--jwt-key", "adaptrt_test_broken.py", "--jwt-algorithm", "RS256"], "public key in PEM"),
        (["serve", "adaptrt_test_factories:both", "--store", "disk"], "write memory, memory:BYTES, sqlite:PATH"),
        (["serve", "adaptrt_test_factories:both", "--store", "memory:many"], "write the bytes as a number"),
        (["serve", "adaptrt_test_factories:both", "--lanes", "1;4"], "numbers with commas"),
        (["serve", "adaptrt_test_factories:both", "--keep", "best"], "not_worse, finite, none, or a number"),
        (["serve", "adaptrt_test_factories:both", "--policy", "reset_after:few"], "number behind the colon"),
        (["serve", "adaptrt_test_factories:both", "--policy", "sometimes"], "no policy 'sometimes'"),
        (["serve", "adaptrt_test_factories:both", "--max-steps", "1", "--port", "0"], "max_steps is 1"),
        (["serve", "adaptrt_test_factories:both", "--max-state-bytes", "1", "--port", "0"], "max_state_bytes is 1"),
        (["serve", "adaptrt_test_factories:bad_labels", "--port", "0"], "must return (unroll, support, query)"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_serve_and_key_refuse_wrong_input(invoke: Invoke, arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.output
