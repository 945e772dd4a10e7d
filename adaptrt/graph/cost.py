"""What a graph costs, read off its operations' shapes."""

from __future__ import annotations

from typing import Any, cast

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


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def num_bytes(graph: Graph) -> int:
    """Bytes of all inputs and outputs: what a call has to read and write at least."""
    return sum(entry.spec.num_bytes for entry in (*graph.signature.inputs, *graph.signature.outputs))
