"""Removes operations that return their argument, and operations that nothing uses.

`detach` is removed, too. A graph is never differentiated, so a detach has had its effect when the gradient was traced, whether it came
from autograd or from the user. A `clone` stays if it changes the memory layout, and `own_outputs` adds the copies that outputs need. In
eval mode batch normalisation returns its running statistics unchanged, so these are replaced as well.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.base import Pass

aten = torch.ops.aten
_IDENTITIES = {aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.clone.default}


def _same(node: fx.Node) -> fx.Node | None:
    """Returns the argument that the operation returns unchanged, or None if it does not."""
    args: Any = node.args
    if node.target in _IDENTITIES:
        before, after = args[0].meta["val"], node.meta["val"]
        return args[0] if isinstance(before, Tensor) and before.stride() == after.stride() else None
    if node.target is operator.getitem and args[0].target is aten._native_batch_norm_legit_functional.default:
        statistics, training = args[0].args[3:5], args[0].args[5]
        return statistics[args[1] - 3] if args[1] >= 3 and not training else None
    return None


def _run(graph: Graph) -> Graph:
    module = graph.module
    for node in list(module.graph.nodes):
        same = _same(node)
        if same is not None:
            node.replace_all_uses_with(same)
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    return graph


remove_identities = Pass("remove_identities", _run)
