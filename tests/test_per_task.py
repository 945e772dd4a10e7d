"""Hyperparameters with a value for each task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from adaptrt import Adjoint, CompiledUnroll, FirstOrder, Implicit, Replay, Stash, Truncated, Unrolled, compile_unroll, optim
from adaptrt.adjoint import auto
from adaptrt.errors import InvalidArgument, InvalidType
from tests import naive
from tests.gradients import gradients
from tests.models import normal, regress
from tests.tolerances import assert_near

K, T = 3, 2
ADJOINTS: list[Adjoint] = [Unrolled(), Replay(), Stash(), FirstOrder(), Truncated(2)]
over_adjoints = pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data(*lead: int) -> tuple[Any, Any]:
    generator = Generator().manual_seed(1)
    support = normal(generator, T, *lead, 5, 3), normal(generator, T, *lead, 5, 2)
    return support, (normal(generator, T, 4, 3), normal(generator, T, 4, 2))


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).requires_grad_()


def mixed() -> tuple[Any, Callable[[int], Any], dict[str, Tensor]]:
    """Rates by task, one for each element, beside a decay that all tasks share: the optimiser, each task's own numbers, and all leaves."""
    generator = Generator().manual_seed(2)
    rates = {
        name: torch.rand(T, *value.shape, generator=generator, dtype=torch.float64).mul(0.2).requires_grad_()
        for name, value in model().named_parameters()
    }
    momentum, decay = leaf(0.8, 0.3), leaf(0.01)
    opt = optim.sgd(
        lr={name: optim.per_task(rate) for name, rate in rates.items()}, momentum=optim.per_task(momentum), weight_decay=decay.reshape(())
    )

    def of_task(task: int) -> Any:
        return {"lr": {name: rate[task] for name, rate in rates.items()}, "momentum": momentum[task], "weight_decay": decay[0]}

    return opt, of_task, {**{f"rate of {name}": rate for name, rate in rates.items()}, "momentum": momentum, "decay": decay}


def by_hand(net: nn.Module, adjoint: Adjoint, of_task: Callable[[int], Any], support: Any, query: Any, per_step: bool) -> Any:
    """The query loss of each task, [T], and each task's adapted state."""
    constant = adjoint.num_constant_steps(K)
    losses, states = [], []
    for task in range(T):
        loop = naive.Loop(net, regress, naive.sgd, of_task(task), K, per_step, adjoint.detach_gradient, K - constant if constant else None)
        start = naive.Start(dict(net.named_parameters()), {}, {}, {})
        states.append(naive.adapt(loop, start, [value[task] for value in support]))
        losses.append(naive.evaluate(loop, states[-1].params, {}, [value[task] for value in query])[0])
    return torch.stack(losses), states


def check(adjoint: Adjoint, backend: str, per_step: bool = False) -> CompiledUnroll:
    """Meta-loss, its parts, and everything that `adapt` returns, with all gradients."""
    net = model()
    support, query = data(*([K] if per_step else []))
    opt, of_task, hyper = mixed()
    unroll = compile_unroll(net, opt, K, loss=regress, adjoint=adjoint, backend=backend, per_step=per_step).vmap()
    leaves = {**hyper, **dict(net.named_parameters())}
    right, states = by_hand(net, adjoint, of_task, support, query, per_step)
    assert_near(gradients(unroll(support, query), leaves), gradients(right.mean(), leaves), torch.float64)
    adapted = unroll.adapt(support, keep="finite")
    found = torch.stack([value.square().sum((*range(1, value.dim()),)) for value in (*adapted.params.values(), adapted.losses)]).sum(0)
    wanted = [torch.stack([value.square().sum() for value in (*state.params.values(), state.losses)]).sum() for state in states]
    cotangent = leaf(0.4, 1.7).detach()
    assert_near(gradients(found, leaves, cotangent), gradients(torch.stack(wanted), leaves, cotangent), torch.float64)
    return unroll


@pytest.mark.parametrize("per_step", [False, True], ids=["one batch", "per step"])
@over_adjoints
def test_numbers_and_gradients(adjoint: Adjoint, per_step: bool) -> None:
    check(adjoint, "eager", per_step)


@pytest.mark.parametrize("adjoint", [Unrolled(), Stash()], ids=str)
def test_numbers_and_gradients_compiled(adjoint: Adjoint) -> None:
    check(adjoint, "inductor")


@pytest.mark.parametrize("adjoint", [Unrolled(), Stash()], ids=str)
def test_one_task_after_another(adjoint: Adjoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "MIN_FLOPS_OF_A_TASK", 0)
    assert "EachTask" in str(check(adjoint, "eager").explain())


def test_losses_by_step_and_states() -> None:
    net, (support, query) = model(), data()
    opt, of_task, hyper = mixed()
    unroll = compile_unroll(net, opt, K, loss=regress, backend="eager").vmap()
    by_step = unroll(support, query, every_step=True, reduction="none")
    right, states = by_hand(net, Unrolled(), of_task, support, query, False)
    assert_near(gradients(by_step[:, -1].sum(), hyper), gradients(right.sum(), hyper), torch.float64)
    first = unroll.adapt(support, outputs="first")
    assert_near({"losses": first.losses.detach()}, {"losses": torch.stack([state.losses for state in states]).detach()}, torch.float64)
    again = unroll.adapt(support, start=first.detach())
    for task in range(T):
        loop = naive.Loop(net, regress, naive.sgd, of_task(task), K)
        wanted = naive.adapt(loop, states[task], [value[task] for value in support])
        assert_near(dict(again[task].detach().params), {n: v.detach() for n, v in wanted.params.items()}, torch.float64)


