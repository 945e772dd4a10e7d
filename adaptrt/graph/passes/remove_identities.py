"""Removes operations that return their argument, and operations that nothing uses.

`detach` is one of them: a graph is never differentiated, so both autograd's and the user's detach have done their work when the gradient
was traced. A `clone` stays if it changes the memory layout; `own_outputs` adds those that outputs need.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx

from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.base import Pass, copy_module

aten = torch.ops.aten
_IDENTITIES = {aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.clone.default}


def _is_identity(node: fx.Node) -> bool:
    if node.target in _IDENTITIES:
        before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
        return isinstance(before, Tensor) and before.stride() == after.stride()
    return False


def _run(graph: Graph) -> Graph:
    module = copy_module(graph)
    for node in list(module.graph.nodes):
        if _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return dataclasses.replace(graph, module=module)


remove_identities = Pass("remove_identities", _run)
