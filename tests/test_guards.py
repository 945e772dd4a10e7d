"""Guards: by task, the state after an adaptation is kept, or is what it was before, bit for bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import adaptrt
from adaptrt import Adapted, Adjoint, CompiledUnroll, FirstOrder, Replay, Stash, Truncated, Unrolled, compile_unroll, optim
from adaptrt.errors import AdaptrtError, DataDependentControlFlow, InvalidArgument, InvalidType, ModelChanged, NotTraceable, ShapeChanged
from adaptrt.inner.guard import Guards, Moment
from tests import naive
from tests.gradients import gradients
from tests.models import norm_mlp as model
from tests.models import normal, regress
from tests.tolerances import assert_near

K, T = 3, 3
ADJOINTS: list[Adjoint] = [Unrolled(), Replay(), Stash(), FirstOrder(), Truncated(2)]


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tasks that get better, worse, and overflow, at a large learning rate."""
    generator = Generator().manual_seed(seed)
    x, y = normal(generator, T, 5, 3), normal(generator, T, 5, 2)
    return x, y * torch.tensor([1.0, 1e3, 1e200], dtype=torch.float64)[:, None, None]


def make(
    net: nn.Module | None = None, adjoint: Adjoint | str = "auto", backend: str = "eager", lr: float = 0.1, **options: Any
) -> CompiledUnroll:
    opt = optim.sgd(lr=lr, momentum=0.8)
    return compile_unroll(model() if net is None else net, opt, K, loss=regress, adjoint=adjoint, backend=backend, **options)


def same(one: Adapted, other: Adapted) -> bool:
    """Whether they have the same bits."""
    mine, theirs = one.state.named_tensors(), other.state.named_tensors()
    return all(torch.equal(value, theirs[name]) for name, value in mine.items())


def small(before: Moment, after: Moment) -> Tensor:
    """A guard of the user's own: the update is small, and the loss less than half of what it was."""
    return (after.update_norm < 5.0) & (after.loss < 0.9 * before.loss) & (before.update_norm == 0.0)


def oracle(net: nn.Module, x: Tensor, y: Tensor, first_order: bool = False) -> tuple[Any, Tensor, Tensor]:
    """The adaptation, the loss after it, and the norm of the change of the parameters."""
    loop = naive.Loop(net, regress, naive.sgd, {"lr": 0.1, "momentum": 0.8}, K, first_order=first_order)
    start = naive.Start(dict(net.named_parameters()), {}, dict(net.named_buffers()), {})
    after = naive.adapt(loop, start, (x, y))
    final, _ = naive.evaluate(loop, after.params, after.buffers, (x, y))
    norm = torch.stack([(after.params[name] - value).square().sum() for name, value in start.params.items()]).sum().sqrt()
    return after, final, norm


GUARDS: dict[str, tuple[Any, Callable[[Any, Tensor, Tensor], Tensor]]] = {
    "finite": ("finite", lambda after, final, norm: final.isfinite()),
    "not_worse": ("not_worse", lambda after, final, norm: final <= after.losses[0]),
    "function": (small, lambda after, final, norm: (norm < 5.0) & (final < 0.9 * after.losses[0])),
}


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("name", GUARDS)
def test_by_task(name: str, adjoint: Adjoint) -> None:
    check(name, adjoint, "eager")


@pytest.mark.parametrize("name", ["finite", "function"])
def test_by_task_compiled(name: str) -> None:
    check(name, Replay(), "inductor")


def check(name: str, adjoint: Adjoint, backend: str) -> None:
    keep, wanted = GUARDS[name]
    net = model()
    unroll = make(net, adjoint, backend)
    x, y = data()
    with torch.no_grad():
        plain = unroll.vmap().adapt((x, y))
        adapted = unroll.vmap().adapt((x, y), keep=keep)
    rows = [oracle(net, x[task], y[task], adjoint.detach_gradient) for task in range(T)]
    kept = [bool(wanted(*row)) for row in rows]
    assert adapted.kept is not None and adapted.final_loss is not None
    assert adapted.kept.tolist() == kept and kept[0] and not kept[2]
    for task, one in enumerate(adapted):
        assert same(one, plain[task] if kept[task] else unroll.start())
        assert one.kept is not None and bool(one.kept) is kept[task]
    finals = torch.stack([final for _, final, _ in rows]).detach()
    assert_near({"final": adapted.final_loss[:2]}, {"final": finals[:2]}, torch.float64)
    assert torch.equal(adapted.losses.nan_to_num(), plain.losses.nan_to_num())


