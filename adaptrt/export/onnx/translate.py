"""Translates the operations of a graph one by one, and puts an ONNX model together."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import onnx
import torch
from onnx import helper
from torch import Tensor, fx
from torch.fx.node import map_aggregate, map_arg

from adaptrt.errors import NotExportable
from adaptrt.export.onnx import elementwise, indexing, pools, products, reductions, shapes
from adaptrt.export.onnx.writer import DTYPES, Name, Refused, Rules, Value, Writer
from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.lower_to_forward import lower_to_forward
from adaptrt.tree import Spec

OPSET = 18
IR_VERSION = 8
"""The one that came with the opset."""

RULES: Rules = {
    **elementwise.RULES,
    **shapes.RULES,
    **products.RULES,
    **pools.RULES,
    **reductions.RULES,
    **indexing.RULES,
}
"""How each operation is translated."""


_OPTIONAL = ("MaxPool", "LayerNormalization")
"""Kinds of nodes whose last outputs may be left out."""


def to_onnx(graph: Graph, name: str) -> onnx.ModelProto:
    """Returns the graph as an ONNX model.

    Inputs and outputs have the names, shapes and dtypes of `graph.signature`, in its order, constants included, and are contiguous.

    Args:
      graph: any graph, as it was captured.
      name: of the graph in the model.
    Raises:
      NotExportable: operations or dtypes of the graph have no counterpart; the message names all of them.
    """
    translated = _translate(lower_to_forward(graph))
    if translated.refused:
        raise NotExportable(
            f"{name} cannot become an ONNX model, because of {', '.join(translated.refused)}. "
            "Write what the model or the loss does there in terms of other operations, or export to another format"
        )
    signature, writer = graph.signature, translated.writer
    nodes = _named(_needed(writer.nodes, translated.outputs), translated.outputs, [entry.name for entry in signature.outputs])
    used = {entry for node in nodes for entry in node.input}
    body = helper.make_graph(
        nodes,
        name,
        [_described(entry.name, entry.spec) for entry in signature.inputs],
        [_described(entry.name, entry.spec) for entry in signature.outputs],
        [entry for entry in writer.initialisers if entry.name in used],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="adaptrt")


def unsupported(graph: Graph) -> list[str]:
    """Returns what keeps the graph from becoming an ONNX model: names of operations and dtypes, each once. Empty if nothing does."""
    return _translate(lower_to_forward(graph)).refused


class _Translated(NamedTuple):
    writer: Writer
    outputs: list[Name]
    refused: list[str]


def _translate(graph: Graph) -> _Translated:
    """Translates a graph of forward operations. What is refused is noted, and the rest is translated all the same."""
    writer, values, refused = Writer(), dict[fx.Node, Any](), dict[str, None]()
    inputs = iter(graph.signature.inputs)
    outputs: list[Name] = []
    for node in graph.module.graph.nodes:
        like: Any = node.meta.get("val")
        if node.op == "placeholder":
            entry = next(inputs)
            if entry.spec.dtype not in DTYPES:
                refused[f"an input of dtype {_short(entry.spec.dtype)}"] = None
            values[node] = Value(entry.name, entry.spec.dtype, entry.spec.shape)
            continue
        args, kwargs = cast(Any, map_arg((node.args, node.kwargs), values.__getitem__))
        if node.op == "output":
            outputs = [writer.get(value) for value in args[0]]
        elif node.target is operator.getitem:
            values[node] = args[0][args[1]]
        else:
            writer.label = node.name
            try:
                values[node] = _value(writer, node.target, like, args, kwargs)
            except Refused as error:
                refused[f"{node.target}{error}"] = None
                values[node] = _wrapped(like, [""] * (len(like) if isinstance(like, list | tuple) else 1))
    return _Translated(writer, outputs if not refused else [], list(refused))


def _value(writer: Writer, target: Any, like: Any, args: Any, kwargs: Any) -> Any:
    """Translates one operation, or computes it now if its arguments are the same in every call."""
    _require_dtypes(like)
    given: list[Value] = []
    map_aggregate((args, kwargs), lambda part: given.append(part) if isinstance(part, Value) else None)  # type: ignore[func-returns-value]
    if all(value.known is not None for value in given):
        return _computed(target, args, kwargs)
    if target not in RULES:
        raise Refused("")
    found = RULES[target](writer, like, *args, **kwargs)
    return _wrapped(like, [found] if isinstance(found, str) else found)


def _computed(target: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = cast(Any, map_aggregate((args, kwargs), lambda part: part.known if isinstance(part, Value) else part))
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    with torch.no_grad():
        found = target(*args, **kwargs)
    parts = found if isinstance(found, list | tuple) else [found]
    values = [Value("", part.dtype, tuple(part.shape), known=part.cpu()) for part in parts]
    return values if isinstance(found, list | tuple) else values[0]


def _wrapped(like: Any, names: Sequence[Name]) -> Any:
    """Returns a value for each name. An operation may have fewer names than results, if nothing uses the last ones."""
    several = isinstance(like, list | tuple)
    parts = cast("Sequence[Tensor]", like) if several else [like]
    values = [None if part is None else Value(name, part.dtype, tuple(part.shape)) for name, part in zip(names, parts, strict=False)]
    return values if several else values[0]


def _require_dtypes(like: Any) -> None:
    for part in cast("Sequence[Any]", like) if isinstance(like, list | tuple) else [like]:
        if isinstance(part, Tensor) and part.dtype not in DTYPES:
            raise Refused(f" of dtype {_short(part.dtype)}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Sequence[Name]) -> list[onnx.NodeProto]:
    """Returns the nodes that the outputs depend on, without last outputs that nothing needs.

    A pool that need not say where it found its maxima is twenty times as fast.
    """
    needed, found = set(outputs), list[onnx.NodeProto]()
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            while node.output[-1] not in needed and node.op_type in _OPTIONAL:
                del node.output[-1]
            needed.update(node.input)
            found.append(node)
    return found[::-1]


def _named(nodes: Sequence[onnx.NodeProto], outputs: Sequence[Name], wanted: Sequence[Name]) -> list[onnx.NodeProto]:
    """Returns the nodes with outputs of the wanted names. What is no node's output, or has two names, is copied by an Identity."""
    computed = {name for node in nodes for name in node.output}
    renamed: dict[Name, Name] = {}
    copies: list[onnx.NodeProto] = []
    for name, new in zip(outputs, wanted, strict=True):
        if name in computed and name not in renamed:
            renamed[name] = new
        else:
            copies.append(helper.make_node("Identity", [name], [new], name=f"{new}/Identity"))
    for node in (*nodes, *copies):
        if not renamed.keys().isdisjoint(node.input):
            node.input[:] = [renamed.get(name, name) for name in node.input]
        if not renamed.keys().isdisjoint(node.output):
            node.output[:] = [renamed.get(name, name) for name in node.output]
    return [*nodes, *copies]


def _described(name: Name, spec: Spec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, DTYPES[spec.dtype], list(spec.shape))
