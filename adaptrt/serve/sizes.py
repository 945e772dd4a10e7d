"""Sizes of requests: which warmed size a request gets, and how requests become one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptrt.errors import DeviceMismatch, InvalidArgument, InvalidBatch, InvalidType, NonFiniteInput, ShapeChanged
from adaptrt.serve import trees

_MAX_KNOWN = 256


class SizesTaken(NamedTuple):
    """Numbers of examples that an engine takes.

    Attributes:
      sizes: that programs are compiled for, in ascending order.
      pads: whether smaller numbers are taken, too, and filled up to one of these.
    """

    sizes: tuple[int, ...]
    pads: bool


class Sizes:
    """The sizes that data of one kind is warmed for.

    Args:
      name: what messages call the data.
      example: data of one task; all requests have its structure, dtypes, device and shapes but for the number of examples.
      sizes: numbers of examples; empty for that of the example.
      pads: whether a request of fewer examples gets the next larger size.
      weighted: whether padded data ends with weights of its examples, which the engine makes.
    Raises:
      InvalidType, InvalidArgument: the example has no tensors, or they disagree on the number of examples; a size is no positive int.
    """

    def __init__(self, name: str, example: Any, sizes: Sequence[int], pads: bool, weighted: bool) -> None:
        self.name = name
        self.pads = pads
        self._weighted = weighted
        self._example = example
        self._form = trees.form(example)
        found = trees.leaves(example)
        if not found or any([leaf.dim() == 0 for leaf in found]):
            raise InvalidType(f"the example of {name} data must hold tensors with an axis of examples in front, got {_words(example)}")
        self._specs = [_spec(leaf) for leaf in found]
        self._known: dict[Any, tuple[int, int]] = {}
        self._is_float = [leaf.is_floating_point() for leaf in found]
        num_examples = _length(name, found)
        self.sizes = positive_ints(f"{name}_sizes", sizes) if len(sizes) else (num_examples,)

    @property
    def taken(self) -> SizesTaken:
        """Which numbers of examples are taken."""
        return SizesTaken(self.sizes, self.pads)

    def fit(self, data: Any) -> tuple[int, int]:
        """Returns the number of examples that a request has, and the size that it gets.

        Raises:
          InvalidType, InvalidBatch, DeviceMismatch: the data is not like the example.
          ShapeChanged: no program is warmed for so many examples.
        """
        key = _key(data)
        if key is not None and (known := self._known.get(key)) is not None:
            return known
        fitted = self._fit(data)
        if key is not None and len(self._known) < _MAX_KNOWN:
            self._known[key] = fitted
        return fitted

    def _fit(self, data: Any) -> tuple[int, int]:
        found = trees.leaves(data)
        if [_spec(leaf) for leaf in found] != self._specs or trees.form(data) != self._form:
            self._refuse(data, found)
        length = len(found[0])
        for leaf in found:
            if len(leaf) != length:
                _length(self.name, found)
        if length in self.sizes:
            return length, length
        larger = [size for size in self.sizes if size > length]
        if not larger or not self.pads or length == 0:
            self._refuse_size(length, bool(larger))
        return length, larger[0]

    def alone(self, request: Any, size: int) -> Any:
        """Returns a request as data [S, ...] of this size, with weights where the engine makes them."""
        length = len(trees.leaves(request)[0]) if self._weighted or self.pads else size
        data = request if length == size else trees.map_leaves(lambda leaf: _padded(leaf, size), request)
        return (*data, (torch.arange(size) < length).to(self._specs[0][3])) if self._weighted else data

    def together(self, requests: Sequence[Any], size: int, lanes: int) -> Any:
        """Returns requests as one batch, data [T, S, ...] with T = lanes; lanes that are left are copies of the last.

        Args:
          requests: at most `lanes`, each of at most `size` examples.
        """
        rows = [*requests, *[requests[-1]] * (lanes - len(requests))]

        def stack(*values: Tensor) -> Tensor:
            return torch.stack([value if len(value) == size else _padded(value, size) for value in values])

        batch = trees.map_leaves(stack, *rows)
        if not self._weighted:
            return batch
        lengths = torch.tensor([len(trees.leaves(row)[0]) for row in rows])
        return (*batch, (torch.arange(size) < lengths[:, None]).to(self._specs[0][3]))

    def warm(self, size: int, lanes: int) -> Any:
        """Returns data of this size that repeats the example, [T, S, ...] with T = lanes."""

        def repeat(leaf: Tensor) -> Tensor:
            return leaf.repeat(-(-size // len(leaf)), *[1] * (leaf.dim() - 1))[:size]

        return self.together([trees.map_leaves(repeat, self._example)], size, lanes)

    def require_finite(self, data: Any) -> None:
        """Raises NonFiniteInput if a request holds NaN or infinity."""
        for index, (leaf, is_float) in enumerate(zip(trees.leaves(data), self._is_float, strict=True)):
            if is_float and not bool(torch.isfinite(leaf).all()):
                raise NonFiniteInput(f"{self.name} tensor {index} holds NaN or infinity; leave these examples out")

    def _refuse(self, data: Any, found: Sequence[Tensor]) -> None:
        if len(found) != len(self._specs) or trees.form(data) != self._form:
            raise InvalidType(f"{self.name} data must be like the example, {_words(self._example)}, got {_words(data)}")
        for index, (leaf, (_, shape, dtype, device)) in enumerate(zip(found, self._specs, strict=True)):
            if leaf.device != device:
                raise DeviceMismatch(f"{self.name} tensor {index} is on {leaf.device}, the example on {device}; call .to('{device}') on it")
            if leaf.dtype != dtype:
                raise InvalidType(f"{self.name} tensor {index} is {leaf.dtype}, the example {dtype}; call .to({dtype}) on it first")
            if leaf.dim() != len(shape) + 1 or leaf.shape[1:] != shape:
                wanted = ", ".join(["examples", *map(str, shape)])
                raise InvalidBatch(f"{self.name} tensor {index} must have the shape [{wanted}], got {list(leaf.shape)}")

    def _refuse_size(self, length: int, would_fit: bool) -> None:
        warmed = ", ".join(map(str, self.sizes))
        advice = f"add it to {self.name}_sizes"
        if would_fit and not self.pads:
            advice += (
                ", or compile with examples='weighted', which pads"
                if self.name == "support"
                else "; padding is not possible, as the model's outputs for one example may depend on others, or weights were not asked for"
            )
        raise ShapeChanged(f"{self.name} data has {length} examples, and programs are warmed for {warmed}; {advice}")


def positive_ints(name: str, values: Any) -> tuple[int, ...]:
    """Returns positive ints in ascending order, each once.

    Raises:
      InvalidType, InvalidArgument: there is none, or something else among them.
    """
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InvalidType(f"{name} must be a tuple of ints, got {type(values).__name__}")
    if not values:
        raise InvalidArgument(f"{name} is empty; pass at least one number")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidType(f"{name} must hold ints, got {value!r}")
        if value < 1:
            raise InvalidArgument(f"{name} must hold numbers of at least 1, got {value}")
    return tuple(sorted(set(values)))


def _key(data: Any) -> Any:
    """Returns what decides how usual data fits: the shapes, dtypes and devices of a tensor or a tuple of tensors; None for other data."""
    if type(data) is Tensor:
        return data.shape, data.dtype, data.device
    if type(data) is tuple and all([type(part) is Tensor for part in data]):
        return tuple([(part.shape, part.dtype, part.device) for part in data])
    return None


def _spec(leaf: Tensor) -> tuple[int, torch.Size, torch.dtype, torch.device]:
    return leaf.dim(), leaf.shape[1:], leaf.dtype, leaf.device


def _length(name: str, found: Sequence[Tensor]) -> int:
    lengths = [len(leaf) for leaf in found]
    if len(set(lengths)) > 1:
        raise InvalidBatch(f"{name} tensors must have as many examples each, got {', '.join(map(str, lengths))}")
    return lengths[0]


def _padded(value: Tensor, size: int) -> Tensor:
    """Returns the value with copies of its last example behind it: data on which model and loss are finite if they are on the rest."""
    return torch.cat([value, value[-1:].expand(size - len(value), *value.shape[1:])])


def _words(data: Any) -> str:
    if isinstance(data, Tensor):
        return f"{str(data.dtype).removeprefix('torch.')}{list(data.shape)}"
    if isinstance(data, tuple | list):
        return f"({', '.join(map(_words, data))})"
    if isinstance(data, dict):
        return f"{{{', '.join(f'{key!r}: {_words(part)}' for key, part in data.items())}}}"
    return type(data).__name__
