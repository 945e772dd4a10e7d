"""Remembers what was found for the last call, for the next one that is like it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from adaptrt.backend.guards import alike

Found = TypeVar("Found")


def are_plain(count: int | None, *batches: Any) -> bool:
    """Whether each batch is a tuple of tensors, of so many if a count is given, so that a call with them can be compared with others."""
    return all(
        [
            type(batch) is tuple
            and (count is None or len(batch) == count)
            and all([isinstance(value, Tensor) and not value.is_nested for value in batch])
            for batch in batches
        ]
    )


class Recent(Generic[Found]):
    """Remembers for each kind of call what the last one found.

    That is valid for every call of equal structure whose tensors are alike (`adaptrt.backend.guards`), since nothing else matters. It is
    safe to use from several threads.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[Hashable, int, Callable[..., bool], Found]] = {}

    def find(self, kind: Hashable, structure: Hashable, tensors: Sequence[Tensor]) -> Found | None:
        """Returns what the last call of this kind found if it was like this one, else None.

        Args:
          kind: of the call, such as whether it is differentiated.
          structure: everything that matters besides the form of its tensors.
          tensors: all tensors that it uses, in order.
        """
        entry = self._entries.get(kind)
        if entry is None or entry[0] != structure or entry[1] != len(tensors) or not entry[2](*tensors):
            return None
        return entry[3]

    def keep(self, kind: Hashable, structure: Hashable, tensors: Sequence[Tensor], found: Found) -> None:
        """Remembers what a call found, in the place of what the last one of its kind did."""
        self._entries[kind] = structure, len(tensors), alike(tensors), found
