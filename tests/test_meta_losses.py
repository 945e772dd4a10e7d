"""Query losses by task and by step, their weighted sums, and what `evaluate` returns, against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from adaptrt import Adjoint, CompiledUnroll, FirstOrder, Replay, Stash, Truncated, Unrolled, compile_unroll, optim
from adaptrt.errors import AdaptrtError, InvalidArgument, InvalidType, LabelOutOfRange, NonFiniteInput, ShapeChanged
from tests import naive
from tests.gradients import gradients
from tests.models import norm_mlp as model
from tests.models import normal, regress
from tests.pairs import ONE_BATCH_AND_PER_STEP, SINGLE_AND_TASKS, by_name, over_pairs
from tests.tolerances import assert_near

K, T = 3, 2
LR = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
HYPER: dict[str, Any] = {"lr": LR, "momentum": 0.8}
ADJOINTS: list[Adjoint] = [Unrolled(), Replay(), Stash(), FirstOrder(), Truncated(2)]
over_adjoints = pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
over_tasks = pytest.mark.parametrize("tasks", [False, True], ids=["single", "vmap"])
over_all = over_pairs(adjoint=by_name(ADJOINTS), tasks=SINGLE_AND_TASKS, per_step=ONE_BATCH_AND_PER_STEP)


def data(tasks: bool, per_step: bool = False) -> tuple[Any, Any]:
    generator, lead = Generator().manual_seed(1), (T,) if tasks else ()
    steps = (K,) if per_step else ()
    support = normal(generator, *lead, *steps, 5, 3), normal(generator, *lead, *steps, 5, 2)
    return support, (normal(generator, *lead, 4, 3), normal(generator, *lead, 4, 2))


def make(net: nn.Module, adjoint: Adjoint | str, tasks: bool, backend: str = "eager", **options: Any) -> CompiledUnroll:
    unroll = compile_unroll(net, optim.sgd(**HYPER), K, loss=regress, adjoint=adjoint, backend=backend, **options)
    return unroll.vmap() if tasks else unroll


def wanted(net: nn.Module, adjoint: Adjoint, support: Any, query: Any, tasks: bool, per_step: bool = False) -> Tensor:
    """The query losses after every step, (k,) or [T, k], by the oracle: an adaptation of one step after another."""
    rows: list[Tensor] = []
    loop = naive.Loop(net, regress, naive.sgd, HYPER, 1, first_order=adjoint.detach_gradient)
    for task in range(T) if tasks else [None]:
        own, asked = (tuple(value if task is None else value[task] for value in part) for part in (support, query))
        after: Any = naive.Start(dict(net.named_parameters()), {}, dict(net.named_buffers()), {})
        losses: list[Tensor] = []
        for step in range(K):
            after = naive.adapt(loop, after, tuple(value[step] for value in own) if per_step else own)
            if step < adjoint.num_constant_steps(K):
                after = naive.detached(after)
            losses.append(naive.evaluate(loop, after.params, after.buffers, asked)[0])
        rows.append(torch.stack(losses))
    return torch.stack(rows) if tasks else rows[0]


def assert_same(net: nn.Module, found: Tensor, right: Tensor, more: dict[str, Tensor] | None = None) -> None:
    """Values, and gradients for a random cotangent, by the learning rate, the model's parameters and what else is given."""
    assert found.shape == right.shape
    cotangent = torch.randn(found.shape, generator=Generator().manual_seed(5), dtype=torch.float64)
    leaves = {"lr": LR, **dict(net.named_parameters()), **(more or {})}
    # Nothing depends on the start of a truncated adaptation.
    assert_near(gradients(found, leaves, cotangent), gradients(right, leaves, cotangent), torch.float64)


@over_all
def test_losses_of_every_step(adjoint: Adjoint, tasks: bool, per_step: bool) -> None:
    net = model()
    support, query = data(tasks, per_step)
    right = wanted(net, adjoint, support, query, tasks, per_step)
    unroll = make(net, adjoint, tasks, per_step=per_step)
    assert_same(net, unroll(support, query, every_step=True, reduction="none"), right)
    right = wanted(net, adjoint, support, query, tasks, per_step)
    assert_same(net, unroll(support, query, every_step=True), right.mean(0) if tasks else right)


