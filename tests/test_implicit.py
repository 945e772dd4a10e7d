"""`Implicit()` against the closed form on a quadratic, and against `Unrolled()` with many steps; what has no fixed point is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from adaptrt import Adjoint, CompiledUnroll, Implicit, Replay, compile_unroll, optim
from adaptrt.errors import AdaptrtError, InvalidArgument, InvalidType, NotConverged
from tests.gradients import gradients
from tests.models import normal, regress
from tests.pairs import SINGLE_AND_TASKS, over_pairs
from tests.tolerances import assert_near

K, T, P = 150, 2, 3
SOLVERS = [Implicit("cg", iterations=8), Implicit("neumann", iterations=150)]
over_solvers = pytest.mark.parametrize("adjoint", SOLVERS, ids=["cg", "neumann"])


def linear() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(P, 1, bias=False).double()


def data(tasks: bool, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator, lead = Generator().manual_seed(seed), (T,) if tasks else ()
    return normal(generator, *lead, 12, P), normal(generator, *lead, 12, 1)


def minimiser(x: Tensor, y: Tensor, strength: Tensor, anchor: Tensor) -> Tensor:
    """Of mean((x w - y)**2) + strength / 2 * |w - anchor|**2, in closed form; [P]."""
    hessian = 2.0 * x.T @ x / len(x) + strength * torch.eye(P, dtype=x.dtype)
    return torch.linalg.solve(hessian, 2.0 * (x.T @ y).squeeze(1) / len(x) + strength * anchor)


@over_pairs(
    anchored={"weight decay": False, "iMAML": True}, adjoint=dict(zip(("cg", "neumann"), SOLVERS, strict=True)), tasks=SINGLE_AND_TASKS
)
def test_the_closed_form_on_a_quadratic(anchored: bool, adjoint: Implicit, tasks: bool) -> None:
    """Gradients of the strength, the data, and with an anchor of the start."""
    check(anchored, adjoint, tasks, "eager")


def test_compiled() -> None:
    check(True, SOLVERS[0], True, "inductor")


def check(anchored: bool, adjoint: Implicit, tasks: bool, backend: str) -> None:
    net, strength = linear(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (x, y), query = data(tasks), data(tasks, 2)
    x, y = x.requires_grad_(), y.requires_grad_()
    opt = optim.proximal(optim.sgd(lr=0.2), strength) if anchored else optim.sgd(lr=0.2, weight_decay=strength)
    unroll = compile_unroll(net, opt, K, loss=regress, adjoint=adjoint, backend=backend)
    leaves = {"strength": strength, "x": x, "y": y, "start": next(net.parameters())}
    found = gradients((unroll.vmap() if tasks else unroll)((x, y), query), leaves)
    losses: list[Tensor] = []
    for task in range(T) if tasks else [None]:
        a, b, c, d = (value if task is None else value[task] for value in (x, y, *query))
        anchor = next(net.parameters()).squeeze(0) if anchored else torch.zeros(P, dtype=torch.float64)
        w = minimiser(a, b, strength, anchor)
        losses.append(((c @ w).unsqueeze(1) - d).square().mean())
    assert_near(
        found,
        gradients(torch.stack(losses).mean(), leaves),
        torch.float64,
    )
    assert bool(found["start"].any()) is anchored


@over_solvers
def test_many_steps_differentiated_through(adjoint: Implicit) -> None:
    """Of a network, with a layer that does not adapt and a learned strength."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(P, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    strength = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    found: list[dict[str, Tensor]] = []
    for chosen in (adjoint, Replay()):
        opt = optim.proximal(optim.sgd(lr=0.3), strength)
        unroll = compile_unroll(net, opt, 200, loss=regress, params="2.*", adjoint=chosen, backend="eager")
        found.append(gradients(unroll(data(False), data(False, 2)), {"strength": strength, **dict(net.named_parameters())}))
    assert found[0]["0.weight"].any() and found[0]["2.weight"].any()
    assert_near(found[0], found[1], torch.float64)


def test_what_adapt_returns_is_differentiable() -> None:
    strength = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    values: list[Tensor] = []
    for adjoint in (SOLVERS[0], Replay()):
        opt = optim.sgd(lr=0.2, weight_decay=strength)
        adapted = compile_unroll(linear(), opt, 100, loss=regress, adjoint=adjoint, backend="eager").adapt(data(False))
        values += torch.autograd.grad(adapted.params["weight"].sin().sum(), strength)
    assert_near({"strength": values[0]}, {"strength": values[1]}, torch.float64)


