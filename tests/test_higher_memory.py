"""What `adaptrt.higher` holds on to: nothing after a loop, one step's weights without tracking, and no more than the original at once."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.adjoint_scaling import peak_of
from tests.higher_cases import CASES, MODELS, loss_of, make, ours, quietly, theirs

LOOPS = 1000


@pytest.fixture
def without_collection() -> Iterator[None]:
    """Only reference counts free anything in the test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def one_loop(net: nn.Module, opt: torch.optim.Optimizer, track: bool) -> list[weakref.ref[Tensor]]:
    """A step and a backward pass, and all fast weights there were."""
    with ours.innerloop_ctx(net, opt, copy_initial_weights=False, track_higher_grads=track) as (fmodel, diffopt):
        seen = [weakref.ref(p) for p in fmodel.parameters()]
        diffopt.step(loss_of(fmodel, 1))
        seen += [weakref.ref(p) for p in fmodel.parameters()]
        loss_of(fmodel, 2).backward()
        return seen


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("track", [True, False])
def test_a_thousand_loops_leave_nothing_behind(track: bool) -> None:
    net = make("mlp")
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    process = psutil.Process()

    def census() -> tuple[int, int, int]:
        gc.collect()
        objects = gc.get_objects()
        return len(objects), sum(issubclass(type(held), Tensor) for held in objects), process.memory_info().rss

    for _ in range(LOOPS // 5):  # caches and the allocator's pools fill
        one_loop(net, opt, track)
    before = census()
    for _ in range(LOOPS):
        one_loop(net, opt, track)
    after = census()
    assert after[0] - before[0] < LOOPS / 20
    assert after[1] == before[1]
    assert after[2] - before[2] < 4096 * LOOPS  # a handle alone takes more


@pytest.mark.usefixtures("double", "without_collection")
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_a_loop_is_freed_when_it_ends(model: str, track: bool) -> None:
    """At once: the garbage collector, which counts objects and not bytes, may come after memory has run out."""
    net = make(model)
    seen = one_loop(net, torch.optim.Adam(net.parameters()), track)
    assert seen and all(reference() is None for reference in seen)


@pytest.mark.usefixtures("double", "without_collection")
@pytest.mark.parametrize("case", CASES)
def test_without_tracking_the_next_step_frees_the_last(case: str) -> None:
    net = make("batch norm")
    with ours.innerloop_ctx(net, CASES[case].kind(net.parameters(), **CASES[case].settings), track_higher_grads=False) as (fmodel, diffopt):
        older: list[weakref.ref[Tensor]] = []
        for step in range(4):
            latest = [weakref.ref(p) for p in fmodel.parameters()]
            diffopt.step(loss_of(fmodel, step))
            older += latest
            assert all(reference() is None for reference in older)
        assert all(p.grad_fn is None for p in fmodel.parameters())
        assert all(not value.requires_grad for states in diffopt.state for entry in states.values() for value in tensors(entry))


def tensors(entry: Any) -> list[Tensor]:
    return [value for value in entry.values() if isinstance(value, Tensor)]


@pytest.mark.usefixtures("double", "without_collection")
def test_with_tracking_all_versions_stay() -> None:
    net = make("mlp")
    with ours.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1)) as (fmodel, diffopt):
        seen = [weakref.ref(p) for p in fmodel.parameters()]
        for step in range(3):
            diffopt.step(loss_of(fmodel, step))
        assert [reference() for reference in seen] == list(fmodel.parameters(time=0))


class Shape(NamedTuple):
    inputs: int
    hidden: int
    batch: int


WEIGHTS, ACTIVATIONS = Shape(60, 120, 4), Shape(10, 100, 200)
KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=0.1),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adadelta": lambda params: torch.optim.Adadelta(params),
    "adamax": lambda params: torch.optim.Adamax(params, lr=0.01),
}


def peak(package: Any, kind: str, shape: Shape, track: bool) -> int:
    """Bytes live at once in twenty steps and the meta-gradient; without tracking, the query loss alone."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(shape.inputs, shape.hidden, bias=False), nn.Tanh(), nn.Linear(shape.hidden, shape.inputs, bias=False))
    opt = KINDS[kind](net.parameters())
    x, y = torch.randn(shape.batch, shape.inputs), torch.randn(shape.batch, shape.inputs)

    def run(steps: int) -> None:
        with package.innerloop_ctx(net, opt, copy_initial_weights=False, track_higher_grads=track) as (fmodel, diffopt):
            for _ in range(steps):
                diffopt.step(F.mse_loss(fmodel(x), y))
            query = F.mse_loss(fmodel(x), y)
            if track:
                torch.autograd.grad(query, list(net.parameters()))

    quietly(lambda: run(2))
    gc.collect()
    return quietly(lambda: peak_of(lambda: run(20)))


@pytest.mark.parametrize(
    ("kind", "shape", "track"),
    [
        ("sgd", WEIGHTS, True),
        ("sgd", ACTIVATIONS, True),
        ("sgd", WEIGHTS, False),
        ("momentum", WEIGHTS, True),
        ("adam", WEIGHTS, True),
        ("adam", ACTIVATIONS, True),
        ("adam", WEIGHTS, False),
        ("adadelta", WEIGHTS, True),
        ("adamax", ACTIVATIONS, True),
    ],
)
def test_peak_is_at_most_the_originals(kind: str, shape: Shape, track: bool) -> None:
    assert peak(ours, kind, shape, track) <= peak(theirs, kind, shape, track)
