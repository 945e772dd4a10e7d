"""Optimisers of the user's own, by the original's recipe: on the tape, and as the `opt` of `compile_unroll`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt import Adjoint, Replay, Unrolled, compile_unroll, higher
from adaptrt.errors import DataDependentControlFlow, NotTraceable, OptimizerMismatch, UnsupportedOptimizer
from adaptrt.higher.optim import DifferentiableOptimizer, DifferentiableSGD
from adaptrt.optim import source

K = 4


class Own(torch.optim.Optimizer):
    """What the user has: a real optimiser; here it only holds groups and state."""

    def __init__(self, params: Any, lr: Any = 0.1, **settings: Any) -> None:
        super().__init__(params, {"lr": lr, **settings})


class AdamLike(Own): ...


class MomentumLike(Own): ...


class SignLike(Own): ...


class DiffAdamLike(DifferentiableOptimizer):
    """State begun at the first step, a Python count, a branch on a setting."""

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        for group_idx, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            beta1, beta2 = group["betas"]
            for p_idx, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                if g is None:
                    continue
                state = self.state[group_idx][p_idx]
                if len(state) == 0:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                if group["weight_decay"] != 0:
                    g = g + group["weight_decay"] * p
                m = state["exp_avg"] = state["exp_avg"] * beta1 + (1 - beta1) * g
                v = state["exp_avg_sq"] = state["exp_avg_sq"] * beta2 + (1 - beta2) * g * g
                correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
                rate = group["lr"] * correction2**0.5 / correction1
                group["params"][p_idx] = p - rate * m / (v.sqrt() + group["eps"])


class DiffMomentumLike(DifferentiableOptimizer):
    """Another arithmetic at the first step, as that of PyTorch's momentum."""

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        for i, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            for j, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                if g is None:
                    continue
                state = self.state[i][j]
                if "momentum_buffer" in state:
                    g = state["momentum_buffer"] * group["momentum"] + (1 - group["dampening"]) * g
                state["momentum_buffer"] = g
                group["params"][j] = p - group["lr"] * g


class DiffSignLike(DifferentiableOptimizer):
    """No state; a smooth sign of the gradient, and a rate turned into a Python number."""

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        for group, grads in zip(self.param_groups, grouped_grads, strict=True):
            for j, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                if g is not None:
                    group["params"][j] = p - math.sqrt(group["lr"]) * torch.tanh(g)


SETTINGS: dict[type[Own], dict[str, Any]] = {
    AdamLike: {"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.0},
    MomentumLike: {"lr": 0.1, "momentum": 0.8, "dampening": 0.3},
    SignLike: {"lr": 0.01},
}
VERSIONS: dict[type[Own], type[DifferentiableOptimizer]] = {
    AdamLike: DiffAdamLike,
    MomentumLike: DiffMomentumLike,
    SignLike: DiffSignLike,
}
over_kinds = pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    tape, programs = dict(higher.optim._registered), dict(source._registered)
    for kind, version in VERSIONS.items():
        higher.register_optim(kind, version)
    yield
    higher.optim._registered.clear()
    higher.optim._registered.update(tape)
    source._registered.clear()
    source._registered.update(programs)


def make_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, generator=generator, dtype=torch.float64), torch.randn(6, 2, generator=generator, dtype=torch.float64)


def on_the_tape(net: nn.Module, opt: torch.optim.Optimizer, support: Any, query: Any) -> tuple[Tensor, list[Tensor]]:
    """Query loss after K steps, and the weights at the end."""
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(K):
            diffopt.step(F.mse_loss(fmodel(support[0]), support[1]))
        return F.mse_loss(fmodel(query[0]), query[1]), list(fmodel.parameters())


def meta_gradients(loss: Tensor, net: nn.Module, *learned: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, [*net.parameters(), *learned])]


