"""Makes a graph check its own data: one more result says whether any of the given inputs holds NaN or infinity.

A check outside the program calls one reduction for each tensor, which takes longer than a small program does. Inside the program it is one
more loop in a kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import fx

from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.base import Pass, add_call, apply
from adaptrt.graph.signature import Output, Signature
from adaptrt.tree import Spec, Structure, flatten

aten = torch.ops.aten


def check_finite(graph: Graph, inputs: Sequence[int]) -> Graph:
    """Returns a graph with the result (what it returned, the largest magnitude in these inputs).

    The largest magnitude is a float64 tensor, and is finite if and only if the inputs are.

    Args:
      graph: any graph.
      inputs: positions of inputs, at least one of which is a floating-point tensor. Other inputs are left out.
    """

    def run(graph: Graph) -> Graph:
        module = graph.module
        nodes = list(module.graph.nodes)
        placeholders, end = [node for node in nodes if node.op == "placeholder"], nodes[-1]

        with module.graph.inserting_before(end):
            largest: fx.Node | None = None
            for index in inputs:
                value = placeholders[index]
                if value.meta["val"].is_floating_point():
                    found = add_call(module, aten.amax.default, add_call(module, aten.abs.default, value))
                    found = add_call(module, aten._to_copy.default, found, dtype=torch.float64)
                    largest = found if largest is None else add_call(module, aten.maximum.default, largest, found)
            assert largest is not None, "something is to be checked"
        end.args = ((*end.args[0], largest),)
        outputs = (*graph.signature.outputs, Output("largest", Spec.of(largest.meta["val"])))
        result = dataclasses.replace(_PAIR, children=(graph.result, _PAIR.children[1]))
        return dataclasses.replace(graph, signature=Signature(graph.signature.inputs, outputs), result=result)

    return apply([Pass("check_finite", run)], graph)


_PAIR: Structure = flatten((torch.zeros(()), torch.zeros(())))[1]
