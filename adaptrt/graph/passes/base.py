"""Defines passes, which turn a graph into an equivalent graph, and applies, records and verifies them."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map_only

from adaptrt.graph.collector import garbage_collection_paused
from adaptrt.graph.ir import Graph, PassRecord
from adaptrt.graph.verify import verify


def _anything(graph: Graph) -> None:
    del graph


@dataclasses.dataclass(frozen=True, slots=True)
class Pass:
    """A rewrite of a graph that keeps the values it computes.

    `run` gets a graph of its own, which it may edit in place. `requires` raises InvalidGraph if the pass cannot be applied, and `ensures`
    raises it if the pass did not do its work.
    """

    name: str
    run: Callable[[Graph], Graph]
    requires: Callable[[Graph], None] = _anything
    ensures: Callable[[Graph], None] = _anything


@garbage_collection_paused()
def apply(passes: Sequence[Pass], graph: Graph) -> Graph:
    """Applies the passes in order and returns the resulting graph, whose `history` says what each pass did.

    The invariants of `verify` hold for the result of all passes together. They need not hold after the first passes, which make a fresh
    capture functional; once they hold, every later pass keeps them.
    """
    graph = dataclasses.replace(graph, module=copy_module(graph))
    for rewrite in passes:
        rewrite.requires(graph)
        before = graph.num_nodes
        graph = rewrite.run(graph)
        rewrite.ensures(graph)
        record = PassRecord(rewrite.name, before, graph.num_nodes)
        graph = dataclasses.replace(graph, history=(*graph.history, record))
    graph.module.recompile()
    return verify(graph)


def add_call(module: fx.GraphModule, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Adds an operation at the place where the graph is being edited, and computes its value."""
    node = module.graph.call_function(target, args, kwargs)
    renew_value(node)
    return node


def renew_value(node: fx.Node) -> None:
    """Computes a node's value again from the values of its arguments."""
    args, kwargs = cast(Any, map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"]))
    with _mode_of(node.graph):
        node.meta["val"] = cast(Any, node.target)(*args, **kwargs)


def has_other_strides(one: fx.Node, other: fx.Node) -> bool:
    """Whether the values of two nodes of equal shape have different memory layouts."""
    values = one.meta["val"], other.meta["val"]
    return values[0] is not values[1] and strides_of(values[0]) != strides_of(values[1])


def strides_of(value: Any) -> Any:
    """Returns the memory layout of a value: the strides and offset of a tensor, or of several tensors."""
    return tree_map_only(Tensor, lambda part: (part.stride(), part.storage_offset()), value)


def _mode_of(graph: fx.Graph) -> contextlib.AbstractContextManager[Any]:
    """Returns the fake tensor mode in which the graph's values were made."""
    known = next((node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), FakeTensor)), None)
    return contextlib.nullcontext() if known is None else known.fake_mode


def copy_module(graph: Graph) -> fx.GraphModule:
    """Returns a copy of the graph's operations."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph.module.graph, {}))
    # graph_copy leaves out the output's own node, whose metadata no pass reads. The module's Python code is generated when it is first
    # called; generating it after every pass took a fifth of the time of a capture.
    return _LazyGraphModule(graph.module, copy)
