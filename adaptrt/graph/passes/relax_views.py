"""Replaces views by reshapes, which copy where the memory layout asks for it.

A view was legal for the layout that was traced. The kernel that runs later, or one that works on all tasks at once, may lay out its result
otherwise.
"""

from __future__ import annotations

import dataclasses

import torch

from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.base import Pass, copy_module

aten = torch.ops.aten


def _run(graph: Graph) -> Graph:
    module = copy_module(graph)
    for node in module.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    module.recompile()
    return dataclasses.replace(graph, module=module)


relax_views = Pass("relax_views", _run)
