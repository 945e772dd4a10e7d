"""Runs a graph operation by operation with PyTorch's own kernels: nothing to compile, and the reference for other backends."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor
from torch.fx._lazy_graph_module import _LazyGraphModule

from adaptrt.backend.base import Backend, Runner
from adaptrt.graph.ir import Graph


@dataclasses.dataclass(frozen=True, slots=True)
class Eager(Backend):
    """PyTorch's kernels, one call an operation."""

    name = "eager"

    def compile(self, graph: Graph) -> Runner:
        module = graph.module
        module.recompile()
        # Left for later, it would be done by whoever calls first: by several threads at once, who then get each other's names.
        _LazyGraphModule.force_recompile(module)

        def run(inputs: list[Tensor]) -> Sequence[Tensor]:
            return module(*inputs)

        return run
