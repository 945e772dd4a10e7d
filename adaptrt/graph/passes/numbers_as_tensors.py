"""Writes the conversion of a Python number to a tensor as `full`, which says its dtype.

Where `torch.func.vmap` computes with a number and with values without axes, it converts the number by `_to_copy`. Eager code converts the
number directly. Inductor first makes a tensor of the default dtype, in which 0.1 is rounded, and of integers one of another dtype than fake
tensors say.
"""

from __future__ import annotations

import torch

from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.base import Pass

aten = torch.ops.aten


def _run(graph: Graph) -> Graph:
    module = graph.module
    for node in module.graph.find_nodes(op="call_function", target=aten._to_copy.default):
        number, value = node.args[0], node.meta["val"]
        if isinstance(number, bool | int | float | complex):
            node.target = aten.full.default
            node.args, node.kwargs = ([], number), {"dtype": value.dtype, "device": value.device}
    return graph


numbers_as_tensors = Pass("numbers_as_tensors", _run)
