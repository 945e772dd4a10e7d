"""Puts the states of several adaptations together, on an axis of tasks, and chooses between two by task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.backend.entry_points import entry_point
from adaptrt.errors import DeviceMismatch, InvalidArgument, InvalidType, OptimizerMismatch
from adaptrt.runtime.adapted import Adapted, are_of_one_unroll, made_of, without_graph
from adaptrt.runtime.rows import Rows
from adaptrt.runtime.state import State
from adaptrt.tree import Spec


@entry_point
def stack(adapted: Sequence[Adapted]) -> Adapted:
    """Puts adaptations of one task each together on a task axis, so that one call of `vmap()` goes on from all of them.

    `batch[i]` and `batch.unbind()` take them apart again. Gradients flow through both. What `unbind()` took apart in this order shares its
    memory. Rows of `losses` are as long as the longest, and end with NaN for tasks that had fewer steps. What a guard has found is not
    passed on, and neither are outputs.

    Args:
      adapted: made by `adapt` or `start` of one unroll, or of its `vmap()`; none has a task axis.
    Raises:
      InvalidArgument: there is none, one has a task axis, or they come from different unrolls.
      OptimizerMismatch: their optimisers' states differ in structure or shape.

    Example:
      >>> from adaptrt import compile_unroll, optim, stack
      >>> unroll = compile_unroll(torch.nn.Linear(2, 1), optim.sgd(lr=0.1), k=2, backend="eager")
      >>> users = [unroll.adapt((torch.randn(5, 2), torch.randn(5, 1))) for _ in range(3)]
      >>> batch = stack(users)
      >>> batch = unroll.vmap().adapt((torch.randn(3, 5, 2), torch.randn(3, 5, 1)), start=batch)
      >>> len(batch), batch[0].params["weight"].shape
      (3, torch.Size([1, 2]))
    """
    if isinstance(adapted, Adapted):
        what = "an adaptation of one task" if adapted.num_tasks is None else f"one that has a task axis already ({adapted.num_tasks} tasks)"
        raise InvalidType(f"stack() takes a list or tuple of adaptations, got {what}")
    if not isinstance(adapted, Sequence):
        raise InvalidType(f"stack() takes a list or tuple of adaptations, got {type(adapted).__name__}")
    parts = list(adapted)
    if not parts:
        raise InvalidArgument("stack() needs at least one adaptation, in a list or tuple")
    again = _put_together_again(parts)
    if again is not None:
        return again
    _require_alike(parts)
    states = [part.state for part in parts]
    for index, num_tasks in enumerate([state.num_tasks for state in states]):
        if num_tasks is not None:
            raise InvalidArgument(f"adaptation {index} has a task axis already ({num_tasks} tasks); take it apart with unbind() first")
    rows = [state.leaves for state in states]
    try:
        leaves = tuple([torch.stack(values) for values in zip(*rows, strict=True)])
    except RuntimeError:
        _require_same_specs([list(map(Spec.of, row)) for row in rows], parts)
        raise
    losses = [part.losses for part in parts]
    try:
        stacked = torch.stack(losses)
    except RuntimeError:
        stacked = torch.stack(_of_equal_length(losses))
    return made_of(parts, State(leaves, states[0].form, len(parts)), stacked)


@entry_point
def where(condition: Tensor, first: Adapted, second: Adapted) -> Adapted:
    """Chooses by task between two adaptations, bit for bit, parameters, optimiser state and buffers alike.

    Args:
      condition: bool [T], or [] for adaptations without task axis. Where it is true the first is taken.
      first, second: of one unroll. One without a task axis stands for each of the T tasks.
    Raises:
      InvalidType, InvalidArgument, DeviceMismatch: the condition is no bool tensor of that shape on the model's device, or the adaptations
        come from different unrolls or have different numbers of tasks.
      OptimizerMismatch: their optimisers' states differ in structure or shape.
    """
    _require_alike([first, second])
    if not isinstance(condition, Tensor) or condition.dtype is not torch.bool:
        found = str(Spec.of(condition)) if isinstance(condition, Tensor) else type(condition).__name__
        raise InvalidType(f"the condition must be a bool tensor, one value for each task, got {found}")
    known = [part.num_tasks for part in (first, second) if part.num_tasks is not None]
    num_tasks = known[0] if known else None
    if len(set(known)) > 1 or condition.shape != (() if num_tasks is None else (num_tasks,)):
        tasks = ["one task" if part.num_tasks is None else f"{part.num_tasks} tasks" for part in (first, second)]
        raise InvalidArgument(
            f"the condition is {Spec.of(condition)}, the adaptations are of {tasks[0]} and {tasks[1]}; it needs one value for each task, "
            "and none, shape [], without a task axis"
        )
    device = first.losses.device
    if condition.device != device:
        raise DeviceMismatch(f"the condition is on {condition.device}, the model on {device}; call .to('{device}') on it first")
    ones = [[_of_one(value, part.num_tasks) for value in part.state.leaves] for part in (first, second)]
    _require_same_specs(ones, [first, second])

    def choose(one: Tensor, other: Tensor) -> Tensor:
        axes = max(one.dim(), other.dim()) - condition.dim()
        return torch.where(condition.reshape((*condition.shape, *[1] * axes)), one, other)

    leaves = tuple([choose(one, other) for one, other in zip(first.state.leaves, second.state.leaves, strict=True)])
    losses = choose(*_of_equal_length([first.losses, second.losses]))
    return made_of([first, second], dataclasses.replace(first.state, leaves=leaves, num_tasks=num_tasks), losses)


def _put_together_again(parts: Sequence[Adapted]) -> Adapted | None:
    """Returns the batch of these adaptations, in their order, if `unbind()` has taken all of them out of one; else None.

    Its tensors are then not taken apart for nothing. None, too, where gradients could be asked for by tensors that were taken out.
    """
    rows = _rows_of(parts[0])[0]
    if rows is None:
        return None
    places: list[int] = []
    for part in parts:
        own, place = _rows_of(part)
        if own is not rows or (torch.is_grad_enabled() and _taken_out_requires_grad(part)):
            return None
        places.append(place)
    batch: Adapted = rows.batch if torch.is_grad_enabled() else without_graph(rows.batch)
    state, losses = batch.state, batch.losses
    if places != list(range(len(batch))):
        chosen = torch.tensor(places, device=losses.device)
        state = dataclasses.replace(state.map(lambda value: value.index_select(0, chosen)), num_tasks=len(places))
        losses = losses.index_select(0, chosen)
    return made_of([batch], state, losses)


def _rows_of(part: object) -> tuple[Rows | None, int]:
    return Rows.of(part) if isinstance(part, Adapted) else (None, 0)


def _taken_out_requires_grad(row: Adapted) -> bool:
    held = vars(row)
    state: State | None = held.get("state")
    values = [*(() if state is None else state.leaves), *([held["losses"]] if "losses" in held else ())]
    return any([value.requires_grad for value in values])


def _require_alike(parts: Sequence[Adapted]) -> None:
    """Checks that all are adaptations of one unroll.

    Raises:
      InvalidType, InvalidArgument, OptimizerMismatch: one is not.
    """
    first = parts[0]
    for index, part in enumerate(parts):
        if not isinstance(part, Adapted):
            raise InvalidType(f"expected what adapt() or start() returned, got {type(part).__name__} at {index}")
        if not are_of_one_unroll(part, first):
            raise InvalidArgument(
                f"adaptation {index} is of another unroll than the first, or of a copy; take all from one unroll, or from its vmap()"
            )
    wanted = first.state.form
    for index, form in enumerate([part.state.form for part in parts]):
        if form is wanted:
            continue
        part = parts[index]
        if form.structure != wanted.structure:
            raise OptimizerMismatch(
                f"the optimiser's state of adaptation {index} has another structure than that of the first: the optimiser was changed in "
                f"between ({tree.difference(first.state.carry, part.state.carry)})"
            )
        if form.dtypes != wanted.dtypes:
            for name, one, other in zip(tree.paths(first.state.carry), first.state.leaves, part.state.leaves, strict=True):
                if one.dtype != other.dtype:
                    raise OptimizerMismatch(f"{name} is {Spec.of(one)} in the first adaptation, and {Spec.of(other)} in adaptation {index}")


def _require_same_specs(specs: Sequence[Sequence[Spec]], parts: Sequence[Adapted]) -> None:
    """Raises OptimizerMismatch unless the tensors of all parts have the same shapes and dtypes, those of one task each."""
    for index, found in enumerate(specs):
        for name, one, other in zip(tree.paths(parts[0].state.carry), specs[0], found, strict=True):
            if one != other:
                raise OptimizerMismatch(f"{name} is {one} in the first adaptation, and {other} in adaptation {index}")


def _of_one(value: Tensor, num_tasks: int | None) -> Spec:
    spec = Spec.of(value)
    return spec if num_tasks is None else dataclasses.replace(spec, shape=spec.shape[1:])


def _of_equal_length(losses: Sequence[Tensor]) -> list[Tensor]:
    """Returns losses (k,) or [T, k], with NaN behind those that have fewer steps than others."""
    num_steps = max([value.shape[-1] for value in losses])
    return [torch.nn.functional.pad(value, (0, num_steps - value.shape[-1]), value=float("nan")) for value in losses]
