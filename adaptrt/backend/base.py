"""What runs a graph."""

from __future__ import annotations

import abc
import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

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

    def builds_ahead(self, device: torch.device) -> bool:
        """Whether `compile` returns a `Building` in a rehearsal, for programs on `device`."""
        del device
        return False

    @abc.abstractmethod
    def compile(self, graph: Graph) -> Runner:
        """The graph as a callable that computes the same values up to rounding.

        It need not look at its inputs: `Program` sees to it that they have the shapes, dtypes, devices and strides of the signature.
        """


_rehearsal = threading.local()


@contextlib.contextmanager
def rehearsal() -> Generator[None]:
    """Within the block, this thread runs programs to find out which there are: their results have the right form and no values."""
    before, _rehearsal.is_on = rehearsing(), True
    try:
        yield
    finally:
        _rehearsal.is_on = before


def rehearsing() -> bool:
    """Whether this thread is in a rehearsal."""
    return getattr(_rehearsal, "is_on", False)


class Form(NamedTuple):
    """What a result looks like."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Building:
    """A runner whose code is being built; called, it waits.

    Args:
      forms: of the results.
      finish: waits for the code.
    """

    def __init__(self, forms: Sequence[Form], finish: Callable[[], Runner]) -> None:
        self.forms = forms
        self._finish = finish
        self._built: Runner | None = None

    def __call__(self, values: list[Tensor]) -> Sequence[Tensor]:
        return self.finish()(values)

    def finish(self) -> Runner:
        """What has been built."""
        if self._built is None:
            with COMPILING:
                if self._built is None:
                    self._built = self._finish()
        return self._built


def without_values(form: Form) -> Tensor:
    """Memory for a result."""
    if not form.shape:  # a scalar may be looked at, as the one is that says whether data is finite
        return torch.zeros((), dtype=form.dtype, device=form.device)
    return torch.empty_strided(form.shape, form.strides, dtype=form.dtype, device=form.device)
