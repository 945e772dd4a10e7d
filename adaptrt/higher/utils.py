"""Functions of nested containers, and copies of parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
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


def _copy_tensor(t: Tensor, safe_copy: bool, device: torch.device | None = None) -> Tensor:
    """Does what `copied` does."""
    return copied(t, device, safe_copy)


def _recursive_copy_and_cast(target: Any, device: torch.device | None) -> Any:
    """Returns nested containers like `target`, with a copy of each tensor on `device`. None leaves it where it is."""
    return _recursive_map(target, lambda leaf: copied(leaf, device) if isinstance(leaf, Tensor) else leaf)


def _is_container(target: Any) -> bool:
    """Tells whether `_recursive_map` looks into a value."""
    return isinstance(target, list | tuple | dict | set)


def _find_param_in_list(param: Tensor, tensors: Iterable[Tensor]) -> int | None:
    """Returns the position of a tensor, the same object, or None if it is not there."""
    return next((i for i, other in enumerate(tensors) if other is param), None)


def _places_of_params(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Returns the place of each parameter: its module and its name there. A module that is used twice is visited twice."""
    for name, param in module._parameters.items():
        if param is not None:
            yield module, name
    for child in module._modules.values():
        if child is not None:
            yield from _places_of_params(child)


def _get_param_mapping(module: nn.Module, seen: list[Tensor], mapping: list[int]) -> list[int]:
    """Appends to `mapping` for each place of a parameter the parameter's position in `seen`, and returns `mapping`.

    Args:
      module: the module that has the parameters.
      seen: distinct parameters. Those that are not there yet are appended.
      mapping: positions that are known already.
    """
    for part, name in _places_of_params(module):
        param: Any = part._parameters[name]
        found = _find_param_in_list(param, seen)
        mapping.append(len(seen) if found is None else found)
        if found is None:
            seen.append(param)
    return mapping


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
