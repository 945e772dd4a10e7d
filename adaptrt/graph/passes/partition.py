"""Cuts the graph of results and gradients in two: a forward graph, and a backward graph that uses what the forward graph keeps.

A minimum cut decides what is kept, as in Chen et al. 2016 (arXiv 1604.06174) and in PyTorch's own partitioner. Each value that the backward
graph needs is either kept, or computed again from kept values, so that as few bytes as possible are kept. Only cheap operations (pointwise
ones and views) are computed again. The inputs of the graph are available to the backward graph as well, and cost nothing.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from torch import fx

from adaptrt.graph.cut import extract, leading_to, minimum_cut, varying
from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.base import apply
from adaptrt.graph.passes.own_outputs import own_outputs
from adaptrt.graph.passes.relax_views import relax_views
from adaptrt.graph.signature import Input, Output, Role, Signature
from adaptrt.tree import Spec, flatten, tuple_of


def partition(joint: Graph, num_results: int) -> tuple[Graph, Graph]:
    """Returns two graphs: (*args) -> (results, kept), and (*args, kept, cotangents) -> gradients, where `kept` is a list.

    Args:
      joint: (*args, cotangents) -> (results, gradients).
      num_results: the number of tensors among the results.
    """
    nodes = list(joint.module.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    inputs = joint.signature.inputs
    outputs: list[fx.Node] = list(nodes[-1].args[0])
    results, gradients = outputs[:num_results], outputs[num_results:]
    cotangents = [node for node, entry in zip(placeholders, inputs, strict=True) if entry.role is Role.COTANGENT]
    given = [(node, entry) for node, entry in zip(placeholders, inputs, strict=True) if entry.role is not Role.COTANGENT]
    later = varying(joint, {index for index, entry in enumerate(inputs) if entry.role is not Role.COTANGENT})
    kept = _to_keep(nodes, {node for node, _ in given}, later, gradients)

    split = len(given) - len(joint.constants)
    args, constants = given[:split], given[split:]
    entries = [Input(f"kept.{index}", Role.KEPT, Spec.of(node.meta["val"])) for index, node in enumerate(kept)]
    of_cotangents = [entry for entry in inputs if entry.role is Role.COTANGENT]
    *children, of_cotangent = joint.arguments.children
    of_kept = flatten([node.meta["val"] for node in kept])[1]

    forward = Graph(
        extract(joint, [node for node, _ in given], [*results, *kept]),
        Signature(
            tuple(entry for _, entry in given),
            (*joint.signature.outputs[:num_results], *(Output(entry.name, entry.spec, kept=True) for entry in entries)),
        ),
        joint.constants,
        tuple_of(children),
        tuple_of([joint.result.children[0], of_kept]),
        joint.history,
    )
    backward = Graph(
        extract(joint, [*(node for node, _ in args), *kept, *cotangents, *(node for node, _ in constants)], gradients),
        Signature(
            (*(entry for _, entry in args), *entries, *of_cotangents, *(entry for _, entry in constants)),
            joint.signature.outputs[num_results:],
        ),
        joint.constants,
        tuple_of([*children, of_kept, of_cotangent]),
        joint.result.children[1],
        joint.history,
    )
    # Kept values have the strides that the first program gives them.
    passes = (relax_views, own_outputs)
    return apply(passes, forward), apply(passes, backward)


def _to_keep(nodes: list[fx.Node], given: set[fx.Node], later: set[fx.Node], gradients: list[fx.Node]) -> list[fx.Node]:
    """Returns the values to keep, in their order. `later` are the values that depend on a cotangent."""
    needed = leading_to(gradients, set())  # on either side
    before = [node for node in nodes if node in needed and node not in later and node.op != "output"]
    read = {node for node in before if node in gradients or any(user in later and user in needed for user in node.users)}
    return minimum_cut(before, given, read)