@pytest.mark.parametrize("tasks", [False, True], ids=["single", "vmap"])
@pytest.mark.parametrize("adjoint", ADJOINTS[:4], ids=str)
def test_gradients(adjoint: Adjoint, tasks: bool) -> None:
    """Of what was kept they are those of the adaptation, of the rest those of the start."""
    net = model()
    unroll = make(net, adjoint)
    x, y = (value[:2] if tasks else value[0] for value in data())
    adapted = (unroll.vmap() if tasks else unroll).adapt((x, y), keep="not_worse" if not tasks else small)
    leaves = dict(net.named_parameters())
    ours = torch.stack([value.sin().sum() for value in adapted.params.values()]).sum()
    wanted = torch.zeros((), dtype=torch.float64)
    for task in range(2) if tasks else [0]:
        after, _, _ = oracle(net, x[task] if tasks else x, y[task] if tasks else y, adjoint.detach_gradient)
        params = after.params if task == 0 else leaves  # the second task is worse afterwards
        wanted = wanted + torch.stack([value.sin().sum() for value in params.values()]).sum()
    assert adapted.kept is not None and adapted.kept.flatten().tolist() == ([True, False] if tasks else [True])
    found, right = (dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True)) for value in (ours, wanted))
    assert_near(found, right, torch.float64)


def test_the_gradient_of_the_final_loss() -> None:
    net = model()
    x, y = (value[0] for value in data())
    adapted = make(net, Replay()).adapt((x, y), keep="finite")
    _, final, _ = oracle(net, x, y)
    leaves = list(net.parameters())
    assert adapted.final_loss is not None
    found, right = (dict(zip("abcdefgh", torch.autograd.grad(value, leaves), strict=False)) for value in (adapted.final_loss, final))
    assert_near(found, right, torch.float64)


def test_going_on_where_nothing_was_kept() -> None:
    """A stream of calls: a lane that rolls back has the state before, its optimiser's included, and goes on from there."""
    unroll = make().vmap()
    state = unroll.adapt(tuple(value[:2] for value in data(1)), keep="finite").detach()
    bad = tuple(value[[0, 2]] for value in data(2))
    after = unroll.adapt(bad, start=state, keep="finite").detach()
    assert after.kept is not None and after.kept.tolist() == [True, False]
    assert same(after[1], state[1]) and not same(after[0], state[0])
    assert same(unroll.adapt(bad, start=after)[0], unroll.adapt(bad, start=unroll.adapt(bad, start=state))[0])


@pytest.mark.parametrize("tasks", [False, True], ids=["single", "vmap"])
def test_batches_for_each_step(tasks: bool) -> None:
    """The loss after the last step is that of its batch."""
    net = model()
    unroll = make(net, Replay(), per_step=True)
    x, y = data()
    x, y = (value[:1].expand(2, K, *value.shape[1:]).contiguous() for value in (x, y))
    x = x + torch.arange(K, dtype=torch.float64)[:, None, None]
    support = (x, y) if tasks else (x[0], y[0])
    adapted = (unroll.vmap() if tasks else unroll).adapt(support, keep=lambda before, after: after.losses[0] == before.loss)
    after = (adapted[0] if tasks else adapted).detach()
    loop = naive.Loop(net, regress, naive.sgd, {}, 1)
    final, _ = naive.evaluate(loop, after.params, after.buffers, (x[0, -1], y[0, -1]))
    assert after.final_loss is not None and after.kept is not None and bool(after.kept)
    assert_near({"loss": after.final_loss}, {"loss": final.detach()}, torch.float64)
    with pytest.raises(InvalidArgument, match="compares losses on one batch"):
        unroll.adapt((x[0], y[0]), keep="not_worse")


