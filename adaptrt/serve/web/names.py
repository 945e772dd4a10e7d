"""Names of tensors: a tree of tensors, such as a support batch, as named tensors of the protocol and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from adaptrt.errors import InvalidType
from adaptrt.serve import trees
from adaptrt.serve.engine import SizesTaken
from adaptrt.serve.web.errors import Invalid
from adaptrt.serve.web.protocol import DATATYPES, datatype_of, has_datatype


class Form:
    """A tree of tensors of which requests bring the values.

    Tensors are called by their place: `support_0` is the first part of a support batch, `query_0` the inputs of a prediction, and
    `query_0_input_ids` the entry of a dict of inputs.

    Args:
      prefix: what names begin with.
      example: the tree; a single tensor counts as a tuple of one.
    Raises:
      InvalidType: a tensor is of a dtype that the protocol does not have, or two would have the same name.
    """

    def __init__(self, prefix: str, example: Any) -> None:
        self.prefix = prefix
        self._is_single = not isinstance(example, tuple)
        self._example = (example,) if self._is_single else example
        self.names = list(named(prefix, self._example))
        self._leaves: list[Tensor] = trees.leaves(self._example)
        for name, leaf in zip(self.names, self._leaves, strict=True):
            if not has_datatype(leaf.dtype):
                raise InvalidType(f"{name} is {leaf.dtype}, and the protocol has {', '.join([found.name for found in DATATYPES])} only")

    def num_numbers(self, num_examples: int) -> int:
        """Returns how many numbers data of so many examples has."""
        return sum([leaf.numel() // len(leaf) * num_examples for leaf in self._leaves])

    def is_in(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether any tensor of this tree is among named tensors."""
        return any([name in tensors for name in self.names])

    def build(self, tensors: Mapping[str, Tensor], sizes: SizesTaken) -> Any:
        """Returns the tree with the values of named tensors.

        Args:
          tensors: by name; others than those of this tree do not matter.
          sizes: numbers of examples that are taken.
        Raises:
          Invalid: one is missing, or of another datatype or shape.
        """
        found: list[Tensor] = []
        for name, leaf in zip(self.names, self._leaves, strict=True):
            tensor = tensors.get(name)
            if tensor is None:
                raise Invalid(f"input {name!r} is missing; {self.prefix} data is {', '.join(self.names)}")
            if tensor.dtype != leaf.dtype:
                raise Invalid(f"input {name!r} must be {datatype_of(leaf.dtype)}, got {datatype_of(tensor.dtype)}")
            if tensor.dim() != leaf.dim() or tensor.shape[1:] != leaf.shape[1:]:
                wanted = ", ".join(["examples", *map(str, leaf.shape[1:])])
                raise Invalid(f"input {name!r} must have the shape [{wanted}], got {list(tensor.shape)}")
            found.append(tensor)
        lengths = [len(tensor) for tensor in found]
        if len(set(lengths)) > 1:
            raise Invalid(f"{self.prefix} data must have as many examples in each input, got {', '.join(map(str, lengths))}")
        if lengths[0] not in sizes.sizes and not (sizes.pads and 0 < lengths[0] <= sizes.sizes[-1]):
            taken = f"1 to {sizes.sizes[-1]}" if sizes.pads else " or ".join(map(str, sizes.sizes))
            raise Invalid(f"{self.prefix} data has {lengths[0]} examples, and this server takes {taken}")
        values = iter(found)
        tree = trees.map_leaves(lambda leaf: next(values), self._example)
        return tree[0] if self._is_single else tree

    def metadata(self, *, optional: bool) -> list[dict[str, Any]]:
        """Returns names, datatypes and shapes, as the protocol's metadata has them; -1 is any number of examples."""
        entries = [
            {"name": name, "datatype": datatype_of(leaf.dtype), "shape": [-1, *leaf.shape[1:]]}
            for name, leaf in zip(self.names, self._leaves, strict=True)
        ]
        return [{**entry, "optional": True} for entry in entries] if optional else entries


def named(prefix: str, value: Any) -> dict[str, Tensor]:
    """Returns the tensors of a tree by name.

    Raises:
      InvalidType: two would have the same name.
    """
    value = value if isinstance(value, tuple) else (value,)
    names = ["_".join([prefix, *[re.sub(r"\W", "_", str(step)) for step in place]]) for place in trees.paths(value)]
    if len(set(names)) < len(names):
        raise InvalidType(f"two tensors of the {prefix} data would have the same name; rename the keys of {', '.join(names)}")
    return dict(zip(names, trees.leaves(value), strict=True))
