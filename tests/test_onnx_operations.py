"""Every rule of translation to ONNX, and of lowering to forward operations, against PyTorch's kernel; and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import onnx
import pytest
import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.errors import NotExportable
from adaptrt.export.onnx import to_onnx, unsupported
from adaptrt.export.onnx.translate import OPSET, RULES
from adaptrt.graph.capture import capture
from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.lower_to_forward import lower_to_forward
from tests.exports import run_graph, run_session, session
from tests.graphs import targets
from tests.tolerances import LONG_SUM, OPERATIONS, STEPS, assert_close

aten = torch.ops.aten


class Case(NamedTuple):
    """A call of an operation. Tensors among the arguments are inputs of the model."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def graph(self) -> Graph:
        return capture(lambda *args: self.fn(*args, **self.kwargs), *self.args)


def call(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Case:
    return Case(fn, args, kwargs)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def apart(*shape: int) -> Tensor:
    """Different numbers, none near another, in a random order."""
    size = torch.Size(shape).numel()
    return torch.randperm(size, generator=torch.Generator().manual_seed(size)).reshape(shape) / 4.0 - size / 8.0


def positive(*shape: int) -> Tensor:
    return normal(*shape).abs() + 0.1


def within(*shape: int) -> Tensor:
    """Between -0.9 and 0.9."""
    return torch.tanh(normal(*shape)) * 0.9


def whole(*shape: int, low: int = -7, high: int = 8, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def truth(*shape: int) -> Tensor:
    return whole(*shape) > 0


SPECIAL = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), -float("inf"), float("nan"), 1e-30])


def unary(target: Any, make: Callable[..., Tensor] = normal) -> list[Case]:
    return [call(target, make(3, 4)), call(target, make()), call(target, make(2, 0, 3))]


def binary(target: Any, make: Callable[..., Tensor] = normal, second: Callable[..., Tensor] | None = None) -> list[Case]:
    """Equal shapes, broadcast both ways, and a number without axes, of another dtype."""
    other = second or make
    shapes = (((3, 4), (3, 4)), ((2, 1, 4), (3, 1)), ((4,), (2, 3, 4)), ((3, 4), ()), ((), ()))
    cases = [call(target, make(*one), other(*two)) for one, two in shapes]
    return [*cases, call(target, make(3, 4).float(), other().double())]


def of_integers(target: Any, second: Callable[..., Tensor] = whole) -> list[Case]:
    dtypes = (torch.int64, torch.int32, torch.uint8)
    return [call(target, whole(3, 4, low=0).to(dtype), second(4).abs().clamp(min=1).to(dtype)) for dtype in dtypes]


def compared(target: Any) -> list[Case]:
    near = normal(3, 4).round()
    cases = [call(target, near, near.t().reshape(3, 4)), call(target, whole(3, 4), near), call(target, whole(3, 1), whole(4))]
    return [
        *cases,
        call(target, truth(3, 4), truth(4)),
        call(target, whole(4, low=0).to(torch.uint8), whole(4)),
        call(target, SPECIAL, SPECIAL.flip(0)),
    ]


def compared_with_number(target: Any) -> list[Case]:
    return [call(target, whole(3, 4), 1), call(target, whole(3, 4), 0.5), call(target, normal(3, 4), 0), call(target, SPECIAL, 1.0)]


