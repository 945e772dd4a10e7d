"""Gives every output memory of its own: copies an output that is an input, or that is returned twice.

Without it a result could alias a parameter of the model, and change when the model is trained on.
"""

from __future__ import annotations

import dataclasses

import torch

from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.base import Pass, copy_module

aten = torch.ops.aten


def _run(graph: Graph) -> Graph:
    module = copy_module(graph)
    end = list(module.graph.nodes)[-1]
    owned: list[torch.fx.Node] = []
    for value in end.args[0]:
        aliases = value.op == "placeholder" or value in owned
        if not aliases:
            owned.append(value)
            continue
        with module.graph.inserting_before(end):
            copy = module.graph.call_function(aten.clone.default, (value,))
        copy.meta["val"] = value.meta["val"]
        owned.append(copy)
    end.args = (owned,)
    module.recompile()
    return dataclasses.replace(graph, module=module)


own_outputs = Pass("own_outputs", _run)
