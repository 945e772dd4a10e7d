"""Broadcasts late: moves `expand` behind pointwise operations, or leaves it to an operation that broadcasts anyway.

The gradient of a mean is one number for each mean, expanded and then divided. What interprets a graph one operation at a time writes the
expanded tensor to memory and reads it again for each of them. Dividing first and broadcasting where the gradient meets a whole tensor gives
the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from adaptrt.graph.ir import Graph
from adaptrt.graph.operations import is_pointwise, is_random
from adaptrt.graph.passes.base import Pass, add_call

_EXPAND = torch.ops.aten.expand.default


def _source(node: fx.Node) -> fx.Node:
    while node.target is _EXPAND:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _decides_a_dtype(node: fx.Node) -> bool:
    """Whether a number is expanded for an operation on several dtypes: without axes it has no say in the dtype that is computed in."""
    arguments = [(argument, argument.meta.get("val")) for argument in node.all_input_nodes]
    dtypes = {value.dtype for _, value in arguments if isinstance(value, Tensor) and value.dtype != torch.bool}
    return len(dtypes) > 1 and any(argument.target is _EXPAND and _source(argument).meta["val"].dim() == 0 for argument, _ in arguments)


def _run(graph: Graph) -> Graph:
    module = graph.module
    for node in list(module.graph.nodes):
        value: Any = node.meta.get("val")
        if not isinstance(value, Tensor) or not is_pointwise(node.target) or is_random(node.target):
            continue
        if not any(argument.target is _EXPAND for argument in node.all_input_nodes):
            continue
        args: Any = map_arg(node.args, _source)
        kwargs: Any = map_arg(node.kwargs, _source)
        if _decides_a_dtype(node):
            continue
        with module.graph.inserting_before(node):
            late = add_call(module, node.target, *args, **kwargs)
            found: Tensor = late.meta["val"]
            if found.shape != value.shape:
                late = add_call(module, _EXPAND, late, list(value.shape))
        node.replace_all_uses_with(late)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    return graph


late_expands = Pass("late_expands", _run)
