"""Tensors in nested tuples, lists and dicts, of one task and of several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def leaves(value: Any) -> list[Tensor]:
    """Returns all tensors, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for part in _parts(value) for leaf in leaves(part)]


def map_leaves(fn: Callable[..., Tensor], value: Any, *others: Any) -> Any:
    """Returns the same tree with `fn` applied to every tensor, and to those in its place in other trees of this structure.

    What is neither a tensor nor a tuple, list, dict or dataclass stays as it is in the first tree.
    """
    if isinstance(value, Tensor):
        return fn(value, *others)
    if isinstance(value, Mapping):
        return {key: map_leaves(fn, part, *[other[key] for other in others]) for key, part in value.items()}
    if isinstance(value, tuple | list):
        made = [map_leaves(fn, *parts) for parts in zip(value, *others, strict=True)]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        made = {name: map_leaves(fn, getattr(value, name), *[getattr(other, name) for other in others]) for name in names}
        return dataclasses.replace(value, **made)
    return value


def paths(value: Any) -> list[tuple[Any, ...]]:
    """Returns for each tensor the indices, keys and names of fields that lead to it, in the order of `leaves`."""
    if isinstance(value, Tensor):
        return [()]
    if isinstance(value, Mapping):
        steps = list(value)
    elif isinstance(value, tuple | list):
        steps = list(range(len(value)))
    else:
        is_tree = dataclasses.is_dataclass(value) and not isinstance(value, type)
        steps = [field.name for field in dataclasses.fields(value)] if is_tree else []
    return [(step, *rest) for step, part in zip(steps, _parts(value), strict=True) for rest in paths(part)]


def form(value: Any) -> Any:
    """Returns what two trees of the same structure have in common; other values than tensors count, too."""
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, Mapping):
        return "dict", tuple([(key, form(part)) for key, part in value.items()])
    if isinstance(value, tuple | list):
        return type(value).__name__, tuple([form(part) for part in value])
    return value


def own(value: Any, num_examples: int | None) -> Any:
    """Returns a tree of one task's tensors in memory of its own; `num_examples`: how many rows of each, None for all."""
    with torch.inference_mode(False), torch.no_grad():
        return map_leaves(lambda leaf: (leaf if num_examples is None else leaf[:num_examples]).clone(), value)


def take_apart(value: Any, num_tasks: int, num_examples: list[int] | None) -> list[Any]:
    """Returns for each task its part of a tree of tensors [T, ...], in memory of its own.

    Args:
      value: the tree.
      num_tasks: of how many tasks to return the part, the first ones.
      num_examples: for each task, how many rows of its part to return; None for all.
    """

    def part(index: int) -> Callable[[Tensor], Tensor]:
        stop = None if num_examples is None else num_examples[index]
        return lambda leaf: (leaf[index] if stop is None else leaf[index][:stop]).clone()

    # Outside of inference mode, so that the caller's autograd may take what it gets.
    with torch.inference_mode(False), torch.no_grad():
        return [map_leaves(part(index), value) for index in range(num_tasks)]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, tuple | list):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return []
