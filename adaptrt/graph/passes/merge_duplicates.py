"""Computes equal expressions only once, by merging operations with equal targets and arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import fx

from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.base import Pass


def _key(value: Any) -> Any:
    """Returns a hashable stand-in for an argument that distinguishes 1, 1.0 and True, and 0.0 and -0.0."""
    if isinstance(value, list | tuple):
        return tuple(_key(part) for part in cast(Sequence[Any], value))
    if isinstance(value, fx.Node):
        return value
    return type(value), repr(value) if isinstance(value, float) else value


def _run(graph: Graph) -> Graph:
    module = graph.module
    seen: dict[Any, fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        key = (node.target, _key(node.args), tuple(sorted((name, _key(value)) for name, value in node.kwargs.items())))
        if key not in seen:
            seen[key] = node
            continue
        node.replace_all_uses_with(seen[key])
        module.graph.erase_node(node)
    return graph


merge_duplicates = Pass("merge_duplicates", _run)
