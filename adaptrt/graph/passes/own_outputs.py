"""Gives every output memory of its own, by copying outputs that share memory with an input or with another output.

Otherwise a result could alias a parameter of the model, and would change when the model is trained further.
"""

from __future__ import annotations

import torch
from torch import fx

from adaptrt.graph.ir import Graph
from adaptrt.graph.operations import memory_of
from adaptrt.graph.passes.base import Pass

aten = torch.ops.aten


def _run(graph: Graph) -> Graph:
    module = graph.module
    end = list(module.graph.nodes)[-1]
    owned: list[fx.Node] = []
    taken: set[fx.Node] = set()
    for value in end.args[0]:
        memory = memory_of(value)
        if memory.op != "placeholder" and memory not in taken:
            taken.add(memory)
            owned.append(value)
            continue
        with module.graph.inserting_before(end):
            copy = module.graph.call_function(aten.clone.default, (value,), {"memory_format": torch.contiguous_format})
        copy.meta["val"] = value.meta["val"].contiguous()
        owned.append(copy)
    end.args = (owned,)
    return graph


own_outputs = Pass("own_outputs", _run)
