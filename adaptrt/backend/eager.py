"""Runs a graph operation by operation with PyTorch's own kernels: nothing to compile, and the reference for other backends."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from adaptrt.backend.base import Backend, Runner
from adaptrt.graph.ir import Graph


@dataclasses.dataclass(frozen=True, slots=True)
class Eager(Backend):
    """PyTorch's kernels, one call an operation."""

    name = "eager"

    def compile(self, graph: Graph) -> Runner:
        module = graph.module
        module.recompile()

        def run(inputs: list[Tensor]) -> Sequence[Tensor]:
            return module(*inputs)

        return run
