"""Replaces views by reshapes, which copy if the memory layout requires it.

A view was legal for the layout that was traced. The kernel that runs later, or one that works on all tasks at once, may give its result
another layout.
"""

from __future__ import annotations

import torch

from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.base import Pass

aten = torch.ops.aten


def _run(graph: Graph) -> Graph:
    module = graph.module
    for node in module.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    return graph


relax_views = Pass("relax_views", _run)
