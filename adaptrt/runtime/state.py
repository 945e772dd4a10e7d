"""The state of an adaptation as a value: everything that the inner steps change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from adaptrt import tree
from adaptrt.errors import InvalidArgument
from adaptrt.graph.pytrees import register
from adaptrt.inner.step import LOSS_BUFFER, Carry
from adaptrt.tree import Tree

register(tree.ReadOnly)


class State(NamedTuple):
    """Adapted parameters, optimiser state and buffers. It is immutable: methods return another state and leave this one unchanged.

    Attributes:
      carry: all of it, in the form in which programs take it. Its buffers include those of a loss module, under names of their own.
      num_tasks: length T of the leading axis that every tensor has, None without one.
    """

    carry: Carry
    num_tasks: int | None = None

    @property
    def params(self) -> dict[str, Tensor]:
        """Adapted parameters by name, read-only."""
        return tree.ReadOnly(self.carry.params)

    @property
    def opt_state(self) -> Tree:
        """The optimiser's state, with dicts that are read-only."""
        return tree.read_only(self.carry.opt_state)

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers by name, read-only."""
        return tree.ReadOnly({name: value for name, value in self.carry.buffers.items() if not name.startswith(LOSS_BUFFER)})

    def replace(
        self,
        *,
        params: Mapping[str, Tensor] | None = None,
        opt_state: Tree = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> State:
        """Returns a state with some values replaced.

        Args:
          params, buffers: by name; those not named stay.
          opt_state: all of the optimiser's state, None to leave it.
        Raises:
          InvalidArgument: a name that is not there, or a shape or dtype that differs.
        """
        carry = Carry(
            {**self.carry.params, **(params or {})},
            self.carry.opt_state if opt_state is None else tree.map_leaves(lambda value: value, opt_state),  # with dicts of its own
            {**self.carry.buffers, **(buffers or {})},
        )
        if tree.flatten(tree.specs(carry)) != tree.flatten(tree.specs(self.carry)):
            raise InvalidArgument(f"a state keeps its structure, shapes and dtypes: {tree.difference(self.carry, carry)}")
        return self._replace(carry=carry)

    def detach(self) -> State:
        """Returns the same values without their autograd history."""
        return self._replace(carry=tree.map_leaves(Tensor.detach, self.carry))

    def named_tensors(self) -> dict[str, Tensor]:
        """Returns every tensor by its dotted name, such as `params.0.weight` or `buffers.1.running_mean`."""
        return dict(zip(tree.paths(self.carry), tree.leaves(self.carry), strict=True))
