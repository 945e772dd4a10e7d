"""What an adapted model cannot predict for is refused, and so are the wrong `start` and shapes that were not warmed up."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import adaptrt
from adaptrt.errors import (
    DeviceMismatch,
    InvalidArgument,
    InvalidBatch,
    InvalidType,
    NonFiniteInput,
    OptimizerMismatch,
    ShapeChanged,
)
from tests.bad_input import (
    Attempt,
    Case,
    adapted,
    anything,
    check_refused,
    data,
    mse_net,
    net,
    normal,
    poisoned,
    warm,
    zeros,
)


def new_prediction_shape() -> Attempt:
    model = net()
    unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(0.1), 1, backend="eager", on_new_shape="error").warmup(data(), data(7, 4))
    result = unroll.adapt(data())
    return Attempt(lambda: result(normal(5, 4)), (model, result.params))


def start_for(model: nn.Module, opt: adaptrt.optim.Optimizer, vmap: bool = False) -> Attempt:
    """A result of the usual unroll, handed to one of another model or optimiser."""
    other = adaptrt.compile_unroll(model, opt, 1, backend="eager")
    return adapted(lambda unroll, result: other.adapt(data(), start=result), vmap)


CASES: list[Case] = [
    Case(
        "prediction: NaN", lambda: adapted(lambda unroll, result: result(poisoned(float("nan"))[0])), NonFiniteInput, r"input 0 holds nan"
    ),
    Case("prediction: empty", lambda: adapted(lambda unroll, result: result(torch.ones(0, 4))), InvalidBatch, r"input 0 is empty"),
    Case(
        "prediction: another device",
        lambda: adapted(lambda unroll, result: result(torch.ones(6, 4, device="meta"))),
        DeviceMismatch,
        r"input 0 is on meta, the model on cpu",
    ),
    Case(
        "prediction: wrong rank",
        lambda: adapted(lambda unroll, result: result(torch.ones(6, 5))),
        InvalidBatch,
        r"input batch.*float32\[6, 5\]",
    ),
    Case(
        "prediction: positional and keyword",
        lambda: adapted(lambda unroll, result: result(torch.ones(6, 4), input=torch.ones(6, 4))),
        InvalidType,
        r"all by position or all by keyword",
    ),
    Case("prediction: nothing", lambda: adapted(lambda unroll, result: result()), InvalidType, r"input.*must be a tensor"),
    Case(
        "prediction: no task axis",
        lambda: adapted(lambda unroll, result: result(torch.ones(6, 4)), vmap=True),
        InvalidBatch,
        r"input tensor 0.*must have 2 tasks along axis 0, got 6",
    ),
    Case(
        "start: wrong kind",
        lambda: adapted(lambda unroll, result: unroll.adapt(data(), start=anything(result.params))),
        InvalidType,
        r"start must be what adapt\(\) returned, got ReadOnly",
    ),
    Case(
        "start: of another optimiser",
        lambda: start_for(net(), adaptrt.optim.adam()),
        OptimizerMismatch,
        r"start was adapted with another model or optimiser",
    ),
    Case(
        "start: of another model",
        lambda: start_for(mse_net(), adaptrt.optim.sgd(0.1, momentum=0.9)),
        OptimizerMismatch,
        r"start was adapted with another model or optimiser",
    ),
    Case("start: same names, other shapes", lambda: start_for(net(9), adaptrt.optim.sgd(0.1, momentum=0.9)), OptimizerMismatch, r"start"),
    Case(
        "start: with tasks, support without",
        lambda: start_for(net(), adaptrt.optim.sgd(0.1, momentum=0.9), vmap=True),
        InvalidArgument,
        r"start holds 2 tasks, the support batch no task axis",
    ),
    Case(
        "start: other number of tasks",
        lambda: adapted(lambda unroll, result: unroll.adapt((normal(3, 6, 4), zeros(3, 6)), start=result), vmap=True),
        InvalidArgument,
        r"start holds 2 tasks, the support batch 3",
    ),
    Case(
        "new shape: nothing warm",
        lambda: warm(then=lambda unroll: unroll.adapt(data())),
        ShapeChanged,
        r"support float32\[6, 4\], int64\[6\]: nothing was compiled yet.*warmup\(\)",
    ),
    Case(
        "new shape: support",
        lambda: warm(data(), then=lambda unroll: unroll.adapt(data(5, 4))),
        ShapeChanged,
        r"support tensor 0 was traced as float32\[6, 4\], got float32\[5, 4\].*warmup\(\).*pad",
    ),
    Case(
        "new shape: query",
        lambda: warm(data(), data(7, 4), then=lambda unroll: unroll(data(), data(5, 4))),
        ShapeChanged,
        r"query tensor 0 was traced as float32\[7, 4\], got float32\[5, 4\].*warmup\(\)",
    ),
    Case(
        "new shape: prediction",
        new_prediction_shape,
        ShapeChanged,
        r"input tensor 0 was traced as float32\[7, 4\], got float32\[5, 4\].*warmup\(\)",
    ),
    Case(
        "new shape: dtype of the target",
        lambda: warm(data(), then=lambda unroll: unroll.adapt((normal(6, 4), torch.zeros(6, dtype=torch.int32)))),
        ShapeChanged,
        r"support tensor 1 was traced as int64\[6\], got int32\[6\]",
    ),
    Case(
        "new shape: query, none warm",
        lambda: warm(data(), then=lambda unroll: unroll(data(), data())),
        ShapeChanged,
        r"query.*nothing was compiled yet.*warmup\(\)",
    ),
    Case(
        "new shape: no target where there was one",
        lambda: warm(data(), then=lambda unroll: unroll.adapt((normal(6, 4),))),
        ShapeChanged,
        r"support.*(target|structure)",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    check_refused(case)
