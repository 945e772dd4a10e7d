"""Which inputs of a graph are class labels, and how many classes there are.

Compiled kernels do not all check an index before they use it, so the bounds are read off the graph and checked on the data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from adaptrt.graph.ir import Graph

aten = torch.ops.aten
_LOSSES = {aten.nll_loss_forward.default, aten.nll_loss2d_forward.default}
_CLASS_AXIS = {aten.nll_loss_forward.default: -1, aten.nll_loss2d_forward.default: 1}
_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.permute.default,
    aten.transpose.int,
    aten.clone.default,
    aten._to_copy.default,
}


class LabelBound(NamedTuple):
    """Input `name` holds labels in [0, num_classes), or `ignore_index`."""

    name: str
    num_classes: int
    ignore_index: int


def label_bounds(graph: Graph) -> list[LabelBound]:
    """The inputs that reach a negative log-likelihood loss as its target, directly or through views."""
    nodes = list(graph.module.graph.nodes)
    names = dict(zip((node for node in nodes if node.op == "placeholder"), (entry.name for entry in graph.signature.inputs), strict=True))
    found: list[LabelBound] = []
    for node in nodes:
        if node.target not in _LOSSES:
            continue
        scores, target, _, _, ignore_index = node.args
        while isinstance(target, fx.Node) and target.target in _VIEWS:
            target = target.args[0]
        if isinstance(target, fx.Node) and target in names:
            num_classes = scores.meta["val"].shape[_CLASS_AXIS[node.target]]
            found.append(LabelBound(names[target], num_classes, ignore_index))
    return found
