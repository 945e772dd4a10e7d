"""Finds which inputs of a graph are class labels or indices into a table, and the largest value that each may have.

Not all compiled kernels check an index before they use it. So the bounds are found in the graph, and the data is checked against them.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from adaptrt.graph.ir import Graph
from adaptrt.graph.signature import Role

aten = torch.ops.aten
_CLASS_AXIS = {aten.nll_loss_forward.default: -1, aten.nll_loss2d_forward.default: 1}
_AS_THEY_ARE = {aten.clone.default, aten._to_copy.default, aten.detach.default, aten.alias.default}
_MOVES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.flip.default,
    aten.cat.default,
    aten.stack.default,
    operator.getitem,
}
"""Operations whose results hold elements of their arguments, unchanged."""
_AS_RESHAPE = {aten.view.default, aten._unsafe_view.default}
"""Those that may not be called on tensors of another memory layout."""


CLASSES = "the model's class labels"


class IndexBound(NamedTuple):
    """States that the input `name` holds integers in [0, size), or `ignore_index` if that is not None.

    `of` says in words what the integers count. `position` counts the inputs of role DATA only. `part` is true where the bound holds, in the
    shape that the input had when the graph was captured; None if it holds everywhere.
    """

    position: int
    name: str
    size: int
    ignore_index: int | None
    of: str
    part: Tensor | None = None

    @property
    def is_class(self) -> bool:
        """Whether they are class labels."""
        return self.of == CLASSES


def index_bounds(graph: Graph) -> list[IndexBound]:
    """Returns the bounds of the inputs of role DATA that are class labels, or indices of an embedding or gather.

    Operations that only choose and move elements are followed, so that a bound is stated for those elements that are used as indices. An
    index that is computed from data in any other way has no bound.
    """
    nodes = list(graph.module.graph.nodes)
    inputs = zip((node for node in nodes if node.op == "placeholder"), graph.signature.inputs, strict=True)
    data = [(node, entry.name) for node, entry in inputs if entry.role is Role.DATA]
    firsts: dict[fx.Node, int] = {}  # each input's elements are numbered from here on
    total = 0
    for node, _ in data:
        firsts[node] = total
        total += node.meta["val"].numel()
    found: dict[tuple[IndexBound, bytes], IndexBound] = {}
    for node in nodes:
        for index, size, ignore_index, of in _uses(node):
            numbers = _elements(index, firsts)
            if numbers is None:
                continue
            for position, (placeholder, name) in enumerate(data):
                shape, first = placeholder.meta["val"].shape, firsts[placeholder]
                own = numbers[(numbers >= first) & (numbers < first + shape.numel())] - first
                if not own.numel():
                    continue
                part = torch.zeros(shape.numel(), dtype=torch.bool, device="cpu")
                part[own] = True
                bound = IndexBound(position, name, size, ignore_index, of)
                place = part.view(shape).to(placeholder.meta["val"].device)
                found[bound, part.numpy().tobytes()] = bound if part.all() else bound._replace(part=place)
    return list(found.values())


def _elements(node: Any, firsts: Mapping[fx.Node, int]) -> Tensor | None:
    """Returns the numbers of the elements of inputs that are the elements of `node`, or None if they are not such elements."""
    values: dict[fx.Node, Any] = {}
    for each in _leading_to(node, firsts) if isinstance(node, fx.Node) else ():
        if each in firsts:
            shape = each.meta["val"].shape
            values[each] = torch.arange(firsts[each], firsts[each] + shape.numel(), device="cpu").view(shape)
        elif each.target in _AS_THEY_ARE:
            values[each] = values[each.all_input_nodes[0]]
        else:
            args, kwargs = cast(Any, map_arg((each.args, each.kwargs), values.__getitem__))
            target: Any = aten.reshape.default if each.target in _AS_RESHAPE else each.target
            values[each] = target(*args, **kwargs)
    return values.get(node)


def _leading_to(node: fx.Node, inputs: Collection[fx.Node]) -> list[fx.Node]:
    """Returns the nodes between `inputs` and `node`, both included, in order; nothing if an operation among them computes something."""
    found = {node}
    pending = [node]
    while pending:
        each = pending.pop()
        if each in inputs:
            continue
        if each.target not in _MOVES and each.target not in _AS_THEY_ARE:
            return []
        pending += [argument for argument in each.all_input_nodes if argument not in found]
        found.update(each.all_input_nodes)
    return sorted(found)


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