@over_tasks
@over_adjoints
def test_a_weighted_sum_of_the_losses_of_every_step(adjoint: Adjoint, tasks: bool) -> None:
    net = model()
    support, query = data(tasks)
    weights = torch.tensor([0.2, 0.3, 0.7], dtype=torch.float64, requires_grad=True)
    unroll = make(net, adjoint, tasks)
    for reduction in ("none", "mean"):
        right = (wanted(net, adjoint, support, query, tasks) * weights).sum(-1)
        right = right.mean() if reduction == "mean" else right
        assert_same(net, unroll(support, query, step_weights=weights, reduction=reduction), right, {"weights": weights})


@over_all
def test_losses_by_task(adjoint: Adjoint, tasks: bool, per_step: bool) -> None:
    net = model()
    support, query = data(tasks, per_step)
    unroll = make(net, adjoint, tasks, per_step=per_step)
    assert_same(net, unroll(support, query, reduction="none"), wanted(net, adjoint, support, query, tasks, per_step)[..., -1])


@over_tasks
@over_adjoints
def test_evaluation(adjoint: Adjoint, tasks: bool) -> None:
    net = model()
    support, query = data(tasks)
    unroll = make(net, adjoint, tasks)
    result = unroll.evaluate(support, query)
    right = wanted(net, adjoint, support, query, tasks)[..., -1]
    assert_same(net, result.losses, right)
    result, right = unroll.evaluate(support, query), wanted(net, adjoint, support, query, tasks)[..., -1]
    assert_same(net, result.loss, right.mean())
    assert torch.equal(unroll.evaluate(support, query).loss, result.loss)
    assert_near({"outputs": result.outputs.detach()}, {"outputs": result.adapted(query[0]).detach()}, torch.float64)
    assert_near(dict(result.adapted.detach().params), dict(unroll.adapt(support).detach().params), torch.float64)
    outputs = unroll.evaluate(support, query).outputs
    assert_same(net, outputs, unroll.adapt(support)(query[0]))


def test_compiled() -> None:
    net, adjoint, tasks = model(), Replay(), True
    support, query = data(tasks)
    unroll = make(net, adjoint, tasks, "inductor")
    assert_same(net, unroll(support, query, every_step=True, reduction="none"), wanted(net, adjoint, support, query, tasks))
    assert_same(net, unroll.evaluate(support, query).losses, wanted(net, adjoint, support, query, tasks)[..., -1])


@over_tasks
def test_they_go_on_from_a_start(tasks: bool) -> None:
    net = model()
    support, query = data(tasks)
    unroll = make(net, Stash(), tasks)
    start = unroll.adapt(support)
    by_step = unroll(support, query, start=start, every_step=True, reduction="none")
    assert_same(net, by_step[..., -1], unroll(support, query, start=unroll.adapt(support), reduction="none"))
    assert_near({"value": by_step[..., -1].mean().detach()}, {"value": unroll(support, query, start=start).detach()}, torch.float64)


def test_a_start_without_task_axis_is_that_of_every_task() -> None:
    net = model()
    support, query = data(tasks=True)
    unroll = make(net, Stash(), tasks=True)
    found = unroll(support, query, start=unroll.start(), every_step=True, reduction="none")
    assert_same(net, found, wanted(net, Stash(), support, query, True))


def test_noise_is_drawn_in_the_same_order() -> None:
    """A generator gives the same losses whichever way they are asked for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Linear(8, 2)).double()
    support, query = data(tasks=True)
    unroll = make(net, Replay(), tasks=True)
    one, other = (unroll(support, query, reduction=r, generator=Generator().manual_seed(3)) for r in ("mean", "none"))
    assert_near({"loss": one.detach()}, {"loss": other.mean().detach()}, torch.float64)
    assert len(set(other.tolist())) == T


def test_a_call_that_fails_takes_its_draws_back() -> None:
    """Also where the query is refused after all steps have drawn."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Linear(8, 2)).double()
    support, query = data(tasks=False)
    bad = query[0].clone(), query[1].clone()
    bad[0][0] = torch.nan
    unroll = make(net, Replay(), tasks=False)
    state = torch.get_rng_state()
    for call in (
        lambda: unroll(support, bad),
        lambda: unroll(support, bad, every_step=True),
        lambda: unroll(support, bad, reduction="none"),
        lambda: unroll.evaluate(support, bad),
    ):
        with pytest.raises(NonFiniteInput):
            call()
        assert torch.equal(torch.get_rng_state(), state)
    for call in (lambda: unroll(support, query, every_step=True), lambda: unroll.evaluate(support, query)):
        call()
        assert not torch.equal(torch.get_rng_state(), state)
        torch.set_rng_state(state)


