"""Replaces operations by simpler ones, as a table of rules says.

Only operations that have a rule are traced. Their parts are written in their place, and all other operations are copied.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import operator
from typing import Any, cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import extract_val
from torch.fx.node import map_arg

from adaptrt.errors import InvalidGraph
from adaptrt.graph.ir import Graph, autocast_off
from adaptrt.graph.operations import is_composite
from adaptrt.graph.passes.base import has_other_strides, renew_value
from adaptrt.graph.passes.recorder import Recorder, Rules
from adaptrt.graph.passes.retrace import fake_inputs, renewed


def decompose(graph: Graph, rules: Rules) -> Graph:
    """Returns the graph with every operation replaced that has a rule.

    Inputs have the strides that the signature gives them. The strides of values that depend on a replaced operation are computed anew.

    Args:
      graph: any graph.
      rules: for each operation a function of the operation's arguments. The rules also apply to the operations that it calls. If it
        returns NotImplemented, the operation stays as it is.
    Raises:
      InvalidGraph: a rule uses a tensor that is none of its arguments.
    """
    known = [node.meta.get("val") for node in graph.module.graph.nodes]
    # No operation can take values of two fake tensor modes.
    mode = next((value.fake_mode for value in known if isinstance(value, FakeTensor)), FakeTensorMode())
    with contextlib.ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.no_grad(), autocast_off(), mode):
            stack.enter_context(context)
        return renewed(graph, _decomposed(graph, rules, mode), graph.signature.inputs)


def _decomposed(graph: Graph, rules: Rules, mode: FakeTensorMode) -> fx.GraphModule:
    written = fx.Graph()
    copies: dict[fx.Node, Any] = {}  # a node, or a list of nodes for an operation with several results
    inputs = iter(fake_inputs(mode, graph.signature.inputs))
    for node in graph.module.graph.nodes:
        args, kwargs = cast(Any, map_arg((node.args, node.kwargs), copies.__getitem__))
        if node.op == "output":
            written.output(*args)
        elif node.op == "placeholder":
            copies[node] = written.node_copy(node)
            copies[node].meta["val"] = next(inputs)
        elif node.target is operator.getitem and not isinstance(args[0], fx.Node):
            copies[node] = args[0][args[1]]
        elif node.target in rules or is_composite(node.target):
            copies[node] = _written_out(node.target, args, kwargs, written, rules)
        else:
            copies[node] = written.node_copy(node, copies.__getitem__)
            if any(has_other_strides(copies[argument], argument) for argument in node.all_input_nodes):
                renew_value(copies[node])
    written.eliminate_dead_code()
    return _LazyGraphModule(graph.module, written)


def _written_out(target: Any, args: Any, kwargs: Any, graph: fx.Graph, rules: Rules) -> Any:
    """Writes the parts of the operation to `graph`, and returns its result as one node or several."""
    recorder = Recorder(graph, rules)
    values: dict[fx.Node, Any] = {}  # one tensor for each node, because rules may ask whether two arguments are the same tensor

    def value_of(node: fx.Node) -> Any:
        if node not in values:
            values[node] = extract_val(node.meta["val"])
            recorder.know(node, values[node])
        return values[node]

    args, kwargs = cast(Any, map_arg((args, kwargs), value_of))
    with recorder:
        result = target(*args, **kwargs)
    found = recorder.nodes_of(result)
    if recorder.constants:
        raise InvalidGraph(f"the rule of {target} uses a tensor that is no argument of the operation")
    return found
