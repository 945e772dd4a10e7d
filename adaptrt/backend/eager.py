"""Runs a graph operation by operation with PyTorch's own kernels. Nothing is compiled. Other backends are compared with this one."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor
from torch.fx._lazy_graph_module import _LazyGraphModule

from adaptrt.backend.base import Backend, Runner
from adaptrt.graph.forgetting import forgetting
from adaptrt.graph.ir import Graph


@dataclasses.dataclass(frozen=True, slots=True)
class Eager(Backend):
    """Calls one of PyTorch's kernels for each operation."""

    name = "eager"

    @forgetting
    def compile(self, graph: Graph) -> Runner:
        module = graph.module
        module.recompile()
        # Otherwise the code would be generated at the first call. If several threads made it at once, they would get each other's names.
        _LazyGraphModule.force_recompile(module)

        def run(inputs: list[Tensor]) -> Sequence[Tensor]:
            return module(*inputs)

        return run
