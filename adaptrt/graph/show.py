"""Prints a graph as readable text, with one line for each input and one for each operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx

from adaptrt.graph.signature import Signature

_SHORT = {
    "float16": "f16",
    "bfloat16": "bf16",
    "float32": "f32",
    "float64": "f64",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
    "bool": "bool",
}


def show(module: fx.GraphModule, signature: Signature) -> str:
    """Returns the graph as text.

    Inputs come first, with their roles. Operations are numbered, as in `%7: f32[6, 4] = addmm(params.bias, ...)`. The last line names the
    outputs.
    """
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    inputs = iter(signature.inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            entry = next(inputs)
            names[node] = entry.name
            lines.append(f"  {entry.role.value:<9} {entry.name}: {_type(node)}")
        elif node.op == "output":
            results = [_argument(value, names) for value in node.args[0]]
            pairs = [f"{entry.name}={value}" for entry, value in zip(signature.outputs, results, strict=True)]
            lines.append("  return " + ", ".join(pairs))
        else:
            names[node] = f"%{len(names) - len(signature.inputs)}"
            arguments = [_argument(value, names) for value in node.args]
            arguments += [f"{key}={_argument(value, names)}" for key, value in node.kwargs.items()]
            lines.append(f"  {names[node]}: {_type(node)} = {_operation(node)}({', '.join(arguments)})")
    num_nodes = sum(node.op == "call_function" for node in module.graph.nodes)
    header = f"graph of {num_nodes} operations, {len(signature.inputs)} inputs, {len(signature.outputs)} outputs"
    return "\n".join([header, *lines])


def _operation(node: fx.Node) -> str:
    text = str(node.target)
    return text.removeprefix("aten.").removesuffix(".default") if text.startswith("aten.") else getattr(node.target, "__name__", text)


def _type(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"{_SHORT.get(name, name)}[{', '.join(map(str, value.shape))}]"
    return "tuple" if isinstance(value, tuple | list) else "?"


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(part, names) for part in cast(Sequence[Any], value))}]"
    return str(value).removeprefix("torch.")