def convolutions() -> list[Case]:
    """(images, weights, stride, padding, dilation, transposed, output padding, groups)"""
    rows = [
        ((2, 4, 9, 8), (6, 4, 3, 3), [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        ((2, 4, 10, 8), (6, 2, 3, 2), [2, 3], [1, 0], [1, 1], False, [0, 0], 2),
        ((3, 4, 11, 12), (8, 1, 3, 3), [1, 2], [2, 1], [2, 2], False, [0, 0], 4),
        ((2, 3, 8, 8), (4, 3, 1, 1), [2, 2], [0, 0], [1, 1], False, [0, 0], 1),
        ((2, 20, 6, 5), (3, 20, 2, 3), [1, 1], [0, 1], [1, 1], False, [0, 0], 1),
        ((3, 40, 5, 5), (4, 20, 3, 3), [2, 1], [1, 1], [1, 1], False, [0, 0], 2),
        ((3, 4, 13), (4, 2, 3), [2], [1], [3], False, [0], 2),
        ((2, 2, 5, 6, 7), (3, 2, 2, 3, 2), [1, 2, 1], [0, 1, 1], [1, 1, 2], False, [0, 0, 0], 1),
        ((1, 6, 4, 3, 5), (2, 6, 2, 1, 3), [1, 1, 2], [0, 0, 1], [1, 1, 1], False, [0, 0, 0], 1),
        ((2, 4, 3, 26), (6, 2, 3, 3), [1, 1], [1, 1], [1, 1], False, [0, 0], 2),
        ((1, 16, 2, 30), (4, 16, 1, 3), [2, 1], [0, 2], [1, 2], False, [0, 0], 1),
        ((2, 1, 40), (3, 1, 5), [1], [0], [2], False, [0], 1),
        ((2, 4, 5, 4), (4, 3, 3, 3), [2, 2], [1, 0], [1, 1], True, [1, 0], 1),
        ((2, 4, 7), (4, 2, 3), [2], [1], [2], True, [1], 2),
    ]
    return [
        call(
            aten.convolution.default, normal(*x), normal(*w), None if w[0] == 8 else normal(w[0] if not rest[3] else w[1] * rest[5]), *rest
        )
        for x, w, *rest in rows
    ]


def convolution_gradients() -> list[Case]:
    found: list[Case] = []
    for case in convolutions():
        x, weight, bias, *rest = case.args
        gradient = normal(*aten.convolution.default(*case.args).shape)
        sizes = None if bias is None else list(bias.shape)
        found.append(call(aten.convolution_backward.default, gradient, x, weight, sizes, *rest, [True, True, bias is not None]))
    return found


def with_gradient(target: Any, backward: Any, places: bool) -> Callable[..., Any]:
    """A pool and its gradient, and its places if they are asked for."""

    def fn(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, gradient: Tensor) -> Any:
        found, index = target(x, kernel, stride, padding, dilation, ceil_mode)
        of_x = backward(gradient, x, kernel, stride, padding, dilation, ceil_mode, index)
        return (found, index, of_x) if places else (found, of_x)

    return fn


def pooled(num_axes: int) -> list[tuple[Any, ...]]:
    """Images, kernel, stride, padding, dilation and ceil_mode."""
    zeros, ones, twos, threes = ([size] * num_axes for size in range(4))
    numbers = [(twos, twos, zeros, ones, False), (threes, twos, ones, ones, False), (twos, twos, zeros, ones, True)]
    numbers += [(twos, twos, ones, twos, False), ([3, 2, 2][:num_axes], [], zeros, ones, False)]
    shapes = ((2, 3, *[6] * num_axes), (2, 3, 7, *[5] * (num_axes - 1)), (3, *[6] * num_axes))
    # Ties, as behind a ReLU, where the first of equal elements is chosen.
    images = [image for shape in shapes for image in (apart(*shape), apart(*shape).relu())]
    return [(image, *rest) for rest in numbers for image in images]


def pools(num_axes: int) -> list[Case]:
    target = getattr(aten, f"max_pool{num_axes}d_with_indices").default
    return [call(target, *args) for args in pooled(num_axes)]


def pool_gradients(num_axes: int) -> list[Case]:
    """With the pool in the same graph, and with places that are given."""
    target = getattr(aten, f"max_pool{num_axes}d_with_indices").default
    backward = getattr(aten, f"max_pool{num_axes}d_with_indices_backward").default
    found: list[Case] = []
    for args in pooled(num_axes):
        maxima, places = target(*args)
        gradient = normal(*maxima.shape)
        found += [call(with_gradient(target, backward, wanted), *args, gradient) for wanted in (True, False)]
        found.append(call(backward, gradient, *args, places))
    return found


INDICES = torch.tensor([[0, 2], [-1, 1]])

CASES: dict[Any, list[Case]] = {
    **{target.default: unary(target.default) for target in (aten.neg, aten.exp, aten.abs, aten.sin, aten.cos, aten.tanh, aten.sigmoid)},
    **{target.default: unary(target.default) for target in (aten.atan, aten.sinh, aten.cosh, aten.asinh, aten.erf, aten.tan, aten.exp2)},
    **{target.default: unary(target.default) for target in (aten.relu, aten.sign)},
    **{
        target.default: unary(target.default, positive)
        for target in (aten.log, aten.sqrt, aten.rsqrt, aten.reciprocal, aten.log2, aten.log10)
    },
    **{target.default: unary(target.default, within) for target in (aten.asin, aten.acos, aten.atanh)},
    aten.acosh.default: unary(aten.acosh.default, lambda *shape: 1.0 + positive(*shape)),
    **{
        target.default: [
            *unary(target.default, lambda *shape: 3 * normal(*shape)),
            call(target.default, torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])),
        ]
        for target in (aten.floor, aten.ceil, aten.round, aten.trunc)
    },
    aten.gelu.default: [*unary(aten.gelu.default), call(aten.gelu.default, normal(3, 4), approximate="tanh")],
    aten.log1p.default: [
        *unary(aten.log1p.default, within),
        call(aten.log1p.default, torch.tensor([1e-7, -1e-7, 1e-3, -1.0, 50.0, float("inf")])),
    ],
    aten.expm1.default: [
        *unary(aten.expm1.default),
        call(aten.expm1.default, torch.tensor([1e-7, -1e-7, 1e-3, -60.0, 30.0, float("inf")])),
    ],
    aten.isnan.default: [call(aten.isnan.default, SPECIAL)],
    aten.isinf.default: [call(aten.isinf.default, SPECIAL)],
    aten.add.Tensor: [
        *binary(aten.add.Tensor),
        *of_integers(aten.add.Tensor),
        call(aten.add.Tensor, truth(4), truth(4)),
        call(aten.add.Tensor, normal(3), normal(3), alpha=-0.5),
    ],
    aten.add.Scalar: [call(aten.add.Scalar, normal(3, 4), 2), call(aten.add.Scalar, whole(3), 2), call(aten.add.Scalar, whole(3), 0.5)],
    aten.sub.Tensor: [*binary(aten.sub.Tensor), *of_integers(aten.sub.Tensor), call(aten.sub.Tensor, normal(3), normal(3), alpha=2)],
    aten.sub.Scalar: [call(aten.sub.Scalar, normal(3, 4), 2), call(aten.sub.Scalar, whole(3), 2)],
    aten.mul.Tensor: [
        *binary(aten.mul.Tensor),
        *of_integers(aten.mul.Tensor),
        call(aten.mul.Tensor, truth(4), truth(4)),
        call(aten.mul.Tensor, normal(4), truth(4)),
    ],
    aten.mul.Scalar: [call(aten.mul.Scalar, normal(3, 4), 0.1), call(aten.mul.Scalar, whole(3), 2)],
    aten.div.Tensor: [*binary(aten.div.Tensor, positive), *of_integers(aten.div.Tensor)],
    aten.div.Scalar: [call(aten.div.Scalar, normal(3, 4), 3), call(aten.div.Scalar, whole(3), 2)],
    aten.div.Tensor_mode: [
        call(aten.div.Tensor_mode, value, other, rounding_mode=mode)
        for mode in ("floor", "trunc", None)
        for value, other in ((3 * normal(3, 4), positive(4)), (whole(3, 4), whole(4, low=2)), (whole(3, 4), -whole(4, low=2)))
    ],
    aten.div.Scalar_mode: [call(aten.div.Scalar_mode, whole(3, 4), -3, rounding_mode=mode) for mode in ("floor", "trunc")],
    aten.remainder.Tensor: [
        *binary(aten.remainder.Tensor, positive, lambda *shape: -positive(*shape)),
        call(aten.remainder.Tensor, whole(3, 4), whole(4, low=2)),
        call(aten.remainder.Tensor, whole(3, 4), -whole(4, low=2)),
    ],
    aten.remainder.Scalar: [
        call(aten.remainder.Scalar, 3 * normal(3, 4), 0.7),
        call(aten.remainder.Scalar, whole(9), 3),
        call(aten.remainder.Scalar, whole(9), -3),
    ],
    aten.fmod.Tensor: [
        *binary(aten.fmod.Tensor, positive, lambda *shape: -positive(*shape)),
        call(aten.fmod.Tensor, whole(3, 4), whole(4, low=2)),
    ],
    aten.fmod.Scalar: [call(aten.fmod.Scalar, 3 * normal(3, 4), 0.7), call(aten.fmod.Scalar, whole(9), -3)],
    aten.pow.Tensor_Tensor: binary(aten.pow.Tensor_Tensor, positive),
    aten.pow.Tensor_Scalar: [call(aten.pow.Tensor_Scalar, normal(3, 4), power) for power in (2, 3)]
    + [call(aten.pow.Tensor_Scalar, positive(3, 4), -0.5), call(aten.pow.Tensor_Scalar, whole(5), 2)],
    aten.pow.Scalar: [call(aten.pow.Scalar, 0.9, normal(3, 4))],
    aten.maximum.default: [
        *binary(aten.maximum.default),
        call(aten.maximum.default, whole(3, 4), whole(4)),
        call(aten.maximum.default, truth(4), truth(4).flip(0)),
    ],
    aten.minimum.default: [
        *binary(aten.minimum.default),
        call(aten.minimum.default, whole(3, 4), whole(4)),
        call(aten.minimum.default, truth(4), truth(4).flip(0)),
    ],
    **{
        packet.Tensor: [call(packet.Tensor, truth(3, 4), truth(4)), *of_integers(packet.Tensor)]
        for packet in (aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor)
    },
    **{packet.Scalar: [call(packet.Scalar, whole(3, 4), 5)] for packet in (aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor)},
    **{
        packet.default: [call(packet.default, truth(3, 4), truth(4)), call(packet.default, whole(9, low=-1, high=2), truth(9).flip(0))]
        for packet in (aten.logical_and, aten.logical_or, aten.logical_xor)
    },
    aten.logical_not.default: [call(aten.logical_not.default, truth(4)), call(aten.logical_not.default, whole(9, low=-1, high=2))],
    aten.bitwise_not.default: [call(aten.bitwise_not.default, truth(4)), call(aten.bitwise_not.default, whole(9))],
    **{packet.Tensor: compared(packet.Tensor) for packet in (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)},
    **{packet.Scalar: compared_with_number(packet.Scalar) for packet in (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)},
    aten.threshold_backward.default: [
        call(aten.threshold_backward.default, normal(3, 4), normal(4, 3).t().relu(), 0),
        call(aten.threshold_backward.default, normal(3, 4), normal(3, 4) + 0.3, 0.5),
    ],
    aten.where.self: [
        call(aten.where.self, truth(3, 4), normal(3, 4), normal(4)),
        call(aten.where.self, truth(3, 1), normal(), normal(3, 4)),
        call(aten.where.self, truth(4), whole(4), whole(4).flip(0)),
        call(aten.where.self, truth(4), truth(4).flip(0), truth(4).logical_not()),
        call(aten.where.self, truth(4), whole(4, low=0).to(torch.uint8), whole(4, low=3).to(torch.uint8)),
        call(aten.where.self, ~SPECIAL.isfinite(), torch.zeros(8), SPECIAL),
        call(lambda mask, x: torch.where(mask, torch.zeros_like(x), x), truth(3, 1), normal(3, 4)),
    ],
    aten.clamp.default: [
        call(aten.clamp.default, normal(3, 4), -0.5, 0.5),
        call(aten.clamp.default, normal(3, 4), None, 0.5),
        call(aten.clamp.default, whole(9), 0),
        call(aten.clamp.default, whole(9, low=0).to(torch.uint8), 2, 5),
    ],
    aten.clamp.Tensor: [
        call(aten.clamp.Tensor, normal(3, 4), normal(4) - 1, normal(4) + 1),
        call(aten.clamp.Tensor, normal(3, 4), None, normal(3, 1)),
    ],
    aten._to_copy.default: [
        call(aten._to_copy.default, value, dtype=dtype)
        for value in (3 * normal(3, 4), whole(9, low=0), truth(4))
        for dtype in (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool)
    ],
    aten.clone.default: [call(lambda x: x.permute(2, 0, 1).clone(memory_format=torch.contiguous_format), normal(2, 3, 4))],
    aten.reshape.default: [call(aten.reshape.default, normal(2, 6), shape) for shape in ([3, 4], [12], [2, 1, 6], [-1, 2])]
    + [call(aten.reshape.default, truth(1), []), call(aten.reshape.default, normal(2, 0), [0, 3])],
    aten.unsqueeze.default: [call(aten.unsqueeze.default, normal(2, 3), dim) for dim in (0, 1, -1)],
    aten.squeeze.dims: [call(aten.squeeze.dims, normal(1, 3, 1), dims) for dims in ([0], [0, 2], [1, -1])],
    aten.permute.default: [call(aten.permute.default, normal(2, 3, 4), dims) for dims in ([2, 0, 1], [0, -1, 1])],
    aten.expand.default: [call(aten.expand.default, normal(3, 1), shape) for shape in ([3, 4], [2, 3, 4], [2, -1, 5])]
    + [call(aten.expand.default, truth(), [2])],
    aten.cat.default: [
        call(aten.cat.default, [normal(2, 3), normal(1, 3)], 0),
        call(aten.cat.default, [normal(2, 3), whole(2, 1)], -1),
        call(aten.cat.default, [normal(0), normal(2, 3)], 0),
    ],
    aten.slice.Tensor: [
        call(aten.slice.Tensor, normal(5, 4), dim, *bounds)
        for dim in (0, -1)
        for bounds in ((1, 3), (-2, 1 << 62), (0, -1), (None, None, 2), (3, 1))
    ],
    aten.flip.default: [call(aten.flip.default, normal(2, 3, 4), dims) for dims in ([0], [0, 2], [-1])],
    aten.select.int: [call(aten.select.int, normal(2, 3, 4), dim, index) for dim, index in ((0, 1), (1, -1), (-1, 0))],
    aten.split_with_sizes.default: [
        call(aten.split_with_sizes.default, normal(6, 2), [1, 2, 3]),
        call(aten.split_with_sizes.default, normal(2, 5), [4, 1], -1),
    ],
    aten.constant_pad_nd.default: [
        call(aten.constant_pad_nd.default, normal(2, 3), pads, value) for pads, value in (([1, 2], 0.5), ([0, 1, 2, 0], 0), ([-1, 1], 1.0))
    ]
    + [call(aten.constant_pad_nd.default, whole(3), [1, 1], 7)],
    aten.repeat.default: [call(aten.repeat.default, normal(2, 3), repeats) for repeats in ([2, 1], [2, 1, 3])],
    aten.full_like.default: [
        call(lambda x: aten.full_like.default(x, 0.5), normal(2, 3)),
        call(lambda x: aten.full_like.default(x, 3), whole(2)),
    ],
    aten.diagonal.default: [call(aten.diagonal.default, normal(3, 4), *rest) for rest in ((), (1,), (-1,), (5,))]
    + [call(aten.diagonal.default, normal(2, 3, 4), 0, 0, 2)],
    aten.as_strided.default: [call(aten.as_strided.default, normal(2, 6), [3, 4], [4, 1])],
    aten.mm.default: [
        call(aten.mm.default, normal(3, 4), normal(4, 2)),
        call(lambda a, b: a.t() @ b.t(), normal(4, 3), normal(2, 4)),
        call(aten.mm.default, normal(3, 0), normal(0, 2)),
    ],
    aten.addmm.default: [
        call(aten.addmm.default, normal(2), normal(3, 4), normal(4, 2)),
        call(aten.addmm.default, normal(3, 2), normal(3, 4), normal(2, 4).t(), beta=0.5, alpha=2),
    ],
    aten.bmm.default: [
        call(aten.bmm.default, normal(5, 3, 4), normal(5, 4, 2)),
        call(lambda a, b: torch.bmm(a, b.transpose(1, 2)), normal(5, 3, 4), normal(5, 2, 4)),
    ],
    aten.convolution.default: convolutions(),
    **{getattr(aten, f"max_pool{axes}d_with_indices").default: pools(axes) for axes in (2, 3)},
    **{getattr(aten, f"max_pool{axes}d_with_indices_backward").default: pool_gradients(axes) for axes in (2, 3)},
    aten.avg_pool2d.default: [
        call(aten.avg_pool2d.default, normal(2, 3, 7, 6), *rest)
        for rest in (([2, 2],), ([3, 2], [2, 1], [1, 1]), ([3, 3], [2, 2], [1, 1], False, False))
    ]
    + [call(aten.avg_pool2d.default, normal(3, 6, 6), [2])],
    aten.avg_pool3d.default: [call(aten.avg_pool3d.default, normal(2, 3, 4, 5, 6), [2, 2, 2])],
    aten.upsample_nearest2d.default: [call(aten.upsample_nearest2d.default, normal(2, 3, 4, 5), [8, 15], None, None)],
    aten.sum.dim_IntList: [call(aten.sum.dim_IntList, normal(2, 3, 4), *rest) for rest in (([1],), ([0, -1], True), ([],), (None, True))]
    + [call(aten.sum.dim_IntList, value, [0]) for value in (whole(3, 4), truth(3, 4), whole(3, 4, low=0).to(torch.uint8))],
    aten.mean.default: [call(aten.mean.default, normal(2, 3))],
    aten.mean.dim: [call(aten.mean.dim, normal(2, 3, 4), *rest) for rest in (([1],), ([0, -1], True), (None,))],
    aten.prod.default: [call(aten.prod.default, normal(2, 3)), call(aten.prod.default, whole(3))],
    aten.prod.dim_int: [call(aten.prod.dim_int, normal(2, 3), dim, keep) for dim in (0, -1) for keep in (False, True)],
    aten.amax.default: [call(aten.amax.default, normal(2, 3, 4), *rest) for rest in (([1],), ([0, -1], True), ([],))]
    + [call(aten.amax.default, whole(3, 4), [0])],
    aten.amin.default: [call(aten.amin.default, normal(2, 3, 4), *rest) for rest in (([1],), ([0, -1], True), ([],))]
    + [call(aten.amin.default, truth(3, 4), [0])],
    aten.argmax.default: [call(aten.argmax.default, normal(3, 4).round(), *rest) for rest in ((), (0,), (-1, True), (None, True))],
    aten.argmin.default: [call(aten.argmin.default, normal(3, 4).round(), *rest) for rest in ((), (0,), (-1, True))]
    + [call(aten.argmin.default, whole(3, 4), 1)],
    aten._softmax.default: [call(aten._softmax.default, normal(2, 3, 4), dim, False) for dim in (0, 1, -1)],
    aten._log_softmax.default: [call(aten._log_softmax.default, normal(2, 3, 4), dim, False) for dim in (0, 1, -1)],
    aten.native_layer_norm.default: [
        call(aten.native_layer_norm.default, normal(5, 3, 4), [4], normal(4), normal(4), 1e-5),
        call(aten.native_layer_norm.default, normal(5, 3, 4), [3, 4], None, None, 1e-3),
        call(lambda *args: aten.native_layer_norm.default(*args)[0], normal(5, 4), [4], normal(4), None, 1e-5),
    ],
    aten.cumsum.default: [call(aten.cumsum.default, normal(3, 4), dim) for dim in (0, -1)]
    + [call(aten.cumsum.default, whole(4), 0), call(aten.cumsum.default, truth(4), 0)],
    aten.topk.default: [call(aten.topk.default, apart(3, 5), 2), call(aten.topk.default, apart(3, 5), 2, 0, False)],
    aten.sort.default: [call(aten.sort.default, apart(3, 5)), call(aten.sort.default, apart(3, 5), 0, True)],
    aten.sort.stable: [
        call(aten.sort.stable, normal(3, 5).round(), stable=True),
        call(aten.sort.stable, normal(3, 9).round(), stable=True, dim=-1, descending=True),
    ],
    aten.embedding.default: [
        call(aten.embedding.default, normal(5, 3), INDICES % 5),
        call(aten.embedding.default, normal(5, 3), torch.tensor(2)),
    ],
    aten.index_select.default: [call(aten.index_select.default, normal(3, 4), dim, torch.tensor([2, 0, 0])) for dim in (0, 1)],
    aten.gather.default: [
        call(aten.gather.default, normal(3, 4), 1, whole(3, 2, low=0, high=4)),
        call(aten.gather.default, normal(3, 4), 0, whole(2, 4, low=0, high=3)),
    ],
    aten.scatter.src: [
        call(aten.scatter.src, normal(3, 4), 1, torch.tensor([[0, 2], [3, 1]]), normal(3, 4)),
        call(aten.scatter.src, whole(4), 0, torch.tensor([2, 0]), whole(2)),
    ],
    aten.scatter.value: [call(aten.scatter.value, normal(3, 4), 1, torch.tensor([[0], [2], [3]]), -1.0)],
    aten.scatter_add.default: [call(aten.scatter_add.default, normal(3, 4), 1, torch.tensor([[0, 0], [3, 1], [1, 1]]), normal(3, 2))],
    aten.scatter_reduce.two: [
        call(aten.scatter_reduce.two, normal(4), 0, torch.tensor([0, 0, 2, 2, 2]), normal(5), reduce)
        for reduce in ("sum", "prod", "amax", "amin")
    ],
    aten.index.Tensor: [
        call(lambda x, i: x[i], normal(3, 4), INDICES),
        call(lambda x, i: x[:, i], normal(2, 3, 4), INDICES),
        call(lambda x, i, j: x[i, j], normal(3, 4, 2), INDICES, torch.tensor([1, -1])),
        call(lambda x, i, j: x[:, i, j], normal(2, 3, 4, 2), INDICES, torch.tensor([[0], [3]])),
        call(lambda x, i, j: x[i, :, j], normal(3, 2, 4), torch.tensor([0, 2]), torch.tensor([[1], [3], [0]])),
        call(lambda x, i: x[i], truth(4), torch.tensor([3, 0])),
    ],
    aten.index_put.default: [
        call(lambda x, i, v: x.index_put((i,), v), normal(5, 4), torch.tensor([4, 0]), normal(2, 4)),
        call(lambda x, i, v: x.index_put((i,), v, accumulate=True), normal(5, 4), torch.tensor([[1, 1], [3, -1]]), normal(4)),
        call(lambda x, i, v: aten.index_put.default(x, [None, i], v, True), normal(2, 5, 4), torch.tensor([4, 0, 4]), normal(2, 3, 4)),
        call(lambda x, i, j, v: x.index_put((i, j), v), normal(3, 4, 2), torch.tensor([0, 2]), torch.tensor([3, 1]), normal(2)),
        call(
            lambda x, i, j, v: aten.index_put.default(x, [i, None, j], v),
            normal(3, 2, 4),
            torch.tensor([0, 2]),
            torch.tensor([3, 1]),
            normal(2, 2),
        ),
        call(lambda x, i, v: x.index_put((i,), v), whole(5), torch.tensor([4, 0]), whole(2)),
    ],
}
"""For each operation that has a rule."""


