"""Computes values that a function's operations would give for constants alone, while the function is recorded.

Tensors have no values while a function is recorded. But one that was made from numbers in the function's code, such as
`torch.linspace(0, 1, 3)`, has the same value in every call. If the function reads it, as `int(...)` or an `assert` does, the operations
behind it are run on real tensors. A tensor that depends on an argument, on random numbers, on a tensor from outside or on uninitialised
memory is not known, and neither is one into which such a tensor was written.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from adaptrt.graph.operations import is_mutable, is_random, name_of
from adaptrt.graph.passes.memory import memories, written

MAX_ELEMENTS = 1 << 24
"""Of all tensors together that one value is computed from. A larger value counts as not known."""

_UNINITIALISED = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_")


def known_values(graph: fx.Graph, wanted: Collection[fx.Node], literals: Mapping[fx.Node, Tensor]) -> Callable[[fx.Node], Any] | None:
    """Returns a function from each wanted node to its present value, or None if one of them is not known.

    Args:
      graph: the operations recorded so far, in the order in which they were called, those included that write to tensors.
      wanted: nodes of the graph.
      literals: the inputs whose values stand in the function's code.
    """
    needed = _leading_to(graph, wanted)
    if any(node not in literals and not _is_determined(node) for node in needed):
        return None
    if sum(value.numel() for node in needed for value in tree_leaves(node.meta["val"]) if isinstance(value, Tensor)) > MAX_ELEMENTS:
        return None
    values: dict[fx.Node, Any] = {}
    for node in needed:
        if node in literals:
            values[node] = literals[node]
        else:
            args, kwargs = cast(Any, map_arg((node.args, node.kwargs), values.__getitem__))
            values[node] = on_real_tensors(node.target, *args, **kwargs)
    return values.__getitem__


def on_real_tensors(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a function of real tensors without any mode seeing its operations."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        return fn(*args, **kwargs)


def _is_determined(node: fx.Node) -> bool:
    """Whether the operation's results depend on its arguments alone."""
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op == "call_function"
    return not is_random(node.target, node.args, node.kwargs) and name_of(node.target) not in _UNINITIALISED


def _leading_to(graph: fx.Graph, wanted: Collection[fx.Node]) -> list[fx.Node]:
    """Returns the nodes on which the wanted ones depend, in order, those included that write to memory which one of these uses."""
    needed = set(wanted)
    used = {memory for node in wanted for memory in memories(node)}
    found: list[fx.Node] = []
    for node in reversed(graph.nodes):
        if node in needed or (is_mutable(node.target) and not used.isdisjoint(written(node))):
            found.append(node)
            needed.update(node.all_input_nodes)
            used.update(memory for of in (node, *node.all_input_nodes) for memory in memories(of))
    return found[::-1]
