"""Nested containers, and copies of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def flatten(x: Any) -> list[Any]:
    """What is in a nest of dicts, lists, tuples and sets, as one list.

    >>> flatten({"a": 1, "b": (2, [3, 4])})
    [1, 2, 3, 4]
    """
    if isinstance(x, dict):
        return flatten(list(x.values()))
    if isinstance(x, list | tuple | set):
        return [leaf for entry in x for leaf in flatten(entry)]
    return [x]


def get_func_params(module: nn.Module, device: torch.device | None = None, safe_copy: bool = True) -> list[Tensor]:
    """The module's parameters, cut from their graph; each requires grad as its original does.

    Args:
      module: in whose order they come.
      device: where to put them; None leaves them where they are.
      safe_copy: copy their memory, so that none is shared with the module.
    """
    return [copied(p, device, safe_copy) for p in module.parameters()]


def copied(value: Tensor, device: torch.device | None = None, safe_copy: bool = True) -> Tensor:
    """One tensor as `get_func_params` copies it."""
    found = value.detach().clone() if safe_copy else value.detach()
    return (found if device is None else found.to(device)).requires_grad_(value.requires_grad)


def _recursive_map(target: Any, map_fn: Callable[[Any], Any]) -> Any:
    """The nest `target` with `map_fn` applied to each leaf."""
    if isinstance(target, dict):
        return type(target)({key: _recursive_map(value, map_fn) for key, value in target.items()})
    if isinstance(target, tuple) and hasattr(target, "_fields"):
        return type(target)(*(_recursive_map(value, map_fn) for value in target))
    if isinstance(target, list | tuple | set):
        return type(target)([_recursive_map(value, map_fn) for value in target])
    return map_fn(target)
