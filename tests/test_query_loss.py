"""A loss of the query batch that is another than that of the inner steps; either may be a module that is learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from adaptrt import Adjoint, FirstOrder, Replay, Stash, Unrolled, compile_unroll, optim
from adaptrt.errors import AdaptrtError, InvalidLoss, InvalidType, NotTraceable, UnsupportedParameter
from tests.gradients import gradients
from tests.models import normal
from tests.pairs import SINGLE_AND_TASKS, by_name, over_pairs
from tests.tolerances import assert_near

K, T = 2, 2


class Weighted(nn.Module):
    """A loss with a parameter and a buffer. As the inner loss it counts its calls, and every step sees the count."""

    scale: Tensor

    def __init__(self, counts: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, 1.6], dtype=torch.float64))
        self.register_buffer("scale", torch.tensor(1.5, dtype=torch.float64))
        self.counts = counts

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        if self.counts:
            self.scale = self.scale + 0.5
        return self.scale * (self.weight * (output - target) ** 2).mean()


def entropy(output: Tensor) -> Tensor:
    """A loss of the output alone."""
    return -(output.softmax(-1) * output.log_softmax(-1)).sum(-1).mean()


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data(tasks: bool, with_target: bool) -> Any:
    generator, lead = Generator().manual_seed(1), (T,) if tasks else ()
    support = normal(generator, *lead, 5, 3), normal(generator, *lead, 5, 2)
    query = normal(generator, *lead, 4, 3), normal(generator, *lead, 4, 2)
    return (support if with_target else support[:1]), query


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "functions": (lambda: F.l1_loss, lambda: F.mse_loss),
    "no target": (lambda: entropy, lambda: F.mse_loss),
    "inner module": (Weighted, lambda: F.mse_loss),
    "query module": (lambda: F.mse_loss, Weighted),
    "both": (lambda: Weighted(counts=True), Weighted),
}


def by_parts(value: Tensor, parts: list[Any]) -> dict[str, Tensor]:
    """The value and its gradients by the parameters of all modules among these; a first-order inner loss has none."""
    modules = [(index, part) for index, part in enumerate(parts) if isinstance(part, nn.Module)]
    return gradients(value, {f"{index}.{name}": param for index, part in modules for name, param in part.named_parameters()})


@over_pairs(case=by_name(CASES), adjoint=by_name([Unrolled(), Replay(), Stash(), FirstOrder()]), tasks=SINGLE_AND_TASKS)
def test_two_losses(case: str, adjoint: Adjoint, tasks: bool) -> None:
    check(case, adjoint, tasks, "eager")


def test_two_losses_compiled() -> None:
    check("both", Unrolled(), True, "inductor")


def check(case: str, adjoint: Adjoint, tasks: bool, backend: str) -> None:
    net, (inner, outer) = model(), [make() for make in CASES[case]]
    unroll = compile_unroll(net, optim.sgd(lr=0.2), K, loss=inner, query_loss=outer, adjoint=adjoint, backend=backend)
    support, query = data(tasks, case != "no target")
    found = by_parts((unroll.vmap() if tasks else unroll)(support, query), [net, inner, outer])
    buffers = dict(inner.named_buffers()) if isinstance(inner, nn.Module) else {}

    def wanted_of(support: Any, query: Any) -> Tensor:
        params: dict[str, Any] = dict(net.named_parameters())
        own = dict(buffers)
        for _ in range(K):
            output = torch.func.functional_call(net, params, (support[0],))
            if isinstance(inner, nn.Module):
                held = {name: value.clone() for name, value in own.items()}
                loss = torch.func.functional_call(inner, held, (output, *support[1:]))
                own = held
            else:
                loss = inner(output, *support[1:])
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            grads = [grad.detach() for grad in grads] if adjoint.detach_gradient else grads
            params = {name: value - 0.2 * grad for (name, value), grad in zip(params.items(), grads, strict=True)}
        return outer(torch.func.functional_call(net, params, (query[0],)), query[1])

    rows = range(T) if tasks else [None]
    losses = [wanted_of(*[tuple(value if row is None else value[row] for value in part) for part in (support, query)]) for row in rows]
    assert_near(found, by_parts(torch.stack(losses).mean(), [net, inner, outer]), torch.float64)


def test_what_the_query_loss_holds_is_read_at_every_call_and_never_changed() -> None:
    outer = Weighted(counts=True)
    unroll = compile_unroll(model(), optim.sgd(lr=0.2), K, loss=F.mse_loss, query_loss=outer, backend="eager")
    support, query = data(False, True)
    with torch.no_grad():
        first = unroll(support, query)
        assert outer.scale.item() == 1.5
        outer.weight.mul_(2.0)
        outer.scale.mul_(0.5)
        assert unroll(support, query).item() == pytest.approx(first.item() * 2.0 * (0.75 + 0.5) / 2.0)
        outer.counts = False
        assert unroll(support, query).item() == pytest.approx(first.item() * 2.0 * 0.75 / 2.0)


def test_one_module_as_both_losses_is_one_loss() -> None:
    """The query sees the buffers as the steps have left them."""
    support, query = data(False, True)
    values: list[float] = []
    for is_both in (False, True):
        loss = Weighted(counts=True)
        other = loss if is_both else None
        unroll = compile_unroll(model(), optim.sgd(lr=0.2), K, loss=loss, query_loss=other, backend="eager")
        values.append(unroll(support, query).item())
    assert values[0] == values[1]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2).double()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (self.norm(output) - target).square().mean()


@pytest.mark.parametrize("train", [True, False])
def test_a_query_loss_with_running_statistics(train: bool) -> None:
    net, outer = model(), Normed().train(train)
    support, query = data(False, True)
    unroll = compile_unroll(net, optim.sgd(lr=0.2), K, loss=F.mse_loss, query_loss=outer, adjoint=Replay(), backend="eager")
    found = by_parts(unroll(support, query), [net, outer])
    params: dict[str, Any] = dict(net.named_parameters())
    for _ in range(K):
        loss = F.mse_loss(torch.func.functional_call(net, params, (support[0],)), support[1])
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {name: value - 0.2 * grad for (name, value), grad in zip(params.items(), grads, strict=True)}
    assert outer.norm.running_mean is not None and not outer.norm.running_mean.any()
    assert_near(found, by_parts(outer(torch.func.functional_call(net, params, (query[0],)), query[1]), [net, outer]), torch.float64)


class Counting:
    """A loss that is another one at each call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * F.mse_loss(output, target)


