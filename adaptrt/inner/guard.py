"""Guards: whether what an adaptation made of a state is kept, decided within a program.

A guard is a function of two moments, one before the first step and one after the last, and returns a bool tensor (0-dim).
"""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.errors import InvalidArgument, InvalidType
from adaptrt.graph.passes.lift_noise import lift_noise
from adaptrt.inner import diagnose
from adaptrt.inner.python_state import PythonState
from adaptrt.inner.step import Batch, Carry, Fixed, Step, of_loss, of_model
from adaptrt.inner.user_code import outside
from adaptrt.process import lock
from adaptrt.tree import Tree


class Moment(NamedTuple):
    """What a guard is shown of one moment of an adaptation. Gradients do not flow through its decision.

    Attributes:
      loss: the support loss at this moment, 0-dim.
      losses: the losses before each step, (k,).
      params: adapted parameters by name.
      buffers, loss_buffers: buffers of the model by name, and those of a loss that is a module.
      opt_state: the optimiser's state.
      update_norm: the Euclidean norm of the change of all parameters since the call began, 0-dim; 0 before it.
    """

    loss: Tensor
    losses: Tensor
    params: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    loss_buffers: Mapping[str, Tensor]
    opt_state: Tree
    update_norm: Tensor


Decide = Callable[[Moment, Moment], Tensor]


def finite(before: Moment, after: Moment) -> Tensor:
    """Whether all losses and all numbers of the state are finite."""
    del before
    values = [after.loss, *[value for value in tree.leaves(after) if value.is_floating_point()]]
    return torch.stack([torch.isfinite(value).all() for value in values]).all()


def not_worse(before: Moment, after: Moment) -> Tensor:
    """Whether that holds and the support loss is at most what it was."""
    return finite(before, after) & (after.loss <= before.loss)


NAMED: Mapping[str, Decide] = {"finite": finite, "not_worse": not_worse}


def guarded(
    step: Step, start: Carry, carry: Carry, fixed: Fixed, batch: Batch, losses: Tensor, noise: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Carry]:
    """Has the guard of a step decide which state remains.

    Args:
      step: whose `guard` decides.
      start, carry: the state before the first step and after the last.
      fixed, batch: what all steps share, and the support batch.
      losses: before each step.
      noise: what random operations of the model return.
    Returns:
      Whether the later state is kept (0-dim bool), the support loss after the last step (0-dim), and the state that remains.
    """
    with lift_noise(noise):
        final_loss = step.evaluate(carry.params, carry.buffers, fixed, batch).loss
    kept = decision(step.guard, start, carry, losses, final_loss)
    return kept, final_loss, tree.where(kept, carry, start)


def decision(decide: Any, start: Carry, carry: Carry, losses: Tensor, final_loss: Tensor) -> Tensor:
    """Returns what a guard decides about one task (0-dim bool). Arguments are as for `guarded`; `final_loss` is after the last step.

    Raises:
      InvalidArgument: it returns something else.
    """
    start, carry, losses, final_loss = tree.map_leaves(Tensor.detach, (start, carry, losses, final_loss))
    squares = [(new - old).square().sum() for new, old in zip(carry.params.values(), start.params.values(), strict=True)]
    norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros_like(final_loss)

    def moment(loss: Tensor, carry: Carry, norm: Tensor) -> Moment:
        return Moment(loss, losses, carry.params, of_model(carry.buffers), of_loss(carry.buffers), carry.opt_state, norm)

    before, after = moment(losses[0], start, torch.zeros_like(norm)), moment(final_loss, carry, norm)
    with diagnose.guarding():
        found: Any = decide(before, after)
    if not isinstance(found, Tensor) or found.dim() != 0 or found.dtype is not torch.bool:
        what = tree.describe(found) if isinstance(found, Tensor) else type(found).__name__
        raise InvalidArgument(
            f"keep(before, after) must return a bool tensor of shape [], got {what}; write for example after.loss < before.loss"
        )
    return found


class Guard:
    """A guard as the user gave it, and the Python values that it reads.

    Args:
      keep: the name of a guard, or a function of (before, after).
    Raises:
      InvalidArgument, InvalidType: it is neither.
    """

    def __init__(self, keep: Any) -> None:
        self.decide = NAMED[keep] if isinstance(keep, str) else keep
        self.python = PythonState({"keep": self.decide})

    def step(self, step: Step) -> Step:
        """Returns the step with this guard."""
        return dataclasses.replace(step, guard=self.decide)


class Guards:
    """The guards that an unroll has met, those used last. It is safe to use from several threads."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Guard] = {}
        self._num_met = 0
        self._lock = lock()

    def find(self, keep: Any) -> Guard:
        """Returns the guard for what the user gave; the same one for equal functions, such as a lambda that is written in a loop.

        Raises:
          InvalidArgument, InvalidType: `keep` is no guard.
        """
        key = _key_of(keep)
        with self._lock:
            guard = self._known.pop(key, None)
            is_new = guard is None
            guard = self._known[key] = guard or Guard(keep)
            if len(self._known) > _MAX_GUARDS:
                del self._known[next(iter(self._known))]
            self._num_met += is_new
        if is_new and self._num_met == _MANY_GUARDS:
            warnings.warn(
                f"{self._num_met} different functions were given as keep=, and programs are compiled for each; give the same function "
                "object at every call, and let it take what changes from a buffer of the model",
                stacklevel=outside(),
            )
        return guard


_MAX_GUARDS = 64
_MANY_GUARDS = 9


def _key_of(keep: Any) -> Hashable:
    if isinstance(keep, str):
        if keep not in NAMED:
            raise InvalidArgument(f"keep must be 'finite', 'not_worse' or a function of (before, after), got {keep!r}")
        return keep
    if not callable(keep) or isinstance(keep, type):
        raise InvalidType(f"keep must be 'finite', 'not_worse' or a function of (before, after), got {keep!r}")
    if isinstance(keep, types.FunctionType) and not (keep.__closure__ or keep.__defaults__ or keep.__kwdefaults__ or vars(keep)):
        return keep.__code__, id(keep.__globals__)  # whichever of them it is, it reads the same
    if isinstance(keep, types.MethodType):  # a new object whenever it is looked up
        return id(keep.__self__), _key_of(keep.__func__)
    return id(keep)  # which the guard holds