def assert_near(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def grouped(net: nn.Sequential, kind: type[Own], **settings: Any) -> Own:
    """Two groups with rates of their own."""
    groups = [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters()), "lr": 0.03}]
    return kind(groups, **{**SETTINGS[kind], **settings})


@pytest.mark.parametrize("adjoint", [Replay(), Unrolled()], ids=["replay", "unrolled"])
@over_kinds
def test_compiled_is_what_the_tape_computes(kind: type[Own], adjoint: Adjoint) -> None:
    net = make_net()
    opt = grouped(net, kind)
    support, query = batch(1), batch(2)
    unroll = compile_unroll(net, opt, K, loss=F.mse_loss, adjoint=adjoint, backend="eager")
    wanted, weights = on_the_tape(net, opt, support, query)
    assert_near(meta_gradients(unroll(support, query), net), meta_gradients(wanted, net))
    assert_near(list(unroll.adapt(support).params.values()), weights)
    assert not opt.state and all(p.grad is None for p in net.parameters())


def test_compiled_by_inductor() -> None:
    net = make_net()
    opt = grouped(net, AdamLike)
    support, query = batch(1), batch(2)
    unroll = compile_unroll(net, opt, K, loss=F.mse_loss, adjoint=Replay(), backend="inductor")
    assert_near(meta_gradients(unroll(support, query), net), meta_gradients(on_the_tape(net, opt, support, query)[0], net))


@over_kinds
def test_tasks(kind: type[Own]) -> None:
    net = make_net()
    opt = grouped(net, kind)
    supports, queries = [batch(1), batch(3)], [batch(2), batch(4)]
    stacked = [tuple(torch.stack(part) for part in zip(*batches, strict=True)) for batches in (supports, queries)]
    loss = compile_unroll(net, opt, K, loss=F.mse_loss, backend="eager").vmap()(*stacked)
    wanted = torch.stack([on_the_tape(net, opt, s, q)[0] for s, q in zip(supports, queries, strict=True)]).mean()
    assert_near(meta_gradients(loss, net), meta_gradients(wanted, net))


