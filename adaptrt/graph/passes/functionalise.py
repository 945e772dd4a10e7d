"""Makes a graph functional: no operation in it mutates.

In-place operations come from the user's model and from autograd's own derivative formulas (`div_`, `add_`), so the whole traced graph is
functionalised rather than the model.
"""

from __future__ import annotations

import torch

from adaptrt.errors import InvalidGraph
from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.base import Pass
from adaptrt.graph.passes.operations import is_mutable
from adaptrt.graph.passes.retrace import retrace


def _run(graph: Graph) -> Graph:
    return retrace(graph, lambda fn: torch.func.functionalize(fn, remove="mutations"))


def _ensures(graph: Graph) -> None:
    for node in graph.module.graph.nodes:
        if is_mutable(node.target):
            raise InvalidGraph(f"{node.format_node()} mutates its argument: the captured function writes to an input")


functionalise = Pass("functionalise", _run, ensures=_ensures)
