"""Defines what a backend is, and how a program is represented whose code is still being built."""

from __future__ import annotations

import abc
import contextlib
import functools
import threading
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adaptrt.backend.launch import Launcher
from adaptrt.graph.ir import Graph
from adaptrt.process import changed, leaving_nothing, lock

Runner = Callable[[list[Tensor]], Sequence[Tensor]]
"""A compiled graph. It takes a list of all inputs in order, constants included, with the strides of the graph's signature. It may empty
the list. Several threads may call it at the same time."""


COMPILING = lock()
"""Held while anything is captured or compiled, because PyTorch's tracing state belongs to the process."""


class Backend(abc.ABC):
    """Turns graphs into callables. Instances are immutable."""

    name: str
    fuses: bool = False
    """Whether small operations cost next to nothing, because they are computed together with others."""

    def lower(self, graph: Graph) -> Graph:
        """The graph after the replacements that `compile` makes first. What is kept for a way back is decided on these operations."""
        return graph

    def launcher(self, device: torch.device) -> Launcher | None:
        """Makes each call of one unroll, whose model is on `device`, one launch; None if programs are run one after the other."""
        del device
        return None

    def builds_ahead(self, device: torch.device) -> bool:
        """Whether `compile` returns a `Building` in a rehearsal, for programs on `device`."""
        del device
        return False

    def private_parts(self) -> tuple[str, ...]:
        """Returns the names of what this backend exchanges or uses of PyTorch's private parts, as far as this PyTorch has them."""
        return ()

    @abc.abstractmethod
    def compile(self, graph: Graph) -> Runner:
        """Compiles the graph to a callable that computes the same values up to rounding.

        The callable need not check its inputs. `Program` has made sure that they have the shapes, dtypes, devices and strides of the
        signature.
        """


_rehearsal = threading.local()


@contextlib.contextmanager
def rehearsal() -> Generator[None]:
    """Within the block, this thread runs programs only to find which ones there are. Their results have the right form and no values."""
    with changed(functools.partial(setattr, _rehearsal, "is_on", rehearsing()), of_thread=True):
        _rehearsal.is_on = True
        yield


def rehearsing() -> bool:
    """Whether this thread is in a rehearsal."""
    return getattr(_rehearsal, "is_on", False)


class Form(NamedTuple):
    """Shape, strides, dtype and device of a result."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Building:
    """A runner whose code is being built. A call waits for the code.

    Args:
      forms: what the results will look like.
      finish: waits for the code and returns the runner.
    """

    def __init__(self, forms: Sequence[Form], finish: Callable[[], Runner]) -> None:
        self.forms = forms
        self._finish = finish
        self._built: Runner | None = None

    def __call__(self, values: list[Tensor]) -> Sequence[Tensor]:
        return self.finish()(values)

    def finish(self) -> Runner:
        """Waits for the code, and returns the runner that was built."""
        if self._built is None:
            with COMPILING:
                if self._built is None:
                    self._built = leaving_nothing(self._finish)()
        return self._built


def without_values(form: Form) -> Tensor:
    """Allocates memory for a result, whose values do not matter."""
    if not form.shape:  # some scalars are read, such as the one that says whether data is finite
        return torch.zeros((), dtype=form.dtype, device=form.device)
    return torch.empty_strided(form.shape, form.strides, dtype=form.dtype, device=form.device)
