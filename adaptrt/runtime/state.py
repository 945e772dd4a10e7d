"""The state of an adaptation as a value: everything that the inner steps change."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping

from torch import Tensor

from adaptrt import tree
from adaptrt.errors import DeviceMismatch, InvalidArgument, InvalidType
from adaptrt.graph.pytrees import register
from adaptrt.inner.step import LOSS_BUFFER, Carry, of_loss, of_model
from adaptrt.tree import Form, Spec, Tree

register(tree.ReadOnly)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class State:
    """Adapted parameters, optimiser state and buffers. It is immutable: methods return another state and leave this one unchanged.

    Attributes:
      leaves: all tensors, in the order in which programs take them.
      form: from these to a `Carry` and back. Its buffers include those of a loss module, under names of their own.
      num_tasks: length T of the leading axis that every tensor has, None without one.
    """

    leaves: tuple[Tensor, ...]
    form: Form
    num_tasks: int | None = None

    @staticmethod
    def of(carry: Carry, num_tasks: int | None = None) -> State:
        """Returns the state that a carry is."""
        leaves, structure = tree.flatten(carry)
        return State(tuple(leaves), tree.form_of(structure, leaves), num_tasks)

    @property
    def carry(self) -> Carry:
        """All of it, in the form in which programs take it."""
        return self.form.tree(self.leaves)

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
        return tree.ReadOnly(of_model(self.carry.buffers))

    @property
    def loss_buffers(self) -> dict[str, Tensor]:
        """The buffers of a loss that is a module, by their names in it, read-only."""
        return tree.ReadOnly(of_loss(self.carry.buffers))

    def replace(
        self,
        *,
        params: Mapping[str, Tensor] | None = None,
        opt_state: Tree = None,
        buffers: Mapping[str, Tensor] | None = None,
        loss_buffers: Mapping[str, Tensor] | None = None,
    ) -> State:
        """Returns a state with some values replaced; gradients flow to the new ones.

        Args:
          params, buffers, loss_buffers: by name; those not named stay. If the state has a task axis, a value without one is given to every
            task.
          opt_state: all of the optimiser's state, None to leave it.
        Raises:
          InvalidArgument: a name that is not there, or a shape, dtype or structure that differs.
          InvalidType: something that is no tensor.
          DeviceMismatch: a tensor on another device.
        """
        carry = self.carry
        of_losses = self._values("loss_buffers", of_loss(carry.buffers), loss_buffers or {})
        replaced = {
            **self._values("buffers", of_model(carry.buffers), buffers or {}),
            **{LOSS_BUFFER + name: value for name, value in of_losses.items()},
        }
        return self.of(
            Carry(
                {**carry.params, **self._values("params", carry.params, params or {})},
                carry.opt_state if opt_state is None else self._opt_state(carry.opt_state, opt_state),
                {**carry.buffers, **replaced},
            ),
            self.num_tasks,
        )

    def map(self, fn: Callable[[Tensor], Tensor]) -> State:
        """Returns the state with `fn` applied to every tensor, which must not change its shape but for the task axis."""
        return dataclasses.replace(self, leaves=tuple([fn(value) for value in self.leaves]))

    def detach(self) -> State:
        """Returns the same values without their autograd history."""
        return self.map(Tensor.detach)

    def over_tasks(self, num_tasks: int) -> State:
        """Returns the state of `num_tasks` tasks that all are in this one, which has no task axis; each has memory of its own."""
        leaves = [_expanded(value, num_tasks) for value in self.leaves]
        return dataclasses.replace(self, leaves=tuple(leaves), num_tasks=num_tasks)

    def named_tensors(self) -> dict[str, Tensor]:
        """Returns every tensor by its dotted name, such as `params.0.weight` or `buffers.1.running_mean`."""
        return dict(zip(tree.paths(self.carry), self.leaves, strict=True))

    def _values(self, kind: str, held: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the values given, with a task axis if the state has one."""
        if not isinstance(given, Mapping):
            raise InvalidType(f"{kind} must be a dict of tensors by name, got {type(given).__name__}")
        for name in given:
            if name not in held:
                close = difflib.get_close_matches(str(name), held, 1)
                guess = f"; did you mean '{close[0]}'?" if close else f"; there are {', '.join(map(repr, held)) or 'none'}"
                raise InvalidArgument(f"{kind} has {name!r}, which is no name of what adapts{guess}")
        return {name: self._value(f"{kind}[{name!r}]", held[name], value) for name, value in given.items()}

    def _opt_state(self, held: Tree, given: Tree) -> Tree:
        old, structure = tree.flatten(held)
        new, given_structure = tree.flatten(given)
        if structure != given_structure:
            raise InvalidArgument(f"opt_state has another structure than this optimiser's: {tree.difference(held, given)}")
        names = tree.paths(held, "opt_state")
        return tree.unflatten(structure, [self._value(*entry) for entry in zip(names, old, new, strict=True)])

    def _value(self, name: str, held: Tensor, given: Tensor) -> Tensor:
        """Returns a value for the place of another, after checking that it fits."""
        if not isinstance(given, Tensor):
            raise InvalidType(f"{name} must be a tensor, got {type(given).__name__}")
        wanted, found = Spec.of(held), Spec.of(given)
        if found == wanted:
            return given
        if found.device != wanted.device:
            raise DeviceMismatch(f"{name} is on {found.device}, the model on {wanted.device}; call .to('{wanted.device}') on it first")
        if self.num_tasks is not None and found == dataclasses.replace(wanted, shape=wanted.shape[1:]):
            return _expanded(given, self.num_tasks)
        advice = f"; call .to({wanted.dtype}) on it" if found.shape == wanted.shape else ""
        if self.num_tasks is None and found.shape[1:] == wanted.shape:
            advice = f"; for a state of {found.shape[0]} tasks call start(num_tasks={found.shape[0]}, ...)"
        raise InvalidArgument(f"{name} must be {wanted}, got {found}{advice}")


def _expanded(value: Tensor, num_tasks: int) -> Tensor:
    return value.unsqueeze(0).expand(num_tasks, *value.shape).clone()
