"""`examples/maml_distributed.py`: it goes on where it was killed, and ends with the numbers of a run that was not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from adaptrt import tree
from examples import maml_distributed as example
from tests.processes import ROOT

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch was built without gloo")

ITERATIONS, EVERY = 30, 10


def arguments(folder: Path, iterations: int = ITERATIONS) -> list[str]:
    named = {"iterations": iterations, "every": EVERY, "tasks": 4, "folder": folder, "backend": "eager"}
    return [f"--{name}={value}" for name, value in named.items()]


def values(folder: Path) -> dict[str, Any]:
    """All that is in the one checkpoint of a folder, by name."""
    (checkpoint,) = folder.iterdir()
    assert re.fullmatch(r"iteration-\d{8}", checkpoint.name)
    dcp_to_torch_save(checkpoint, folder.with_suffix(".pt"))
    state = torch.load(folder.with_suffix(".pt"))
    assert state["iteration"] == int(checkpoint.name[-8:])
    return dict(tree.named_leaves(state))


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys() and {"model.hyper.lr", "outer.state.hyper.lr.exp_avg"} <= {*wanted}
    for name, value in wanted.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value, name


@pytest.fixture
def _without_group() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """Leaves no process group and no other number of threads behind."""
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("_without_group")
def test_a_run_in_parts_is_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    example.main(arguments(whole))
    printed = capsys.readouterr().out
    assert "from iteration 0\n" in printed and "iteration 20: meta-loss" in printed and "on unseen tasks" in printed
    example.main(arguments(parts, iterations=EVERY))
    (parts / "iteration-00000020.partial").mkdir()  # a run was killed while it wrote this
    example.main(arguments(parts))
    printed = capsys.readouterr().out
    assert f"from iteration {EVERY}\n" in printed and "iteration 10: meta-loss" in printed
    assert_equal(values(parts), values(whole))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_processes_share_the_tasks(processes: int) -> None:
    (x, y), _ = example.draw_tasks(seed=0, iteration=3, num_tasks=8)
    parts = [example.share((x, y), rank, processes) for rank in range(processes)]
    assert all(len(part) == len(target) == 8 // processes for part, target in parts)
    assert {tuple(task.flatten().tolist()) for part, _ in parts for task in part} == {tuple(task.flatten().tolist()) for task in x}
    other, _ = example.draw_tasks(seed=0, iteration=4, num_tasks=8)
    assert not torch.equal(other[0], x)


@pytest.mark.parametrize(("wrong", "message"), [("--iterations=0", "at least 1"), ("--every=0", "at least 1"), ("--tasks=5", "multiple")])
def test_wrong_arguments(wrong: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        example.main([wrong])
    assert message in capsys.readouterr().err


# --- with torchrun


KILLED = """
import os, signal
from examples import maml_distributed as example

def die():
    os.kill(os.getpid(), signal.SIGKILL)

where, rank = os.environ["WHERE"], int(os.environ["RANK"])
iterate, replace = example.iterate, os.replace

def iterate_or_die(learner, seed, iteration, num_tasks):
    if where == "training" and iteration == 15 and rank == 1:
        die()
    return iterate(learner, seed, iteration, num_tasks)

def replace_or_die(partial, path):
    if where == "writing" and str(path).endswith("20"):
        die()
    replace(partial, path)

example.iterate, example.os.replace = iterate_or_die, replace_or_die
example.main()
"""
"""The example, which a process kills by SIGKILL: in the middle of an iteration, or before a checkpoint has its name."""


def torchrun(script: Path, folder: Path, where: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), *arguments(folder)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "WHERE": where, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=150, check=False)


@pytest.mark.slow
def test_two_processes_that_are_killed_twice(tmp_path: Path) -> None:
    original, killed, script = Path(example.__file__), tmp_path / "killed", tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf-8")
    for where, first, left in (("training", 0, {"10"}), ("writing", 10, {"10", "20.partial"})):
        died = torchrun(script, killed, where)
        assert died.returncode == 1 and "SIGKILL" in died.stderr, died.stderr
        assert f"2 processes, 4 tasks an iteration, from iteration {first}\n" in died.stdout
        assert {path.name for path in killed.iterdir()} == {f"iteration-000000{name}" for name in left}
    finished = torchrun(original, killed)
    assert finished.returncode == 0 and "from iteration 10\n" in finished.stdout, finished.stderr
    uninterrupted = torchrun(original, tmp_path / "whole")
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    assert finished.stdout.splitlines()[-1] == uninterrupted.stdout.splitlines()[-1]
    assert_equal(values(killed), values(tmp_path / "whole"))
