"""Adds a leading task axis to a graph, which makes one program for a batch of tasks.

The graph of one task is run under `torch.func.vmap` and recorded again. At this point it holds neither random operations nor autograd. So
the axis has a simple meaning: each task's results are what the graph gives for that task alone.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._decomp import get_decompositions  # pyright: ignore[reportUnknownVariableType]

from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.base import Pass, apply
from adaptrt.graph.passes.decompose import decompose
from adaptrt.graph.passes.functionalise import functionalise
from adaptrt.graph.passes.merge_duplicates import merge_duplicates
from adaptrt.graph.passes.numbers_as_tensors import numbers_as_tensors
from adaptrt.graph.passes.own_outputs import own_outputs
from adaptrt.graph.passes.relax_views import relax_views
from adaptrt.graph.passes.remove_identities import remove_identities
from adaptrt.graph.passes.retrace import retrace
from adaptrt.graph.signature import Input
from adaptrt.tree import Spec

aten = torch.ops.aten

# Operations without a batching rule, which vmap would run once for each task.
_WITHOUT_BATCHING_RULE = (
    aten._native_batch_norm_legit_functional,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
    aten.native_batch_norm_backward,
    aten.fill,
)


def batch(graph: Graph, batched: Sequence[bool], summed: Sequence[bool], num_tasks: int) -> Graph:
    """Returns the graph over `num_tasks` tasks.

    Args:
      graph: the program of one task.
      batched: for each input except the constants, whether it has one value for each task, along a new leading axis.
      summed: for each output, whether to sum it over the tasks. Otherwise the output gets a leading axis of tasks.
      num_tasks: length of the axis, at least 1.
    """
    axes = (*batched, *(False for _ in graph.constants))
    inputs = [_stacked(entry, num_tasks) if axis else entry for entry, axis in zip(graph.signature.inputs, axes, strict=True)]

    def over_tasks(fn: Callable[..., Any]) -> Callable[..., Any]:
        mapped = torch.func.vmap(fn, in_dims=tuple(0 if axis else None for axis in axes))

        def run(*values: Tensor) -> list[Tensor]:
            # vmap refuses a call in which no input is mapped, and gives every output an axis.
            return [value.sum(0) if total else value for value, total in zip(mapped(*values), summed, strict=True)]

        return run

    def simplify(graph: Graph) -> Graph:
        rules = _rules()
        if any(node.target in rules for node in graph.module.graph.nodes):
            graph = decompose(graph, rules)
        return _in_any_layout(_with_closed_slices(graph))

    def stack(graph: Graph) -> Graph:
        # An operation without a batching rule is run once for each task. That is correct, so the user needs no warning. Python's warning
        # filters do not see this one while autograd runs, and PyTorch cannot be asked whether the warning was enabled.
        functorch = cast(Any, torch._C)._functorch
        functorch._set_vmap_fallback_warning_enabled(False)
        try:
            return retrace(graph, over_tasks, inputs=inputs)
        finally:
            functorch._set_vmap_fallback_warning_enabled(True)

    passes = (
        Pass("decompose", simplify),
        functionalise,
        relax_views,
        Pass("batch", stack),
        functionalise,
        numbers_as_tensors,
        relax_views,
        remove_identities,
        merge_duplicates,
        own_outputs,
    )
    return apply(passes, graph)


def _rules() -> dict[Any, Callable[..., Any]]:
    def copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        del non_blocking
        return source.to(target.dtype).expand(target.shape).clone()

    return {**cast(Any, get_decompositions(_WITHOUT_BATCHING_RULE)), aten.copy.default: copied}


def _with_closed_slices(graph: Graph) -> Graph:
    """Gives every open slice an explicit end.

    An open end is recorded as the largest integer, on which the batching rule of slice_scatter overflows.
    """
    module = graph.module
    for node in module.graph.nodes:
        if node.target in (aten.slice.Tensor, aten.slice_scatter.default):
            end = 3 if node.target is aten.slice.Tensor else 4
            dim = node.args[end - 2] if len(node.args) > end - 2 else 0
            if len(node.args) > end and isinstance(node.args[end], int):
                node.update_arg(end, min(node.args[end], node.args[0].meta["val"].shape[dim]))
    return graph


def _in_any_layout(graph: Graph) -> Graph:
    """Lets results that were asked for with the channels last have any layout.

    Only tensors of four or five axes have such a layout, and an axis of tasks makes five or six of them.
    """
    for node in graph.module.graph.nodes:
        if node.kwargs.get("memory_format") in (torch.channels_last, torch.channels_last_3d):
            node.update_kwarg("memory_format", torch.contiguous_format)
    return graph


def _stacked(entry: Input, num_tasks: int) -> Input:
    spec = entry.spec
    return dataclasses.replace(entry, spec=Spec((num_tasks, *spec.shape), spec.dtype, spec.device))