def make(adjoint: Adjoint, k: int = K, opt: Any = None, **options: Any) -> CompiledUnroll:
    opt = optim.sgd(lr=torch.tensor(0.2, requires_grad=True), weight_decay=0.1) if opt is None else opt
    return compile_unroll(linear(), opt, k, loss=regress, adjoint=adjoint, backend="eager", **options)


def test_steps_that_have_not_converged_are_warned_of() -> None:
    unroll = make(SOLVERS[0], k=3)
    with pytest.warns(NotConverged, match="distance to the fixed point, relative to the parameters is .*make more steps"):
        unroll(data(False), data(False, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unroll(data(False), data(False, 2))  # once
        make(SOLVERS[0])(data(False), data(False, 2))


def test_slow_steps_are_told_from_converged_ones() -> None:
    """Many steps that are too small are warned of; one that starts where others have ended is not."""
    opt = optim.sgd(lr=1e-4, weight_decay=0.1)
    with pytest.warns(NotConverged, match="distance to the fixed point"):
        make(SOLVERS[0], k=50, opt=opt)(data(False), data(False, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float64, torch.float32):
            net = linear().to(dtype)
            batch = tuple(value.to(dtype) for value in data(False))
            unroll = compile_unroll(net, optim.sgd(lr=0.2, weight_decay=0.1), K, loss=regress, adjoint=Implicit(), backend="eager")
            unroll.adapt(batch, start=unroll.adapt(batch, start=unroll.adapt(batch).detach()).detach())


def test_systems_that_are_not_symmetric_are_warned_of() -> None:
    """Rotated gradients: conjugate gradients do not solve that, the series does."""
    turn = torch.tensor([[0.8, 0.6, 0.0], [-0.6, 0.8, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    rotation = optim.Transform(lambda p: (), lambda g, state, p, hyper: ({n: v @ turn for n, v in g.items()}, state), init_is_constant=True)
    decay = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    opt = optim.chain(rotation, optim.sgd(lr=0.1, weight_decay=decay))
    with pytest.warns(NotConverged) as caught:
        make(Implicit(), opt=opt)(data(False), data(False, 2))
    assert any("asymmetry" in str(each.message) and "use Implicit(solver='neumann')" in str(each.message) for each in caught)
    found, right = (make(adjoint, 400, opt)(data(False), data(False, 2)) for adjoint in (Implicit("neumann", iterations=300), Replay()))
    assert_near(gradients(found, {"decay": decay}), gradients(right, {"decay": decay}), torch.float64)


@pytest.mark.parametrize("adjoint", [Implicit(), Implicit("neumann", iterations=200)], ids=["cg", "neumann"])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e-23), (torch.float16, 1e-3)], ids=str)
def test_small_numbers(dtype: torch.dtype, scale: float, adjoint: Implicit) -> None:
    """Gradients whose squares are 0 in their precision."""
    net, decay = linear().to(dtype), torch.tensor(0.5, requires_grad=True)
    batch, query = (tuple(value.to(dtype) for value in data(False, seed)) for seed in (1, 2))

    def gradient(adjoint: Any) -> float:
        opt = optim.sgd(lr=0.2, weight_decay=decay)
        loss = compile_unroll(net, opt, K, loss=regress, query_loss=lambda o, y: regress(o, y) * scale, adjoint=adjoint, backend="eager")(
            batch, query
        )
        return torch.autograd.grad(loss, decay)[0].item() / scale

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)  # in half precision steps end before they converge
        assert gradient(adjoint) == pytest.approx(gradient(Replay()), rel=0.1 if dtype is torch.float16 else 1e-3)


def test_outputs_and_numbers_of_steps() -> None:
    """Losses are constant with outputs or without; the outputs are not."""
    unroll = make(SOLVERS[0], opt=optim.sgd(lr=0.2, weight_decay=0.1))
    net = unroll._settings.model
    batch = data(False)
    adapted, plain = unroll.adapt(batch, outputs="first"), unroll.adapt(batch)
    (of_losses,) = torch.autograd.grad(adapted.losses.sum(), list(net.parameters()))
    assert not of_losses.any() and torch.equal(adapted.params["weight"], plain.params["weight"])
    (of_outputs,) = torch.autograd.grad(adapted.outputs.sum(), list(net.parameters()))
    assert_near({"weight": of_outputs}, {"weight": batch[0].sum(0, keepdim=True)}, torch.float64)
    assert unroll.adapt(batch, steps=40).losses.shape == (40,)
    several: list[dict[str, Any]] = [{}, {"outputs": "first"}]
    for options in several:
        with pytest.raises(InvalidArgument, match="steps=1 is too few"):
            unroll.adapt(batch, steps=1, **options)


def test_a_solver_that_has_not_converged_is_warned_of() -> None:
    unroll = make(Implicit("neumann", iterations=1))
    with pytest.warns(NotConverged, match="residual of the linear system is 0"):
        unroll(data(False), data(False, 2))


def test_the_residual_is_reported() -> None:
    unroll = make(SOLVERS[0])
    unroll(data(False), data(False, 2))
    text = str(unroll.explain())
    assert all(
        f"{name} in the last call: " in text
        for name in ("residual of the linear system", "relative to the parameters", "asymmetry of the linear system")
    )


def test_damping_makes_the_system_better_posed() -> None:
    """It is that of a larger diagonal: here of a closed form."""
    net, damping, lr = linear(), 0.5, 0.2
    decay = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    (x, y), (c, d) = data(False), data(False, 2)
    opt = optim.sgd(lr=lr, weight_decay=decay)
    loss = compile_unroll(net, opt, K, loss=regress, adjoint=Implicit(damping=damping), backend="eager")((x, y), (c, d))
    (found,) = torch.autograd.grad(loss, decay)
    w = minimiser(x, y, decay.detach(), torch.zeros(P, dtype=torch.float64)).requires_grad_()
    (outer,) = torch.autograd.grad(((c @ w).unsqueeze(1) - d).square().mean(), w)
    system = lr * (2.0 * x.T @ x / len(x) + 0.1 * torch.eye(P, dtype=torch.float64)) + damping * torch.eye(P, dtype=torch.float64)
    assert_near({"decay": found}, {"decay": -lr * (torch.linalg.solve(system, outer) @ w).detach()}, torch.float64)


def test_evaluation_is_warmed_up_as_far_as_it_goes() -> None:
    unroll = make(SOLVERS[0], on_new_shape="error").warmup(data(False), data(False, 2), evaluate=True)
    unroll.evaluate(data(False), data(False, 2)).loss.backward()


BATCH = data(False)
WRONG: dict[str, tuple[Callable[[], Any], type[AdaptrtError], str]] = {
    "solver": (lambda: Implicit("newton"), InvalidArgument, "must be 'cg' or 'neumann'"),
    "iterations": (lambda: Implicit(iterations=0), InvalidArgument, "int of at least 1"),
    "damping": (lambda: Implicit(damping=-1.0), InvalidArgument, "at least 0"),
    "tolerance": (lambda: Implicit(tolerance="small"), InvalidType, "must be a number"),  # type: ignore[arg-type]
    "k": (lambda: make(SOLVERS[0], k=1).adapt(BATCH), InvalidArgument, "k=1 is too few"),
    "per_step": (
        lambda: make(SOLVERS[0], k=2, per_step=True).adapt(tuple(torch.stack([v, v]) for v in BATCH)),
        InvalidArgument,
        "each step has another batch",
    ),
    "every step": (
        lambda: make(SOLVERS[0])(BATCH, BATCH, every_step=True),
        InvalidArgument,
        r"go back through each step, which Implicit\(.*\) does not",
    ),
    "momentum": (
        lambda: make(SOLVERS[0], opt=optim.sgd(lr=0.1, momentum=0.9)).adapt(BATCH),
        InvalidArgument,
        "remembers 'weight.momentum_buffer'",
    ),
    "adam": (lambda: make(SOLVERS[0], opt=optim.adam(lr=0.1)).adapt(BATCH), InvalidArgument, "the optimiser remembers"),
    "schedule": (
        lambda: make(SOLVERS[0], opt=optim.sgd(lr=optim.schedule(lambda step: 0.1 * 0.9**step))).adapt(BATCH),
        InvalidArgument,
        "remembers 'num_updates', which every step changes. Take one whose steps are all alike",
    ),
    "lbfgs": (lambda: make(SOLVERS[0], opt=optim.lbfgs(lr=0.1)).adapt(BATCH), InvalidArgument, "updates a step"),
    "dropout": (
        lambda: compile_unroll(
            nn.Sequential(linear(), nn.Dropout()), optim.sgd(lr=0.1), K, loss=regress, adjoint=SOLVERS[0], backend="eager"
        ).adapt(BATCH),
        InvalidArgument,
        r"draw random numbers. Call model.eval\(\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    run, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        run()
