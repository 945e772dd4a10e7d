"""What tests ask of a graph, and of a function as Inductor compiles it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from adaptrt.backend import Inductor
from adaptrt.graph.capture import capture
from adaptrt.graph.ir import Graph


def targets(graph: Graph) -> list[Any]:
    """Its operations, in order."""
    return [node.target for node in graph.module.graph.nodes if node.op == "call_function"]


def compiled(fn: Callable[..., Any], *args: Tensor) -> Callable[[], list[Tensor]]:
    """`fn(*args)` by Inductor, captured anew, to be called without arguments."""
    run = Inductor().compile(capture(fn, *args))
    return lambda: list(run(list(args)))
