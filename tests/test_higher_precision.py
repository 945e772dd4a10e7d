"""`adaptrt.higher` under autocast and with a gradient scaler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt import higher

RATE = 0.25  # a power of two, as the scales are: products with it are exact
STEPS = 3


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.last = nn.Linear(4 * 9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))).flatten(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)), (5,)),
    "convolutional": (Convolutional, (1, 5, 5)),
}


def make(model: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A module, and a batch for each inner step and for the query."""
    torch.manual_seed(1)
    build, shape = MODELS[model]
    return build(), [(torch.randn(8, *shape), torch.randn(8, 2)) for _ in range(STEPS + 1)]


def by_hand(net: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> list[list[Tensor]]:
    """Weights after the inner steps, and meta-gradients: the loop without the library."""
    params = {name: p.clone() for name, p in net.named_parameters()}
    for x, y in batches[:-1]:
        loss = F.mse_loss(torch.func.functional_call(net, params, (x,)), y)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {name: p - RATE * grad for (name, p), grad in zip(params.items(), grads, strict=True)}
    x, y = batches[-1]
    query = F.mse_loss(torch.func.functional_call(net, params, (x,)), y)
    return [list(params.values()), list(torch.autograd.grad(query, list(net.parameters())))]


def by_library(net: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> list[list[Tensor]]:
    opt = torch.optim.SGD(net.parameters(), lr=RATE)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for x, y in batches[:-1]:
            diffopt.step(F.mse_loss(fmodel(x), y))
        x, y = batches[-1]
        grads = torch.autograd.grad(F.mse_loss(fmodel(x), y), list(net.parameters()))
        return [list(fmodel.parameters()), list(grads)]


def distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest number."""
    scale = max(float(w.detach().abs().max()) for w in wanted)
    return max(float((f - w).detach().abs().max()) for f, w in zip(found, wanted, strict=True)) / scale


@pytest.mark.parametrize("model", MODELS)
def test_autocast(model: str) -> None:
    net, batches = make(model)
    exact = by_library(net, batches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = by_library(net, batches), by_hand(net, batches)
    for got, same, single in zip(found, wanted, exact, strict=True):
        assert all(value.dtype is torch.float32 for value in got)
        assert distance(got, same) < 1e-6
        assert 1e-4 < distance(got, single) < 5e-2


@pytest.mark.parametrize("track", [True, False])
def test_autocast_around_the_forward_passes_only(track: bool) -> None:
    """As PyTorch recommends. Weights copied at the beginning are leaves, whose casts autocast keeps."""
    net, batches = make("mlp")

    def run(around: Callable[[], Any]) -> list[Tensor]:
        opt = torch.optim.Adam(net.parameters(), lr=0.1)
        with higher.innerloop_ctx(net, opt, track_higher_grads=track) as (fmodel, diffopt):
            for x, y in batches:
                with around():
                    loss = F.mse_loss(fmodel(x), y)
                diffopt.step(loss)
            return list(fmodel.parameters())

    found, exact = run(lambda: torch.autocast("cpu", dtype=torch.bfloat16)), run(contextlib.nullcontext)
    assert all(value.dtype is torch.float32 for value in found)
    assert 1e-5 < distance(found, exact) < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert distance(run(contextlib.nullcontext), found) < 1e-6


KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=RATE, momentum=0.5, weight_decay=0.25),
    "adam": lambda params: torch.optim.Adam(params, lr=0.05, eps=1e-3),
}


def scaler_of(scale: float = 2.0**10) -> Any:
    return torch.amp.GradScaler("cpu", init_scale=scale)


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_inner_losses(kind: str) -> None:
    """The scale divided away again: weights and meta-gradients are those of the losses as they are."""

    def run(scaler: Any) -> list[Tensor]:
        net, batches = make("mlp")
        with higher.innerloop_ctx(net, KINDS[kind](net.parameters()), copy_initial_weights=False) as (fmodel, diffopt):
            for x, y in batches[:-1]:
                loss = F.mse_loss(fmodel(x), y)
                diffopt.step(loss if scaler is None else scaler.scale(loss), grad_scaler=scaler)
            x, y = batches[-1]
            return [*fmodel.parameters(), *torch.autograd.grad(F.mse_loss(fmodel(x), y), list(net.parameters()))]

    found, wanted = run(scaler_of()), run(None)
    assert distance(found, wanted) < 1e-6


def test_a_callback_sees_gradients_without_the_scale() -> None:
    net, batches = make("mlp")
    scaler, seen = scaler_of(), list[Any]()

    def keep(grads: Any) -> Any:
        seen.append(grads)
        return grads

    with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=RATE)) as (fmodel, diffopt):
        loss = F.mse_loss(fmodel(batches[0][0]), batches[0][1])
        wanted = torch.autograd.grad(loss, list(fmodel.parameters()), retain_graph=True)
        diffopt.step(scaler.scale(loss), grad_scaler=scaler, grad_callback=keep)
    assert distance(seen[0], wanted) < 1e-6


def test_scaled_outer_losses() -> None:
    """A scaler's whole protocol around the outer optimiser, with the inner losses scaled as well."""

    def run(scaler: Any) -> list[Tensor]:
        net, batches = make("mlp")
        opt, outer = torch.optim.SGD(net.parameters(), lr=RATE), torch.optim.Adam(net.parameters(), lr=0.1, eps=1e-3)
        for _ in range(3):
            outer.zero_grad()
            with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
                for x, y in batches[:-1]:
                    loss = F.mse_loss(fmodel(x), y)
                    diffopt.step(loss if scaler is None else scaler.scale(loss), grad_scaler=scaler)
                query = F.mse_loss(fmodel(batches[-1][0]), batches[-1][1])
            if scaler is None:
                query.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 0.1)
                outer.step()
            else:
                scaler.scale(query).backward()
                scaler.unscale_(outer)
                nn.utils.clip_grad_norm_(net.parameters(), 0.1)
                scaler.step(outer)
                scaler.update()
        return [p.detach() for p in net.parameters()]

    assert distance(run(scaler_of()), run(None)) < 1e-6


def test_an_outer_overflow_skips_the_outer_step() -> None:
    net, batches = make("mlp")
    outer, scaler = torch.optim.SGD(net.parameters(), lr=0.1), scaler_of()
    before = [p.detach().clone() for p in net.parameters()]
    with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=RATE), copy_initial_weights=False) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(batches[0][0]), batches[0][1]))
        scaler.scale(1e38 * F.mse_loss(fmodel(batches[1][0]), batches[1][1])).backward()
    scaler.step(outer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def held(diffopt: Any) -> list[Any]:
    """The numbers in the optimiser's state, in order."""
    return [[entry[key] for key in sorted(entry)] for states in diffopt.state for entry in states.values() if entry]


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", [0, 1])
def test_an_inner_overflow_skips_the_inner_step(when: int, kind: str, poison: float, track: bool) -> None:
    """As `GradScaler.step` does: weights and state stay, also where one gradient alone is not finite. The handle counts it as an update."""

    def run(overflow: bool) -> tuple[list[Tensor], list[Tensor]]:
        net, batches = make("mlp")
        scaler = scaler_of()
        opt = KINDS[kind](net.parameters())
        with higher.innerloop_ctx(net, opt, copy_initial_weights=False, track_higher_grads=track) as (fmodel, diffopt):
            for i, (x, y) in enumerate(batches[:-1]):
                if overflow and i == when:
                    before, state = [p.detach().clone() for p in fmodel.parameters()], held(diffopt)
                    bias = list(fmodel.parameters())[-1]
                    diffopt.step(scaler.scale(F.mse_loss(fmodel(x), y) + (poison * bias).sum()), grad_scaler=scaler)
                    assert all(torch.equal(p, old) for p, old in zip(fmodel.parameters(), before, strict=True))
                    torch.testing.assert_close(held(diffopt), state, rtol=0.0, atol=0.0)
                diffopt.step(scaler.scale(F.mse_loss(fmodel(x), y)), grad_scaler=scaler)
            if track:
                assert len(list(fmodel.parameters(time=STEPS + overflow))) == 4
                with pytest.raises(IndexError):
                    fmodel.parameters(time=STEPS + overflow + 1)
            query = F.mse_loss(fmodel(batches[-1][0]), batches[-1][1])
            return list(fmodel.parameters()), list(torch.autograd.grad(query, list((net if track else fmodel).parameters())))

    for found, wanted in zip(run(True), run(False), strict=True):
        assert all(bool(value.isfinite().all()) for value in found)
        assert distance(found, wanted) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_steps_with_an_overflow_are_those_of_the_real_optimiser(kind: str) -> None:
    net, batches = make("mlp")
    real, opt = make("mlp")[0], KINDS[kind](net.parameters())
    real_opt, scaler = KINDS[kind](real.parameters()), scaler_of()
    factors = [1.0, 1e38, 1.0]
    with higher.innerloop_ctx(net, opt) as (fmodel, diffopt):
        for factor, (x, y) in zip(factors, batches, strict=False):
            diffopt.step(scaler.scale(factor * F.mse_loss(fmodel(x), y)), grad_scaler=scaler)
        for factor, (x, y) in zip(factors, batches, strict=False):
            real_opt.zero_grad()
            scaler.scale(factor * F.mse_loss(real(x), y)).backward()
            scaler.step(real_opt)
            scaler.update(new_scale=scaler.get_scale())
        assert distance(list(fmodel.parameters()), list(real.parameters())) < 1e-6
