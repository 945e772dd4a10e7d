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
    """A model of a package, which `make` imports and builds."""

    package: str
    name: str
    make: Callable[[], Case]


ZOO: list[Entry] = []


def entry(package: str, name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Puts what builds a model into the zoo."""

    def put(make: Callable[[], Case]) -> Callable[[], Case]:
        ZOO.append(Entry(package, name, make))
        return make

    return put