def test_values_are_read_at_every_call() -> None:
    net, (support, _) = model(), data()
    rates = torch.tensor([0.1, 0.2], dtype=torch.float64)
    unroll = compile_unroll(net, optim.sgd(lr=optim.per_task(rates)), K, loss=regress, backend="eager").vmap()
    unroll.adapt(support)
    before = list(unroll.graphs())
    rates.copy_(torch.tensor([0.0, 0.05], dtype=torch.float64))
    adapted = unroll.adapt(support)
    assert list(unroll.graphs()) == before
    plain = compile_unroll(net, optim.sgd(lr=0.05), K, loss=regress, backend="eager").adapt([value[1] for value in support])
    assert torch.equal(adapted[0].params["0.weight"], net[0].weight)  # type: ignore[index]
    assert_near(dict(adapted[1].detach().params), dict(plain.detach().params), torch.float64)


def test_by_step_in_schedules_chains_and_wrappers() -> None:
    """Wherever a hyperparameter may be a tensor."""
    net, (support, query) = model(), data()
    table = torch.tensor([[0.1, 0.2, 0.05], [0.02, 0.0, 0.3]], dtype=torch.float64, requires_grad=True)
    norms, strengths, base = leaf(0.5, 3.0), leaf(0.2, 0.0), leaf(0.1, 0.3)

    def made(lr: Any, max_norm: Any, strength: Any, base: Any) -> list[Any]:
        return [
            optim.chain(optim.clip_by_global_norm(max_norm), optim.proximal(optim.sgd(lr=optim.per_step(lr)), strength)),
            optim.adam(lr=optim.schedule(lambda step, base: base / (step + 1), base=base), betas=(0.9, strength)),
        ]

    by_task = made(*[optim.per_task(value) for value in (table, norms, strengths, base)])
    for place, opt in enumerate(by_task):
        unroll = compile_unroll(net, opt, K, loss=regress, backend="eager").vmap()
        losses = [
            compile_unroll(net, made(table[t], norms[t], strengths[t], base[t])[place], K, loss=regress, backend="eager")(
                *[tuple(value[t] for value in part) for part in (support, query)]
            )
            for t in range(T)
        ]
        leaves = {"table": table, "norms": norms, "strengths": strengths, "base": base, **dict(net.named_parameters())}
        assert_near(gradients(unroll(support, query), leaves), gradients(torch.stack(losses).mean(), leaves), torch.float64)


def test_implicit_gradients() -> None:
    net = nn.Linear(3, 2).double()
    (support, query), decay = data(), leaf(0.5, 2.0)
    leaves = {"decay": decay}

    def loss(adjoint: Adjoint, k: int) -> Tensor:
        opt = optim.sgd(lr=0.3, weight_decay=optim.per_task(decay))
        return compile_unroll(net, opt, k, loss=regress, adjoint=adjoint, backend="eager").vmap()(support, query)

    assert_near(gradients(loss(Implicit(tolerance=1e-12), 250), leaves), gradients(loss(Replay(), 250), leaves), torch.float64)


def test_bad_input() -> None:
    net, (support, _) = model(), data()
    wrong_values: list[tuple[Any, type[Exception], str]] = [
        (0.1, InvalidType, "per_task takes a floating-point tensor, one value for each task, got float"),
        (torch.tensor([1, 2]), InvalidType, "got torch.int64"),
        (torch.tensor(0.1), InvalidArgument, r"along its first axis, got shape \[\]"),
    ]
    for value, error, message in wrong_values:
        with pytest.raises(error, match=message):
            optim.per_task(value)
    rates = optim.per_task(torch.full((3,), 0.1, dtype=torch.float64))
    with pytest.raises(InvalidArgument, match=r"lr must be a number for each task, got per_task\(\) of a tensor of shape \[2, 2\]"):
        optim.sgd(lr=optim.per_task(torch.zeros(2, 2)))
    with pytest.raises(InvalidArgument, match=r"an entry for each task and step, shape \[T, k\]"):
        optim.sgd(lr=optim.per_step(rates))
    unroll = compile_unroll(net, optim.sgd(lr=rates), K, loss=regress, backend="eager")
    with pytest.raises(InvalidArgument, match="'lr' has a value for each of 3 tasks, and the support batch has 2 tasks"):
        unroll.vmap().adapt(support)
    with pytest.raises(InvalidArgument, match=r"'lr' has a value for each of 3 tasks, and the call has no task axis; call vmap\(\)"):
        unroll.adapt([value[0] for value in support])
    wrong = {name: optim.per_task(torch.zeros(T, 7, dtype=torch.float64)) for name, _ in net.named_parameters()}
    with pytest.raises(InvalidArgument, match=r"must be a scalar or of the parameter's shape \[4, 3\], got shape \[7\]"):
        compile_unroll(net, optim.sgd(lr=wrong), K, loss=regress, backend="eager").vmap().adapt(support)
    opt = optim.sgd(lr=rates)
    with pytest.raises(InvalidArgument, match="that of one task"):
        opt.update({"w": torch.zeros(2)}, opt.init({"w": torch.zeros(2)}), {"w": torch.zeros(2)}, opt.hyper)


def test_in_the_groups_of_an_instance() -> None:
    net, (support, query) = model(), data()
    rates = leaf(0.1, 0.3)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    opt.param_groups[0]["lr"] = optim.per_task(rates)
    found = compile_unroll(net, opt, K, loss=regress, backend="eager").vmap()(support, query)
    pure = compile_unroll(net, optim.sgd(lr=optim.per_task(rates)), K, loss=regress, backend="eager").vmap()(support, query)
    assert_near(gradients(found, {"rates": rates}), gradients(pure, {"rates": rates}), torch.float64)
