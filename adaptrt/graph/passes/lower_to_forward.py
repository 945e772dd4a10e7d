"""Brings a graph to a small set of forward ATen operations, which interpreters of other libraries have, too.

Every gradient is written in terms of operations that also stand in forward passes, but for two that say more than their parts:
`max_pool2d_with_indices_backward`, because what runs the graph may know better where its own pool found the maxima, and
`threshold_backward`, the gradient of ReLU. The rest is PyTorch's core set, from which these are taken out:

- views of one kind only (`reshape`, `permute`, `slice`, `select`, `expand`), batch and group normalisation, `stack`, `unbind`;
- operations that are two others in sequence, such as `addcmul`, `leaky_relu` or `masked_fill`;
- tensors without values (`empty`), which are zeros.

`gelu`, `_softmax`, `_log_softmax` and, in float32, `native_layer_norm` stay, for which there are kernels everywhere. `silu` does not, so
that it shares the sigmoid with its gradient.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, decomposition_table
from torch._decomp.decompositions import pw_cast_for_opmath

from adaptrt.graph.ir import Graph
from adaptrt.graph.passes import norm_rules, pool_rules
from adaptrt.graph.passes.base import Pass, apply
from adaptrt.graph.passes.convolution_rules import convolution_backward
from adaptrt.graph.passes.decompose import decompose
from adaptrt.graph.passes.functionalise import functionalise
from adaptrt.graph.passes.late_expands import late_expands
from adaptrt.graph.passes.merge_duplicates import merge_duplicates
from adaptrt.graph.passes.merge_sums import merge_sums
from adaptrt.graph.passes.own_outputs import own_outputs
from adaptrt.graph.passes.recorder import Rules
from adaptrt.graph.passes.relax_views import relax_views
from adaptrt.graph.passes.remove_identities import remove_identities

aten = torch.ops.aten

_KEPT = (aten.threshold_backward.default,)
"""Of the core set's decompositions, those that are not used: there are kernels."""

_BEYOND_THE_CORE = (
    *(aten.elu.default, aten.leaky_relu.default, aten.hardtanh.default, aten.linalg_vector_norm.default),
    *(
        aten.upsample_bilinear2d.default,
        aten.upsample_linear1d.default,
        aten.upsample_trilinear3d.default,
        aten.any.default,
        aten.any.dim,
        aten.any.dims,
    ),
)
"""Operations of the core set that PyTorch has a decomposition for all the same."""


def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    del non_blocking
    return source.to(x.dtype).expand(x.shape)


def _zeros(size: Sequence[int], **options: Any) -> Tensor:
    dtype, device = options.get("dtype"), options.get("device")
    return aten.full.default(size, 0, dtype=dtype or torch.get_default_dtype(), device=device)


def _zeros_like(x: Tensor, *size: Any, **options: Any) -> Tensor:
    shape = size[0] if size else x.shape
    return aten.full.default(shape, 0, dtype=options.get("dtype") or x.dtype, device=options.get("device") or x.device)


def _sigmoid_backward(gradient: Tensor, output: Tensor) -> Tensor:
    """PyTorch's own rule is the same, but takes five times as long to trace, which recurrent networks do hundreds of times."""
    return gradient * (output * (1 - output))


def _silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Two operations fewer on whole tensors than PyTorch's own rule, because x * s is the output."""
    s = torch.sigmoid(x)
    return gradient * (s + (x * s) * (1 - s))


def _tanh_backward(gradient: Tensor, output: Tensor) -> Tensor:
    return gradient * (1 - output * output)


