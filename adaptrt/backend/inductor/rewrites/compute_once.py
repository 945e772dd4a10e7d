"""Marks small expressions that are computed once, before a loop over a larger tensor, and not again for each of its elements.

A compiler that fuses operations makes one expression of all pointwise operations. The bias corrections of Adam, which are two powers in
double precision, would be computed for every few parameters. What normalisation derives from its statistics by divisions and roots would be
computed for every few activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from adaptrt.graph.ir import Graph
from adaptrt.graph.operations import COSTLY, is_pointwise, is_view, name_of
from adaptrt.graph.passes.base import Pass, add_call

MIN_RATIO = 8
"""How many times as many elements as the expression the loop must have."""

MIN_COST = 1 << 18
"""How much has to be saved at least, in additions. Another loop, at whose end threads wait for each other, costs about as much."""

MIN_COST_OF_POSITIONS = 10
"""What an element has to cost at least, in additions, if the expression reads nothing from memory. A cheaper one is computed as fast as it
would be read. And a compiler does not fuse operations that would read too many tensors, to which this would add one."""

_COSTS: dict[str, int] = {
    **dict.fromkeys(("div", "reciprocal", "sqrt", "rsqrt", "remainder", "fmod"), 10),
    **dict.fromkeys(COSTLY, 20),
}
"""What operations cost, roughly, in additions. All others cost one."""

_LIBRARY: Any = torch.library.Library("adaptrt", "FRAGMENT")
_LIBRARY.define("computed_once(Tensor x) -> Tensor")
_LIBRARY.impl("computed_once", torch.clone, "CPU")
_LIBRARY.impl("computed_once", torch.clone, "Meta")

computed_once: Any = torch.ops.adaptrt.computed_once.default
"""The operation x -> x, whose result lies in memory."""


def _run(graph: Graph) -> Graph:
    module = graph.module
    nodes = [node for node in module.graph.nodes if is_pointwise(node.target) and _is_on_cpu(node)]
    loops: dict[fx.Node, set[fx.Node]] = {}  # for each operation the larger ones that it is part of
    for node in nodes:
        for part in _parts(node):
            if part.meta["val"].numel() * MIN_RATIO <= node.meta["val"].numel():
                loops.setdefault(part, set()).add(node)
    for node in nodes:
        total = sum(loop.meta["val"].numel() for loop in loops.get(node, ()))
        if total == 0:
            continue
        expression = _expression(node)
        cost = sum(map(_cost_of_operation, expression))
        if cost * total < MIN_COST or (cost < MIN_COST_OF_POSITIONS and not _reads(expression)):
            continue
        users = list(node.users)
        with module.graph.inserting_after(node):
            once = add_call(module, computed_once, node)
        for user in users:
            user.replace_input_with(node, once)
    return graph


def _is_on_cpu(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.device.type == "cpu"


def _parts(node: fx.Node) -> Iterator[fx.Node]:
    """The pointwise operations whose results the operation reads, directly or through views."""
    for argument in map(_behind_views, node.all_input_nodes):
        if is_pointwise(argument.target):
            yield argument


def _behind_views(node: fx.Node) -> fx.Node:
    while is_view(node.target) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _expression(node: fx.Node) -> list[fx.Node]:
    """All pointwise operations that one element is computed by."""
    seen: dict[fx.Node, None] = {node: None}
    for found in (waiting := [node]):
        for part in _parts(found):
            if part not in seen:
                seen[part] = None
                waiting.append(part)
    return waiting


def _reads(expression: list[fx.Node]) -> bool:
    """Whether anything in memory goes into it, rather than constants and positions only."""
    operands = {_behind_views(operand) for node in expression for operand in node.all_input_nodes}
    return any(operand.op == "placeholder" or bool(operand.all_input_nodes) for operand in operands.difference(expression))


def _cost_of_operation(node: fx.Node) -> int:
    if node.target is torch.ops.aten.pow.Tensor_Scalar and node.args[1] in (1, 2, 3, 4):
        return 1  # multiplications
    return _COSTS.get(name_of(node.target), 1)


compute_once = Pass("compute_once", _run)
