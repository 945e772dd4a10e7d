"""Profilers and debuggers that are at work while a program is captured: the numbers are right, and they go on afterwards if they can."""

from __future__ import annotations

import contextlib
import cProfile
import gc
import pstats
import sys
from collections.abc import Callable, Generator
from typing import Any

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


SCALE = {"of a rule": 2.0}


class WithRules(torch.Tensor):
    """Its rules are the user's code, which runs within an operation of PyTorch's."""

    calls = 0
    plain: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> WithRules:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # pyright: ignore
        made.plain = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*[arg.plain if isinstance(arg, cls) else arg for arg in args], **(kwargs or {})) * cls.scale()

    @classmethod
    def scale(cls) -> float:
        return SCALE["of a rule"]


class Counted(WithRules):
    @classmethod
    def scale(cls) -> float:
        Counted.calls += 1
        return float(Counted.calls)


def with_rules(kind: type[WithRules]) -> nn.Module:
    class Model(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * kind(torch.ones(1)).cos()

    return Model(2, 1)


def test_rules_of_a_tensor_of_the_users_are_code_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(5, 2), torch.randn(5, 1)
    unroll = adaptrt.compile_unroll(model := with_rules(WithRules), optim.sgd(lr=0.1), 1, loss=F.mse_loss, backend="eager")
    for scale in (2.0, 3.0):
        monkeypatch.setitem(SCALE, "of a rule", scale)
        torch.testing.assert_close(unroll.adapt((x, y)).params["weight"], by_hand(model, x, y))  # type: ignore[arg-type]
    assert sys.getprofile() is None
    with pytest.raises(NotTraceable, match=r"Counted\.calls"):
        adaptrt.compile_unroll(with_rules(Counted), optim.sgd(lr=0.1), 1, loss=F.mse_loss, backend="eager").adapt((x, y))
    assert Counted.calls == 0 and sys.getprofile() is None
