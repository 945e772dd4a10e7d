"""Adaptation without an optimiser: steps are forward passes that update buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import adaptrt
from adaptrt import Adjoint, CompiledUnroll, FirstOrder, Implicit, Replay, Stash, Truncated, Unrolled, compile_unroll, optim
from adaptrt.errors import InvalidArgument, InvalidBatch, NothingToAdapt
from tests.gradients import gradients
from tests.models import normal
from tests.pairs import ONE_BATCH_AND_PER_STEP, SINGLE_AND_TASKS, by_name, over_pairs
from tests.tolerances import assert_near

K, T = 3, 2
ADJOINTS: list[Adjoint | str] = ["auto", Unrolled(), Replay(), Stash(), FirstOrder(), Truncated(2)]
over_tasks = pytest.mark.parametrize("tasks", [False, True], ids=["single", "vmap"])


class Prototypes(nn.Module):
    """Distances to two points, which move towards the features of the data, and of which gradients flow to what makes the features."""

    points: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.rate = nn.Parameter(torch.tensor(0.3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("points", torch.tensor([[0.5, -0.5, 0.1, 0.2], [-0.3, 0.4, 0.0, -0.1]]))

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        logits = -(features[:, None] - self.points).square().sum(-1)
        if self.training:
            nearest = logits.softmax(-1)
            self.points = self.points + self.rate * (nearest.T @ features / nearest.sum(0)[:, None] - self.points)
            self.count += 1
        return logits


def model() -> Prototypes:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Prototypes().double()


def data(tasks: bool, per_step: bool = False) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    generator, lead = Generator().manual_seed(1), (T,) if tasks else ()
    x = normal(generator, *lead, *((K,) if per_step else ()), 5, 3)
    return x, (normal(generator, *lead, 4, 3), torch.randint(2, (*lead, 4), generator=generator))


def by_hand(net: Prototypes, x: Tensor, per_step: bool, detached: int = 0) -> dict[str, Tensor]:
    """The buffers after K forward passes; gradients flow through all but the first `detached`."""
    params, buffers = dict(net.named_parameters()), {name: value.clone() for name, value in net.named_buffers()}
    for step in range(K):
        values = {**params, **buffers}
        torch.func.functional_call(net, values, (x[step] if per_step else x,))
        buffers = {name: values[name].detach() if step < detached else values[name] for name in buffers}
    return buffers


def by_hand_query(net: Prototypes, buffers: dict[str, Tensor], query: tuple[Tensor, Tensor]) -> Tensor:
    values = {**dict(net.named_parameters()), **{name: value.clone() for name, value in buffers.items()}}
    return F.cross_entropy(torch.func.functional_call(net, values, (query[0],)), query[1])


def make(net: nn.Module, tasks: bool, backend: str = "eager", k: int = K, **options: Any) -> CompiledUnroll:
    unroll = compile_unroll(net, None, k, backend=backend, **options)
    return unroll.vmap() if tasks else unroll


@over_pairs(adjoint=by_name(ADJOINTS), tasks=SINGLE_AND_TASKS, per_step=ONE_BATCH_AND_PER_STEP)
def test_buffers_and_meta_gradients(adjoint: Adjoint | str, tasks: bool, per_step: bool) -> None:
    check(adjoint, tasks, per_step, "eager")


@pytest.mark.parametrize(("adjoint", "tasks"), [(Unrolled(), True), (Stash(), False)], ids=str)
def test_buffers_and_meta_gradients_compiled(adjoint: Adjoint, tasks: bool) -> None:
    check(adjoint, tasks, False, "inductor")


def check(adjoint: Adjoint | str, tasks: bool, per_step: bool, backend: str) -> None:
    net = model()
    support, query = data(tasks, per_step)
    detached = adjoint.num_constant_steps(K) if isinstance(adjoint, Adjoint) else 0
    rows = range(T) if tasks else [slice(None)]
    right = [by_hand(net, support[row], per_step, detached) for row in rows]
    loss = torch.stack([by_hand_query(net, own, (query[0][row], query[1][row])) for row, own in zip(rows, right, strict=True)]).mean()
    unroll = make(net, tasks, backend, adjoint=adjoint, per_step=per_step)
    found = unroll((support,), query)
    leaves = dict(net.named_parameters())
    assert_near(gradients(found, leaves), gradients(loss, leaves), torch.float64)
    adapted = unroll.adapt((support,))
    wanted = {name: torch.stack([own[name] for own in right]) if tasks else right[0][name] for name in right[0]}
    assert_near({n: v.detach() for n, v in adapted.buffers.items()}, {n: v.detach() for n, v in wanted.items()}, torch.float64)
    assert adapted.params == {}
    assert torch.equal(adapted.losses, torch.zeros((T, K) if tasks else (K,), dtype=torch.float64))
    assert torch.equal(net.points, model().points)


def test_a_target_or_a_loss_gives_losses_before_each_step() -> None:
    net = model()
    support, query = data(False)
    labels = torch.tensor([0, 1, 0, 1, 1])
    first = by_hand_query(net.eval(), dict(net.named_buffers()), (support, labels)).detach()
    net.train()
    for found in (
        make(net, False).adapt((support, labels)).losses,
        make(net, False, loss=F.cross_entropy).adapt((support, labels)).losses,
        make(net, False, loss=lambda output: F.cross_entropy(output, labels)).adapt((support,)).losses,
    ):
        assert found.shape == (K,)
        assert_near({"loss": found[0]}, {"loss": first}, torch.float64)
        assert found[0] != found[1]
    unroll = make(net, False, query_loss=F.cross_entropy)
    assert_near({"loss": unroll((support,), query)}, {"loss": make(net, False)((support,), query)}, torch.float64)
    with pytest.raises(InvalidBatch, match="has no target"):
        make(net, False, loss=F.cross_entropy).adapt((support,))


def test_statistics_of_another_domain() -> None:
    """AdaBN: running statistics of the target domain, by the modes of `BatchNorm` itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2))
    x, _ = data(False)
    x, unroll = x.float(), compile_unroll(net, None, 1, backend="eager")
    adapted = unroll.adapt((x,))
    net.eval()
    predicted = adapted(x).detach()
    net.train()(x)
    assert_near({"output": predicted}, {"output": net.eval()(x).detach()}, torch.float32)


