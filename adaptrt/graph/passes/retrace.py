"""Runs a graph again on fake tensors, through a transformation, and records the resulting operations."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptrt.graph.ir import Graph, autocast_off
from adaptrt.graph.passes.recorder import record
from adaptrt.graph.signature import Input, Signature
from adaptrt.tree import Spec


def fake_tensors(mode: FakeTensorMode, specs: Sequence[Spec]) -> list[Tensor]:
    """Makes a contiguous fake tensor for each spec. Each is an object of its own, because one object would be one input."""
    # An inference tensor could not require grad.
    with torch.inference_mode(False), mode:
        return [torch.empty(spec.shape, dtype=spec.dtype, device=spec.device) for spec in specs]


def fake_inputs(mode: FakeTensorMode, inputs: Sequence[Input]) -> list[Tensor]:
    """Makes a fake tensor for each input, with the strides of that input."""
    with torch.inference_mode(False), mode:
        return [torch.empty_strided(entry.spec.shape, entry.strides, dtype=entry.spec.dtype, device=entry.spec.device) for entry in inputs]


def retrace(
    graph: Graph,
    transform: Callable[[Callable[..., Any]], Callable[..., Any]],
    inputs: Sequence[Input] | None = None,
) -> Graph:
    """Returns the graph of `transform(graph.function())`.

    Args:
      graph: the graph to run.
      transform: takes and returns a flat function of tensors, for example `torch.func.functionalize`.
      inputs: the inputs of the transformed function, if they differ from those of the graph.
    """
    inputs = graph.signature.inputs if inputs is None else inputs
    graph.module.recompile()  # a pass may have edited it
    mode = FakeTensorMode()
    fakes = fake_inputs(mode, inputs)
    with torch.inference_mode(False), torch.no_grad(), autocast_off(), mode:
        module, constants = record(transform(graph.function()), fakes)
    assert not constants, "constants are inputs of a graph"
    return renewed(graph, module, inputs)


def renewed(graph: Graph, module: fx.GraphModule, inputs: Sequence[Input]) -> Graph:
    """Returns the graph with the operations of `module` and these inputs. The outputs are what the operations compute."""
    values: Any = module.graph.output_node().args[0]
    outputs = [
        dataclasses.replace(entry, spec=Spec.of(node.meta["val"])) for entry, node in zip(graph.signature.outputs, values, strict=True)
    ]
    return dataclasses.replace(graph, module=module, signature=Signature(tuple(inputs), tuple(outputs)))
