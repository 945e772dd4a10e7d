"""`adapt(steps=n)`: another number of steps by the programs that are there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from adaptrt import Adjoint, CompiledUnroll, FirstOrder, Replay, Stash, Truncated, Unrolled, compile_unroll, optim
from adaptrt.errors import AdaptrtError, InvalidArgument, InvalidBatch, InvalidType
from tests.models import normal, regress
from tests.tolerances import assert_near

K, T = 3, 2
ADJOINTS: list[Adjoint] = [Replay(), Replay(every=2), Stash(), FirstOrder(), Truncated(2)]
over_adjoints = pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
over_tasks = pytest.mark.parametrize("tasks", [False, True], ids=["single", "vmap"])


def model() -> nn.Module:
    """Its first layer does not adapt: what it computes of a support batch is the same in all steps, and computed once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def make(
    net: nn.Module, adjoint: Adjoint, k: int, tasks: bool = False, backend: str = "eager", opt: Any = None, **options: Any
) -> CompiledUnroll:
    opt = optim.sgd(lr=0.1, momentum=0.5) if opt is None else opt
    unroll = compile_unroll(net, opt, k, loss=regress, params=["2.*", "4.*"], adjoint=adjoint, backend=backend, **options)
    return unroll.vmap() if tasks else unroll


def batch(*lead: int) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(1)
    return normal(generator, *lead, 5, 3), normal(generator, *lead, 5, 2)


def results(net: nn.Module, unroll: CompiledUnroll, support: Any, **options: Any) -> dict[str, Tensor]:
    """All numbers of an adaptation, and gradients of something of all of them."""
    adapted = unroll.adapt(support, **options)
    value = torch.stack([value.sin().sum() for value in (*adapted.params.values(), adapted.losses)]).sum()
    params = dict(net.named_parameters())
    grads = dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))
    return {
        **{f"of {name}": grad for name, grad in grads.items()},
        **adapted.detach().state.named_tensors(),
        "losses": adapted.losses.detach(),
    }


@over_tasks
@over_adjoints
def test_equal_to_an_unroll_of_so_many_steps(adjoint: Adjoint, tasks: bool) -> None:
    """In any order, one step included, and without another program."""
    net = model()
    unroll = make(net, adjoint, K, tasks)
    support = batch(*([T] if tasks else []))
    results(net, unroll, support)
    before = list(unroll.graphs())
    for steps in (1, 5, 2, K, 1):
        assert_near(results(net, unroll, support, steps=steps), results(net, make(net, adjoint, steps, tasks), support), torch.float64)
    assert list(unroll.graphs()) == before


@over_adjoints
def test_more_than_one_step_of_an_unroll_of_one(adjoint: Adjoint) -> None:
    net = model()
    unroll = make(net, adjoint, 1)
    for steps in (4, 1):
        assert_near(results(net, unroll, batch(), steps=steps), results(net, make(net, adjoint, steps), batch()), torch.float64)


def test_one_step_first() -> None:
    """The programs are those of a loop from the start."""
    net = model()
    unroll = make(net, Stash(), K)
    for steps in (1, K):
        assert_near(results(net, unroll, batch(), steps=steps), results(net, make(net, Stash(), steps), batch()), torch.float64)


def test_compiled() -> None:
    net = model()
    unroll = make(net, Stash(), K, backend="inductor")
    results(net, unroll, batch())
    before = list(unroll.graphs())
    for steps in (1, 4):
        assert_near(results(net, unroll, batch(), steps=steps), results(net, make(net, Stash(), steps), batch()), torch.float64)
    assert list(unroll.graphs()) == before


@over_tasks
def test_batches_for_each_step_guards_starts_and_several_updates(tasks: bool) -> None:
    net = model()
    lead = [T] if tasks else []
    unroll = make(net, Replay(), K, tasks, per_step=True)
    support = batch(*lead, 2)
    assert_near(results(net, unroll, support, steps=2), results(net, make(net, Replay(), 2, tasks, per_step=True), support), torch.float64)
    with pytest.raises(InvalidBatch, match="must have 3 inner steps"):
        unroll.adapt(support)

    lbfgs = optim.lbfgs(lr=0.1, max_iter=2)
    unroll = make(net, Replay(), K, tasks, opt=lbfgs)
    wanted = make(net, Replay(), 2, tasks, opt=lbfgs)
    assert_near(results(net, unroll, batch(*lead), steps=2), results(net, wanted, batch(*lead)), torch.float64)

    unroll, one = make(net, Replay(), K, tasks), make(net, Replay(), 1, tasks)
    first = unroll.adapt(batch(*lead), steps=1, keep="finite")
    assert first.losses.shape == (*lead, 1) and first.kept is not None and bool(first.kept.all())
    again = unroll.adapt(batch(*lead), steps=1, start=first, keep="finite")
    both = one.adapt(batch(*lead), start=one.adapt(batch(*lead)))
    assert_near(again.detach().state.named_tensors(), both.detach().state.named_tensors(), torch.float64)


def test_noise_for_so_many_steps() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Linear(8, 2)).double()
    unrolls = [compile_unroll(net, optim.sgd(lr=0.1), k, loss=regress, adjoint=Replay(), backend="eager") for k in (K, 5)]
    one, other = (unroll.adapt(batch(), steps=5, generator=Generator().manual_seed(3)).detach().state.named_tensors() for unroll in unrolls)
    assert_near(one, other, torch.float64)


WRONG: dict[str, tuple[Any, Adjoint, type[AdaptrtError], str]] = {
    "unrolled": (2, Unrolled(), InvalidArgument, r"Unrolled\(\) has one program of 3 steps; pass adjoint=Replay\(\)"),
    "zero": (0, Replay(), InvalidArgument, "steps must be at least 1"),
    "float": (2.0, Replay(), InvalidType, "steps must be an int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    steps, adjoint, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        make(model(), adjoint, K).adapt(batch(), steps=steps)