def test_states_guards_and_streams() -> None:
    net = model()
    unroll = make(net, False, k=1)
    batch, query = data(False, per_step=True)
    adapted = unroll.start()
    assert adapted.losses.dtype is torch.float64 and adapted.losses.shape == (0,)
    for x in batch:
        adapted = unroll.adapt((x,), start=adapted, keep="finite")
        assert adapted.kept is not None and bool(adapted.kept)
    assert_near(dict(adapted.detach().buffers), {n: v.detach() for n, v in by_hand(net, batch, True).items()}, torch.float64)
    both = adaptrt.stack([adapted, unroll.adapt((batch[0],))])
    later = unroll.vmap().adapt((batch[:2],), start=both)
    assert torch.equal(later[0].buffers["points"], unroll.adapt((batch[0],), start=adapted).buffers["points"])
    moved = adapted.replace(buffers={"points": torch.zeros(2, 4, dtype=torch.float64)})
    kept = unroll.adapt((batch[0],), start=moved, keep=lambda before, after: after.update_norm > 0)
    assert not kept.kept and torch.equal(kept.buffers["points"], moved.buffers["points"])
    losses = make(net, True)((batch[:2],), data(True)[1], every_step=True, reduction="none")
    assert losses.shape == (T, K) and query


def test_what_cannot_adapt_is_refused() -> None:
    net = model()
    with pytest.raises(NothingToAdapt, match="only buffers adapt, and Linear has none"):
        compile_unroll(nn.Linear(2, 2), None, 1)
    with pytest.raises(InvalidArgument, match="leave one of them out"):
        compile_unroll(net, None, 1, params="features.*")
    with pytest.raises(NothingToAdapt, match=r"forward changes none of them: count, points\. Running statistics"):
        make(net.eval(), False).adapt((data(False)[0],))
    with pytest.raises(InvalidArgument, match="without an optimiser only buffers adapt"):
        make(model(), False, adjoint=Implicit()).adapt((data(False)[0],))
    assert compile_unroll(net, optim.sgd(lr=0.1), 1).k == 1


def test_models_without_parameters_and_losses_with_buffers() -> None:
    x, (c, _) = data(False)
    norm = nn.BatchNorm1d(3, affine=False, momentum=None).double()
    adapted = make(norm, False, k=1).adapt((x,))
    assert_near({"mean": adapted.buffers["running_mean"]}, {"mean": x.mean(0)}, torch.float64)
    norm.eval()
    assert_near({"out": adapted(c)}, {"out": (c - x.mean(0)) / (x.var(0) + norm.eps).sqrt()}, torch.float64)
    assert adapted.losses.dtype is torch.float64

    class Seen(nn.Module):
        total: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros((), dtype=torch.float64))

        def forward(self, output: Tensor) -> Tensor:
            self.total = self.total + output.detach().sum()
            return output.square().mean()

    net = nn.Linear(3, 2).double()
    after = make(net, False, loss=Seen()).adapt((x,))
    assert_near({"total": after.loss_buffers["total"]}, {"total": K * net(x).detach().sum()}, torch.float64)


def test_without_losses() -> None:
    net, (x, _) = model(), data(False)
    with pytest.raises(InvalidArgument, match="keep='not_worse' compares losses, and there is none here"):
        make(net, False).adapt((x,), keep="not_worse")
    with pytest.raises(InvalidArgument, match="buffer 'points' after a forward pass of the support batch depends on other examples"):
        make(net, False, examples="weighted").adapt((x, torch.ones(5)))
