"""Makes a graph functional, so that no operation in it mutates a tensor.

In-place operations come from the user's model and from autograd's own derivative formulas (`div_`, `add_`). So the whole traced graph is
functionalised, not only the model. Nearly all of these operations write to a value that shares memory with no other, and are replaced by
their out-of-place counterparts in the same place. If one is left, the graph is traced again through PyTorch's functionalisation, which
follows views and takes as long as the capture did.

A counterpart may give a contiguous tensor where the one written to had gaps, as a part of a split tensor has, to which recurrent cells
apply their activations in place. Then the strides of what depends on it are computed anew.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from adaptrt.errors import NotTraceable
from adaptrt.graph.ir import Graph
from adaptrt.graph.operations import is_mutable, memory_of, name_of, out_of_place
from adaptrt.graph.passes.base import Pass, copy_module, has_other_strides, renew_value, strides_of
from adaptrt.graph.passes.retrace import retrace

aten = torch.ops.aten


def _run(graph: Graph) -> Graph:
    if not any(is_mutable(node.target) for node in graph.module.graph.nodes):
        return graph
    exchanged = dataclasses.replace(graph, module=copy_module(graph))
    if all(_exchange(node) for node in list(exchanged.module.graph.nodes) if is_mutable(node.target)):
        return exchanged
    return retrace(graph, lambda fn: torch.func.functionalize(fn, remove="mutations"))


def _exchange(node: fx.Node) -> bool:
    """Replaces `node` by an out-of-place operation, and returns False if that would give other values."""
    if node.target is aten._native_batch_norm_legit.default:
        return _exchange_batch_norm(node)
    target = out_of_place(node.target)
    written = node.args[0] if node.args else None
    if target is None or not isinstance(written, fx.Node) or not _is_private(written, node):
        return False
    value = _alike(target, node, written)
    if value is None:
        return False
    with node.graph.inserting_before(node):
        result = node.graph.call_function(target, node.args, node.kwargs)
    result.meta = {**node.meta, "val": value}
    moved = has_other_strides(result, node)
    _replace_from(node, written, result)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    return not moved or _renew_users(result)


def _renew_users(changed: fx.Node) -> bool:
    """Computes anew the values that depend on a value with new strides, and returns False if an operation needs the old ones."""
    pending = set(changed.users)
    while pending:
        node = min(pending)
        pending.remove(node)
        if node.op != "call_function":
            continue
        if node.target in _OF_STRIDES or node.target is operator.getitem:
            return False
        before = strides_of(node.meta["val"])
        try:
            renew_value(node)
        except RuntimeError:  # a view that is no longer one
            return False
        if strides_of(node.meta["val"]) != before:
            pending.update(node.users)
    return True


_OF_STRIDES = {aten.as_strided.default, aten.as_strided_.default, aten.as_strided_scatter.default}


def _exchange_batch_norm(node: fx.Node) -> bool:
    statistics = node.args[3:5]
    if not all(isinstance(value, fx.Node) and _is_private(value, node) for value in statistics):
        return False
    with node.graph.inserting_before(node):
        result = node.graph.call_function(aten._native_batch_norm_legit_functional.default, node.args, node.kwargs)
        updated = [node.graph.call_function(operator.getitem, (result, index)) for index in (3, 4)]
    result.meta = {**node.meta, "val": (*node.meta["val"], *(value.meta["val"] for value in statistics))}  # type: ignore[union-attr]
    for before, after in zip(statistics, updated, strict=True):
        assert isinstance(before, fx.Node)
        after.meta = dict(before.meta)
        _replace_from(node, before, after)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    return True


def _is_private(value: fx.Node, writer: fx.Node) -> bool:
    """Whether no value except `value` itself shows, after `writer`, what `writer` writes to it."""
    if value.op == "placeholder" or memory_of(value) is not value:
        return False
    return not any(user > writer for view in _views(value, value, writer) for user in view.users)


def _views(value: fx.Node, memory: fx.Node, besides: fx.Node) -> Iterator[fx.Node]:
    """Returns the views of `value`, whose memory is that of `memory`, and their views, except those reached only through `besides`."""
    for user in value.users:
        if user is not besides and memory_of(user) is memory:
            yield user
            yield from _views(user, memory, besides)


def _replace_from(writer: fx.Node, before: fx.Node, after: fx.Node) -> None:
    """Makes every user of `before` that comes after `writer` use `after` instead."""
    before.replace_all_uses_with(after, delete_user_cb=lambda user: user > writer)


def _alike(target: Any, node: fx.Node, written: fx.Node) -> Any:
    """Returns what `target` gives, or None if it is not like the tensor written to.

    An in-place operation keeps the dtype, whereas `target` may promote it. Strides may differ only if the new ones are contiguous.
    """
    value = written.meta["val"]
    args, kwargs = cast(Any, map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"]))
    try:
        with torch.no_grad(), value.fake_mode:
            result = target(*args, **kwargs)
    except Exception:  # the overload takes other arguments, so the graph is traced again
        return None
    if not isinstance(result, Tensor) or (result.dtype, result.shape) != (value.dtype, value.shape):
        return None
    return value if result.stride() == value.stride() else result if result.is_contiguous() else None


def _ensures(graph: Graph) -> None:
    for node in graph.module.graph.nodes:
        if is_mutable(node.target):
            raise NotTraceable(
                f"the model writes to one of its inputs in place ({name_of(node.target)}); let it work on a copy, for example x.clone()"
            )


functionalise = Pass("functionalise", _run, ensures=_ensures)
