"""What tests ask of a graph."""

from __future__ import annotations

from typing import Any

from adaptrt.graph.ir import Graph


def targets(graph: Graph) -> list[Any]:
    """Its operations, in order."""
    return [node.target for node in graph.module.graph.nodes if node.op == "call_function"]
