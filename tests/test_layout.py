"""The way of a call through the files of the runtime is the one that docs/layout.md shows."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adaptrt
from adaptrt import Adjoint, Replay, Stash, Unrolled

_ROOT = Path(adaptrt.__file__).parent


def files_entered(adjoint: Adjoint) -> list[tuple[str, str]]:
    """For each frame of adaptrt's that a repeated meta-loss enters: the file of the frame that it was entered from, and its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    unroll = adaptrt.compile_unroll(model, opt, 3, loss=F.cross_entropy, adjoint=adjoint, backend="eager")
    batch = torch.randn(6, 4), torch.arange(6) % 3
    for _ in range(2):
        unroll(batch, batch)
    stack = [""]
    found: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, arg: Any) -> None:
        del arg
        path = Path(frame.f_code.co_filename)
        if _ROOT not in path.parents:
            return
        if event == "call":
            found.append((stack[-1], path.relative_to(_ROOT).as_posix()))
            stack.append(found[-1][1])
        elif event == "return":
            stack.pop()

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        unroll(batch, batch)
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.parametrize("adjoint", [Unrolled(), Replay(), Stash()], ids=str)
def test_a_repeated_call_neither_plans_nor_captures(adjoint: Adjoint) -> None:
    entered = {file for _, file in files_entered(adjoint)}
    assert {"runtime/route.py", "inner/reader.py", "runtime/validation.py", "runtime/nodes.py", "runtime/program.py"} <= entered
    assert not {"runtime/plan.py", "runtime/probe.py", "runtime/capture.py", "graph/capture.py", "inner/step.py"} & entered


def test_a_call_that_is_one_program_leaves_out_the_adjoint() -> None:
    entered = files_entered(Unrolled())
    assert not [file for _, file in entered if file.startswith("adjoint/") or file in ("runtime/calls.py", "runtime/program_set.py")]
    assert sum(before != file for before, file in entered[1:]) < 30
