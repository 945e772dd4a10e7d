"""Runs a graph's operations again on fake tensors, through a transformation, and records what comes out."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import make_fx

from adaptrt.graph.ir import Graph, autocast_off
from adaptrt.graph.signature import Input, Signature
from adaptrt.tree import Spec


def fake_tensors(mode: FakeTensorMode, specs: Sequence[Spec]) -> list[Tensor]:
    """A contiguous fake tensor for each spec. Each is an object of its own: `make_fx` aliases inputs that are one object."""
    # An inference tensor could not require grad.
    with torch.inference_mode(False), mode:
        return [torch.empty(spec.shape, dtype=spec.dtype, device=spec.device) for spec in specs]


def fake_inputs(mode: FakeTensorMode, inputs: Sequence[Input]) -> list[Tensor]:
    """A fake tensor for each input, with its strides."""
    with torch.inference_mode(False), mode:
        return [torch.empty_strided(entry.spec.shape, entry.strides, dtype=entry.spec.dtype, device=entry.spec.device) for entry in inputs]


def retrace(
    graph: Graph,
    transform: Callable[[Callable[..., Any]], Callable[..., Any]],
    inputs: Sequence[Input] | None = None,
) -> Graph:
    """The graph of `transform(graph.module)`.

    Args:
      graph: what to run.
      transform: from a flat function of tensors to one, for example `torch.func.functionalize`.
      inputs: the inputs of the transformed function where they differ from the graph's.
    """
    inputs = graph.signature.inputs if inputs is None else inputs
    graph.module.recompile()  # a pass may have edited it
    mode = FakeTensorMode()
    fakes = fake_inputs(mode, inputs)
    with torch.inference_mode(False), torch.no_grad(), autocast_off(), _use_lazy_graph_module(True), mode:
        module = make_fx(transform(graph.module), tracing_mode="real")(*fakes)
    return renewed(graph, module, inputs)


def renewed(graph: Graph, module: fx.GraphModule, inputs: Sequence[Input]) -> Graph:
    """The graph with other operations and inputs; its outputs are what these compute."""
    values: Any = module.graph.output_node().args[0]
    outputs = [
        dataclasses.replace(entry, spec=Spec.of(node.meta["val"])) for entry, node in zip(graph.signature.outputs, values, strict=True)
    ]
    return dataclasses.replace(graph, module=module, signature=Signature(tuple(inputs), tuple(outputs)))