@pytest.mark.parametrize("kind", [AdamLike, MomentumLike], ids=["adam", "momentum"])
def test_state_of_the_instance_is_where_it_starts(kind: type[Own]) -> None:
    """Also where some parameters have none yet, and when going on from a result."""
    net = make_net()
    opt = grouped(net, kind)
    support, query = batch(1), batch(2)
    for p in list(net.parameters())[:3]:
        if kind is AdamLike:
            opt.state[p] = {"step": 3, "exp_avg_sq": torch.rand_like(p), "exp_avg": torch.randn_like(p)}
        else:
            opt.state[p] = {"momentum_buffer": torch.randn_like(p)}
    unroll = compile_unroll(net, opt, K, loss=F.mse_loss, backend="eager")
    wanted, weights = on_the_tape(net, opt, support, query)
    assert_near(meta_gradients(unroll(support, query), net), meta_gradients(wanted, net))
    half = compile_unroll(net, opt, K // 2, loss=F.mse_loss, backend="eager")
    assert_near(list(half.adapt(support, start=half.adapt(support)).params.values()), weights)


@pytest.mark.parametrize("key", ["lr", "eps", "weight_decay"])
def test_settings_are_learned(key: str) -> None:
    net = make_net()
    learned = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    opt = AdamLike(net.parameters(), **{**SETTINGS[AdamLike], key: learned})
    support, query = batch(1), batch(2)
    unroll = compile_unroll(net, opt, K, loss=F.mse_loss, backend="eager")
    found = meta_gradients(unroll(support, query), net, learned)
    assert_near(found, meta_gradients(on_the_tape(net, opt, support, query)[0], net, learned))
    assert float(found[-1].abs()) > 1e-6


def test_a_setting_is_an_input_and_what_is_decided_by_it_is_looked_at() -> None:
    net = make_net()
    opt = AdamLike(net.parameters(), **SETTINGS[AdamLike])
    support, query = batch(1), batch(2)
    unroll = compile_unroll(net, opt, K, loss=F.mse_loss, backend="eager")
    indices: list[Any] = []
    for lr, decay in ((0.1, 0.0), (0.2, 0.0), (0.2, 0.3), (0.2, 0.4), (0.1, 0.0)):
        opt.param_groups[0].update(lr=lr, weight_decay=decay)
        wanted = on_the_tape(net, opt, support, query)[0]
        assert_near(meta_gradients(unroll(support, query), net), meta_gradients(wanted, net))
        indices.append(unroll._reader.structure())
    assert indices[0] == indices[1] == indices[4] != indices[2] == indices[3]


def test_a_setting_turned_into_a_number_is_a_constant_that_is_looked_at() -> None:
    net = make_net()
    opt = SignLike(net.parameters(), lr=0.01)
    support, query = batch(1), batch(2)
    unroll = compile_unroll(net, opt, K, loss=F.mse_loss, backend="eager")
    for lr in (0.01, 0.04):
        opt.param_groups[0]["lr"] = lr
        assert_near(meta_gradients(unroll(support, query), net), meta_gradients(on_the_tape(net, opt, support, query)[0], net))
    opt.param_groups[0]["lr"] = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(NotTraceable, match=r"'lr', which requires grad.*torch\.sqrt"):
        unroll(support, query)


class BranchLike(Own): ...


class DiffBranchLike(DifferentiableOptimizer):
    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        for i, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            for j, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                state = self.state[i][j]
                state["step"] = state.get("step", 0) + 1
                rate = group["lr"] if state["step"] < 3 else 0.0
                group["params"][j] = p - rate * g


class GrowingLike(Own): ...


class DiffGrowingLike(DifferentiableOptimizer):
    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        for i, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            for j, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                state = self.state[i][j]
                state["past"] = [*state.get("past", []), g]
                group["params"][j] = p - group["lr"] * sum(state["past"])


def test_what_cannot_be_a_program_is_refused_by_name() -> None:
    net = make_net()
    support, query = batch(1), batch(2)
    with pytest.raises(UnsupportedOptimizer, match="BranchLike"):
        compile_unroll(net, BranchLike(net.parameters()), K)
    higher.register_optim(BranchLike, DiffBranchLike)
    on_the_tape(net, BranchLike(net.parameters()), support, query)
    with pytest.raises(DataDependentControlFlow, match="test_higher_registered"):
        compile_unroll(net, BranchLike(net.parameters()), K, loss=F.mse_loss, backend="eager")(support, query)
    higher.register_optim(GrowingLike, DiffGrowingLike)
    with pytest.raises(NotTraceable, match=r"same state at every step.*past"):
        compile_unroll(net, GrowingLike(net.parameters()), K, loss=F.mse_loss, backend="eager")
    opt = MomentumLike(net.parameters(), **SETTINGS[MomentumLike])
    unroll = compile_unroll(net, opt, K, loss=F.mse_loss, backend="eager")
    opt.state[next(net.parameters())] = {"buffer": torch.zeros(4, 3)}
    with pytest.raises(OptimizerMismatch, match="momentum_buffer"):
        unroll(support, query)


class OurSGD(torch.optim.SGD):
    """A subclass that steps as its parent does."""


def test_a_class_registered_with_a_version_of_ours() -> None:
    net = make_net()
    opt = OurSGD(net.parameters(), lr=0.1, momentum=0.9)
    support, query = batch(1), batch(2)
    with pytest.raises(UnsupportedOptimizer):
        compile_unroll(net, opt, K)
    higher.register_optim(OurSGD, DifferentiableSGD)
    unroll = compile_unroll(net, opt, K, loss=F.mse_loss, backend="eager")
    assert_near(meta_gradients(unroll(support, query), net), meta_gradients(on_the_tape(net, opt, support, query)[0], net))
