"""A program of a manifest: which data it takes, how its inputs are checked and put together, and what its outputs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.errors import InvalidArgument, InvalidExport
from adaptrt.export import manifest as manifests
from adaptrt.export import trees
from adaptrt.export.manifest import ProgramEntry
from adaptrt.graph.indices import IndexBound
from adaptrt.graph.noise import Noise, draw
from adaptrt.inner import check
from adaptrt.inner.step import Batch, Fixed
from adaptrt.runtime.state import State
from adaptrt.tree import Spec, Tree

_CPU = torch.device("cpu")


class Program:
    """A program of the manifest, and what its inputs must be."""

    def __init__(self, entry: ProgramEntry) -> None:
        self.entry = entry
        self.constants: list[Tensor] = []
        self._data = [trees.from_json(part) for part in entry.data]
        self._result = trees.from_json(entry.result)
        self._specs = [each.spec for each in entry.inputs if each.role == "data"]
        self._bounds = [_bound(each) for each in entry.bounds]
        self._noise = [_noise(each) for each in entry.noise]
        self._taken = [(each.spec.shape, each.spec.dtype, each.strides) for each in entry.inputs]
        drawn = [each.spec for each in entry.inputs if each.role == "noise"]
        has_tasks = bool(drawn) and len(drawn[0].shape) > len(self._noise[0].spec.shape)
        self._num_tasks = drawn[0].shape[0] if has_tasks else None
        self._num_noise_of_steps = _num_noise_before(entry, self._data[0].num_leaves)

    def require(self, base: State, fixed: Fixed, constants: Mapping[str, Tensor], folder: Path) -> None:
        """Looks up the program's constants, and checks that its inputs and outputs are what is given to it and taken from it.

        Raises:
          InvalidExport: they are not.
        """
        weights = [each.weight for each in self.entry.inputs if each.weight is not None]
        self.constants = [constants[name] for name in weights if name in constants]
        carry = base.carry
        held = len(base.leaves) if self.entry.kind != "predict" else len(carry.params) + len(carry.buffers)
        shared = len(tree.leaves(fixed)) if self.entry.kind != "predict" else len(fixed.params)
        num_data = sum(part.num_leaves for part in self._data)
        wanted = held + shared + num_data + len(self._noise) + len(self.constants)
        results = len(base.leaves) + 1 if self.entry.kind == "adapt" else self._result.num_leaves
        if wanted != len(self.entry.inputs) or num_data != len(self._specs) or results != len(self.entry.outputs):
            raise InvalidExport(f"{folder}: the inputs and outputs of program '{self.entry.name}' are not those of its kind; export again")

    def takes(self, data: Sequence[Tree]) -> bool:
        """Whether it is for data of these shapes."""
        found = [tree.flatten(part) for part in data]
        if len(found) != len(self._data) or not all(trees.alike(own, each[1]) for own, each in zip(self._data, found, strict=True)):
            return False
        return [Spec.of(value) for leaves, _ in found for value in leaves] == self._specs

    def in_words(self) -> str:
        """The data that it is for."""
        return ", ".join(map(str, self._specs))

    def check(self, parts: Sequence[tuple[str, Batch]], finite: bool) -> None:
        """Checks the values of data: labels and indices that do not exist, weights that sum to 0, NaN and infinity."""
        first = 0
        for name, batch in parts:
            num_leaves = len(tree.leaves(batch))
            own = [bound for bound in self._bounds if first <= bound.position < first + num_leaves]
            check.weights(name, batch)
            check.indices(name, batch, [bound._replace(position=bound.position - first) for bound in own])
            if finite:
                check.finite(name, batch)
            first += num_leaves

    def draw(self, generator: torch.Generator | None) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Draws the noise of the steps, and that of the prediction."""
        drawn = draw(self._noise, generator, self._num_tasks)
        return drawn[: self._num_noise_of_steps], drawn[self._num_noise_of_steps :]

    def as_taken(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Returns the tensors of all inputs in the memory layout in which the program takes them.

        Raises:
          InvalidArgument: one has another shape or dtype, which the program itself would not notice.
        """
        found: list[Tensor] = []
        for value, (shape, dtype, strides), entry in zip(values, self._taken, self.entry.inputs, strict=True):
            if value.shape != shape or value.dtype != dtype or value.device.type != "cpu":
                raise InvalidArgument(f"'{entry.name}' must be {entry.spec} on the CPU, got {Spec.of(value)} on {value.device}")
            if value.stride() != strides:
                value = torch.empty_strided(shape, strides, dtype=dtype).copy_(value)
            found.append(value)
        return found

    def result(self, values: Sequence[Tensor]) -> Any:
        """Returns the tree of the program's outputs."""
        return tree.unflatten(self._result, values)


def _num_noise_before(entry: ProgramEntry, num_data: int) -> int:
    """Returns how many inputs of noise come before the data behind the first `num_data`."""
    count = 0
    for each in entry.inputs:
        if each.role == "data":
            if num_data == 0:
                break
            num_data -= 1
        count += each.role == "noise"
    return count


def _noise(found: Mapping[str, Any]) -> Noise:
    try:
        spec = found["spec"]
        dtype = manifests.DTYPES[spec["dtype"]]
        constants, order = tuple(map(float, found["constants"])), tuple(map(int, found["order"]))
        return Noise(str(found["kind"]), constants, Spec(tuple(map(int, spec["shape"])), dtype, _CPU), order)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidExport(f"the manifest describes noise by {str(found)[:80]}, which is none") from error


def _bound(found: Mapping[str, Any]) -> IndexBound:
    try:
        part = found["part"]
        return IndexBound(**{**found, "part": None if part is None else torch.tensor(part, dtype=torch.bool)})
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidExport(f"the manifest describes indices by {str(found)[:80]}, which are none") from error
