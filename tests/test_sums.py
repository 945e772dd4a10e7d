"""Sums one axis after the other become one sum; sums over all but the channels are taken image by image. The same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptrt.backend import Inductor
from adaptrt.graph.capture import capture
from tests.graphs import targets
from tests.tolerances import LAST_BIT, OPERATIONS, ROUNDING, SECOND_DERIVATIVE, STATISTIC, assert_close

aten = torch.ops.aten
SUM = aten.sum.dim_IntList


# --- one sum

MERGED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "kept axes": (lambda x: x.sum(0, True).sum(3, True).sum(-2, True), 1),
    "dropped axes": (lambda x: x.sum(0).sum(2).sum(1), 1),
    "several at once": (lambda x: x.sum((0, -1)).sum(-1), 1),
    "all that is left": (lambda x: x.sum((1, 2)).sum(()), 1),
    "kept, then dropped": (lambda x: x.sum(0, True).sum(3), 2),
    "dropped, then kept": (lambda x: x.sum(0).sum(2, True), 2),
    "in another dtype": (lambda x: x.sum(0).sum(0, dtype=torch.float32), 2),
    "used otherwise": (lambda x: (lambda y: y.sum(0) * y)(x.sum(0)), 2),
    "an axis twice": (lambda x: x.sum(0, True).sum(0, True), 1),
}


def test_sums_of_a_single_number() -> None:
    x, y = torch.tensor(2.0, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    for fn, value in ((lambda x: x.sum(0), x), (lambda x: x.sum(-1, True), x), (lambda y: y.sum(0).sum(-1), y)):
        graph = capture(fn, value)
        assert_close(graph.run(value), fn(value), LAST_BIT)
        assert_close(Inductor().compile(graph)([value])[0], fn(value), LAST_BIT)


@pytest.mark.parametrize("fn, count", MERGED.values(), ids=MERGED)
def test_sums_are_merged(fn: Callable[[Tensor], Tensor], count: int) -> None:
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    graph = capture(fn, x)
    assert targets(graph).count(SUM) == count
    assert_close(graph.run(x), fn(x), ROUNDING)


def test_the_second_derivative_of_batch_normalisation_has_no_partial_sums() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.batch_norm(x, None, None, training=True).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient, x, y)[0]

    x, y = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randn(3, 4, 5, 6, dtype=torch.float64)
    graph = capture(fn, x, y)
    sums = [node for node in graph.module.graph.nodes if node.target is SUM]
    assert sums and all(node.meta["val"].numel() == 4 for node in sums)
    assert_close(graph.run(x, y), fn(x, y), SECOND_DERIVATIVE)


# --- image by image


def statistics_of(x: Tensor, axes: tuple[int, ...]) -> list[Tensor]:
    found = [torch.var_mean(x, axes, correction=correction, keepdim=keepdim) for correction in (0, 1) for keepdim in (True, False)]
    negative = tuple(axis - x.dim() for axis in axes)
    return [*[value for pair in found for value in pair], x.sum(axes), x.sum(axes, keepdim=True), (x * x).sum(negative)]


IMAGES = [
    ((5, 64, 20, 21), (0, 2, 3)),
    ((2, 64, 40, 40), (0, 2, 3)),
    ((2, 3, 32, 48, 50), (1, 3, 4)),
    ((3, 16, 9, 20, 16), (0, 2, 3, 4)),
    ((2, 130, 32, 32), (3, 0, 2)),
    ((2, 3, 64, 20, 20), (1, 3, 4)),
]


@pytest.mark.parametrize("shape, axes", IMAGES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_numbers(shape: tuple[int, ...], axes: tuple[int, ...], channels_last: bool) -> None:
    def fn(x: Tensor) -> list[Tensor]:
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        return statistics_of((x + 1).contiguous(memory_format=last if channels_last else torch.contiguous_format), axes)

    x = 100 + torch.randn(shape, dtype=torch.float64)
    graph = capture(fn, x)
    lowered = Inductor().lower(graph)
    assert aten.var_mean.correction not in targets(lowered)
    wanted = fn(x)
    for found in (lowered.run(x), Inductor().compile(graph)([x])):
        for ours, theirs in zip(found, wanted, strict=True):
            assert_close(ours, theirs, OPERATIONS)
            assert ours.shape == theirs.shape
    single = Inductor().compile(capture(fn, x.float()))([x.float()])
    for ours, theirs in zip(single, fn(x.float().double()), strict=True):
        assert_close(ours.double(), theirs, STATISTIC)


OTHERS: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
    "few elements": (lambda x: torch.var_mean(x, (0, 2, 3)), torch.empty(2, 3, 4, 5)),
    "all axes": (lambda x: torch.var_mean(x, (0, 1, 2, 3)), torch.empty(8, 64, 20, 20)),
    "other axes": (lambda x: torch.var_mean(x, (2, 3)), torch.empty(8, 64, 20, 20)),
    "rows": (lambda x: torch.var_mean(x, (0,)), torch.empty(8192, 64)),
    "half precision": (lambda x: torch.var_mean(x, (0, 2, 3)), torch.empty(8, 64, 20, 20, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("fn, x", OTHERS.values(), ids=OTHERS)
def test_other_statistics_are_left_alone(fn: Callable[[Tensor], Any], x: Tensor) -> None:
    assert aten.var_mean.correction in targets(Inductor().lower(capture(fn, x)))


STAGES: dict[str, tuple[tuple[int, ...], tuple[int, ...], list[list[int]]]] = {
    "images": ((8, 64, 28, 28), (0, 2, 3), [[2, 3], [0]]),
    "rows of large images": ((8, 64, 40, 40), (0, 2, 3), [[3], [0, 2]]),
    "rows too short": ((8, 2048, 7, 7), (0, 2, 3), [[2, 3], [0]]),
    "tasks do not make images large": ((9, 8, 64, 28, 28), (1, 3, 4), [[3, 4], [1]]),
}


@pytest.mark.parametrize("shape, axes, stages", STAGES.values(), ids=STAGES)
def test_stages(shape: tuple[int, ...], axes: tuple[int, ...], stages: list[list[int]]) -> None:
    lowered = Inductor().lower(capture(lambda x: x.sum(axes), torch.empty(shape)))
    assert [node.args[1] for node in lowered.module.graph.nodes if node.target is SUM] == stages
