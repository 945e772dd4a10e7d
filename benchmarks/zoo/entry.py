"""What the zoo's models are declared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class Case(NamedTuple):
    """A model, a function that draws a batch for it, and its loss of (output, *rest of the batch)."""

    model: nn.Module
    batch: Callable[[], tuple[Any, ...]]
    loss: Callable[..., Tensor]


class Entry(NamedTuple):
    """A model of a package.

    Attributes:
      package: the name that is imported.
      name: the model, in words.
      make: imports and builds it.
      expected: the outcome that is known; "right" unless the limits of adaptrt or of PyTorch say otherwise.
    """

    package: str
    name: str
    make: Callable[[], Case]
    expected: str


ZOO: list[Entry] = []


def entry(package: str, name: str, expected: str = "right") -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Puts what builds a model into the zoo."""

    def put(make: Callable[[], Case]) -> Callable[[], Case]:
        ZOO.append(Entry(package, name, make, expected))
        return make

    return put
