"""Computes larger matrix products in single precision by oneDNN where MKL, the other library, does not use all of the processor.

MKL does not use AVX-512 on processors that are not Intel's. On an EPYC of family 26 oneDNN takes half of MKL's time for eight million
multiplications and more, the same time for two million, and more time for fewer, because MKL has less to set up.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, fx

from adaptrt.backend.inductor.processor import mkl_is_slow
from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.base import Pass, add_call

aten = torch.ops.aten

MIN_MULTIPLICATIONS = 1 << 22


def _run(graph: Graph) -> Graph:
    if not mkl_is_slow():
        return graph
    module = graph.module
    for node in list(module.graph.nodes):
        if node.target is aten.mm.default:
            bias, (a, b) = None, node.args
        elif node.target is aten.addmm.default and not any(value != 1 for value in node.kwargs.values()):
            bias, a, b = node.args
            if bias.meta["val"].dim() != 1:
                continue
        else:
            continue
        if _is_large(a, b):
            with module.graph.inserting_before(node):
                weights = add_call(module, aten.permute.default, b, [1, 0])
                product = add_call(module, _linear(), a, weights, bias)
            node.replace_all_uses_with(product)
            module.graph.erase_node(node)
    return graph


def _is_large(a: fx.Node, b: fx.Node) -> bool:
    left, right = a.meta["val"], b.meta["val"]
    on_cpu = left.device.type == "cpu" and left.dtype == torch.float32
    return on_cpu and left.shape[0] * left.shape[1] * right.shape[1] >= MIN_MULTIPLICATIONS


def _by_onednn(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    if 1 not in weights.stride():  # oneDNN knows rows or columns that lie together
        weights = weights.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weights, bias, "none", [], "")


def _shape(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    del bias
    return x.new_empty(x.shape[0], weights.shape[0])


@functools.cache
def _linear() -> Any:
    """x [M, K], weights [N, K], bias [N] or None -> x weights^T + bias [M, N].

    PyTorch's own operation cannot stand in a graph for Inductor, which takes it for one of its making, with constant weights.
    """
    _LIBRARY.define("linear_by_onednn(Tensor x, Tensor weights, Tensor? bias) -> Tensor")
    _LIBRARY.impl("linear_by_onednn", _by_onednn, "CPU")
    _LIBRARY.impl("linear_by_onednn", _shape, "Meta")
    return torch.ops.adaptrt.linear_by_onednn.default


_LIBRARY: Any = torch.library.Library("adaptrt", "FRAGMENT")


products_by_onednn = Pass("products_by_onednn", _run)
