"""Defines `Graph`, a pure function of tensors as functional ATen operations.

A graph only computes values. A gradient is captured as a graph of its own, traced together with the function that it differentiates, so
`run` records nothing for autograd.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from adaptrt import tree
from adaptrt.graph.show import show
from adaptrt.graph.signature import Signature
from adaptrt.process import lock
from adaptrt.tree import Structure, Tree

_GENERATING = lock()
"""Held while the code of a graph is generated: two threads that do so at once get each other's names."""


def autocast_off() -> contextlib.AbstractContextManager[object]:
    """Returns a context without autocast, so that a graph is captured and run in the dtypes that it names."""
    enabled = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    stack = contextlib.ExitStack()
    for device in enabled:
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack if enabled else _NOTHING


_NOTHING = contextlib.nullcontext()

Constant = Callable[[], Tensor]
"""Returns the current value of a graph's constant."""


@dataclasses.dataclass(frozen=True, slots=True)
class PassRecord:
    """The number of nodes before and after a pass."""

    name: str
    num_nodes_before: int
    num_nodes_after: int


@dataclasses.dataclass(frozen=True, slots=True)
class Graph:
    """A pure function of tensors as functional ATen operations.

    Attributes:
      module: the operations. It takes and returns flat tuples of tensors.
      signature: name, role, shape and dtype of every input and output.
      constants: values of the last `len(constants)` inputs (role CONST). They are the tensors that the function closed over, held by
        reference.
      arguments: structure of the tuple of arguments that the captured function took, without constants.
      result: structure of the value that the captured function returned.
      history: what each pass did.
    """

    module: fx.GraphModule
    signature: Signature
    constants: tuple[Tensor, ...]
    arguments: Structure
    result: Structure
    history: tuple[PassRecord, ...] = ()

    @property
    def num_nodes(self) -> int:
        """The number of operations in the graph, without its inputs and its output."""
        return sum(node.op not in ("placeholder", "output") for node in self.module.graph.nodes)

    def run(self, *args: Tree) -> Tree:
        """Evaluates the graph operation by operation on the arguments that the captured function took.

        Records nothing for autograd, whatever the arguments.

        Raises:
          ValueError: the arguments do not have the structure that was captured.
        """
        values, structure = tree.flatten(args)
        if structure != self.arguments:
            raise ValueError(
                f"run() takes arguments of the structure that was captured ({self.arguments.num_leaves} tensors), got another one"
            )
        with torch.no_grad(), autocast_off():
            return tree.unflatten(self.result, self.function()(*values, *self.constants))

    def function(self) -> Callable[..., Any]:
        """Returns the operations as a function of the tensors of all inputs, in order, to those of all outputs.

        A call of the module itself would run the hooks that are registered for all modules.
        """
        with _GENERATING:
            _ = self.module.code  # which generates it where it is missing
        forward = self.module.forward
        return lambda *inputs: forward(*inputs)  # `functionalize` would take a bound method for a function of one argument more

    def __str__(self) -> str:
        return show(self.module, self.signature)
