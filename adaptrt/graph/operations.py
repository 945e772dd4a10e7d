"""Answers questions about ATen operations whose answers PyTorch keeps in private attributes."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

COSTLY = frozenset(
    [
        *("exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "pow", "sigmoid", "tanh", "sinh", "cosh", "asinh", "acosh", "atanh"),
        *("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "erf", "erfc", "erfinv", "lgamma"),
    ]
)
"""Names of pointwise functions that are costly: the C library computes one element at a time, PyTorch's vector library many at once."""


def is_operation(target: Any) -> bool:
    """Whether `target` is an ATen (or other registered) operation, or the selection of one of its results."""
    return target is operator.getitem or isinstance(target, torch._ops.OpOverload)


@functools.cache
def is_composite(target: Any) -> bool:
    """Whether PyTorch itself expresses the operation by other operations on every device, as a reshape by a view or a copy."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    composite, *devices = (
        torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key) for key in ("CompositeImplicitAutograd", "CPU", "CUDA")
    )
    return composite and not any(devices)


def is_mutable(target: Any) -> bool:
    """Whether the operation writes to an argument."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def out_of_place(target: Any) -> Any | None:
    """Returns the counterpart of an in-place operation such as `add_.Tensor` that returns a new tensor, or None if there is none.

    This works only for operations that write to their first argument and return it.
    """
    schema = target._schema
    written = [index for index, argument in enumerate(schema.arguments) if argument.alias_info is not None and argument.alias_info.is_write]
    namespace, name = schema.name.split("::")
    if written != [0] or not name.endswith("_") or name.startswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    return getattr(packet, schema.overload_name or "default", None)


def is_random(target: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> bool:
    """Whether the operation draws random numbers when called with these arguments.

    Attention has the tag of random operations because of its dropout. It is random only if the dropout probability is not zero.
    """
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    bound = dict(zip((argument.name for argument in target._schema.arguments), args, strict=False)) | (kwargs or {})
    if any(argument.name == "dropout_p" for argument in target._schema.arguments):
        return bool(bound.get("dropout_p", 0.0))
    return True


def is_view(target: Any) -> bool:
    """Whether the operation's results share memory with its first argument."""
    return isinstance(target, torch._ops.OpOverload) and any(result.alias_info is not None for result in target._schema.returns)


def memory_of(node: fx.Node) -> fx.Node:
    """Returns the node whose memory `node` uses, which is `node` itself unless it is a view."""
    while is_view(node.target) or (node.target is operator.getitem and is_view(node.args[0].target)):  # type: ignore[union-attr]
        node = node.args[0]  # type: ignore[assignment]
    return node


def name_of(target: Any) -> str:
    """Returns the operation's name without namespace and overload, for messages."""
    return str(target).removeprefix("aten.").split(".")[0]


def is_pointwise(target: Any) -> bool:
    """Whether each element of the operation's result depends only on the elements of its arguments at the same place."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
