"""Selects items of a tensor by integer tensors without reading these, in the place of `x[i]`.

PyTorch reads an integer tensor without axes in an index, because a selection is a view, which has to begin somewhere. While a function is
traced there is nothing to read.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def select_by_tensors(value: Tensor, index: Any) -> Any:
    """Returns `value[index]` as a copy if the index holds integer tensors without axes besides numbers, slices, None and an ellipsis.

    Otherwise returns NotImplemented; in particular if the integer tensors follow from constants, where PyTorch can make a view.
    """
    items = _items(index)
    if not _is_known(value, items):
        return NotImplemented
    axes = _axes_of_places(value, items)
    found = value[tuple([slice(None) if _is_place(item) else item for item in items])]
    for axis, place in reversed(axes):
        found = found[(*(slice(None),) * axis, _as_index(place))].squeeze(axis)
    return found


def assign_by_tensor(value: Tensor, index: Any, new: Any) -> Any:
    """Does what `value[index] = new` does for an index as above with one such tensor. Otherwise returns NotImplemented."""
    items = _items(index)
    if not _is_known(value, items) or sum(map(_is_place, items)) > 1:
        return NotImplemented
    ((axis, _),) = _axes_of_places(value, items)
    if isinstance(new, Tensor):
        new = new.to(value.dtype).expand(select_by_tensors(value, index).shape).unsqueeze(axis)
    value[tuple([_as_index(item) if _is_place(item) else item for item in items])] = new
    return None


def _as_index(place: Tensor) -> Tensor:
    """Returns a copy with one axis, since the model may count the original up before a gradient needs it."""
    return place.to(torch.int64, copy=True).reshape(1)


def _axes_of_places(value: Tensor, items: tuple[Any, ...]) -> list[tuple[int, Tensor]]:
    """Returns each integer tensor with the axis that a slice in its place would have in the result."""
    axes: list[tuple[int, Tensor]] = []
    consumed = sum(item is not None and item is not Ellipsis for item in items)
    axis = 0
    for item in items:
        if _is_place(item):
            axes.append((axis, item))
        axis += value.dim() - consumed if item is Ellipsis else 0 if type(item) is int else 1
    return axes


def _items(index: Any) -> tuple[Any, ...]:
    items = cast("tuple[Any, ...]", index) if isinstance(index, tuple) else (index,)
    return tuple([_number(item) if _is_place(item) else item for item in items])


def _number(place: Tensor) -> Tensor | int:
    """Returns an integer tensor as a number if it has the same value in every call."""
    try:
        return int(place)
    except DataDependentOutputException:
        return place


def _is_known(value: Tensor, items: tuple[Any, ...]) -> bool:
    if not any(map(_is_place, items)) or not all(_is_place(item) or _is_plain(item) for item in items):
        return False
    functorch = cast(Any, torch._C)._functorch
    return not functorch.is_functorch_wrapped_tensor(value)


def _is_place(item: Any) -> bool:
    return isinstance(item, FakeTensor) and item.dim() == 0 and item.dtype in _INTEGERS


def _is_plain(item: Any) -> bool:
    return item is None or item is Ellipsis or type(item) is int or isinstance(item, slice)
