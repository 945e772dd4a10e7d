"""Merges sums over one axis after another into one sum over several axes.

Autograd writes such sums for the second derivative of batch normalisation: over the images, then over rows, then over columns. When
compiled, the first of them reads memory across the images and writes a whole image of partial sums, for each of four sums in a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.base import Pass

_SUM = torch.ops.aten.sum.dim_IntList


def _run(graph: Graph) -> Graph:
    module = graph.module
    for node in module.graph.find_nodes(op="call_function", target=_SUM):
        before: Any = node.args[0]
        axes, keeps = _axes(node)
        # If other operations need the partial sums, they are computed anyway.
        while before.target is _SUM and len(before.users) == 1 and not node.kwargs and not before.kwargs:
            earlier, kept = _axes(before)
            if kept != keeps:
                break
            if not kept:  # these axes are counted after the earlier sum has removed its own
                left = [axis for axis in range(before.args[0].meta["val"].dim()) if axis not in earlier]
                axes = [left[axis] for axis in axes]
            axes, before = sorted({*axes, *earlier}), before.args[0]
        if before is not node.args[0]:
            node.args = (before, axes, keeps)
    module.graph.eliminate_dead_code()
    return graph


def _axes(node: fx.Node) -> tuple[list[int], bool]:
    """Returns the axes of a sum, as non-negative numbers, and whether the sum keeps them."""
    args: Any = node.args
    dim = args[0].meta["val"].dim()
    keeps = len(args) > 2 and bool(args[2])
    return [axis % dim for axis in args[1]] if args[1] and dim else list(range(dim)), keeps


merge_sums = Pass("merge_sums", _run)
