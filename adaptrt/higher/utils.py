"""Functions of nested containers, and copies of parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def flatten(x: Any) -> list[Any]:
    """Returns the leaves of nested dicts, lists, tuples and sets as one list.

    >>> flatten({"a": 1, "b": (2, [3, 4])})
    [1, 2, 3, 4]
    """
    if isinstance(x, dict):
        return flatten(list(x.values()))
    if isinstance(x, list | tuple | set):
        return [leaf for entry in x for leaf in flatten(entry)]
    return [x]


def get_func_params(module: nn.Module, device: torch.device | None = None, safe_copy: bool = True) -> list[Tensor]:
    """Returns the parameters of a module, detached from their graph. Each requires grad if its original does.

    Args:
      module: the module, which gives the order of the parameters.
      device: where they are put; None leaves them where they are.
      safe_copy: copy their memory, so that they share none with the module.
    """
    return [copied(p, device, safe_copy) for p in module.parameters()]


def copied(value: Tensor, device: torch.device | None = None, safe_copy: bool = True) -> Tensor:
    """Returns a copy of one tensor, made as `get_func_params` makes it."""
    found = value.detach().clone() if safe_copy else value.detach()
    return (found if device is None else found.to(device)).requires_grad_(value.requires_grad)


def _recursive_map(target: Any, map_fn: Callable[[Any], Any]) -> Any:
    """Returns nested containers like `target`, with `map_fn` applied to each leaf."""
    kind = type(target)  # not isinstance: a leaf may answer for another class
    if issubclass(kind, dict):
        mapped = copy.copy(target)  # which keeps what a defaultdict makes
        mapped.update({key: _recursive_map(value, map_fn) for key, value in target.items()})
        return mapped
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return kind(*(_recursive_map(value, map_fn) for value in target))
    if issubclass(kind, list | tuple | set):
        return kind([_recursive_map(value, map_fn) for value in target])
    return map_fn(target)


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a parameter group: all its entries but the parameters."""
    return {key: value for key, value in group.items() if key != "params"}
