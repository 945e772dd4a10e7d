"""Checks the invariants of a graph, after capture and after the passes."""

from __future__ import annotations

from torch import Tensor, fx

from adaptrt.errors import InvalidGraph
from adaptrt.graph.ir import Graph
from adaptrt.graph.operations import is_mutable, is_operation, is_random, memory_of
from adaptrt.tree import Spec


def verify(graph: Graph) -> Graph:
    """Returns `graph` if it is functional, closed and deterministic, and agrees with its signature.

    Raises:
      InvalidGraph: an invariant does not hold. The message names the first node that breaks one.
    """
    graph.module.graph.lint()
    nodes = list(graph.module.graph.nodes)
    for node in nodes:
        _verify_operation(node)
    inputs = [node for node in nodes if node.op == "placeholder"]
    outputs = list(nodes[-1].args[0])
    _verify_values("input", [entry.spec for entry in graph.signature.inputs], inputs)
    _verify_values("output", [entry.spec for entry in graph.signature.outputs], outputs)
    if graph.arguments.num_leaves + len(graph.constants) != len(inputs):
        raise InvalidGraph(f"{graph.arguments.num_leaves} arguments and {len(graph.constants)} constants, but {len(inputs)} inputs")
    if graph.result.num_leaves != len(outputs):
        raise InvalidGraph(f"the result has {graph.result.num_leaves} tensors, the graph {len(outputs)} outputs")
    memories = [memory_of(output) for output in outputs]
    if any(memory.op == "placeholder" for memory in memories) or len(set(memories)) != len(memories):
        raise InvalidGraph("an output shares memory with an input or another output; it would alias a tensor of the caller")
    return graph


def _verify_operation(node: fx.Node) -> None:
    if node.op in ("placeholder", "output"):
        return
    if node.op != "call_function" or not is_operation(node.target):
        raise InvalidGraph(f"{node.format_node()}: only ATen operations may stand in a graph")
    if is_mutable(node.target):
        raise InvalidGraph(f"{node.format_node()}: an operation that mutates its argument")
    if is_random(node.target, node.args, node.kwargs):
        raise InvalidGraph(f"{node.format_node()}: a random operation that was not lifted to an input")


def _verify_values(kind: str, expected: list[Spec], nodes: list[fx.Node]) -> None:
    if len(expected) != len(nodes):
        raise InvalidGraph(f"the signature has {len(expected)} {kind}s, the graph {len(nodes)}")
    for spec, node in zip(expected, nodes, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or Spec.of(value) != spec:
            found = Spec.of(value) if isinstance(value, Tensor) else type(value).__name__
            raise InvalidGraph(f"{kind} {node.name} is {found}, the signature says {spec}")
