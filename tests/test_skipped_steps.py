"""A loss that returns `(loss, update)`: where `update` is false, the step changes nothing, and by task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from adaptrt import Adjoint, CompiledUnroll, FirstOrder, Replay, Stash, Truncated, Unrolled, compile_unroll, optim
from adaptrt.errors import InvalidLoss
from tests.gradients import gradients
from tests.models import norm_mlp as model
from tests.models import normal
from tests.tolerances import assert_near

K, T = 4, 3
ADJOINTS: list[Adjoint] = [Unrolled(), Replay(), Stash(), FirstOrder(), Truncated(2)]
LR = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
BOUND = 0.9


def sure(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Skips the step where the loss is small, as test-time adaptation skips what is no use."""
    loss = F.mse_loss(output, target)
    return loss, loss > BOUND


class Sure(nn.Module):
    """The same as a module, with a count of its calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        self.calls = self.calls + 1
        return sure(output, target)


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tasks whose losses fall below the bound after 0, some and no steps."""
    generator = Generator().manual_seed(seed)
    x, y = normal(generator, T, 5, 3), normal(generator, T, 5, 2)
    return x, y * torch.tensor([0.05, 1.5, 3.0], dtype=torch.float64)[:, None, None]


def make(net: nn.Module, adjoint: Adjoint, backend: str = "eager", loss: Any = sure) -> CompiledUnroll:
    opt = optim.sgd(lr=LR, momentum=0.7)
    return compile_unroll(net, opt, K, loss=loss, query_loss=F.mse_loss, adjoint=adjoint, backend=backend)


def naive_adapt(net: nn.Module, adjoint: Adjoint, x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Parameters and buffers after the steps that are made, and their number; a step is skipped by an `if`."""
    params: dict[str, Tensor] = dict(net.named_parameters())
    buffers = dict(net.named_buffers())
    moments: dict[str, Tensor] = {}
    made = 0
    for step in range(K):
        held = {name: value.clone() for name, value in buffers.items()}
        loss, update = sure(torch.func.functional_call(net, {**params, **held}, (x,)), y)
        if update:
            made += 1
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            grads = [grad.detach() for grad in grads] if adjoint.detach_gradient else grads
            for (name, value), grad in zip(list(params.items()), grads, strict=True):
                moments[name] = 0.7 * moments[name] + grad if name in moments else grad
                params[name] = value - LR * moments[name]
            buffers = held
        if step < adjoint.num_constant_steps(K):
            params = {name: value.detach().requires_grad_() for name, value in params.items()}
            moments = {name: value.detach() for name, value in moments.items()}
    return params, buffers, made


def check(adjoint: Adjoint, backend: str, loss: Any = sure) -> None:
    net = model()
    unroll = make(net, adjoint, backend, loss).vmap()
    x, y = data()
    query = data(2)
    adapted = unroll.adapt((x, y))
    rows = [naive_adapt(net, adjoint, x[task], y[task]) for task in range(T)]
    assert [made for *_, made in rows] == [0, 2, K]
    for task, (params, buffers, _) in enumerate(rows):
        assert_near(dict(adapted[task].detach().params), {name: value.detach() for name, value in params.items()}, torch.float64)
        assert_near(dict(adapted[task].detach().buffers), buffers, torch.float64)
    leaves = {"lr": LR, **dict(net.named_parameters())}
    found = unroll(*[(x, y), query])
    losses: list[Tensor] = []
    for task, (params, buffers, _) in enumerate(rows):
        held = {name: value.clone() for name, value in buffers.items()}
        losses.append(F.mse_loss(torch.func.functional_call(net, {**params, **held}, (query[0][task],)), query[1][task]))
    wanted = torch.stack(losses).mean()
    assert_near(gradients(found, leaves), gradients(wanted, leaves), torch.float64)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_steps_that_are_skipped(adjoint: Adjoint) -> None:
    check(adjoint, "eager")


def test_steps_that_are_skipped_compiled() -> None:
    check(Replay(), "inductor")


def test_a_loss_module_forgets_a_skipped_step_too() -> None:
    check(Stash(), "eager", Sure())
    loss = Sure()
    states = make(model(), Replay(), loss=loss).vmap().adapt(data()).state.named_tensors()
    assert states["buffers.loss:calls"].tolist() == [0, 2, K]


def test_where_no_step_is_made_the_state_is_what_it_was() -> None:
    net = model()
    unroll = make(net, Replay())
    x, y = (value[0] for value in data())
    start = unroll.start()
    adapted = unroll.adapt((x, y), start=start).state.named_tensors()
    assert all(torch.equal(value, adapted[name]) for name, value in start.state.named_tensors().items())


@pytest.mark.parametrize(
    ("update", "found"), [(True, "bool"), (torch.tensor(1), r"int64\[\]"), (torch.tensor([True]), r"bool\[1\]"), (None, "NoneType")]
)
def test_what_is_no_update(update: Any, found: str) -> None:
    unroll = make(model(), Replay(), loss=lambda output, target: (F.mse_loss(output, target), update))
    with pytest.raises(
        InvalidLoss, match=rf"\(loss, update\) with a bool tensor of shape \[\] as update; got a tuple with {found} as second"
    ):
        unroll.adapt((data()[0][0], data()[1][0]))
