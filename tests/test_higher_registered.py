"""Optimisers of the user's own, by the original's recipe: on the tape, and as the `opt` of `compile_unroll`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt import Adjoint, Replay, Unrolled, compile_unroll, higher
from adaptrt.errors import DataDependentControlFlow, NotTraceable, OptimizerMismatch, UnsupportedOptimizer
from adaptrt.higher.optim import DifferentiableOptimizer, DifferentiableSGD
from adaptrt.higher.registered import _MAX_BUILT, RegisteredSource
from adaptrt.optim.registry import REGISTERED

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
    before = dict(REGISTERED)
    for kind, version in VERSIONS.items():
        higher.register_optim(kind, version)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


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


@pytest.mark.slow
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


@pytest.mark.parametrize("kind", [AdamLike, MomentumLike], ids=["adam", "momentum"])
def test_state_that_the_instance_gets_and_loses_later_is_seen(kind: type[Own]) -> None:
    net = make_net()
    opt = grouped(net, kind)
    support, query = batch(1), batch(2)
    unroll = compile_unroll(net, opt, K, loss=F.mse_loss, backend="eager")
    seen: list[float] = []
    for held in (False, True, False):
        for p in net.parameters() if held else ():
            zeros, ones = torch.zeros_like(p), torch.ones_like(p)
            opt.state[p] = {"step": 3, "exp_avg": ones, "exp_avg_sq": ones} if kind is AdamLike else {"momentum_buffer": zeros}
        if not held:
            opt.state.clear()
        wanted = on_the_tape(net, opt, support, query)[0]
        assert_near(meta_gradients(unroll(support, query), net), meta_gradients(wanted, net))
        seen.append(float(wanted.detach()))
    assert seen[0] == seen[2] != seen[1]


def test_programs_for_settings_long_gone_are_forgotten() -> None:
    net = make_net()
    opt = grouped(net, MomentumLike, label=0)
    unroll = compile_unroll(net, opt, 1, loss=F.mse_loss, backend="eager")
    for label in range(40):  # no number: a constant that is looked at
        for group in opt.param_groups:
            group["label"] = str(label)
        unroll._settings.source.structure()
    assert isinstance(unroll._settings.source, RegisteredSource)
    assert len(unroll._settings.source._built) == _MAX_BUILT
    assert torch.isfinite(unroll(batch(1), batch(2)))


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
    num_plans: list[int] = []
    for lr, decay in ((0.1, 0.0), (0.2, 0.0), (0.2, 0.3), (0.2, 0.4), (0.1, 0.0)):
        opt.param_groups[0].update(lr=lr, weight_decay=decay)
        wanted = on_the_tape(net, opt, support, query)[0]
        assert_near(meta_gradients(unroll(support, query), net), meta_gradients(wanted, net))
        num_plans.append(len(unroll.explain().adjoints))
    assert num_plans == [1, 1, 2, 2, 2]  # a number that is not zero decides otherwise than zero, whichever it is


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
    opt.state[next(net.parameters())] = {"momentum_buffer": torch.zeros(3)}  # it would be broadcast
    with pytest.raises(OptimizerMismatch, match=r"momentum_buffer: float\d\d\[4, 3\] expected, got float\d\d\[3\]"):
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


# --- what an `_update` may do, and what is refused


class Odd(Own): ...


Update = Callable[[Any, Any, int, int, Tensor, Tensor, Any], Tensor]
"""(version, group, its index, the parameter's index, parameter, gradient, state) -> new parameter."""


def decays_in_place(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    g.add_(0.3 * p)
    state["past"] = 0.5 * state["past"] + g if state else g * 1.0
    return p - group["lr"] * state["past"]


def keeps_the_gradient(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    state["past"] = state.get("past", 0.0 * g)
    state["past"].add_(g)
    return p - group["lr"] * state["past"]


def asks_for_the_type(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    return p - group["lr"] * g if isinstance(group["lr"], float) else p - 2 * group["lr"] * g


def compares_settings(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    return p - (group["lr"] if group["lr"] < group["other"] else group["other"]) * g


def remembers_the_first_rate(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    state.setdefault("first", group["lr"])
    state["norm"] = 0.9 * state.get("norm", 0.0) + g.norm()
    return p - state["first"] * g / (1 + state["norm"])


def keeps_a_nest(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    state["nest"] = [state["nest"][1] if state else 0 * g, {"g": g}["g"], None, "name", True]
    return p - group["lr"] * (g + 0.5 * state["nest"][0])


def writes_a_setting(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    group["lr"] = group["lr"] * 0.5
    return p - group["lr"] * g


def writes_a_new_setting(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    group["k"] = group.get("k", 0) + 1
    return p - group["lr"] / group["k"] * g


def writes_an_attribute(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    self.t = getattr(self, "t", 0) + 1
    return p - group["lr"] / self.t * g


def grows_an_attribute(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    self.past.append(1)
    return p - group["lr"] / len(self.past) * g


def counts_in_a_tensor(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    self.count += 1
    return p - group["lr"] / self.count * g


def keeps_a_window(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    self.window.append(1)
    return p - group["lr"] / len(self.window) * g


def keeps_shared_state(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    shared = self.state[i]["shared"]
    shared["t"] = shared.get("t", 0) + 1
    return p - group["lr"] / shared["t"] * g


def keeps_an_object(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    state["held"] = object()
    return p - group["lr"] * g


def changes_its_dtype(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    state["mask"] = state["mask"] * 0.5 if state else g > 0
    return p - group["lr"] * g


def changes_its_shape(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    state["mean"] = g.mean() if "mean" not in state else state["mean"].unsqueeze(0)
    return p - group["lr"] * g


def draws(self: Any, group: Any, i: int, j: int, p: Tensor, g: Tensor, state: Any) -> Tensor:
    return p - group["lr"] * g * torch.rand(())


def made_with(update: Update) -> type[DifferentiableOptimizer]:
    class Version(DifferentiableOptimizer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.past: list[int] = []
            self.count, self.window = torch.zeros(()), deque[int](maxlen=3)

        def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
            for i, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
                for j, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                    if g is not None:
                        group["params"][j] = update(self, group, i, j, p, g, self.state[i][j])

    return Version


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "update", [decays_in_place, keeps_the_gradient, asks_for_the_type, compares_settings, remembers_the_first_rate, keeps_a_nest]
)
def test_update_may(update: Update, dtype: torch.dtype) -> None:
    higher.register_optim(Odd, made_with(update))
    net = make_net().to(dtype)
    net.register_parameter("scale", nn.Parameter(torch.ones((), dtype=dtype)))  # no loss uses it
    support, query = ([value.to(dtype) for value in batch(seed)] for seed in (1, 2))
    opt = Odd(net.parameters(), lr=0.1, other=0.05)
    unroll = compile_unroll(net, opt, K, loss=F.mse_loss, backend="eager")
    for other in (0.05, 0.2):
        opt.param_groups[0]["other"] = other
        loss, wanted = unroll(support, query), on_the_tape(net, opt, support, query)[0]
        grads = [torch.autograd.grad(value, list(net.parameters()), allow_unused=True, materialize_grads=True) for value in (loss, wanted)]
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        for a, b in zip((loss, *grads[0]), (wanted, *grads[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("update", "says"),
    [
        (writes_a_setting, "writes to a setting"),
        (writes_a_new_setting, "writes to a setting"),
        (writes_an_attribute, r"writes to self\.t"),
        (grows_an_attribute, r"writes to self\.past"),
        (counts_in_a_tensor, r"writes to self\.count"),
        (keeps_a_window, r"writes to self\.window"),
        (keeps_shared_state, "under 'shared'"),
        (keeps_an_object, "keeps a object in the state"),
        (changes_its_dtype, "dtypes"),
        (changes_its_shape, r"mean: float\d\d\[\] expected, got float\d\d\[1\]"),
        (draws, "random"),
    ],
)
def test_update_may_not(update: Update, says: str) -> None:
    """What the tape runs and a program would get wrong."""
    higher.register_optim(Odd, made_with(update))
    net = make_net()
    on_the_tape(net, Odd(net.parameters()), batch(1), batch(2))
    state = torch.get_rng_state()
    with pytest.raises(NotTraceable, match=says):
        compile_unroll(net, Odd(net.parameters()), K, loss=F.mse_loss, backend="eager")
    assert torch.equal(state, torch.get_rng_state())


def test_learned_settings_have_no_type_to_ask_for() -> None:
    higher.register_optim(Odd, made_with(asks_for_the_type))
    net = make_net()
    with pytest.raises(NotTraceable, match="type of the setting 'lr'"):
        compile_unroll(net, Odd(net.parameters(), lr=torch.tensor(0.1, requires_grad=True)), K, loss=F.mse_loss, backend="eager")


class Doubled(DiffMomentumLike):
    def step(self, loss: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
        return super().step(2 * loss, *args, **kwargs)


class Called(DiffMomentumLike):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, grad_callback=lambda grads: [2 * g for g in grads], **kwargs)


class FirstOrderOnly(DiffMomentumLike):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, first_order=True, **kwargs)


@pytest.mark.parametrize(
    ("version", "says"),
    [(Doubled, "overrides step"), (Called, "sets a grad_callback"), (FirstOrderOnly, "sets a grad_callback or first_order")],
)
def test_what_a_program_would_not_run_is_refused(version: type[DifferentiableOptimizer], says: str) -> None:
    higher.register_optim(Odd, version)
    net = make_net()
    with pytest.raises(UnsupportedOptimizer, match=says):
        compile_unroll(net, Odd(net.parameters(), **SETTINGS[MomentumLike]), K)


class Scaled(DifferentiableOptimizer):
    """What `__init__` reads is looked at, too."""

    def __init__(self, other: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(other, *args, **kwargs)
        self.rates = [group["lr"] * other.scale for group in self.param_groups]

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        for group, rate, grads in zip(self.param_groups, self.rates, grouped_grads, strict=True):
            group["params"][:] = [p - rate * g for p, g in zip(group["params"], grads, strict=True)]


def test_attributes_of_the_instance_are_read_as_they_stand() -> None:
    higher.register_optim(Odd, Scaled)
    net = make_net()
    opt: Any = Odd(net.parameters(), lr=0.1)
    opt.scale = 1.0
    unroll = compile_unroll(net, opt, K, loss=F.mse_loss, backend="eager")
    for lr, scale in ((0.1, 1.0), (0.2, 1.0), (0.2, 3.0)):
        opt.param_groups[0]["lr"], opt.scale = lr, scale
        assert_near([unroll(batch(1), batch(2)).detach()], [on_the_tape(net, opt, batch(1), batch(2))[0].detach()])


class Clipped(DifferentiableSGD):
    """A version of ours, with something before it."""

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        super()._update([[None if g is None else g.clamp(-0.1, 0.1) for g in grads] for grads in grouped_grads], **kwargs)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_version_of_ours_may_be_extended(momentum: float) -> None:
    higher.register_optim(OurSGD, Clipped)
    net = make_net()
    opt = OurSGD(net.parameters(), lr=0.1, momentum=momentum, dampening=0.5)
    unroll = compile_unroll(net, opt, K, loss=F.mse_loss, backend="eager")
    for lr in (0.1, 0.3):
        opt.param_groups[0]["lr"] = lr
        wanted = on_the_tape(net, opt, batch(1), batch(2))[0]
        assert_near(meta_gradients(unroll(batch(1), batch(2)), net), meta_gradients(wanted, net))
    assert len(unroll._execution.planner.supports.entries()) == 1


class Half(nn.Module):
    """Uses one of its two layers, or both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
        self.both = False

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) if self.both else self.a(x)


def test_a_parameter_may_begin_later() -> None:
    """Going on from a result whose loss did not use it."""
    net = Half()
    opt = MomentumLike(net.parameters(), **SETTINGS[MomentumLike])
    support = batch(1)
    adapted = compile_unroll(net, opt, 2, loss=F.mse_loss, backend="eager").adapt(support)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for both in (False, False, True, True):
            fmodel.both = both
            diffopt.step(F.mse_loss(fmodel(support[0]), support[1]))
        wanted = list(fmodel.parameters())
    net.both = True
    adapted = compile_unroll(net, opt, 2, loss=F.mse_loss, backend="eager").adapt(support, start=adapted)
    assert_near([value.detach() for value in adapted.params.values()], [value.detach() for value in wanted])


def test_registering_anew_replaces() -> None:
    net = make_net()
    opt = OurSGD(net.parameters(), lr=0.1)
    found: list[Tensor] = []
    for version in (DifferentiableSGD, Clipped, DifferentiableSGD):
        higher.register_optim(OurSGD, version)
        found.append(compile_unroll(net, opt, K, loss=F.mse_loss, backend="eager")(batch(1), batch(2)).detach())
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_a_class_of_torch_optim_may_be_registered_and_put_back() -> None:
    net = make_net()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    found: list[Tensor] = []
    for version in (DifferentiableSGD, Clipped, DifferentiableSGD):
        higher.register_optim(torch.optim.SGD, version)
        assert type(higher.get_diff_optim(opt, net.parameters())) is version
        found.append(compile_unroll(net, opt, K, loss=F.mse_loss, backend="eager")(batch(1), batch(2)).detach())
        assert_near(found[-1:], [on_the_tape(net, opt, batch(1), batch(2))[0].detach()])
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


class Rooted(DifferentiableOptimizer):
    """Adam as one writes it: the root of a second moment that may be zero."""

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        for i, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            for j, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                state = self.state[i][j]
                if len(state) == 0:
                    state["v"] = torch.zeros_like(p)
                state["v"] = 0.9 * state["v"] + 0.1 * g * g
                group["params"][j] = p - group["lr"] * g / (state["v"].sqrt() + 1e-3)


def test_a_gradient_that_becomes_zero_makes_no_nan() -> None:
    """In the branch of the first step, which is not taken then, its root has no derivative."""
    higher.register_optim(Odd, Rooted)
    torch.manual_seed(1)
    net = nn.Linear(3, 2, bias=False).double()
    x, y = batch(1)
    support = torch.stack([x, x * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), x]), torch.stack([y] * 3)
    opt = Odd(net.parameters(), lr=0.05)
    loss = compile_unroll(net, opt, 3, loss=F.mse_loss, per_step=True, backend="eager")(support, (x, y))
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for step in range(3):
            diffopt.step(F.mse_loss(fmodel(support[0][step]), y))
        wanted = F.mse_loss(fmodel(x), y)
    assert_near(meta_gradients(loss, net), meta_gradients(wanted, net))
