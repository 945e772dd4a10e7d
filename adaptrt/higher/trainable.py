"""Settings of an optimiser that are learned: out of its groups as tensors, into a step as an override, and back into the groups.

An override has for each overridden setting a list: one value for all groups, or one for each group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt.higher.utils import _recursive_map, flatten, settings_of
from adaptrt.optim.families import FAMILIES

Override = Mapping[str, Sequence[Any]]


def get_trainable_opt_params(opt: torch.optim.Optimizer, device: torch.device | None = None) -> dict[str, list[Any]]:
    """Returns the numbers in the optimiser's groups as tensors that require grad, in the form that `override` takes.

    Flags are left out. The tensors are copies.

    Args:
      opt: an instance of a class of `torch.optim`, or of another class. Of a class of `torch.optim` exactly those settings count that are
        numbers in its arithmetic; of another class, every int, float and tensor.
      device: where the tensors are put; None for the default.
    """
    family = FAMILIES.get(type(opt))
    override: dict[str, list[Any]] = {}

    def trainable(value: Any) -> Tensor:
        value = torch.as_tensor(value, device=device).detach().clone()
        return (value if value.is_floating_point() else value.to(torch.get_default_dtype())).requires_grad_()

    for group in opt.param_groups:
        for key, value in settings_of(group).items():
            leaves = flatten(value)
            numbers = bool(leaves) and all(isinstance(x, int | float | Tensor) and not isinstance(x, bool) for x in leaves)
            if numbers and (family is None or key in family.numbers):
                override.setdefault(key, []).append(_recursive_map(value, trainable))
    return override


def apply_trainable_opt_params(opt: torch.optim.Optimizer, override: Override) -> None:
    """Writes learned numbers into the optimiser's groups, each with the type of the setting that it replaces.

    Args:
      opt: its `param_groups` are changed.
      override: lists of values by name of the setting, as `get_trainable_opt_params` returns them.
    Raises:
      ValueError: a list has the wrong length, or a number stands where the setting is a nest of numbers.
    """
    for key, values in override.items():
        for group, value in zip(opt.param_groups, by_group(key, values, len(opt.param_groups)), strict=True):
            group[key] = _written(key, value, group[key])


def _written(key: str, value: Any, target: Any) -> Any:
    if isinstance(target, Tensor):
        return torch.as_tensor(value).detach().to(target).clone()
    if isinstance(target, Mapping):
        return {name: _written(key, value[name], entry) for name, entry in target.items()}
    if isinstance(target, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(target):
            raise ValueError(f"override of '{key}': expected {len(target)} numbers in place of {target}, got {value}")
        return type(target)([_written(key, new, old) for new, old in zip(value, target, strict=True)])
    if isinstance(value, list | tuple | Mapping) or (isinstance(value, Tensor) and value.numel() != 1):
        raise ValueError(f"override of '{key}': expected a number in place of {target}, got {value}")
    return type(target)(value.item() if isinstance(value, Tensor) else value)


def _recursive_apply(replacement: Any, target: Any) -> Any:
    """Returns a setting that is replaced: numbers of the type that they had, and tensors as the same objects with other values.

    Args:
      replacement: a tensor or a number for each number or tensor of the setting, in nests of the same form.
      target: the setting as it is. Its tensors are changed.
    Raises:
      ValueError: the nests differ.
    """
    return _in_place(_written("a setting", replacement, target), target)


def _in_place(value: Any, target: Any) -> Any:
    if isinstance(target, Tensor):
        target.data = value
        return target
    if isinstance(target, Mapping):
        return type(target)({name: _in_place(value[name], entry) for name, entry in target.items()})  # pyright: ignore[reportCallIssue]
    if isinstance(target, list | tuple):
        return type(target)([_in_place(new, old) for new, old in zip(value, target, strict=True)])
    return value


def by_group(key: str, values: Any, num_groups: int) -> list[Any]:
    """Returns one value for each group from an entry of an override.

    Args:
      key: the setting's name, for messages.
      values: one value for all groups, or one for each.
      num_groups: how many groups there are.
    Raises:
      TypeError: `values` is no sequence.
      ValueError: it has the wrong length.
    """
    if not isinstance(values, Sequence):
        raise TypeError(f"override of '{key}' must be a list of one value for all groups or one for each, got a {type(values).__name__}")
    if len(values) not in (1, num_groups):
        raise ValueError(f"override of '{key}' has {len(values)} values: give one, or one for each of {num_groups} groups")
    return list(values) * (num_groups if len(values) == 1 else 1)
