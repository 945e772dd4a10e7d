"""Cuts the graph of results and gradients in two: one that is run forward and keeps what the other needs on the way back.

What is kept is a minimum cut, as in Chen et al. 2016 (arXiv 1604.06174) and in PyTorch's own partitioner: each value that the way back
needs is kept or computed again from kept ones, so that the kept bytes are fewest, under the rule that only cheap operations (pointwise ones
and views) are computed again. Inputs of the graph are at hand on the way back and cost nothing.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import networkx
import torch
from torch import Tensor, fx

from adaptrt.graph.ir import Graph, Input, Output, Role, Signature
from adaptrt.graph.passes.base import apply
from adaptrt.graph.passes.operations import is_view
from adaptrt.graph.passes.own_outputs import own_outputs
from adaptrt.graph.passes.relax_views import relax_views
from adaptrt.tree import Spec, Structure, flatten

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


# What differentiating an operation reads: nothing, its result, or else its arguments.
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


def num_bytes_to_keep(step: Graph) -> int:
    """About what `partition` keeps of a function like this, without the graph of its gradients: what differentiating it would read."""
    nodes = [node for node in step.module.graph.nodes if node.op != "output"]
    read = {value for node in nodes if node.op == "call_function" for value in _read_on_the_way_back(node)}
    return _minimum_cut(nodes, {node for node in nodes if node.op == "placeholder"}, read)[0]


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


def partition(joint: Graph, num_results: int) -> tuple[Graph, Graph]:
    """Two graphs: (*args) -> (results, kept), and (*args, kept, cotangents) -> gradients; `kept` is a list.

    Args:
      joint: (*args, cotangents) -> (results, gradients).
      num_results: tensors among the results.
    """
    nodes = list(joint.module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    inputs = joint.signature.inputs
    outputs: list[fx.Node] = list(nodes[-1].args[0])
    results, gradients = outputs[:num_results], outputs[num_results:]
    cotangents = [node for node, entry in zip(placeholders, inputs, strict=True) if entry.role is Role.COTANGENT]
    given = [(node, entry) for node, entry in zip(placeholders, inputs, strict=True) if entry.role is not Role.COTANGENT]
    kept = _to_keep(nodes, [node for node, _ in given], cotangents, gradients)

    split = len(given) - len(joint.constants)
    args, constants = given[:split], given[split:]
    entries = [Input(f"kept.{index}", Role.KEPT, Spec.of(node.meta["val"])) for index, node in enumerate(kept)]
    of_cotangents = [entry for entry in inputs if entry.role is Role.COTANGENT]
    *children, of_cotangent = joint.arguments.children
    of_kept = flatten([node.meta["val"] for node in kept])[1]

    forward = Graph(
        _extract(joint, [node for node, _ in given], [*results, *kept]),
        Signature(
            tuple(entry for _, entry in given),
            (*joint.signature.outputs[:num_results], *(Output(entry.name, entry.spec, kept=True) for entry in entries)),
        ),
        joint.constants,
        _tuple(children),
        _tuple([joint.result.children[0], of_kept]),
        joint.history,
    )
    backward = Graph(
        _extract(joint, [*(node for node, _ in args), *kept, *cotangents, *(node for node, _ in constants)], gradients),
        Signature(
            (*(entry for _, entry in args), *entries, *of_cotangents, *(entry for _, entry in constants)),
            joint.signature.outputs[num_results:],
        ),
        joint.constants,
        _tuple([*children, of_kept, of_cotangent]),
        joint.result.children[1],
        joint.history,
    )
    # What is kept has the strides that the first program gives it.
    passes = (relax_views, own_outputs)
    return apply(passes, forward), apply(passes, backward)


def _tuple(children: list[Structure]) -> Structure:
    return Structure("sequence", tuple, tuple(range(len(children))), tuple(children))


def _to_keep(nodes: list[fx.Node], given: list[fx.Node], cotangents: list[fx.Node], gradients: list[fx.Node]) -> list[fx.Node]:
    """The values to keep, in their order."""
    needed = _leading_to(gradients, set())  # on either side
    later = set(cotangents)
    for node in nodes:
        if not later.isdisjoint(node.all_input_nodes):
            later.add(node)
    before = [node for node in nodes if node in needed and node not in later and node.op != "output"]
    read = {node for node in before if node in gradients or any(user in later and user in needed for user in node.users)}
    inputs = set(given)
    return [node for node in _minimum_cut(before, inputs, read)[1] if node not in inputs]


def _minimum_cut(nodes: list[fx.Node], inputs: set[fx.Node], read: set[fx.Node]) -> tuple[int, list[fx.Node]]:
    """The fewest bytes from which, and from `inputs`, all of `read` is computed by cheap operations; and the values that these are."""
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
    num_bytes, (near, _) = networkx.minimum_cut(flow, source, sink)
    cut = [node for node in nodes if (node, "in") in near and flow.has_node((node, "out")) and (node, "out") not in near]
    return num_bytes, cut


def is_cheap(node: fx.Node) -> bool:
    """Whether the operation is computed again rather than its result kept."""
    target: Any = node.target
    return target is operator.getitem or target in _CHEAP or is_view(target) or torch.Tag.pointwise in getattr(target, "tags", ())


def _leading_to(outputs: list[fx.Node], given: set[fx.Node]) -> set[fx.Node]:
    """What has to be evaluated for `outputs` where `given` is at hand."""
    needed: set[fx.Node] = set()
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node not in needed and node not in given:
            needed.add(node)
            pending += node.all_input_nodes
    return needed


def _extract(joint: Graph, inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
    """The operations that lead from `inputs` to `outputs`."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"arg{number}")
        copies[node].meta = dict(node.meta)
    needed = _leading_to(outputs, set(inputs))
    for node in joint.module.graph.nodes:
        if node in needed:
            assert node.op == "call_function", f"{node.name} is at hand neither as an input nor kept"
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule(joint.module, graph)