def norm_gradient(training: bool, *rest: Any) -> Callable[..., Any]:
    def fn(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, gradient: Tensor) -> Any:
        found, *saved = aten._native_batch_norm_legit_functional.default(x, weight, bias, mean, var, training, 0.1, 1e-5)
        backward = aten.native_batch_norm_backward.default
        return found, *saved[2:], *backward(gradient, x, weight, mean, var, *saved[:2], training, 1e-5, [True, True, True])

    return fn


def group_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, gradient: Tensor) -> Any:
    sizes = (x.shape[0], x.shape[1], x[0, 0].numel(), 2)
    found, mean, invstd = aten.native_group_norm.default(x, weight, bias, *sizes, 1e-5)
    mask = [True, weight is not None, bias is not None]
    gradients = aten.native_group_norm_backward.default(gradient, x, mean, invstd, weight, *sizes, mask)
    return found, *[part for part in gradients if part is not None]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor) -> Any:
    found, mean, invstd = aten.native_layer_norm.default(x, [4], weight, bias, 1e-5)
    return found, *aten.native_layer_norm_backward.default(gradient, x, [4], mean, invstd, weight, bias, [True, True, True])


def without_statistics(x: Tensor, weight: Tensor, gradient: Tensor) -> Any:
    found, mean, invstd = aten.native_batch_norm.default(x, weight, None, None, None, True, 0.1, 1e-5)
    backward = aten.native_batch_norm_backward.default
    return found, *backward(gradient, x, weight, None, None, mean, invstd, True, 1e-5, [True, True, False])[:2]


