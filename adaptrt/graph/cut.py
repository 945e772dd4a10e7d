"""Cuts a graph in two at the place where the fewest bytes have to be kept."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import networkx
import torch
from torch import Tensor, fx

from adaptrt.graph.ir import Graph
from adaptrt.graph.operations import is_pointwise, is_view

aten = torch.ops.aten
_CHEAP = {
    aten.reshape.default,
    aten.clone.default,
    aten._to_copy.default,
    aten.where.self,
    aten.full.default,
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.arange.start_step,
    aten.arange.default,
    aten.constant_pad_nd.default,
}


def is_cheap(node: fx.Node) -> bool:
    """Whether the operation is so cheap that it is computed again instead of keeping its result."""
    target: Any = node.target
    return target is operator.getitem or target in _CHEAP or is_view(target) or is_pointwise(target)


def varying(graph: Graph, same: Collection[int]) -> set[fx.Node]:
    """Returns the inputs whose position is not in `same`, and all operations that depend on them. Constants do not count as inputs."""
    nodes = list(graph.module.graph.nodes)
    arguments = [node for node in nodes if node.op == "placeholder"][: len(graph.signature.inputs) - len(graph.constants)]
    found = {node for index, node in enumerate(arguments) if index not in same}
    for node in nodes:
        if node.op == "call_function" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def minimum_cut(nodes: list[fx.Node], inputs: set[fx.Node], read: set[fx.Node]) -> list[fx.Node]:
    """Returns the values with the fewest bytes from which, together with `inputs`, cheap operations can compute all of `read`."""
    flow = networkx.DiGraph()
    source, sink = "source", "sink"
    flow.add_nodes_from((source, sink))
    for node in nodes:
        value = node.meta.get("val")
        size = {} if not isinstance(value, Tensor) else {"capacity": 0 if node in inputs else value.numel() * value.element_size()}
        flow.add_edge((node, "in"), (node, "out"), **size)
        if node.op == "placeholder" or not is_cheap(node):
            flow.add_edge(source, (node, "in"))
        for argument in node.all_input_nodes if is_cheap(node) else ():
            flow.add_edge((argument, "out"), (node, "in"))
        if node in read:
            flow.add_edge((node, "out"), sink)
    _, (near, _) = networkx.minimum_cut(flow, source, sink)
    return [node for node in nodes if node not in inputs and (node, "in") in near and (node, "out") not in near]


def leading_to(outputs: list[fx.Node], given: set[fx.Node]) -> set[fx.Node]:
    """Returns the operations that must be evaluated to get `outputs` when `given` is available."""
    needed: set[fx.Node] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node not in needed and node not in given:
            needed.add(node)
            pending += node.all_input_nodes
    return needed


def extract(whole: Graph, inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
    """Returns a module of the operations that lead from `inputs` to `outputs`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"arg{number}")
        copies[node].meta = dict(node.meta)
    needed = leading_to(outputs, set(inputs))
    for node in whole.module.graph.nodes:
        if node in needed:
            assert node.op == "call_function", f"{node.name} is at hand neither as an input nor kept"
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule(whole.module, graph)