def shared() -> nn.Module:
    loss = nn.Module()
    loss.own = net_with_shared.weight  # type: ignore[assignment]
    loss.forward = lambda output, target: F.mse_loss(output, target)  # type: ignore[method-assign]
    return loss


net_with_shared = nn.Linear(3, 2).double()
net_with_shared.register_buffer("count", torch.zeros(2, dtype=torch.float64))


def shared_buffer() -> nn.Module:
    loss = Weighted()
    loss.scale = net_with_shared.count  # type: ignore[assignment]
    return loss


WRONG: dict[str, tuple[Any, type[AdaptrtError], str]] = {
    "class": (nn.MSELoss, InvalidType, r"query_loss must be an instance, got the class MSELoss; write query_loss=MSELoss\(\)"),
    "number": (3, InvalidType, "query_loss must be a function"),
    "shared buffer": (shared_buffer, UnsupportedParameter, r"the query loss holds the model's buffer 'count' \(as 'scale'\)"),
    "shared": (shared, UnsupportedParameter, "the query loss holds the model's parameter 'weight'"),
    "no scalar": (lambda output, target: output - target, InvalidLoss, "scalar"),
    "state": (Counting(), NotTraceable, "calls"),
    "no target": (lambda output: output.mean(), AdaptrtError, "positional argument"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    value, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        query_loss = value() if value in (shared, shared_buffer) else value
        unroll = compile_unroll(net_with_shared, optim.sgd(lr=0.2), K, loss=F.mse_loss, query_loss=query_loss, backend="eager")
        unroll(*data(False, True))
