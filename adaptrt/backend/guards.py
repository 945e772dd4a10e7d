"""Finds out whether tensors are like earlier ones in everything that a compiled program depends on, in less than a microsecond, in C++."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt.errors import NotDifferentiable
from adaptrt.graph.exchange import Entry, Target

MAX_KNOWN = 4

GUARDS = Entry(
    "guards in C++",
    "A call whose tensors are like those of the call before skips the checks that were made then.",
    "every call is checked in full, and takes longer",
    needed=(Target("torch._C._dynamo.guards", "TensorGuards"),),
)


TANGENTS = Entry(
    "forward mode",
    "A call skips looking for tangents, which it refuses, while no forward-mode differentiation is on.",
    "every tensor is looked at in every call, which takes longer",
    needed=(Target("torch.autograd.forward_ad", "_current_level"),),
)

_forward_mode: Any = torch.autograd.forward_ad
_shown_if: Any = getattr(_forward_mode, "_set_fwd_grad_enabled", contextlib.nullcontext)


def in_forward_mode() -> bool:
    """Whether tensors may have tangents (`torch.autograd.forward_ad`)."""
    return getattr(_forward_mode, "_current_level", 0) >= 0


def refuse_tangents(tensors: Sequence[Tensor]) -> None:
    """Raises if one of the tensors has a tangent, because programs would lose it.

    Raises:
      NotDifferentiable: one has.
    """
    with _shown_if(not torch.is_inference_mode_enabled()):  # within a custom function of autograd tangents are hidden
        found = any(_forward_mode.unpack_dual(tensor).tangent is not None for tensor in tensors)
    if found:
        raise NotDifferentiable(
            "an unroll was given a tensor with a tangent (forward-mode differentiation), which its programs would lose; compute gradients "
            "by backward() or torch.autograd.grad"
        )


def alike(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Returns a function that says whether other tensors, as many, are like these. It must not be given more or fewer.

    They are if each has the class, dispatch keys, dtype, device, layout, sizes, strides and `requires_grad` of its example, and if
    arguments that are one object here are one object there, too. Dispatch keys say, for example, whether a view is a negated one. What the
    function accepts within inference mode it refuses outside, and the other way round.

    It must not be given nested tensors: PyTorch's guards end the process then.
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
    """As `alike`, for tensors that are different objects: PyTorch's guards refuse one object given twice."""
    sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    try:
        return torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check  # type: ignore[attr-defined]
    except (AttributeError, TypeError):  # in another PyTorch, of which the entry above speaks
        return lambda *others: False


class Known:
    """Remembers lists of tensors that were accepted, up to four kinds of them, so that similar ones need not be checked again."""

    __slots__ = ("_checks",)

    def __init__(self) -> None:
        self._checks: tuple[Callable[..., bool], ...] = ()

    def __contains__(self, tensors: Sequence[Tensor]) -> bool:
        return any(check(*tensors) for check in self._checks)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """From now on accepts tensors that are like these, unless four kinds are known already."""
        if len(self._checks) < MAX_KNOWN:
            self._checks = (*self._checks, alike(tensors))
