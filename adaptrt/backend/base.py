"""What runs a graph."""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adaptrt.backend.launch import Launcher
from adaptrt.graph.ir import Graph

Runner = Callable[[list[Tensor]], Sequence[Tensor]]
"""Takes every input of a graph in order, with the strides of its signature, constants included, and may empty the list. Safe to call from
threads."""


COMPILING = threading.RLock()
"""Held while anything is captured or compiled: PyTorch's tracing state belongs to the process."""


class Backend(abc.ABC):
    """Turns graphs into callables. Instances are immutable."""

    name: str
    fuses: bool = False
    """Whether small operations cost next to nothing beside others."""

    def lower(self, graph: Graph) -> Graph:
        """The graph in the operations that `compile` would put in the place of its own, for what has to know which they are."""
        return graph

    def launcher(self, device: torch.device) -> Launcher | None:
        """What makes the calls of one unroll, whose model is on `device`, one launch each; None if programs are run one by one."""
        del device
        return None

    @abc.abstractmethod
    def compile(self, graph: Graph) -> Runner:
        """The graph as a callable that computes the same values up to rounding."""
