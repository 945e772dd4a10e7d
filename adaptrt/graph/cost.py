"""What a graph costs, read off its operations' shapes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import fx
from torch.fx.node import map_arg

from adaptrt.graph.ir import Graph


def num_flops(graph: Graph) -> int:
    """Floating-point operations of the matrix products, convolutions and attention in the graph (a multiply-add counts as two).

    Pointwise operations and reductions are not counted, as in `torch.utils.flop_counter`.
    """
    # Imported here because it imports Triton where that is installed, which takes seconds.
    from torch.utils.flop_counter import flop_registry

    total = 0
    for node in graph.module.graph.nodes:
        formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if node.op == "call_function" and formula is not None:
            args, kwargs = cast(Any, map_arg((node.args, node.kwargs), _value))
            total += formula(*args, **kwargs, out_val=_value(node))
    return total


def num_dependent(graph: Graph, inputs: Collection[int]) -> int:
    """Operations whose result depends on one of these inputs, given by position."""
    nodes = list(graph.module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    dependent = {placeholders[index] for index in inputs}
    for node in nodes:
        if node.op == "call_function" and not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    return sum(node.op == "call_function" for node in dependent)


def unchanged_inputs(graph: Graph, count: int) -> set[int]:
    """Which of the first `count` inputs are, as they came or copied, the output of the same position."""
    nodes = list(graph.module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    outputs = list(nodes[-1].args[0])
    for index, node in enumerate(outputs[:count]):
        while node.target is torch.ops.aten.clone.default:
            node = node.args[0]
        outputs[index] = node
    return {index for index in range(count) if outputs[index] is placeholders[index]}


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def num_bytes(graph: Graph) -> int:
    """Bytes of all inputs and outputs: what a call has to read and write at least."""
    return sum(entry.spec.num_bytes for entry in (*graph.signature.inputs, *graph.signature.outputs))
