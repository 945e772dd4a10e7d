"""Profilers and debuggers that are at work while a program is captured: the numbers are right, and they go on afterwards if they can."""

from __future__ import annotations

import contextlib
import cProfile
import gc
import pstats
import sys
from collections.abc import Callable, Generator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adaptrt
from adaptrt import optim
from adaptrt.errors import NotTraceable


class Counting(nn.Linear):
    """Its state is noticed only where the code that runs is recorded."""

    calls = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(input) * self.calls


def by_hand(model: nn.Linear, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad(F.mse_loss(model(x), y), [model.weight])
    return model.weight - 0.1 * grad


def marker() -> None:
    """A function that a profiler should see after the capture."""


@contextlib.contextmanager
def profiled_in_c() -> Generator[Callable[[], bool]]:
    profile = cProfile.Profile()
    profile.enable()
    try:
        yield lambda: profile.disable() or any(name == "marker" for _, _, name in pstats.Stats(profile).stats)  # type: ignore[attr-defined]
    finally:
        profile.disable()


@contextlib.contextmanager
def profiled_by_torch() -> Generator[Callable[[], bool]]:
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_stack=True)
    with profile, pytest.warns(RuntimeWarning, match="sees no more Python calls of this thread"):  # it cannot be put back
        yield lambda: True


@contextlib.contextmanager
def put_by(put: Callable[..., None], get: Callable[[], object]) -> Generator[Callable[[], bool]]:
    seen: set[str] = set()

    def note(frame: object, event: str, arg: object) -> None:
        seen.add(frame.f_code.co_name)  # type: ignore[attr-defined]

    before = get()
    put(note)
    try:
        yield lambda: "marker" in seen
    finally:
        put(before)


PROFILERS = {
    "cProfile": profiled_in_c,
    "torch.profiler": profiled_by_torch,
    "sys.setprofile": lambda: put_by(sys.setprofile, sys.getprofile),
    "sys.settrace": lambda: put_by(sys.settrace, sys.gettrace),
}


@pytest.mark.parametrize("name", PROFILERS)
def test_captures_work_beside_a_profiler_which_goes_on(name: str) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    unroll = adaptrt.compile_unroll(model, optim.sgd(lr=0.1), 1, loss=F.mse_loss, backend="eager")
    counting = adaptrt.compile_unroll(Counting(3, 2).double(), optim.sgd(lr=0.1), 1, loss=F.mse_loss, backend="eager")
    with PROFILERS[name]() as goes_on:
        adapted = unroll.adapt((x, y))
        with pytest.raises(NotTraceable, match="calls"):
            counting.adapt((x, y))
        marker()
        assert goes_on()
    torch.testing.assert_close(adapted.params["weight"], by_hand(model, x, y), rtol=1e-12, atol=1e-12)


def test_callbacks_of_the_garbage_collector_are_no_code_of_the_model() -> None:
    counts = {"collections": 0}

    def collected(phase: str, info: object) -> None:
        counts["collections"] += 1

    class Collecting(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            gc.collect()
            return super().forward(input)

    torch.manual_seed(0)
    model, x, y = Collecting(3, 2).double(), torch.randn(4, 3).double(), torch.randn(4, 2).double()
    unroll = adaptrt.compile_unroll(model, optim.sgd(lr=0.1), 1, loss=F.mse_loss, backend="eager")
    gc.callbacks.append(collected)
    try:
        adapted = unroll.adapt((x, y))
    finally:
        gc.callbacks.remove(collected)
    assert counts["collections"]
    torch.testing.assert_close(adapted.params["weight"], by_hand(model, x, y), rtol=1e-12, atol=1e-12)
