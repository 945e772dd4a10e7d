"""`trace`: captures a module's forward pass as a graph that can be printed, inspected and run."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from adaptrt.backend.base import COMPILING
from adaptrt.functional import call_module
from adaptrt.graph.capture import capture
from adaptrt.graph.ir import Graph
from adaptrt.graph.noise import Noise
from adaptrt.graph.passes.lift_noise import lift_noise, record_noise
from adaptrt.graph.signature import Role
from adaptrt.inner.check import model_device
from adaptrt.inner.constants import constant_reader
from adaptrt.inner.diagnose import running
from adaptrt.inner.step import Batch
from adaptrt.tree import Tree


def trace(model: nn.Module, *inputs: Tree) -> Graph:
    """Captures the forward pass of `model` in its current mode, with parameters, buffers and randomness as inputs.

    The graph's arguments are `(params, buffers, noise, inputs)`: two dicts by name, a tuple of tensors for the random operations in order,
    and the tuple of inputs. It returns `(output, buffers)`, the buffers as the pass leaves them. For a gradient, capture the function that
    takes it (`adaptrt.compile_unroll` does): a graph is not differentiated.

    Args:
      model: any module; it is not changed.
      inputs: example inputs, positional; shapes and dtypes matter, values do not.
    Raises:
      DataDependentControlFlow: the model's Python code depends on a tensor's value; names the line.
      InvalidBatch: the model raises on these inputs.
      UnsupportedRandomness: a random operation that cannot be lifted.

    Example:
      >>> import torch
      >>> model = nn.Linear(3, 2)
      >>> graph = trace(model, torch.zeros(4, 3))
      >>> print(graph)
      graph of 2 operations, 3 inputs, 1 outputs
        param     params.weight: f32[2, 3]
        param     params.bias: f32[2]
        data      inputs.0: f32[4, 3]
        %0: f32[3, 2] = t(params.weight)
        %1: f32[4, 2] = addmm(params.bias, inputs.0, %0)
        return result.0=%1
      >>> x = torch.randn(4, 3)
      >>> output, buffers = graph.run(dict(model.named_parameters()), {}, (), (x,))
      >>> torch.equal(output, model(x))
      True
    """
    model_device(model)
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    noise: list[Noise] = []

    def probe(params: dict[str, Tensor], buffers: dict[str, Tensor], inputs: tuple[Any, ...]) -> Any:
        with record_noise() as drawn, running("input", Batch(inputs, None)):
            output, _ = call_module(model, params, buffers, inputs, {})
        noise[:] = drawn  # a capture may run it twice
        return output

    def forward(params: dict[str, Tensor], buffers: dict[str, Tensor], noise: tuple[Tensor, ...], inputs: tuple[Any, ...]) -> Any:
        with lift_noise(noise):
            return call_module(model, params, buffers, inputs, {})

    roles = (Role.PARAM, Role.BUFFER, Role.NOISE, Role.DATA)
    with COMPILING:
        capture(probe, params, buffers, inputs)
        specs = tuple(entry.spec for entry in noise)
        graph = capture(forward, params, buffers, specs, inputs, roles=roles, names=("params", "buffers", "noise", "inputs"))
    for value in graph.constants:
        constant_reader(value, [model])
    return graph
