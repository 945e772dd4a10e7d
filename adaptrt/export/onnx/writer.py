"""Writes the nodes and initialisers of one ONNX graph.

A rule of translation gets a `Writer`, the value that the operation gave when it was captured (for shape and dtype), and the operation's
arguments, with a `Value` in place of each tensor. It returns the name of its result, or several.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

DTYPES: Mapping[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
"""The dtypes that can be exported."""

WIDER: Mapping[torch.dtype, torch.dtype] = {dtype: torch.int32 for dtype in (torch.int16, torch.int8, torch.uint8)}
"""In what to compute with dtypes for which ONNX Runtime has hardly any kernels. Casting the result back wraps it around, as in PyTorch."""


class Refused(Exception):
    """A rule does not know the operation with these arguments. The text says which, after the operation's name."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A tensor in the ONNX graph.

    Attributes:
      name: of the input, or of the node's output; "" for a known value, which gets a name when it is first used.
      dtype, shape: of the tensor.
      known: its elements, if they are the same in every call.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    known: Tensor | None = None

    @property
    def dim(self) -> int:
        return len(self.shape)

    def axis(self, axis: int) -> int:
        """Returns the axis as a number that is not negative."""
        return axis % max(self.dim, 1)


Operand = Value | bool | int | float
Name = str
Rule = Callable[..., Name | Sequence[Name]]
OneName = Callable[..., Name]
"""A rule of an operation with one result."""
Rules = Mapping[Any, Rule]


_MANY = 64
"""Larger tensors whose elements are all equal are stored as one of them."""


class Pool(NamedTuple):
    """A pool's maxima, and their places, counted through the whole tensor."""

    maxima: Name
    places: Name


class Writer:
    """Collects the nodes and initialisers of one graph.

    Attributes:
      nodes: in the order of computation.
      initialisers: tensors that are the same in every call, equal ones once.
      label: what the names of new nodes start with.
      exchanged: for the names of some values, the value of which they are the transpose, its last two axes exchanged.
      products: for the names of some values, the two of which they are the product.
      pools: for the names of places of maxima, the pool that found them.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: list[onnx.TensorProto] = []
        self.label = ""
        self.exchanged: dict[Name, Value] = {}
        self.products: dict[Name, tuple[Operand, Operand]] = {}
        self.pools: dict[Name, Pool] = {}
        self._names: dict[Any, Name] = {}  # of initialisers, casts and tensors of equal elements
        self._reshaped: dict[Name, Value] = {}
        self._count = 0

    def node(self, kind: str, *inputs: Name, outputs: int, **attributes: Any) -> list[Name]:
        """Writes a node with several outputs."""
        self._count += 1
        found = [f"{self.label}/{self._count}.{index}" if outputs > 1 else f"{self.label}/{self._count}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), found, name=f"{self.label}/{kind}.{self._count}", **attributes))
        return found

    def __call__(self, kind: str, *inputs: Name, **attributes: Any) -> Name:
        """Writes a node with one output."""
        return self.node(kind, *inputs, outputs=1, **attributes)[0]

    def constant(self, value: Tensor | np.ndarray[Any, Any]) -> Name:
        """Returns the name of an initialiser, or of an Expand of one if all elements are equal."""
        tensor = torch.as_tensor(value).detach().cpu()
        if tensor.numel() > _MANY and tensor.dtype != torch.bool and bool((tensor == tensor.flatten()[0]).all()):
            return self("Expand", self._initialiser(tensor.flatten()[0].numpy()), self.integers(tensor.shape))
        return self._initialiser(tensor.numpy())

    def _initialiser(self, array: np.ndarray[Any, Any] | np.generic) -> Name:
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._names:
            self._names[key] = f"known/{len(self.initialisers)}"
            self.initialisers.append(numpy_helper.from_array(array, self._names[key]))
        return self._names[key]

    def integers(self, values: Sequence[int] | int) -> Name:
        """Returns the name of a list of int64, such as a shape, or of one of them."""
        return self._initialiser(np.array(values, np.int64))

    def number(self, value: float, dtype: torch.dtype) -> Name:
        """Returns the name of a number as a tensor without axes."""
        return self._initialiser(torch.tensor(value, dtype=dtype).numpy())

    def get(self, operand: Operand, dtype: torch.dtype | None = None) -> Name:
        """Returns the name of an operand, converted to `dtype` if it has another."""
        if not isinstance(operand, Value):
            return self.number(operand, dtype or torch.tensor(operand).dtype)
        wanted = dtype or operand.dtype
        if operand.known is not None:
            return self.constant(operand.known.to(wanted))
        return self.cast(operand.name, wanted) if wanted != operand.dtype else operand.name

    def get_broadcast(self, operand: Operand, dtype: torch.dtype, others: Sequence[Operand], shape: Sequence[int]) -> Name:
        """Like `get`, for an operand that is broadcast with others to `shape`: a tensor of equal elements becomes one of them."""
        if isinstance(operand, Value) and operand.known is not None and operand.known.numel() > 1:
            first = operand.known.flatten()[0]
            rest = [other.shape for other in others if isinstance(other, Value)]
            if bool((operand.known == first).all()) and rest and torch.broadcast_shapes(*rest) == tuple(shape):
                return self.number(first.item(), dtype)
        return self.get(operand, dtype)

    def cast(self, name: Name, dtype: torch.dtype) -> Name:
        """Converts to a dtype, once for each value."""
        key = name, dtype
        if key not in self._names:
            self._names[key] = self("Cast", name, to=DTYPES[dtype])
        return self._names[key]

    def reshape(self, name: Name, shape: Sequence[int]) -> Name:
        options = {"allowzero": 1} if 0 in shape else {}  # else a 0 stands for the size that there was
        return self("Reshape", name, self.integers(list(shape)), **options)

    def reshape_value(self, value: Value, shape: Sequence[int]) -> Name:
        """Reshapes what the value itself was reshaped from, if it was."""
        source = self._reshaped.get(value.name, value)
        if source.shape == tuple(shape):
            return self.get(source)
        name = self.reshape(self.get(source), shape)
        self._reshaped[name] = source
        return name

    def full(self, value: float, dtype: torch.dtype, shape: Sequence[int]) -> Name:
        """Returns the name of a tensor whose elements are all equal, made once."""
        number = self.number(value, dtype)
        key = number, tuple(shape)
        if len(shape) and key not in self._names:
            self._names[key] = self("Expand", number, self.integers(list(shape)))
        return self._names[key] if len(shape) else number


def promoted(*operands: Operand) -> torch.dtype:
    """Returns the dtype in which PyTorch combines the operands."""
    metas = [
        torch.empty(operand.shape, dtype=operand.dtype, device="meta") if isinstance(operand, Value) else operand for operand in operands
    ]
    return torch.result_type(*metas)  # type: ignore[arg-type]
