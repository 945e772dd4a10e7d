"""Finds out which operations of a recorded graph, which may still write in place, use the same memory.

Fake tensors have no memory, but each knows whether it is a view of another.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from adaptrt.errors import NotTraceable
from adaptrt.graph.operations import is_mutable


def memories(node: fx.Node) -> list[int]:
    """Identifies the memory of each of a node's tensors. A view has the memory of what it is a view of, as fake tensors do."""
    return [memory_of(value) for value in tree_leaves(node.meta["val"]) if isinstance(value, Tensor)]


def memory_of(value: Tensor) -> int:
    """Identifies the memory of a tensor."""
    return value.untyped_storage()._cdata


def written(node: fx.Node) -> list[int]:
    """Identifies the memories to which a mutable operation writes."""
    return [memory for of in _written_by(node.target, node.args, node.kwargs) if isinstance(of, fx.Node) for memory in memories(of)]


def written_by(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Returns the tensors among its arguments to which a mutable operation writes."""
    return [value for value in _written_by(target, args, kwargs) if isinstance(value, Tensor)]


def _written_by(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    arguments = target._schema.arguments
    given: dict[str, Any] = {**dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}
    return tree_leaves([given.get(argument.name) for argument in arguments if argument.alias_info and argument.alias_info.is_write])


def refuse_lost_writes(graph: fx.Graph, copies: Sequence[tuple[fx.Node, fx.Node]]) -> None:
    """Refuses writes that a copy would not show, or not pass on, where PyTorch has a view.

    Args:
      graph: the operations in the order in which they were called.
      copies: pairs of a copy and of what it is a copy of.
    Raises:
      NotTraceable: the copy is written to, or it is used after what it is a copy of was written to.
    """
    for copy, original in copies:
        own, others = set(memories(copy)), set(memories(original))
        made = stale = False
        for node in graph.nodes:
            reads = any(not own.isdisjoint(memories(argument)) for argument in node.all_input_nodes)
            writes = set(written(node)) if is_mutable(node.target) else set[int]()
            if (reads and stale) or not own.isdisjoint(writes):
                raise NotTraceable(
                    f"what p[i] gives for a tensor i (shape {list(copy.meta['val'].shape)}) is a copy while the model is traced, and "
                    "a write in place would be lost. Assign p[i] = ... instead, and read p[i] again after each write to p"
                )
            made = made or not own.isdisjoint(memories(node))
            stale |= made and not others.isdisjoint(writes)