def adaptive_max(x: Tensor, sizes: list[int], gradient: Tensor) -> Any:
    found, places = aten.adaptive_max_pool2d.default(x, sizes)
    return found, places, aten.adaptive_max_pool2d_backward.default(gradient, x, places)


_NORMS = (normal(6, 3, 4, 5), normal(3), normal(3), normal(3), positive(3), normal(6, 3, 4, 5))

LOWERED: dict[str, list[Case]] = {
    "convolution_backward": convolution_gradients(),
    "batch_norm": [call(norm_gradient(training), *_NORMS) for training in (True, False)]
    + [call(without_statistics, normal(6, 3), normal(3), normal(6, 3))],
    "group_norm": [
        call(group_norm, normal(6, 4, 3, 2), normal(4), normal(4), normal(6, 4, 3, 2)),
        call(group_norm, normal(4, 6, 8, 9), normal(6), normal(6), normal(4, 6, 8, 9)),
        call(lambda x, gradient: group_norm(x, None, None, gradient), 3 + normal(6, 4, 5), normal(6, 4, 5)),
    ],
    "layer_norm": [call(layer_norm, normal(6, 3, 4), normal(4), normal(4), normal(6, 3, 4))],
    "adaptive_avg_pool": [call(aten._adaptive_avg_pool2d.default, normal(2, 3, 7, 6), sizes) for sizes in ([1, 1], [2, 3], [3, 4])],
    "adaptive_avg_pool_backward": [
        call(aten._adaptive_avg_pool2d_backward.default, normal(2, 3, *sizes), normal(2, 3, 7, 6)) for sizes in ([1, 1], [2, 3], [3, 4])
    ],
    "adaptive_avg_pool3d": [
        call(aten._adaptive_avg_pool3d.default, normal(2, 3, 7, 6, 5), [2, 3, 4]),
        call(aten._adaptive_avg_pool3d_backward.default, normal(2, 3, 2, 3, 4), normal(2, 3, 7, 6, 5)),
    ],
    "adaptive_max_pool": [call(adaptive_max, apart(2, 3, 7, 6), sizes, normal(2, 3, *sizes)) for sizes in ([1, 1], [2, 3], [3, 4])],
    "avg_pool_backward": [
        call(aten.avg_pool2d_backward.default, normal(*aten.avg_pool2d.default(x, *rest).shape), x, *rest)
        for x in (normal(2, 3, 7, 6),)
        for rest in (
            ([2, 2], [], [0, 0], False, True, None),
            ([3, 2], [2, 1], [1, 1], False, True, None),
            ([3, 3], [2, 2], [1, 1], True, False, None),
            ([2, 2], [2, 2], [0, 0], True, True, 3),
        )
    ],
    "avg_pool": [
        call(aten.avg_pool2d.default, normal(2, 3, 7, 6), [3, 2], [2, 2], [1, 1], True, with_padding, divisor)
        for with_padding in (True, False)
        for divisor in (None, 3)
    ],
    "avg_pool3d": [
        call(aten.avg_pool3d.default, normal(1, 2, 5, 4, 5), [2, 2, 2], [], [0, 0, 0], True),
        call(aten.avg_pool3d_backward.default, normal(1, 2, 2, 2, 2), normal(1, 2, 5, 4, 5), [2], [], [0], False, True, None),
        call(aten.avg_pool3d_backward.default, normal(1, 2, 3, 2, 3), normal(1, 2, 5, 4, 5), [2], [], [0], True, True, None),
    ],
    "resizing": [
        call(torch.nn.functional.interpolate, normal(2, 3, 4, 5), 7),
        call(aten.upsample_nearest1d_backward.default, normal(2, 3, 7), [7], [2, 3, 4]),
        call(aten.upsample_nearest2d_backward.default, normal(2, 3, 7, 9), [7, 9], [2, 3, 4, 5], None, None),
        call(aten.upsample_nearest3d_backward.default, normal(2, 1, 2, 3, 4), [2, 3, 4], [2, 1, 2, 2, 2]),
        call(aten.upsample_linear1d_backward.default, normal(2, 3, 7), [7], [2, 3, 4], False),
        call(aten.upsample_bilinear2d.default, normal(2, 3, 4, 5), [7, 9], False, None, None),
        call(aten.upsample_bilinear2d_backward.default, normal(2, 3, 7, 9), [7, 9], [2, 3, 4, 5], True, None, None),
        call(aten.upsample_trilinear3d_backward.default, normal(2, 1, 2, 3, 4), [2, 3, 4], [2, 1, 2, 2, 2], False),
    ],
    "sigmoid and tanh": [
        call(aten.sigmoid_backward.default, normal(3, 4), positive(3, 4)),
        call(aten.tanh_backward.default, normal(3, 4), within(3, 4)),
        call(aten.silu_backward.default, normal(3, 4), 2 * normal(3, 4)),
        call(aten.silu_backward.default, normal(5), torch.tensor([-200.0, -20.0, 0.0, 20.0, 200.0])),
    ],
    "losses": [
        call(torch.nn.functional.binary_cross_entropy_with_logits, normal(3, 4), positive(3, 4)),
        call(torch.nn.functional.cross_entropy, normal(6, 4), whole(6, low=0, high=4), label_smoothing=0.1),
        call(torch.nn.functional.huber_loss, normal(3, 4), normal(4, 3).t()),
        call(torch.nn.functional.kl_div, normal(3, 4), positive(3, 4), reduction="batchmean"),
    ],
    "activations": [
        call(getattr(torch.nn.functional, name), 2 * normal(3, 4))
        for name in ("elu", "softplus", "hardswish", "leaky_relu", "silu", "mish", "celu", "glu", "logsigmoid")
    ],
    "reductions": [
        *[
            call(lambda x, reduce=reduce: reduce(x, 1), apart(3, 4))
            for reduce in (torch.max, torch.min, torch.std, torch.logsumexp, torch.any, torch.all)
        ],
        *[call(reduce, apart(3, 4)) for reduce in (torch.max, torch.min, torch.var_mean, torch.any)],
        call(torch.linalg.vector_norm, normal(3, 4)),
    ],
    "scattered slices": [
        call(aten.select_scatter.default, normal(3, 4), normal(3), 1, 2),
        call(aten.slice_scatter.default, normal(5, 4), normal(2, 4), 0, 1, 5, 2),
        call(aten.diagonal_scatter.default, normal(3, 4), normal(3)),
        call(lambda x: x.unfold(1, 3, 2).clone(), normal(2, 8, 3)),
        call(torch.tril, normal(3, 4)),
        call(torch.roll, normal(3, 4), 1, 0),
    ],
    "embedding_dense_backward": [call(aten.embedding_dense_backward.default, normal(6, 3), torch.tensor([0, 2, 2, 1, 3, 2]), 5, 3, False)],
    "bilinear": [call(torch.nn.functional.bilinear, normal(5, 3), normal(5, 2), normal(4, 3, 2), normal(4))],
}
"""What PyTorch has an operation for, and a graph of forward operations has not."""

