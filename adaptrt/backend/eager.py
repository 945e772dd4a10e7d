"""Runs a graph operation by operation with PyTorch's own kernels. Nothing is compiled. Other backends are compared with this one."""

from __future__ import annotations

import dataclasses

from adaptrt.backend.base import Backend, Runner
from adaptrt.graph.forgetting import forgetting
from adaptrt.graph.ir import Graph


@dataclasses.dataclass(frozen=True, slots=True)
class Eager(Backend):
    """Calls one of PyTorch's kernels for each operation."""

    name = "eager"

    @forgetting
    def compile(self, graph: Graph) -> Runner:
        graph.module.recompile()
        function = graph.function()
        return lambda inputs: function(*inputs)
