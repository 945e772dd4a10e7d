"""Estimates what a graph costs in operations and bytes, from the shapes of its operations."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from adaptrt.graph.cut import minimum_cut, varying
from adaptrt.graph.ir import Graph
from adaptrt.graph.operations import is_view

aten = torch.ops.aten

PRODUCTS: set[Any] = set()
"""adaptrt's own operations that compute the product of a [..., M, K] and a [..., K, N]. A file that defines one adds it here."""


def num_flops(graph: Graph) -> int:
    """Counts the floating-point operations of matrix products, convolutions and attention in the graph (a multiply-add counts as two).

    Pointwise operations and reductions are not counted, as in `torch.utils.flop_counter`.
    """
    return flops_of(graph.module.graph.nodes)


def flops_of(nodes: Iterable[fx.Node]) -> int:
    """Counts the floating-point operations of some of a graph's operations, as `num_flops` does."""
    # Imported here because it imports Triton where that is installed, which takes seconds.
    from torch.utils.flop_counter import flop_registry

    total = 0
    for node in nodes:
        if node.target in PRODUCTS:
            total += 2 * _value(node).numel() * _value(node.all_input_nodes[0]).shape[-1]
            continue
        formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if node.op == "call_function" and formula is not None:
            args, kwargs = cast(Any, map_arg((node.args, node.kwargs), _value))
            total += formula(*args, **kwargs, out_val=_value(node))
    return total


# The derivative of an operation reads nothing (_LINEAR), the result of the operation (_BY_RESULT), or otherwise its arguments.
_LINEAR = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.neg.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.clone.default,
    aten._to_copy.default,
    aten.constant_pad_nd.default,
}
_BY_RESULT = {
    aten.relu.default,
    aten.exp.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.sqrt.default,
    aten.rsqrt.default,
    aten.reciprocal.default,
    aten._softmax.default,
    aten._log_softmax.default,
}


def num_bytes_to_keep(step: Graph, same: Collection[int]) -> int:
    """Estimates how many bytes `partition` would keep of a step, without the graph of the step's gradients.

    The estimate is what differentiating the step's operations would read.

    Args:
      step: the graph of one step.
      same: positions of inputs that are the same in every step. Values that depend on those alone are kept once, and are not counted.
    """
    nodes = [node for node in step.module.graph.nodes if node.op != "output"]
    read = {value for node in nodes if node.op == "call_function" for value in _read_on_the_way_back(node)}
    own = varying(step, same)
    return sum(
        _value(node).nbytes for node in minimum_cut(nodes, {node for node in nodes if node.op == "placeholder" or node not in own}, read)
    )


def _read_on_the_way_back(node: fx.Node) -> Sequence[fx.Node]:
    value = node.meta.get("val")
    target: Any = node.target
    if isinstance(value, Tensor) and not value.dtype.is_floating_point:
        return ()
    if target is operator.getitem or target in _LINEAR or is_view(target):
        return ()
    if target is aten.where.self:
        return [part for part in node.args[:1] if isinstance(part, fx.Node)]
    if target in (aten.mul.Tensor, aten.div.Tensor) and not all(isinstance(part, fx.Node) for part in node.args):
        return ()
    return [node] if target in _BY_RESULT else node.all_input_nodes


def returns_input(graph: Graph, position: int) -> bool:
    """Whether the output at this position is the input at the same position, unchanged or copied."""
    nodes = list(graph.module.graph.nodes)
    node = nodes[-1].args[0][position]
    while node.target is aten.clone.default:
        node = node.args[0]
    return node is nodes[position]  # inputs come first


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def num_bytes(graph: Graph) -> int:
    """Counts the bytes of all inputs and outputs, which a call has to read and write at least."""
    return sum(entry.spec.num_bytes for entry in (*graph.signature.inputs, *graph.signature.outputs))
