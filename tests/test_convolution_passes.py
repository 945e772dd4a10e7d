"""What makes convolutional programs fast: each rewrite gives the operation's numbers, and does what it is for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt.backend import Inductor
from adaptrt.backend.inductor import compile as inductor
from adaptrt.backend.inductor.rewrites.one_channel_last import one_channel_last
from adaptrt.graph.capture import capture
from adaptrt.graph.passes.base import apply
from adaptrt.graph.passes.convolution_gradients import convolution_gradients
from adaptrt.graph.passes.pool_as_maxima import PoolAsMaxima
from tests.graphs import targets
from tests.tolerances import EQUAL, OPERATIONS, ROUNDING, assert_close

aten = torch.ops.aten


# --- pooling

POOLS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "2": (lambda x: F.max_pool2d(x, 2), (3, 2, 8, 6)),
    "module": (nn.MaxPool2d(2), (3, 2, 8, 6)),
    "odd sizes": (lambda x: F.max_pool2d(x, 2), (2, 3, 7, 5)),
    "2 x 3": (lambda x: F.max_pool2d(x, (2, 3)), (2, 3, 7, 9)),
    "stride named": (lambda x: F.max_pool2d(x, kernel_size=3, stride=3), (2, 1, 9, 10)),
    "one image": (lambda x: F.max_pool2d(x, 2), (3, 4, 6)),
    "torch's own": (lambda x: torch.max_pool2d(x, 2, 2), (2, 3, 4, 4)),
}
OTHER_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "overlapping": lambda x: F.max_pool2d(x, 3, 2),
    "padded": lambda x: F.max_pool2d(x, 2, padding=1),
    "dilated": lambda x: F.max_pool2d(x, 2, dilation=2),
    "rounded up": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "large": lambda x: F.max_pool2d(x, 5),
    "with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "within a transform": lambda x: torch.func.vmap(lambda y: F.max_pool2d(y, 2))(x.unsqueeze(0))[0],
}


def tied(shape: tuple[int, ...]) -> Tensor:
    """Few different values, so that most windows hold equal ones, with NaN, infinities and both zeros among them."""
    x = torch.randint(-2, 3, shape).double()
    flat = x.view(-1)
    flat[::11], flat[5::17], flat[3::19], flat[7::13] = float("nan"), float("inf"), -float("inf"), -0.0
    return x


@pytest.mark.parametrize(("fn", "shape"), POOLS.values(), ids=POOLS)
def test_pools_take_the_element_that_the_operation_takes(fn: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    for x in (torch.randn(shape, dtype=torch.float64), tied(shape)):
        x.requires_grad_()
        with PoolAsMaxima() as mode:
            found = fn(x)
        assert mode.num_written == 1
        expected = fn(x)
        assert_close(found, expected, EQUAL, equal_nan=True)
        cotangent = torch.randn_like(expected).requires_grad_()
        ours, theirs = (torch.autograd.grad(value, x, cotangent, create_graph=True)[0] for value in (found, expected))
        assert torch.equal(ours, theirs)
        seed = torch.randn_like(x)
        again = [torch.autograd.grad((value * seed).sum(), cotangent, create_graph=True)[0] for value in (ours, theirs)]
        assert torch.equal(*again)


def test_pools_have_derivatives_of_every_order() -> None:
    x = torch.randperm(48).double().view(1, 2, 6, 4).requires_grad_()

    def fn(x: Tensor) -> Tensor:
        with PoolAsMaxima():
            return F.max_pool2d((x / 48).sin(), 2)

    assert torch.autograd.gradcheck(fn, x) and torch.autograd.gradgradcheck(fn, x)


@pytest.mark.parametrize("fn", OTHER_POOLS.values(), ids=OTHER_POOLS)
def test_other_pools_are_left_alone(fn: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 10, 10)
    with PoolAsMaxima() as mode:
        found = fn(x)
    assert mode.num_written == 0 and torch.equal(found, fn(x))


def test_a_capture_for_fusion_says_that_it_wrote_pools() -> None:
    def fn(x: Tensor) -> Tensor:
        return F.max_pool2d(F.max_pool2d(x, 2), 2)

    x = torch.randn(2, 3, 8, 8)
    plain, fused = capture(fn, x), capture(fn, x, for_fusion=True)
    assert aten.max_pool2d_with_indices.default in targets(plain)
    assert aten.max_pool2d_with_indices.default not in targets(fused)
    assert fused.history[0].name == "pool_as_maxima of 2 pools"
    assert torch.equal(fused.run(x), plain.run(x))


# --- gradients of convolutions

CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "same": ((4, 3, 6, 5), (2, 3, 3, 3), {"padding": 1}),
    "valid": ((4, 3, 6, 5), (2, 3, 3, 2), {}),
    "strided": ((3, 2, 7, 7), (4, 2, 3, 3), {"stride": 2, "padding": 1}),
    "strided, rest": ((3, 2, 8, 8), (4, 2, 3, 3), {"stride": 2, "padding": 1}),
    "dilated": ((3, 2, 8, 7), (4, 2, 3, 2), {"dilation": 2}),
    "one axis": ((3, 2, 9), (4, 2, 3), {"padding": 1}),
    "groups": ((3, 4, 6, 6), (4, 2, 3, 3), {"groups": 2}),
}


@pytest.mark.parametrize(("shape", "weights", "options"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_second_derivatives_of_convolutions(shape: tuple[int, ...], weights: tuple[int, ...], options: dict[str, Any]) -> None:
    convolve = {3: F.conv1d, 4: F.conv2d}[len(shape)]

    def fn(x: Tensor, w: Tensor, seed: Tensor) -> list[Tensor]:
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        (inner,) = torch.autograd.grad(convolve(x, w, **options).sin().sum(), w, create_graph=True)
        return list(torch.autograd.grad((inner * seed).sum(), [x, w]))

    values = [torch.randn(size, dtype=torch.float64) for size in (shape, weights, weights)]
    graph = capture(fn, *values)
    assert "convolution_gradients" in {record.name for record in graph.history}
    for found, expected in zip(graph.run(*values), fn(*values), strict=True):
        assert_close(found, expected, OPERATIONS)


def test_gradients_without_use_are_not_computed_and_weight_gradients_are_named() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        """The derivative of an inner gradient of two layers, by the weights."""
        w, v = w.detach().requires_grad_(), v.detach().requires_grad_()
        inner = torch.autograd.grad(F.conv2d(F.conv2d(x, w, padding=1).sin(), v, padding=1).sin().sum(), [w, v], create_graph=True)
        return torch.autograd.grad(sum((part.square().sum() for part in inner), torch.zeros(())), [w, v])[0]

    values = [torch.randn(size, dtype=torch.float64) for size in ((2, 1, 6, 6), (3, 1, 3, 3), (3, 3, 3, 3))]
    graph = capture(fn, *values)
    assert_close(graph.run(*values), fn(*values), OPERATIONS)
    nodes = list(graph.module.graph.nodes)
    for node in nodes:
        if node.target is aten.convolution_backward.default:
            assert node.args[-1] == [index in {user.args[1] for user in node.users} for index in range(3)]
        if node.target is aten.convolution.default:
            assert not all(getattr(arg, "target", None) is aten.transpose.int for arg in node.args[:2]), "images convolved by images"
    assert apply([convolution_gradients], graph).num_nodes == graph.num_nodes, "what is done is not done again"


# --- layout


@pytest.mark.parametrize(("batch", "channels", "expected"), [(4, 1, 1), (1, 1, 1), (4, 2, 0)])
def test_images_of_one_channel_become_channels_last(batch: int, channels: int, expected: int) -> None:
    x, w = torch.randn(batch, channels, 6, 6, dtype=torch.float64), torch.randn(3, channels, 3, 3, dtype=torch.float64)
    graph = capture(lambda x, w: F.conv2d(x, w).sin(), x, w)
    renewed = apply([one_channel_last], graph)
    assert targets(renewed).count(aten.as_strided.default) == expected
    assert targets(apply(inductor.PASSES, graph)).count(aten.as_strided.default) == expected
    assert_close(renewed.run(x, w), graph.run(x, w), ROUNDING)


def test_an_image_that_is_a_view_is_left_alone() -> None:
    """Inductor would read it from the beginning of the memory that it is a view of."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x[2], w).sin() + F.conv2d(x[1].sin(), w)

    x, w = torch.randn(3, 4, 1, 6, 6, dtype=torch.float64), torch.randn(3, 1, 3, 3, dtype=torch.float64)
    graph = capture(fn, x, w)
    assert targets(one_channel_last.run(graph)).count(aten.as_strided.default) == 1
    assert_close(Inductor().compile(graph)([x, w])[0], fn(x, w), OPERATIONS)


def test_all_rewrites_are_idle_where_nothing_is_to_be_done() -> None:
    graph = capture(lambda x: x.sin(), torch.zeros(3))
    for rewrite, _ in itertools.product((convolution_gradients, one_channel_last), range(2)):
        assert targets(rewrite.run(graph)) == [aten.sin.default]