def test_tasks_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptrt.runtime.plan.one_by_one", lambda flops: True)
    check("function", Stash(), "eager")
    monkeypatch.undo()


def test_noise_of_the_last_evaluation() -> None:
    """Random operations draw for it after the steps; the steps draw as without a guard."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Linear(8, 2)).double()
    unroll = make(net, Replay())
    batch = tuple(value[0] for value in data())
    one, other = (unroll.adapt(batch, keep=keep, generator=Generator().manual_seed(3)) for keep in (None, "finite"))
    assert same(one.detach(), other.detach())


# --- what a guard reads


CAP = 1e9


def test_what_a_guard_reads_is_followed() -> None:
    """A cell, a default, a global name, and a function made anew at every call."""
    unroll = make()
    batch = tuple(value[0] for value in data())

    def kept(keep: Any) -> bool:
        adapted = unroll.adapt(batch, keep=keep)
        assert adapted.kept is not None
        return bool(adapted.kept)

    cap = 1e9

    def of_cell(before: Moment, after: Moment) -> Tensor:
        return after.update_norm < cap

    def of_global(before: Moment, after: Moment) -> Tensor:
        return after.update_norm < CAP

    assert kept(of_cell) and kept(of_global)
    cap = 0.0
    assert not kept(of_cell)
    cap = 1e9
    assert kept(of_cell)
    globals()["CAP"] = 0.0
    try:
        assert not kept(of_global)
        assert not kept(lambda before, after: after.update_norm < CAP)
    finally:
        globals()["CAP"] = 1e9
    assert kept(of_global)
    for bound in (1e9, 0.0, 1e9):
        assert kept(lambda before, after, bound=bound: after.update_norm < bound) is (bound > 1.0)
        assert kept(lambda before, after: after.update_norm < CAP)


def test_a_function_is_captured_once() -> None:
    unroll, calls = make(), list[int]()
    batch = tuple(value[0] for value in data())

    def counting(before: Moment, after: Moment) -> Tensor:
        calls.append(len(calls))
        return after.loss < before.loss

    with pytest.raises(NotTraceable, match="calls"):  # what it writes would be forgotten
        unroll.adapt(batch, keep=counting)
    for _ in range(3):
        unroll.adapt(batch, keep=lambda before, after: after.loss < before.loss)
    assert sum(name.startswith("guard") for name in unroll.graphs()) == 1


def test_many_functions_are_warned_of() -> None:
    unroll = make()
    batch = tuple(value[0] for value in data())
    with pytest.warns(UserWarning, match="9 different functions were given as keep="):
        for bound in range(9):
            unroll.adapt(batch, keep=lambda before, after, bound=bound: after.update_norm < bound)


def test_warmup() -> None:
    unroll = make(on_new_shape="error").vmap()
    batch = data()
    unroll.warmup(batch, start=True)
    with pytest.raises(ShapeChanged, match=r"warmup\(support, keep=\.\.\.\)"):
        unroll.adapt(batch, keep="finite")
    unroll.warmup(batch, start=True, keep="finite")
    with torch.inference_mode():
        before = len(unroll.graphs())
        first = unroll.adapt(batch, keep="finite")
        unroll.adapt(batch, keep="finite", start=first)
        assert len(unroll.graphs()) == before
    with pytest.raises(ShapeChanged):
        unroll.adapt(batch, keep="not_worse")
    one_by_one = make(adjoint=Replay(), on_new_shape="error").warmup(tuple(value[0] for value in batch), keep="finite")
    with pytest.raises(ShapeChanged, match="and steps="):
        one_by_one.adapt(tuple(value[0] for value in batch), keep="finite", steps=1)
    one_by_one.warmup(tuple(value[0] for value in batch), keep="finite", steps=1)
    one_by_one.adapt(tuple(value[0] for value in batch), keep="finite", steps=1)


def test_copies_and_parts_know_what_was_decided() -> None:
    adapted = make().vmap().adapt(data(), keep="finite").detach()
    for other in (copy.deepcopy(adapted), copy.copy(adapted), adapted[:]):
        assert other.kept is not None and other.kept.tolist() == [True, True, False]
        assert other.final_loss is not None and other.final_loss.shape == (T,)
    assert make().start().kept is None and make().vmap().adapt(data())[0].kept is None
    assert adaptrt.stack(adapted.unbind()).kept is None  # it was decided of other calls


WRONG: dict[str, tuple[Any, type[AdaptrtError], str]] = {
    "name": ("better", InvalidArgument, "keep must be 'finite', 'not_worse' or a function"),
    "number": (True, InvalidType, "keep must be 'finite', 'not_worse' or a function.*got True"),
    "class": (Moment, InvalidType, "keep must be"),
    "float": (lambda before, after: after.loss, InvalidArgument, r"must return a bool tensor of shape \[\], got float64\[\]"),
    "bool": (lambda before, after: True, InvalidArgument, r"of shape \[\], got bool"),
    "shape": (lambda before, after: after.losses < before.loss, InvalidArgument, r"of shape \[\], got bool\[3\]"),
    "value": (lambda before, after: bool(after.loss < before.loss), DataDependentControlFlow, "keep"),
    "arguments": (lambda before: before.loss, InvalidArgument, r"keep\(before, after\) fails"),
    "attribute": (lambda before, after: after.los < 1.0, InvalidArgument, "has no attribute 'los'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    keep, kind, message = WRONG[name]
    unroll = make()
    batch = tuple(value[0] for value in data())
    with pytest.raises(kind, match=message):
        unroll.adapt(batch, keep=keep)
    assert unroll.adapt(batch, keep="finite").kept is not None


class Bounded:
    """A guard that is a method."""

    def __init__(self) -> None:
        self.bound = 1e9

    def keeps(self, before: Moment, after: Moment) -> Tensor:
        return after.update_norm < self.bound


def test_a_method_is_one_guard() -> None:
    unroll, owner = make(), Bounded()
    batch = tuple(value[0] for value in data())
    for _ in range(3):
        assert bool(unroll.adapt(batch, keep=owner.keeps).kept)
    assert sum(name.startswith("guard") for name in unroll.graphs()) == 1
    owner.bound = 0.0
    assert not bool(unroll.adapt(batch, keep=owner.keeps).kept)
    assert bool(unroll.adapt(batch, keep=Bounded().keeps).kept)


def test_a_value_that_changes_before_the_first_way_back() -> None:
    """The program for it would be that of the other decision."""
    unroll, owner = make(adjoint=Replay()), Bounded()
    batch = tuple(value[0] for value in data())
    adapted = unroll.adapt(batch, keep=owner.keeps)
    owner.bound = 0.0
    with pytest.raises(ModelChanged, match="keep= reads was changed between a call and its first backward"):
        adapted.params["0.weight"].sum().backward()
    owner.bound = 1e9
    adapted.params["0.weight"].sum().backward()


def test_guards_used_last_are_known() -> None:
    guards = Guards()
    finite = guards.find("finite")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for bound in range(100):
            guards.find(lambda before, after, bound=bound: after.update_norm < bound)
            assert guards.find("finite") is finite


@pytest.mark.parametrize("tasks", [False, True], ids=["single", "vmap"])
def test_gradients_through_a_chain_of_guarded_adaptations(tasks: bool) -> None:
    """No gradient flows through running statistics, with a guard or without."""
    net = model()
    unroll = compile_unroll(net, optim.sgd(lr=0.1), 2, loss=regress, backend="eager")
    support = tuple(value[:2].clamp(-2, 2) if tasks else value[0] for value in data())
    unroll = unroll.vmap() if tasks else unroll

    def gradient(keep: Any) -> dict[str, Tensor]:
        adapted = unroll.adapt(support, keep=keep, start=unroll.adapt(support, keep=keep))
        assert not any(value.requires_grad for value in adapted.buffers.values())
        return gradients(torch.stack([value.sum() for value in adapted.params.values()]).sum(), dict(net.named_parameters()))

    assert_near(gradient("finite"), gradient(None), torch.float64)
