"""Cuts a graph in two at the place where the fewest bytes have to be kept, and takes parts out of it."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import networkx
import torch
from torch import Tensor, fx

from adaptrt import tree
from adaptrt.graph.ir import Graph
from adaptrt.graph.operations import is_pointwise, is_view
from adaptrt.graph.signature import Signature

V = TypeVar("V")

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


def part(whole: Graph, arguments: Sequence[int], results: Sequence[int]) -> Graph:
    """Returns the graph that computes some results from some arguments.

    Args:
      whole: a graph whose result is a tuple.
      arguments: which ones the part takes, in their order. It reads no others.
      results: which entries of the tuple it returns, in this order.
    """
    placeholders = [node for node in whole.module.graph.nodes if node.op == "placeholder"]
    split = len(placeholders) - len(whole.constants)
    of_arguments = _groups(list(zip(placeholders[:split], whole.signature.inputs[:split], strict=True)), whole.arguments.children)
    outputs: Any = whole.module.graph.output_node().args[0]
    of_results = _groups(list(zip(outputs, whole.signature.outputs, strict=True)), whole.result.children)
    taken = [pair for index in arguments for pair in of_arguments[index]]
    given = [
        (node, dataclasses.replace(entry, name=entry.name.replace(f"result.{index}", f"result.{place}", 1)))
        for place, index in enumerate(results)
        for node, entry in of_results[index]
    ]
    needed = leading_to([node for node, _ in given], {node for node, _ in taken})
    constants = list(zip(placeholders[split:], whole.signature.inputs[split:], whole.constants, strict=True))
    constants = [entry for entry in constants if entry[0] in needed]
    module = extract(whole, [node for node, _ in taken] + [node for node, _, _ in constants], [node for node, _ in given])
    names = [dataclasses.replace(entry, name=f"const.{index}") for index, (_, entry, _) in enumerate(constants)]
    return Graph(
        module,
        Signature((*[entry for _, entry in taken], *names), tuple([entry for _, entry in given])),
        tuple([value for _, _, value in constants]),
        tree.tuple_of([whole.arguments.children[index] for index in arguments]),
        tree.tuple_of([whole.result.children[index] for index in results]),
        whole.history,
    )


def _groups(leaves: list[V], children: Sequence[tree.Structure]) -> list[list[V]]:
    """Returns the leaves of each subtree."""
    rest = iter(leaves)
    return [list(itertools.islice(rest, child.num_leaves)) for child in children]