def test_a_start_that_is_none() -> None:
    ways: list[dict[str, Any]] = [{"every_step": True}, {"step_weights": torch.ones(K)}, {"reduction": "none"}]
    for options in ways:
        with pytest.raises(InvalidType, match="start must be what adapt"):
            make(model(), Replay(), False)(*data(False), start={"a": 1}, **options)  # type: ignore[arg-type]


def test_one_task_that_diverges_shows() -> None:
    """The others' losses and gradients are as without it."""
    net = model()
    support, query = data(tasks=True)
    broken = support[0].clone(), support[1].clone()
    broken[1][1] = 1e300
    losses = make(net, Replay(), tasks=True)(broken, query, reduction="none")
    assert losses.isfinite().tolist() == [True, False]
    right = wanted(net, Replay(), support, query, True)[0, -1]
    assert_near({"loss": losses[0].detach()}, {"loss": right.detach()}, torch.float64)


@over_tasks
def test_warmup(tasks: bool) -> None:
    net = model()
    support, query = data(tasks)
    unroll = make(net, Replay(), tasks, on_new_shape="error").warmup(support, query)
    calls: list[Callable[[], Any]] = [
        lambda: unroll.evaluate(support, query),
        lambda: unroll(support, query, reduction="none") if tasks else unroll(support, query, every_step=True),
        lambda: unroll(support, query, every_step=True),
    ]
    for call in calls:
        with pytest.raises(ShapeChanged, match="evaluate=True"):
            call()
    unroll.warmup(support, query, evaluate=True)
    before = len(unroll.graphs())
    for call in calls:
        call()
    unroll(support, query, step_weights=torch.ones(K, dtype=torch.float64)).backward()
    unroll.evaluate(support, query).loss.backward()
    assert len(unroll.graphs()) == before
    assert "evaluate" in str(unroll.explain())


WRONG: dict[str, tuple[dict[str, Any], type[AdaptrtError], str]] = {
    "reduction": ({"reduction": "sum"}, InvalidArgument, "reduction must be one of 'mean', 'none'"),
    "weights": ({"step_weights": [1.0] * K}, InvalidType, "step_weights must be a floating-point tensor.*got list"),
    "int weights": ({"step_weights": torch.ones(K, dtype=torch.long)}, InvalidType, r"got int64\[3\]"),
    "number": ({"step_weights": torch.ones(K + 1)}, InvalidArgument, r"shape \[3\], got \[4\]"),
    "meta": ({"step_weights": torch.ones(K, device="meta")}, InvalidArgument, "step_weights is on meta"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    options, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        make(model(), Replay(), False)(*data(False), **options)


def test_wrong_labels() -> None:
    unroll = compile_unroll(nn.Linear(3, 2), optim.sgd(lr=0.1), K, backend="eager")
    support, query = (torch.randn(4, 3), torch.tensor([0, 1, 0, 1])), (torch.randn(2, 3), torch.tensor([0, 2]))
    for call in (lambda: unroll.evaluate(support, query), lambda: unroll(support, query, every_step=True)):
        with pytest.raises(LabelOutOfRange, match="query target holds 2"):
            call()
    with pytest.raises(InvalidArgument, match="no axis of examples"):
        unroll.vmap().evaluate(support, (query[0], torch.tensor([0, 1])))


def test_warmup_of_evaluation_needs_a_query() -> None:
    with pytest.raises(InvalidArgument, match="needs a query batch"):
        make(model(), Replay(), False).warmup(data(False)[0], evaluate=True)
