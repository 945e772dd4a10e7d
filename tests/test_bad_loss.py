"""Losses that are no differentiable scalar of what adapts are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import adaptrt
from adaptrt.errors import InvalidBatch, InvalidLoss, NothingToAdapt
from tests.bad_input import CE, Case, Forward, attempt, beside, check_refused, data, normal


def detached(module: Forward, h: Tensor) -> Tensor:
    return h.detach()


CASES: list[Case] = [
    Case(
        "loss: not a scalar",
        lambda: attempt(loss=lambda output, target: CE(output, target, reduction="none")),
        InvalidLoss,
        r"loss must be a floating-point scalar.*got float32\[6\].*\.mean\(\)",
    ),
    Case(
        "loss: shape [1]",
        lambda: attempt(loss=lambda output, target: CE(output, target)[None]),
        InvalidLoss,
        r"loss must be a floating-point scalar.*got float32\[1\]",
    ),
    Case(
        "loss: integer",
        lambda: attempt(loss=lambda output, target: output.argmax(-1).sum()),
        InvalidLoss,
        r"loss must be a floating-point scalar.*got int64\[\]",
    ),
    Case(
        "loss: complex",
        lambda: attempt(loss=lambda output, target: output.sum() * 1j),
        InvalidLoss,
        r"loss must be a floating-point scalar.*got complex64\[\]",
    ),
    Case("loss: a number", lambda: attempt(loss=lambda output, target: 1.0), InvalidLoss, r"loss must return a tensor, got float"),
    Case(
        "loss: a tuple",
        lambda: attempt(loss=lambda output, target: (CE(output, target), output)),
        InvalidLoss,
        r"loss must return a tensor, or .* got a tuple with",
    ),
    Case("loss: nothing", lambda: attempt(loss=lambda output, target: None), InvalidLoss, r"loss must return a tensor, got NoneType"),
    Case(
        "loss: scalar on support, not on query",
        lambda: attempt(loss=lambda o, t: CE(o, t, reduction="none") if o.shape[0] == 5 else CE(o, t), query=data(5, 4), call="meta"),
        InvalidLoss,
        r"float32\[5\]",
    ),
    Case(
        "loss: detached",
        lambda: attempt(Forward(detached)),
        NothingToAdapt,
        r"support loss does not depend on the adapted parameters: check `params=`",
    ),
    Case("loss: constant", lambda: attempt(loss=lambda output, target: torch.ones(())), NothingToAdapt, r"support loss does not depend"),
    Case(
        "loss: does not use what adapts",
        lambda: attempt(beside("unused", nn.Parameter(torch.ones(2))), adaptrt.optim.sgd(0.1), params="unused"),
        NothingToAdapt,
        r"support loss does not depend.*\(unused\)|support loss does not depend.*params=",
    ),
    Case(
        "loss=None: no target",
        lambda: attempt(support=(normal(6, 4),)),
        InvalidLoss,
        r"batch has no target and the output \(float32\[6, 3\]\).*pass \(inputs, target\) or loss=",
    ),
    Case(
        "loss=None: boolean target",
        lambda: attempt(support=(normal(6, 4), torch.ones(6, 3, dtype=torch.bool))),
        InvalidLoss,
        r"no default loss for a target of torch\.bool; pass loss=",
    ),
    Case(
        "loss=None: output without loss",
        lambda: attempt(Forward(lambda module, h: {"logits": h})),
        InvalidLoss,
        r"loss=None needs a model that returns a tensor or has a `\.loss`, got dict",
    ),
    Case(
        "loss: no label for a loss of two",
        lambda: attempt(support=(normal(6, 4),), loss=CE),
        InvalidBatch,
        r"the loss takes \(output, target\), but the batch has no target; pass \(inputs, target\)",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    check_refused(case)
