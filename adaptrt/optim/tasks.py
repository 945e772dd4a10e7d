"""Where a tree of hyperparameters has values for each task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from adaptrt import tree
from adaptrt.optim.base import Hyper, PerTask, Schedule
from adaptrt.tree import Structure, Tree


def are_per_task(part: Tree) -> list[bool]:
    """Returns for each leaf of a tree, in order, whether it has an axis of tasks because it is in a `PerTask`."""
    return _marks(tree.flatten(part)[1], inside=False)


def _marks(structure: Structure, inside: bool) -> list[bool]:
    if structure.kind == "leaf":
        return [inside]
    inside = inside or structure.payload is PerTask
    return [mark for child in structure.children for mark in _marks(child, inside)]


def of_one_task(hyper: Hyper) -> Hyper:
    """Returns hyperparameters with the values of each `PerTask` in its place, which within a step are those of one task."""
    if isinstance(hyper, PerTask):
        return hyper.values
    if isinstance(hyper, Schedule):
        return dataclasses.replace(hyper, numbers=of_one_task(hyper.numbers))
    if isinstance(hyper, Mapping):
        return {key: of_one_task(value) for key, value in cast("Mapping[str, Any]", hyper).items()}
    return tuple([of_one_task(value) for value in cast("tuple[Any, ...]", hyper)]) if type(hyper) is tuple else hyper