WITHOUT_FLOAT64 = {
    *(aten.tan, aten.asin, aten.acos, aten.atan, aten.sinh, aten.cosh, aten.asinh, aten.acosh, aten.atanh, aten.erf, aten.gelu),
    *(aten.convolution, aten.avg_pool2d, aten.avg_pool3d, aten.upsample_nearest2d, aten.native_layer_norm),
    *("convolution_backward",),
}
"""Operations for which ONNX Runtime has no kernel in float64 on CPUs; layer normalisation is another graph there."""


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The case with float32 inputs in `dtype`."""
    return case._replace(args=tree.map_leaves(lambda value: value.to(dtype) if value.dtype == torch.float32 else value, case.args))


def agree(case: Case, dtype: torch.dtype) -> Graph:
    """Compares ONNX Runtime with PyTorch, and returns the lowered graph."""
    case = in_dtype(case, dtype)
    graph = case.graph()
    inputs = {entry.name: value for entry, value in zip(graph.signature.inputs, tree.leaves(case.args), strict=True)}
    lowered = lower_to_forward(graph)
    wanted = tree.leaves(case.fn(*case.args, **case.kwargs))
    tolerance = OPERATIONS if dtype == torch.float64 else LONG_SUM if has_sums(lowered) else STEPS
    again = list(run_graph(lowered, inputs).values())
    assert_close(again, wanted, tolerance, equal_nan=True)
    model = to_onnx(graph, "operation")
    found = run_session(session(model), inputs)
    assert list(found) == [entry.name for entry in graph.signature.outputs]
    assert_close(list(found.values()), wanted, tolerance, equal_nan=True)
    return lowered


def has_sums(graph: Graph) -> bool:
    return not {aten.convolution.default, aten.mm.default, aten.sum.dim_IntList}.isdisjoint(targets(graph))


def dtypes_of(key: Any) -> list[torch.dtype]:
    packet = key if isinstance(key, str) else key.overloadpacket
    return [torch.float32] if packet in WITHOUT_FLOAT64 else [torch.float64, torch.float32]


def shown(value: Any) -> str:
    return str(value).removeprefix("aten.").removeprefix("torch.")


RUNS = [(key, dtype) for key in CASES for dtype in dtypes_of(key)]


@pytest.mark.parametrize(("target", "dtype"), RUNS, ids=shown)
def test_an_operation_is_translated_as_pytorch_computes_it(target: Any, dtype: torch.dtype) -> None:
    for case in CASES[target]:
        assert target in targets(agree(case, dtype)), "the case does not reach the rule"


@pytest.mark.parametrize(("name", "dtype"), [(key, dtype) for key in LOWERED for dtype in dtypes_of(key)], ids=shown)
def test_what_is_lowered_keeps_its_value(name: str, dtype: torch.dtype) -> None:
    for case in LOWERED[name]:
        agree(case, dtype)


def test_every_rule_has_a_case() -> None:
    assert {str(target) for target in RULES} == {str(target) for target in CASES}


# --- what is refused, and how a model is written


def test_everything_that_is_unsupported_is_named_at_once() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.linalg.qr(x)[0] + torch.lgamma(x) + torch.digamma(x) + torch.lgamma(x + 1)

    graph = capture(fn, normal(3, 3))
    assert unsupported(graph) == ["aten.linalg_qr.default", "aten.lgamma.default", "aten.digamma.default"]
    with pytest.raises(NotExportable, match=r"adapt .* aten.linalg_qr.default, aten.lgamma.default, aten.digamma.default\. Write "):
        to_onnx(graph, "adapt")


@pytest.mark.parametrize(
    ("case", "named"),
    [
        (call(torch.exp, normal(3).bfloat16()), "an input of dtype bfloat16"),
        (call(torch.exp, normal(3).to(torch.complex64)), "an input of dtype complex64"),
        (call(lambda x: torch.view_as_complex(x).abs(), normal(3, 2)), "aten.view_as_complex.default of dtype complex64"),
        (call(lambda x: x.as_strided([2, 2], [1, 2]), normal(6)), "aten.as_strided.default to another layout"),
        (call(torch.Tensor.scatter_reduce, normal(4), 0, whole(4, low=0, high=4), normal(4), "mean"), "aten.scatter_reduce.two with"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_a_refusal_says_which_arguments_are_not_known(case: Case, named: str) -> None:
    found = unsupported(case.graph())
    assert any(entry.startswith(named) for entry in found), found


def test_a_graph_that_is_supported_has_nothing_unsupported() -> None:
    assert unsupported(capture(lambda x: x @ x, normal(3, 3))) == []


def test_a_model_has_the_signature_of_its_graph() -> None:
    def fn(state: dict[str, Tensor], x: Tensor) -> dict[str, Any]:
        return {"params": {"0.weight": state["0.weight"] + x.sum()}, "same": x, "again": [x, state["0.weight"]]}

    graph = capture(fn, {"0.weight": normal(2, 3)}, normal(3).double(), names=("carry", "x"))
    model = to_onnx(graph, "adapt")
    assert model.graph.name == "adapt"
    assert [entry.name for entry in model.graph.input] == ["carry.0.weight", "x"]
    assert [entry.name for entry in model.graph.output] == ["result.params.0.weight", "result.same", "result.again.0", "result.again.1"]
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    shapes = [[axis.dim_value for axis in entry.type.tensor_type.shape.dim] for entry in model.graph.output]
    assert shapes == [[2, 3], [3], [3], [2, 3]]
    inputs = {"carry.0.weight": normal(2, 3), "x": normal(3).double()}
    assert_close(run_session(session(model), inputs), run_graph(graph, inputs), STEPS)


def test_what_a_function_closes_over_is_an_input() -> None:
    table = normal(3)
    graph = capture(lambda x: x * table, normal(3))
    model = to_onnx(graph, "loss")
    assert [entry.name for entry in model.graph.input] == ["arg0", "const.0"]


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_what_is_the_same_in_every_call_is_computed_once_and_stored_once() -> None:
    def fn(x: Tensor) -> Tensor:
        mask = torch.ones(4, 4, dtype=torch.bool).tril().logical_not()
        return x.masked_fill(mask, 0.5) + x.masked_fill(mask, 2.0).masked_fill(mask.clone(), 0.5) + torch.arange(4) * 2

    model = to_onnx(capture(fn, normal(4, 4)), "loss")
    assert set(kinds(model)) <= {"Where", "Add"}
    values = [(entry.data_type, tuple(entry.dims), entry.raw_data) for entry in model.graph.initializer]
    assert len(set(values)) == len(values)
    assert sum(entry.data_type == onnx.TensorProto.BOOL for entry in model.graph.initializer) == 1


def test_a_number_in_float64_is_converted_once() -> None:
    def fn(lr: Tensor, *params: Tensor) -> list[Tensor]:
        return [param - lr * param for param in params]

    model = to_onnx(capture(fn, torch.tensor(0.1, dtype=torch.float64), *[normal(3)] * 3), "adapt")
    assert kinds(model).count("Cast") == 1


def test_a_pool_whose_places_nothing_needs_does_not_find_them() -> None:
    model = to_onnx(capture(lambda x: torch.nn.functional.max_pool2d(x, 2), normal(1, 1, 4, 4)), "predict")
    assert [len(node.output) for node in model.graph.node if node.op_type == "MaxPool"] == [1]


def test_a_reshape_that_undoes_another_is_left_out() -> None:
    model = to_onnx(capture(lambda x: x.exp().reshape(6).reshape(3, 2).reshape(2, 3).log(), normal(2, 3)), "loss")
    assert kinds(model) == ["Exp", "Log"]


def test_a_transposed_factor_is_no_operation_of_its_own() -> None:
    model = to_onnx(capture(lambda x, w, b: torch.nn.functional.linear(x, w, b), normal(5, 3), normal(4, 3), normal(4)), "predict")
    assert kinds(model) == ["Gemm"]


BY_CHANNEL: dict[str, tuple[Case, list[str]]] = {
    "factor and term": (call(lambda x, w, b: w * x + b, normal(4, 6, 20, 20), normal(6, 1, 1), normal(1, 6, 1, 1)), ["BatchNormalization"]),
    "term first": (call(lambda x, w, b: b + x * w, normal(4, 6, 20, 20), normal(6, 1, 1), normal(6, 1, 1)), ["BatchNormalization"]),
    "of each image": (call(lambda x, w, b: x * w + b, normal(4, 6, 300), normal(4, 6, 1), normal(4, 6, 1)), ["BatchNormalization"]),
    "of each image alone": (call(lambda x, w, b: x * w + b, normal(4, 6, 300), normal(4, 1, 1), normal(4, 1, 1)), ["BatchNormalization"]),
    "of a matrix": (call(lambda x, w, b: x * w + b, normal(6, 300), normal(6, 1), normal(6, 1)), ["BatchNormalization"]),
    "factors of images, terms of channels": (
        call(lambda x, w, b: x * w + b, normal(4, 6, 300), normal(4, 1, 1), normal(6, 1)),
        ["Mul", "Add"],
    ),
    "known factors and terms": (
        call(lambda x: x * torch.arange(6.0).reshape(6, 1) + torch.linspace(0, 1, 6).reshape(6, 1), normal(4, 6, 300)),
        ["BatchNormalization"],
    ),
    "a short factor": (call(torch.mul, normal(6, 1), normal(4, 6, 50)), ["BatchNormalization"]),
    "a short term": (call(torch.add, normal(4, 6, 50), normal(6, 1)), ["BatchNormalization"]),
    "a short difference": (call(torch.sub, normal(4, 6, 50), normal(6, 1)), ["BatchNormalization"]),
    "a difference to a tensor": (call(torch.sub, normal(6, 1), normal(4, 6, 50)), ["Sub"]),
    "a long factor": (call(torch.mul, normal(2, 3, 300), normal(3, 1)), ["Mul"]),
    "a multiple of the term": (call(torch.add, normal(4, 6, 50), normal(6, 1), alpha=2), ["Mul", "Add"]),
    "the last axis": (call(lambda x, w, b: x * w + b, normal(400, 6), normal(6), normal(6)), ["Mul", "Add"]),
    "one number": (call(lambda x, w, b: x * w + b, normal(4, 6, 50), normal(1), normal()), ["Mul", "Add"]),
    "axes apart": (call(lambda x, w, b: x * w + b, normal(4, 6, 50), normal(4, 1, 50), normal(4, 1, 50)), ["Mul", "Add"]),
    "small tensors": (call(lambda x, w, b: x * w + b, normal(2, 3, 50), normal(3, 1), normal(3, 1)), ["Mul", "Add"]),
    "large tensors": (call(torch.mul, normal(64, 64, 130), normal(64, 1)), ["Mul"]),
    "integers": (call(torch.mul, whole(4, 6, 50), whole(6, 1)), ["Mul"]),
    "another dtype": (call(torch.mul, normal(4, 6, 50), whole(6, 1)), ["Cast", "Mul"]),
}
"""For each case the operations, but for those that make nothing new."""


@pytest.mark.parametrize("name", BY_CHANNEL)
def test_a_number_for_each_channel_is_a_batch_normalisation(name: str) -> None:
    case, wanted = BY_CHANNEL[name]
    for dtype in (torch.float32, torch.float64):
        agree(case, dtype)
    assert [kind for kind in kinds(to_onnx(case.graph(), "loss")) if kind not in ("Reshape", "Expand")] == wanted


def test_a_product_that_others_need_is_computed_beside_the_sum() -> None:
    case = call(lambda x, w, b: (x * w, x * w + b), normal(4, 6, 300), normal(6, 1), normal(6, 1))
    agree(case, torch.float32)
    assert set(kinds(to_onnx(case.graph(), "loss"))) == {"Mul", "BatchNormalization", "Reshape", "Expand"}


@pytest.mark.parametrize(
    ("shape", "order", "wanted"),
    [
        ((2, 3, 4), (1, 2, 0), (1, 0)),
        ((2, 3, 4, 5), (2, 3, 0, 1), (1, 0)),
        ((2, 3, 4, 5), (0, 3, 1, 2), (0, 2, 1)),
        ((2, 1, 4), (2, 1, 0), (1, 0)),
        ((2, 3, 1, 4), (1, 3, 2, 0), (1, 0)),
        ((2, 3, 4, 5), (3, 1, 2, 0), (2, 1, 0)),
        ((2, 3, 4), (2, 1, 0), (2, 1, 0)),
        ((1, 3, 4), (1, 0, 2), None),
        ((1, 1), (1, 0), (1, 0)),
        ((0, 3, 4), (1, 2, 0), (1, 0)),
    ],
)
def test_axes_that_stay_together_move_as_one(shape: tuple[int, ...], order: tuple[int, ...], wanted: tuple[int, ...] | None) -> None:
    case = call(lambda x: x.permute(order).exp(), normal(*shape))
    agree(case, torch.float32)
    found = [node for node in to_onnx(case.graph(), "loss").graph.node if node.op_type == "Transpose"]
    assert [tuple(node.attribute[0].ints) for node in found] == ([] if wanted is None else [wanted])


def test_the_library_does_not_import_onnx() -> None:
    code = "import sys, adaptrt, adaptrt.export; assert not {'onnx', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
