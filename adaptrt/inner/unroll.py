"""Runs an inner step k times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.inner.step import Batch, Carry, Fixed, Step
from adaptrt.tree import Tree

StepFunction = Callable[[Carry, Fixed, Batch, Sequence[Tensor]], tuple[Carry, Tensor]]


def batch_of_step(support: Batch, index: int, *, per_step: bool, task_axis: bool = False) -> Batch:
    """Returns the batch of one inner step: all of `support`, or its slice `index` if each step has a batch of its own.

    Args:
      support: leaves [...], or [k, ...] if `per_step`, or [T, k, ...] if there is a task axis too.
      index: the step, from 0.
      per_step: whether support has a step axis.
      task_axis: whether a task axis stands before it.
    """
    if not per_step:
        return support
    return tree.map_leaves(lambda value: value.select(1 if task_axis else 0, index), support)


def unroll(
    step: StepFunction,
    k: int,
    carry: Carry,
    fixed: Fixed,
    support: Batch,
    noise: Sequence[Sequence[Tensor]],
    *,
    per_step: bool = False,
    updates_per_step: int = 1,
) -> tuple[Carry, Tensor]:
    """Returns the carry after k steps, and the losses before each of them (k,).

    Args:
      step: (carry, fixed, batch, noise) -> (carry, loss).
      k: number of steps.
      carry: where to start.
      fixed: what all steps share.
      support: one batch, or with `per_step` k of them along a leading axis.
      noise: what each update's random operations return.
      per_step: whether support has a leading axis of length k.
      updates_per_step: how often `step` is done on one batch, each time with noise of its own.
    """
    losses: list[Tensor] = []
    for index in range(k * updates_per_step):
        carry, loss = step(carry, fixed, batch_of_step(support, index // updates_per_step, per_step=per_step), noise[index])
        losses.append(loss)
    return carry, torch.stack(losses[::updates_per_step])


def first_step(
    step: Step, carry: Carry, fixed: Fixed, support: Batch, noise: Sequence[Sequence[Tensor]], *, per_step: bool = False
) -> tuple[Carry, Tensor, Tree]:
    """Does the first of k steps.

    Args:
      step, carry, fixed, support, per_step: as for `unroll`.
      noise: what the random operations of each of the step's updates return.
    Returns:
      The carry after it, the loss before it (0-dim), and what the model returned for that loss.
    """
    batch = batch_of_step(support, 0, per_step=per_step)
    carry, loss, output = step.with_output(carry, fixed, batch, noise[0])
    for own in noise[1:]:
        carry, _ = step(carry, fixed, batch, own)
    return carry, loss, output
