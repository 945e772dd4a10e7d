"""Rows that a mask selects, tables with a largest norm, and targets of `ctc_loss`: right, or refused with words that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt import optim
from adaptrt.adjoint import FirstOrder
from adaptrt.errors import DataDependentControlFlow, InvalidBatch, LabelOutOfRange, NotDifferentiable, NotTraceable, UnsupportedParameter
from tests import naive
from tests.bad_input import Attempt, Case, Forward, attempt, check_refused, data, normal
from tests.test_refusals import close, double, looped, unrolled


def upper() -> Tensor:
    return torch.ones(3, 3).triu() > 0


FROM_CONSTANTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "index": lambda m, h: h + (h.mT @ h)[upper()].mean(),
    "masked_select": lambda m, h: h + torch.masked_select(h.mT @ h, upper()).mean(),
    "masked_select of a row": lambda m, h: h + torch.masked_select(h, upper()[1]).mean(),
    "from a shape": lambda m, h: h + h[:, torch.arange(h.shape[1]) < 2].mean(),
    "an assignment": lambda m, h: h.clone().index_put_((upper()[1].expand(6, 3),), torch.zeros((), dtype=h.dtype)),
    "the places of a mask in a buffer": lambda m, h: h + h[:, m.places].mean(),
}


@pytest.mark.parametrize("name", FROM_CONSTANTS)
def test_masks_that_are_the_same_in_every_call(name: str) -> None:
    torch.manual_seed(0)
    model = Forward(FROM_CONSTANTS[name]).double()
    model.register_buffer("places", upper()[1].nonzero(as_tuple=True)[0])
    batch = double()
    found, wanted = unrolled(model)(batch, batch), naive.meta_loss(*looped(model), batch, batch)
    close(found, wanted)
    close(torch.autograd.grad(found, list(model.parameters())), torch.autograd.grad(wanted, list(model.parameters())))


def test_weights_of_zero_are_rows_left_out() -> None:
    """What the error about masks says."""

    def chosen(output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output[y != 2], y[y != 2])

    def weighted(output: Tensor, y: Tensor) -> Tensor:
        losses, mask = F.cross_entropy(output, y, reduction="none"), y != 2
        return (losses * mask).sum() / mask.sum()

    torch.manual_seed(0)
    model, batch = nn.Linear(4, 3).double(), double()
    close(unrolled(model, weighted)(batch, batch), naive.meta_loss(*looped(model, chosen), batch, batch))


class Table(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.options = nn.Parameter(3.0 * normal(5, 3)), options

    def forward(self, x: Tensor) -> Tensor:
        rows = F.embedding(x[:, 0].abs().long().clamp(0, 4), self.table, **self.options)
        return rows * (1.0 / rows.norm(dim=-1, keepdim=True)).clamp(max=1)


def masked(forward: Callable[[Any, Tensor], Tensor]) -> Attempt:
    model = Forward(forward)
    model.register_buffer("mask", upper()[1])
    return attempt(model, optim.sgd(0.1))


def ctc(targets: Any, lengths: Any = (7, 7), spelt: Any = (3, 3)) -> Attempt:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.ctc_loss(output.log_softmax(-1), target, torch.tensor(lengths), torch.tensor(spelt))

    return attempt(nn.Linear(4, 5), optim.sgd(0.1), (normal(7, 2, 4), torch.tensor(targets)), loss=loss)


class Undifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x**3


NO_DERIVATIVE: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "none at all": (lambda m, h: torch.igamma(h.abs(), h.abs()), r"no derivative, which every adjoint needs"),
    "a function without backward": (lambda m, h: Undifferentiable.apply(h), r"Give the custom autograd function a backward"),
    "a value that is needed was changed": (lambda m, h: (lambda e: (e.add_(1.0), e)[1])(h.exp()), r"y = y \+ 1 in place of y \+= 1"),
}

REFUSED: list[Case] = [
    *[
        Case(
            f"rows chosen by {name}",
            lambda forward=forward: masked(forward),
            DataDependentControlFlow,
            r"never changes, make a buffer of the places, mask\.nonzero.*weight 0",
        )
        for name, forward in {
            "data": lambda m, h: h + h[h[:, 0] > 0].sum(),
            "a buffer": lambda m, h: h + h[:, m.mask].sum(),
            "masked_select": lambda m, h: h + torch.masked_select(h, m.mask).sum(),
        }.items()
    ],
    Case(
        "a largest norm of a function",
        lambda: attempt(Table(max_norm=1.0), optim.sgd(0.1)),
        NotTraceable,
        r"test_right_masks\.py:\d+: .*max_norm rewrites rows.*rows \* \(max_norm / rows\.norm",
    ),
    Case(
        "a largest norm of a module",
        lambda: attempt(nn.Embedding(5, 3, max_norm=1.0), optim.sgd(0.1), call="compile"),
        UnsupportedParameter,
        r"max_norm=1\.0.*rows \* \(1\.0 / rows\.norm",
    ),
    Case("a label too large", lambda: ctc([[1, 2, 7], [2, 3, 4]]), LabelOutOfRange, r"index 7 .*targets of ctc_loss"),
    Case("a negative label", lambda: ctc([[1, -2, 1], [2, 3, 4]]), LabelOutOfRange, r"index -2 .*targets of ctc_loss"),
    Case(
        "too many frames", lambda: ctc([[1, 2, 3], [2, 3, 4]], (9, 7)), InvalidBatch, r"input_lengths must be 0 to 7, the number of frames"
    ),
    Case("targets too long", lambda: ctc([[1, 2, 3], [2, 3, 4]], spelt=(4, 3)), InvalidBatch, r"target_lengths must be 0 to 3"),
    *[
        Case(
            f"no derivative: {name}, {type(adjoint).__name__}",
            lambda forward=forward, adjoint=adjoint: attempt(Forward(forward), optim.sgd(0.1), data(), adjoint=adjoint),
            NotDifferentiable,
            message,
        )
        for name, (forward, message) in NO_DERIVATIVE.items()
        for adjoint in ("auto", FirstOrder())
    ],
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    check_refused(case)


def test_the_advice_about_a_largest_norm() -> None:
    """Scaled by hand, rows are those that PyTorch returns, and the table stays what it is."""
    model, x = Table(), data()[0]
    wanted = F.embedding(x[:, 0].abs().long().clamp(0, 4), model.table.detach().clone(), max_norm=1.0)
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [-1, 99])
def test_padding_of_targets_may_be_anything(padding: int) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.ctc_loss(output.log_softmax(-1), target, torch.full((2,), 7), torch.tensor([2, 3]))

    torch.manual_seed(0)
    model, x = nn.Linear(4, 5).double(), normal(7, 2, 4).double()
    padded = torch.tensor([[1, 2, padding], [2, 3, 4]])
    close(unrolled(model, loss).adapt((x, padded)).losses[0], loss(model(x), padded))


@pytest.mark.parametrize("data_is", ["a blank among labels", "too many frames", "a negative length"])
def test_what_ctc_cannot_mean_is_nan(data_is: str) -> None:
    def loss(output: Tensor, target: Any) -> Tensor:
        return F.ctc_loss(output.log_softmax(-1), target["labels"], target["frames"], target["spelt"], reduction="sum")

    target = {"labels": torch.tensor([[1, 2, 3], [2, 3, 4]]), "frames": torch.tensor([7, 7]), "spelt": torch.tensor([3, 3])}
    model = nn.Linear(4, 5)
    assert unrolled(model, loss).adapt((normal(7, 2, 4), target)).losses.isfinite().all()
    key, value = {"a blank among labels": ("labels", 0), "too many frames": ("frames", 8), "a negative length": ("frames", -1)}[data_is]
    target[key].view(-1)[0] = value
    assert unrolled(model, loss).adapt((normal(7, 2, 4), target)).losses.isnan().all()
