"""Finds which inputs of a graph are class labels or indices into a table, and the largest value that each may have.

Not all compiled kernels check an index before they use it. So the bounds are found in the graph, and the data is checked against them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from adaptrt.graph.ir import Graph
from adaptrt.graph.signature import Role

aten = torch.ops.aten
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
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
    aten.clone.default,
    aten._to_copy.default,
}


CLASSES = "the model's class labels"


class IndexBound(NamedTuple):
    """States that the input `name` holds integers in [0, size), or `ignore_index` if that is not None.

    `of` says in words what the integers count. `position` counts the inputs of role DATA only.
    """

    position: int
    name: str
    size: int
    ignore_index: int | None
    of: str

    @property
    def is_class(self) -> bool:
        """Whether they are class labels."""
        return self.of == CLASSES


def index_bounds(graph: Graph) -> list[IndexBound]:
    """Returns the bounds of the inputs of role DATA that are class labels, or indices of an embedding or gather, possibly through views."""
    nodes = list(graph.module.graph.nodes)
    inputs = zip((node for node in nodes if node.op == "placeholder"), graph.signature.inputs, strict=True)
    data = [(node, entry.name) for node, entry in inputs if entry.role is Role.DATA]
    places = {node: (position, name) for position, (node, name) in enumerate(data)}
    found: dict[IndexBound, None] = {}
    for node in nodes:
        for index, size, ignore_index, of in _uses(node):
            while isinstance(index, fx.Node) and index.target in _VIEWS:
                index = index.args[0]
            if isinstance(index, fx.Node) and index in places:
                found[IndexBound(*places[index], size, ignore_index, of)] = None
    return list(found)


def _uses(node: fx.Node) -> list[tuple[object, int, int | None, str]]:
    """Returns index, size, ignored value and meaning for each index of the operation, or nothing if it has none."""
    args = node.args
    if node.target in _CLASS_AXIS:
        scores, target, _, _, ignore_index = args
        return [(target, _shape(scores)[_CLASS_AXIS[node.target]], ignore_index, CLASSES)]  # type: ignore[list-item]
    if node.target is aten.embedding.default:
        return [(args[1], _shape(args[0])[0], None, "rows of the embedding")]
    if node.target in (aten.gather.default, aten.index_select.default):
        return [(args[2], _shape(args[0])[args[1]], None, "positions along the gathered axis")]  # type: ignore[index]
    return []


def _shape(node: object) -> torch.Size:
    assert isinstance(node, fx.Node)
    return node.meta["val"].shape