def _trilinear(
    one: Tensor, two: Tensor, three: Tensor, expand1: Sequence[int], expand2: Sequence[int], expand3: Sequence[int], summed: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:  # fmt: skip
    del unroll_dim
    for axes, of in ((expand1, 0), (expand2, 1), (expand3, 2)):
        value = (one, two, three)[of]
        for axis in axes:
            value = value.unsqueeze(axis)
        one, two, three = (value if of == 0 else one), (value if of == 1 else two), (value if of == 2 else three)
    product = one * two * three
    return product.sum(list(summed)) if summed else product


def _max_dim(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return x.amax(dim, keepdim), x.argmax(dim, keepdim)


def _min_dim(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return x.amin(dim, keepdim), x.argmin(dim, keepdim)


def _max(x: Tensor) -> Tensor:
    return x.amax(list(range(x.dim())))


def _min(x: Tensor) -> Tensor:
    return x.amin(list(range(x.dim())))


def _select_scatter(x: Tensor, source: Tensor, dim: int, index: int) -> Tensor:
    size, index = x.shape[dim], index % x.shape[dim]
    parts = (aten.slice.Tensor(x, dim, 0, index), source.unsqueeze(dim), aten.slice.Tensor(x, dim, index + 1, size))
    return torch.cat([part for part in parts if part.shape[dim]], dim)


def _slice_scatter(x: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
    places = torch.arange(x.shape[dim], device=x.device)[start:end:step]
    return aten.index_put.default(x, [*[None] * (dim % x.dim()), places], source)


def _diagonal_scatter(x: Tensor, source: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    turned = x.movedim((dim1, dim2), (-2, -1))
    rows, columns = turned.shape[-2:]
    places = torch.arange(rows * columns, device=x.device).reshape(rows, columns).diagonal(offset)
    flat = aten.index_put.default(turned.flatten(-2), [*[None] * (x.dim() - 2), places], source)
    return flat.reshape(turned.shape).movedim((-2, -1), (dim1, dim2))


def _unfold(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    moved, axis = x.movedim(dim, -1), dim % x.dim()
    first = torch.arange(0, x.shape[dim] - size + 1, step, device=x.device)
    places = first.unsqueeze(1) + torch.arange(size, device=x.device)
    return aten.index.Tensor(moved, [*[None] * (x.dim() - 1), places]).movedim(-2, axis)


def _var_mean(x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
    axes = list(dim) if dim else list(range(x.dim()))
    mean = x.mean(axes, keepdim=True)
    count = math.prod(x.shape[axis] for axis in axes) - (1 if correction is None else correction)
    var = (x - mean).square().sum(axes, keepdim=keepdim) / max(count, 0)
    return var, mean if keepdim else mean.reshape(var.shape)


def _var(x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return _var_mean(x, dim, correction=correction, keepdim=keepdim)[0]


def _max_pool(x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False) -> Tensor:
    return aten.max_pool2d_with_indices.default(x, kernel, stride, padding, dilation, ceil_mode)[0]


@functools.cache
def _rules() -> Rules:
    of_pytorch = cast("dict[Any, Any]", decomposition_table)
    rules: dict[Any, Any] = dict(core_aten_decompositions())
    rules |= {target: of_pytorch[target] for target in _BEYOND_THE_CORE if target in of_pytorch}
    for target in _KEPT:
        rules.pop(target, None)
    empty = (aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default)
    rules |= dict.fromkeys(empty, _zeros_like)
    rules |= dict.fromkeys((aten.empty.memory_format, aten.empty_permuted.default, aten.empty_strided.default), _zeros)
    return {
        **rules,
        **norm_rules.RULES,
        **pool_rules.RULES,
        aten.convolution_backward.default: convolution_backward,
        aten.copy.default: _copy,
        aten.native_group_norm_backward.default: pw_cast_for_opmath(norm_rules.group_norm_backward),  # halves are computed in float32
        aten.sigmoid_backward.default: _sigmoid_backward,
        aten.silu_backward.default: pw_cast_for_opmath(_silu_backward),
        aten.tanh_backward.default: _tanh_backward,
        aten._trilinear.default: _trilinear,
        aten.max.dim: _max_dim,
        aten.min.dim: _min_dim,
        aten.max.default: _max,
        aten.min.default: _min,
        aten.select_scatter.default: _select_scatter,
        aten.slice_scatter.default: _slice_scatter,
        aten.diagonal_scatter.default: _diagonal_scatter,
        aten.unfold.default: _unfold,
        aten.var_mean.correction: _var_mean,
        aten.var.correction: _var,
        aten.max_pool2d.default: _max_pool,
    }


_PASSES = (
    Pass("decompose", lambda graph: decompose(graph, _rules())),
    functionalise,
    relax_views,
    remove_identities,
    late_expands,
    merge_duplicates,
    merge_sums,
    own_outputs,
)


def lower_to_forward(graph: Graph) -> Graph:
    """Returns a graph of forward operations that computes the same values.

    Operations that no rule replaces stay as they are; whoever translates the graph has to say so.
    """
    return apply(_PASSES, graph)
