"""Finds out whether tensors are like earlier ones in everything that a compiled program depends on, in less than a microsecond, in C++."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adaptrt.graph.exchange import Entry, Target

MAX_KNOWN = 4

GUARDS = Entry(
    "guards in C++",
    "A call whose tensors are like those of the call before skips the checks that were made then.",
    "every call is checked in full, and takes longer",
    needed=(Target("torch._C._dynamo.guards", "TensorGuards"),),
)


def alike(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function of as many tensors: whether each has the class, dtype, device, layout, sizes, strides and `requires_grad` of its example.

    Tensors that are one object must be one object again. It depends on inference mode as well: what it accepts in one mode it refuses in
    the other.
    """
    if any(tensor.layout is not torch.strided for tensor in tensors):
        return lambda *others: False
    first = {id(tensor): place for place, tensor in reversed([*enumerate(tensors)])}  # where an object is for the first time
    distinct = sorted(first.values())
    check = _check_of([tensors[place] for place in distinct])
    if len(distinct) == len(tensors):
        return check
    again = [(place, first[id(tensor)]) for place, tensor in enumerate(tensors) if place != first[id(tensor)]]

    def both(*others: Tensor) -> bool:
        return check(*[others[place] for place in distinct]) and all(others[place] is others[of] for place, of in again)

    return both


def _check_of(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """As `alike`, of tensors that are different objects, as it wants them."""
    sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    try:
        return torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check  # type: ignore[attr-defined]
    except (AttributeError, TypeError):  # in another PyTorch, of which the entry above speaks
        return lambda *others: False


class Known:
    """The first few sorts of lists of tensors that were accepted, so that their like need not be looked at again."""

    __slots__ = ("_checks",)

    def __init__(self) -> None:
        self._checks: tuple[Callable[..., bool], ...] = ()

    def __contains__(self, tensors: Sequence[Tensor]) -> bool:
        return any(check(*tensors) for check in self._checks)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Accepts what is like these tensors from now on, if there is room."""
        if len(self._checks) < MAX_KNOWN:
            self._checks = (*self._checks, alike(tensors))
