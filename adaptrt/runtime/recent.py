"""What was found for the last call, taken over by the next one that is like it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from adaptrt.backend.guards import alike

Found = TypeVar("Found")


class Recent(Generic[Found]):
    """For each kind of call what the last one found.

    It holds for every call of equal structure whose tensors are alike (`adaptrt.backend.guards`): nothing else matters. Safe to use from
    threads: an entry is replaced at once.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[Hashable, Callable[..., bool], Found]] = {}

    def find(self, kind: Hashable, structure: Hashable, tensors: Sequence[Tensor]) -> Found | None:
        """What the last call of this kind found, if it was like this one.

        Args:
          kind: of the call, such as whether it is differentiated.
          structure: what else a call is for besides the form of its tensors.
          tensors: all that it is given, in order.
        """
        entry = self._entries.get(kind)
        return entry[2] if entry is not None and entry[0] == structure and entry[1](*tensors) else None

    def keep(self, kind: Hashable, structure: Hashable, tensors: Sequence[Tensor], found: Found) -> None:
        """Keeps what a call found in place of what the last one of its kind did."""
        self._entries[kind] = structure, alike(tensors), found
