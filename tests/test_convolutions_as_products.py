"""Convolutions with more weights than windows as matrix products: the same numbers, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptrt.backend import Inductor
from adaptrt.backend.inductor.compile import LOWERING
from adaptrt.graph.capture import capture
from adaptrt.graph.cost import num_flops
from adaptrt.graph.passes.base import apply
from tests.graphs import targets
from tests.tolerances import OPERATIONS, assert_close

aten = torch.ops.aten

# image, weight, options; of 8 outputs or more, on 8 windows or fewer
FEW_WINDOWS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 3, 2, 2), (8, 3, 3, 3), {"padding": 1}),
    ((1, 3, 5, 6), (9, 3, 3, 2), {"padding": (1, 0), "stride": 2}),
    ((2, 5, 7, 5), (16, 5, 2, 2), {"dilation": (3, 2), "stride": (2, 1)}),
    ((4, 6, 1, 2), (8, 6, 1, 1), {}),
    ((3, 2, 2, 2), (6, 2, 2, 2), {"padding": "valid"}),
    ((1, 2, 3, 3), (9, 2, 3, 3), {"padding": "same"}),
]


@pytest.mark.parametrize("with_bias", [False, True])
def test_numbers(with_bias: bool) -> None:
    """All of them in one program, which is compiled once."""
    values = [torch.randn(shape, dtype=torch.float64) for image, weights, _ in FEW_WINDOWS for shape in (image, weights, weights[:1])]

    def fn(*values: Tensor) -> list[Tensor]:
        rows = zip(values[::3], values[1::3], values[2::3], FEW_WINDOWS, strict=True)
        return [F.conv2d(x.sin(), w, b if with_bias else None, **options).exp() for x, w, b, (_, _, options) in rows]

    graph = capture(fn, *values)
    lowered = apply(LOWERING, graph)
    assert aten.convolution.default not in targets(lowered)
    assert num_flops(lowered) == num_flops(graph)
    found = zip(lowered.run(*values), Inductor().compile(graph)(list(values)), graph.run(*values), strict=True)
    for of_lowered, of_compiled, wanted in found:
        assert_close(of_lowered, wanted, OPERATIONS)
        assert_close(of_compiled, wanted, OPERATIONS)
        assert of_compiled.stride() == wanted.stride()


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_layout(format: torch.memory_format) -> None:
    x, w = torch.randn(2, 3, 3, 3), torch.randn(16, 3, 2, 2)

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d((x + 1).contiguous(memory_format=format), w)

    graph = capture(fn, x, w)
    assert aten.convolution.default not in targets(apply(LOWERING, graph))
    (found,) = Inductor().compile(graph)([x, w])
    assert found.stride() == fn(x, w).stride()


@pytest.mark.parametrize(
    "fn, image, weights",
    [
        (F.conv2d, (9, 3, 2, 2), (8, 3, 1, 1)),  # 36 windows
        (lambda x, w: F.conv2d(x, w, groups=3), (1, 3, 2, 2), (9, 1, 2, 2)),
        (lambda x, w: F.conv2d(x.bfloat16(), w.bfloat16()), (1, 3, 2, 2), (9, 3, 2, 2)),
        (F.conv_transpose2d, (1, 3, 1, 1), (3, 40, 2, 2)),
        (F.conv1d, (1, 3, 2), (9, 3, 2)),
    ],
)
def test_others_stay(fn: Callable[[Tensor, Tensor], Tensor], image: tuple[int, ...], weights: tuple[int, ...]) -> None:
    graph = capture(fn, torch.randn(image), torch.randn(weights))
    assert aten.convolution.default in targets(apply(LOWERING, graph))


def test_gradients_of_gradients() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(F.conv2d(x, w, padding=1).tanh().square().sum(), w, create_graph=True)
        return torch.autograd.grad((gradient * gradient).sum(), x)[0]

    x, w = torch.randn(1, 3, 2, 2, dtype=torch.float64), torch.randn(10, 3, 3, 3, dtype=torch.float64)
    graph = capture(lambda x, w: fn(x.detach().requires_grad_(), w.detach().requires_grad_()), x, w)
    assert targets(apply(LOWERING, graph)).count(aten.convolution.default) < targets(graph).count(aten.convolution.default)
    (found,) = Inductor().compile(graph)([x, w])
    assert_close(found, fn(x.requires_grad_(), w.requires_grad_()), OPERATIONS)
