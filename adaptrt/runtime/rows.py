"""One task of a batch of adaptations: its values are taken out of the batch when they are first asked for.

Views of all tensors of all tasks take longer than the steps of a small model, and often few of them are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.runtime.state import State

V = TypeVar("V")


class Value(Generic[V]):
    """An attribute that an instance holds, or that it takes out of the `Rows` it is one of when it is first asked for."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, one: Any, owner: type | None = None) -> V:
        if one is None:
            raise AttributeError(f"'{self._name}' is an attribute of adaptations, not of their class")
        held = one.__dict__
        try:
            rows, place = held[Rows.KEY]
        except KeyError:
            raise AttributeError(self._name) from None
        found = held[self._name] = rows.values(self._name)[place]
        return found


class Rows:
    """The values of each task of a batch, which are taken apart when the first is asked for.

    Args:
      batch: the adaptation of several tasks.
      num_tasks: how many.
    """

    KEY = "_row_of"
    """Where an instance holds its rows and its place among them."""
    _SHARED = ("_predictor", "fixed", "_num_links")
    """Attributes that are the same for every task."""

    def __init__(self, batch: Any, num_tasks: int) -> None:
        self.batch = batch
        self._num_tasks = num_tasks
        self._found: dict[str, Sequence[Any]] = {}

    @staticmethod
    def of(one: Any) -> tuple[Rows | None, int]:
        """Returns the rows that this is one of, and which one; None if it was not taken out of a batch."""
        return vars(one).get(Rows.KEY, (None, 0))

    def taken_out(self, kind: type[V]) -> list[V]:
        """Returns an instance of this class for each task."""
        made = [kind.__new__(kind) for _ in range(self._num_tasks)]
        for place, one in enumerate(made):
            one.__dict__[Rows.KEY] = self, place
        return made

    def values(self, name: str) -> Sequence[Any]:
        """Returns an attribute for every task."""
        found = self._found.get(name)
        if found is None:
            found = self._found[name] = self._taken_apart(name, getattr(self.batch, name))
        return found

    def _taken_apart(self, name: str, value: Any) -> Sequence[Any]:
        if name in Rows._SHARED:
            return [value] * self._num_tasks
        if isinstance(value, Tensor) and value.is_inference():  # in every mode the same
            return value.unbind(0)
        with torch.inference_mode(False), torch.enable_grad():  # as they were made, in whatever mode the first is asked for
            if isinstance(value, State):
                return [State(row, value.form) for row in zip(*[leaf.unbind(0) for leaf in value.leaves], strict=True)]
            leaves, structure = tree.flatten(value)
            rows = zip(*[leaf.unbind(0) for leaf in leaves], strict=True) if leaves else [()] * self._num_tasks
            return [tree.unflatten(structure, row) for row in rows]
