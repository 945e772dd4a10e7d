"""`examples="weighted"`: the loss is a weighted mean over examples, and examples of weight 0 are padding."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from adaptrt import Adjoint, CompiledUnroll, FirstOrder, Replay, Stash, Truncated, Unrolled, compile_unroll, optim
from adaptrt.adjoint import auto
from adaptrt.errors import DeviceMismatch, InvalidArgument, InvalidBatch, InvalidLoss, InvalidType, NonFiniteInput
from tests import naive
from tests.gradients import gradients
from tests.models import normal
from tests.tolerances import assert_near

K, T, S, Q = 2, 3, 5, 4
SIZES, ASKED = (5, 2, 3), (1, 4, 3)  # examples of each task
LR = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
HYPER: dict[str, Any] = {"lr": LR, "momentum": 0.8}
ADJOINTS: list[Adjoint] = [Unrolled(), Replay(), Stash(), FirstOrder(), Truncated(1)]
over_adjoints = pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
losses_of = functools.partial(F.cross_entropy, reduction="none")


def model() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(seed: int, *lead: int) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(seed)
    return normal(generator, *lead, 3), torch.randint(3, lead, generator=generator)


def masks(sizes: tuple[int, ...], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor(sizes)[:, None]


def make(net: nn.Module, adjoint: Adjoint | str = "auto", backend: str = "eager", **options: Any) -> CompiledUnroll:
    options = {"loss": losses_of, **options}
    return compile_unroll(net, optim.sgd(**HYPER), K, adjoint=adjoint, backend=backend, examples="weighted", **options)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum()


def by_hand(net: nn.Module, adjoint: Adjoint, support: Any, query: Any, per_step: bool = False) -> tuple[Tensor, naive.Adapted]:
    """The query loss of one task, and its adapted state; batches end with weights."""

    def loss(output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        return weighted_mean(F.cross_entropy(output, target, reduction="none"), weights)

    constant = adjoint.num_constant_steps(K)
    loop = naive.Loop(net, loss, naive.sgd, HYPER, K, per_step, adjoint.detach_gradient, K - constant if constant else None)
    start = naive.Start(dict(net.named_parameters()), {}, {}, {})
    after = naive.adapt(loop, start, support)
    return naive.evaluate(loop, after.params, {}, query)[0], after


@over_adjoints
def test_padded_tasks_are_as_tasks_of_their_own_size(adjoint: Adjoint) -> None:
    check_padding(adjoint, "eager")


@pytest.mark.parametrize("adjoint", [Unrolled(), Stash()], ids=str)
def test_padded_tasks_compiled(adjoint: Adjoint) -> None:
    check_padding(adjoint, "inductor")


def test_padded_tasks_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "MIN_FLOPS_OF_A_TASK", 0)
    assert "EachTask" in str(check_padding(Stash(), "eager").explain())


def check_padding(adjoint: Adjoint, backend: str) -> CompiledUnroll:
    """Tasks of several sizes in one batch against the same tasks one by one, without their padding."""
    net, support, query = model(), data(1, T, S), data(2, T, Q)
    own, asked = masks(SIZES, S), masks(ASKED, Q)
    rows = range(T)
    found = [
        by_hand(
            net,
            adjoint,
            (*[value[row, : SIZES[row]] for value in support], torch.ones(SIZES[row], dtype=torch.float64)),
            (*[value[row, : ASKED[row]] for value in query], torch.ones(ASKED[row], dtype=torch.float64)),
        )
        for row in rows
    ]
    unroll = make(net, adjoint, backend).vmap()
    leaves = {"lr": LR, **dict(net.named_parameters())}
    right = torch.stack([loss for loss, _ in found])
    assert_near(gradients(unroll((*support, own), (*query, asked)), leaves), gradients(right.mean(), leaves), torch.float64)
    assert_near({"losses": unroll((*support, own), (*query, asked), reduction="none").detach()}, {"losses": right.detach()}, torch.float64)
    adapted = unroll.adapt((*support, own.double())).detach()
    for row in rows:
        after = found[row][1]
        assert_near(dict(adapted[row].params), {n: v.detach() for n, v in after.params.items()}, torch.float64)
        assert_near({"losses": adapted[row].losses}, {"losses": after.losses.detach()}, torch.float64)
    return unroll


@pytest.mark.parametrize("per_step", [False, True], ids=["one batch", "per step"])
@over_adjoints
def test_learned_weights(adjoint: Adjoint, per_step: bool) -> None:
    """Weights are any numbers from 0 on, and get gradients, those that are 0 as well."""
    net, query = model(), (*data(2, Q), torch.rand(Q, generator=Generator().manual_seed(3), dtype=torch.float64).requires_grad_())
    lead = (K,) if per_step else ()
    weights = torch.rand(*lead, S, generator=Generator().manual_seed(4), dtype=torch.float64)
    weights[..., 1] = 0.0
    support = (*data(1, *lead, S), weights.requires_grad_())
    unroll = make(net, adjoint, per_step=per_step)
    leaves = {"support": support[2], "query": query[2], **dict(net.named_parameters())}
    right, _ = by_hand(net, adjoint, support, query, per_step)
    assert_near(gradients(unroll(support, query), leaves), gradients(right, leaves), torch.float64)
    assert torch.autograd.grad(unroll(support, query), support[2])[0][..., 1].abs().max() > 1e-6 or adjoint.detach_gradient


def test_losses_of_several_forms() -> None:
    """Losses without target, default losses, and modules with parameters, each over the unpadded part of a batch."""
    x, y = data(1, S)
    few, weights = 3, torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64)

    class Smooth(nn.Module):
        def __init__(self, each: bool) -> None:
            super().__init__()
            self.smoothing, self.each = nn.Parameter(torch.tensor(0.5, dtype=torch.float64)), each

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            found = F.cross_entropy(output, target, reduction="none") + self.smoothing * output.square().mean(-1)
            return found if self.each else found.mean()

    targets = y.double()[:, None] * torch.ones(3, dtype=torch.float64)
    cases: list[tuple[Any, Any, tuple[Tensor, ...]]] = [
        (None, None, (x, y)),
        (None, None, (x, targets)),
        (lambda output: output.square().sum(-1), lambda output: output.square().sum(-1).mean(), (x,)),
        (Smooth(True), Smooth(False), (x, y)),
    ]
    for of_each, of_all, batch in cases:
        net = model()
        plain = compile_unroll(net, optim.sgd(**HYPER), K, loss=of_all, backend="eager").adapt(tuple(value[:few] for value in batch))
        padded = make(net, loss=of_each).adapt((*batch, weights))
        assert_near(dict(padded.detach().params), dict(plain.detach().params), torch.float64)
        assert_near({"losses": padded.losses.detach()}, {"losses": plain.losses.detach()}, torch.float64)


def test_with_guards_outputs_and_steps() -> None:
    net, (x, y) = model(), data(1, S)
    unroll = make(net, Stash())
    batch = (x, y, torch.tensor([1.0, 1, 0, 0, 0]))
    adapted = unroll.adapt(batch, keep="not_worse", outputs="first", steps=3)
    plain = compile_unroll(net, optim.sgd(**HYPER), 3, loss=F.cross_entropy, backend="eager").adapt((x[:2], y[:2]))
    assert adapted.kept is not None and bool(adapted.kept) and adapted.outputs.shape == (S, 3)
    assert_near(dict(adapted.detach().params), dict(plain.detach().params), torch.float64)
    right = F.cross_entropy(plain(x[:2]), y[:2]).detach()
    assert_near({"loss": adapted.final_loss.detach()}, {"loss": right}, torch.float64)  # type: ignore[union-attr]


class Centred(nn.Module):
    """Subtracts the mean of the batch, or its first example."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.layer = first, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - (x[:1] if self.first else x.mean(0)))


class Counted(nn.Module):
    """Keeps a mean of what it has seen, which no loss reads."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * x.detach().mean(0)
        return self.layer(x)


def contrastive(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output @ output.T, torch.arange(len(output)), reduction="none") + 0 * target


def in_pairs(output: Tensor, target: Tensor) -> Tensor:
    """Of two views of each example, one behind the other."""
    return (output - output.roll(4, 0)).square().sum(-1) + 0 * target


def train_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()


MIXING: dict[str, tuple[nn.Module, Any, str]] = {
    "batch norm": (
        train_norm(),
        losses_of,
        r"the loss of an example of the support batch .*; '1' \(BatchNorm1d\) in train mode does so: call eval\(\) on it",
    ),
    "mean": (Centred(False), losses_of, "compute it for each example by itself"),
    "first": (Centred(True), losses_of, "compute it for each example by itself"),
    "buffer": (Counted(), losses_of, "buffer 'seen' after a forward pass of the support batch depends on other examples"),
    "loss": (nn.Linear(3, 3), contrastive, "the loss of an example"),
    "pairs": (nn.Linear(3, 3), in_pairs, "the loss of an example"),
}


@pytest.mark.parametrize("name", MIXING)
def test_examples_that_depend_on_each_other_are_refused(name: str) -> None:
    net, loss, message = MIXING[name]
    net = net.double()
    batch = (*data(1, 8), torch.ones(8))
    with pytest.raises(InvalidArgument, match=message):
        make(net, loss=loss).adapt(batch)
    with pytest.raises(InvalidArgument, match=message):
        make(net, loss=loss).vmap().adapt(tuple(value[None] for value in batch))


@pytest.mark.parametrize("nonfinite", ["error", "ignore"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_first_batch_that_shows_nothing(value: float, nonfinite: str) -> None:
    """What was found out of bad data does not hold for the next."""
    x, y = data(1, S)
    unroll = make(train_norm(), nonfinite=nonfinite)
    bad = x.clone()
    bad[2] = value
    for first in (bad, x * value):
        with pytest.raises(NonFiniteInput):
            unroll.adapt((first, y, torch.ones(S)))
        with pytest.raises(InvalidArgument, match="depends on other examples"):
            unroll.adapt((x, y, torch.ones(S)))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.table(x.long()).mean(1)))


def test_dummy_data_shows_it_too() -> None:
    zeros, y = torch.zeros(S, 3), torch.zeros(S, dtype=torch.long)
    for net, x in ((train_norm(), zeros.double()), (train_norm(), zeros.double() + 0.25), (Words().double(), zeros.long())):
        with pytest.raises(InvalidArgument, match="depends on other examples"):
            make(net).warmup((x, y, torch.ones(S)))


def test_a_weak_dependence_in_half_precision() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return losses_of(output, target) + 0.01 * output.mean()

    x, y = data(1, S)
    with pytest.raises(InvalidArgument, match="depends on other examples"):
        make(model().float(), loss=loss, dtype=torch.bfloat16).adapt((x.float(), y, torch.ones(S)))


def test_a_loss_that_says_whether_to_update_is_refused() -> None:
    def loss(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        found = losses_of(output, target)
        return found, found.mean() < 50

    with pytest.raises(InvalidLoss, match="without update: that would be computed from padding, too"):
        make(model(), loss=loss).adapt((*data(1, S), torch.ones(S)))


def test_query_examples_that_depend_on_each_other_are_refused() -> None:
    batch = (*data(1, S), torch.ones(S))
    unroll = make(model(), query_loss=contrastive)
    for call in (unroll, unroll.evaluate):
        with pytest.raises(InvalidArgument, match="the loss of an example of the query batch depends on other examples"):
            call(batch, batch)


def test_independent_examples_are_accepted() -> None:
    """Normalisation in eval mode, dropout, indices that are floats, examples on the second axis, and data that all of them share."""
    x, y = data(1, S)

    def check(net: nn.Module, inputs: Any) -> None:
        generator = [torch.Generator().manual_seed(3) for _ in range(2)]
        found = make(net).adapt((inputs, y, torch.ones(S)), generator=generator[0])
        plain = compile_unroll(net, optim.sgd(**HYPER), K, loss=F.cross_entropy, backend="eager")
        right = plain.adapt((inputs, y), generator=generator[1])
        assert_near(dict(found.detach().params), dict(right.detach().params), torch.float64)

    check(train_norm().eval(), x)
    check(nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3)).double(), x)
    check(Words().double().eval(), torch.tensor([[0.0, 6.0], [3.0, 5.0], [1.0, 1.0], [2.0, 4.0], [6.0, 6.0]]))

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(3, 3)

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return self.cell(x)[0][-1] + shift

    for length in (2, S):
        x = normal(Generator().manual_seed(2), length, S, 3)
        check(Second().double(), (x, torch.ones(3).double()))


def test_weights_that_the_losses_could_not_hold() -> None:
    """The mean is formed in a precision in which they are neither 0 nor infinite."""
    x, y = data(1, S)
    for net, weights in (
        (model().float(), torch.full((S,), 1e-50, dtype=torch.float64)),
        (model().half(), torch.full((S,), 60000.0, dtype=torch.float16)),
        (model().half(), torch.full((S,), 1e-9)),
    ):
        dtype = next(net.parameters()).dtype
        unroll = make(net, loss=lambda output, target: (output.float() - target[:, None]).square().mean(1).to(output.dtype))
        found, plain = (unroll.adapt((x.to(dtype), y, each)).losses for each in (weights, torch.ones(S)))
        assert bool(found.isfinite().all())
        torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-3)


def test_labels_that_are_ignored() -> None:
    """With the default loss an example of a sequence is the mean over the labels that count."""

    class Each(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).mT  # [S, classes, length]

    x, y = data(1, S, 4)
    y[:, 2:] = -100
    net = Each(3, 3).double()
    found = make(net, loss=None).adapt((x, y, torch.ones(S))).losses
    plain = compile_unroll(net, optim.sgd(**HYPER), K, backend="eager").adapt((x, y)).losses
    assert_near({"losses": found.detach()}, {"losses": plain.detach()}, torch.float64)


def test_in_half_precision() -> None:
    net = model().float()
    x, y = data(1, S)
    unroll = make(net, dtype=torch.bfloat16)
    padded = unroll.adapt((x.float(), y, torch.tensor([True, True, True, False, False])))
    plain = compile_unroll(net, optim.sgd(**HYPER), K, dtype=torch.bfloat16, backend="eager").adapt((x[:3].float(), y[:3]))
    for key, value in plain.params.items():
        torch.testing.assert_close(padded.params[key], value, rtol=0.02, atol=0.01)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (lambda x, y, w: (x,), InvalidType, r"\(inputs, target, weights\), or \(inputs, weights\) .* got tuple of 1"),
    "a list": (lambda x, y, w: (x, y, [1.0] * S), InvalidType, "support weights must be a tensor, one number for each example"),
    "sum to 0": (lambda x, y, w: (x, y, 0 * w), InvalidBatch, "support weights sum to 0: there is padding alone"),
    "negative": (lambda x, y, w: (x, y, w - 2), InvalidBatch, r"support weights must be at least 0, and are -1.0 at \[0\]"),
    "NaN": (lambda x, y, w: (x, y, w * float("nan")), InvalidBatch, "support weights must be at least 0, and are nan"),
    "infinite": (lambda x, y, w: (x, y, w / 0), NonFiniteInput, r"support weights 0 holds inf at \[0\]"),
    "too few": (lambda x, y, w: (x, y, w[:3]), InvalidLoss, r"one floating-point value for each example, .*\[5\].*\[3\]"),
    "one number": (lambda x, y, w: (x, y, w.sum()), InvalidLoss, "one floating-point value for each example"),
    "device": (lambda x, y, w: (x, y, w.to("meta")), DeviceMismatch, "support weights 0 is on meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    change, error, message = BAD[name]
    net = model()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for loss in (losses_of, None):
        unroll = make(net, loss=loss)
        with pytest.raises(error, match=message):
            unroll.adapt(change(*data(1, S), torch.ones(S, dtype=torch.float64)))
        unroll.adapt((*data(1, S), torch.ones(S)))
        if name in ("sum to 0", "negative", "NaN", "infinite"):
            with pytest.raises(error, match=message):  # on the way of repeated calls, too
                unroll.adapt(change(*data(1, S), torch.ones(S, dtype=torch.float64)))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_bad_tasks_losses_and_options() -> None:
    net, (x, y) = model(), data(1, T, S)
    weights = torch.ones(T, S)
    weights[1] = 0
    with pytest.raises(InvalidBatch, match=r"support weights at \[1\] sum to 0"):
        make(net).vmap().adapt((x, y, weights))
    with pytest.raises(InvalidBatch, match=r"query weights at \[1\] sum to 0"):
        make(net).vmap()((x, y, torch.ones(T, S)), (x, y, weights))
    with pytest.raises(InvalidBatch, match=r"the loss takes \(output, target\), but the batch has no target"):
        make(net).adapt((x[0], y[0]))
    with pytest.raises(InvalidLoss, match=r"leave out its mean, for example by reduction='none'"):
        make(net, loss=F.cross_entropy).adapt((x[0], y[0], weights[0]))
    with pytest.raises(InvalidType, match="got tuple of 3"):
        compile_unroll(net, optim.sgd(lr=0.1), 1).adapt((x[0], y[0], weights[0]))
    with pytest.raises(InvalidArgument, match="examples must be one of 'equal', 'weighted', got 'masked'"):
        compile_unroll(net, optim.sgd(lr=0.1), 1, examples="masked")
