"""Functions shared by adjoints that take one step at a time.

One step is phi' = S(phi, eta, batch, noise). Its pullback is lambda <- lambda^T dS/dphi, and eta's gradient is the sum of lambda^T dS/deta.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.adjoint.base import Gradients, Loop, Problem, Task, Wrt
from adaptrt.inner.step import Batch, Carry
from adaptrt.inner.unroll import batch_of_step

STEP = ("carry", "fixed", "batch", "noise")

Pull = Callable[[int, Sequence[Tensor]], Any]
"""Index of an update and cotangents of its carry and loss, to gradients of carry, fixed, batch and noise. Asked from the last one back."""


def wrt_step(problem: Problem) -> Wrt:
    """Returns what a step's pullback is with respect to."""
    return Wrt((problem.carry, problem.differentiated.fixed, problem.differentiated.support, None), (*problem.carry, True))


def loop_of(problem: Problem, shared: list[Tensor] | None = None) -> Loop | None:
    """Returns the loop over a problem's steps, None for a single step. `shared`: what its steps share, if that is known already."""
    in_loop = num_updates(problem) > 1 if problem.in_loop is None else problem.in_loop
    return Loop((False, True, not problem.per_step, False), shared) if in_loop else None


def backwards(problem: Problem, task: Task, pull: Pull, carry: Sequence[Tensor], losses: Tensor, first: int = 0) -> Gradients:
    """Pulls cotangents of the last carry and of the losses back through all updates, to gradients.

    Args:
      problem, task: what was run.
      pull: pulls back through one update.
      carry, losses: cotangents.
      first: the update where that ends; what those before it computed is constant.
    """
    adjoint, of_loss = list(carry), losses.unbind(-1)
    fixed = _Sum()
    none = torch.zeros_like(of_loss[0])
    support = [_Sum() for _ in range(problem.k if problem.per_step else 1)]
    for index in reversed(range(first, num_updates(problem))):
        # Of the updates of a step, the loss before the first is reported.
        of_step, later = divmod(index, problem.updates_per_step)
        adjoint, more_fixed, more_batch, _ = pull(index, [*adjoint, none if later else of_loss[of_step]])
        fixed.add(more_fixed)
        support[of_step if problem.per_step else 0].add(more_batch)
    if first:
        adjoint = [torch.zeros_like(value) for value in adjoint]
        for part in support[: first // problem.updates_per_step] if problem.per_step else ():
            part.add([torch.zeros_like(value) for value in support[-1].total])
    of_support = support[0].total
    if problem.per_step:
        axis = 1 if problem.task_axis else 0
        of_support = [torch.stack(rows, axis) for rows in zip(*(part.total for part in support), strict=True)]
    return Gradients(start_gradients(problem, adjoint), fixed.total, of_support, ())


class _Sum:
    """A running sum of lists of tensors. The first term is kept as it is, so a sum of one costs nothing."""

    def __init__(self) -> None:
        self.total: list[Tensor] = []

    def add(self, terms: Sequence[Tensor]) -> None:
        self.total = [old + new for old, new in zip(self.total, terms, strict=True)] if self.total else list(terms)


def first_carry(problem: Problem, task: Task) -> Carry:
    """Returns the carry to start from, with the task axis that every later carry has."""
    if not problem.task_axis or problem.start_has_task_axis:
        return task.start
    num_tasks = tree.leaves(task.support)[0].shape[0]
    return tree.map_leaves(lambda value: value.unsqueeze(0).expand(num_tasks, *value.shape), task.start)


def batch_of_update(problem: Problem, task: Task, index: int) -> Batch:
    """Returns the support batch of one update."""
    step = index // problem.updates_per_step
    return batch_of_step(task.support, step, per_step=problem.per_step, task_axis=problem.task_axis)


def num_updates(problem: Problem) -> int:
    """Returns the number of updates in all k steps."""
    return problem.k * problem.updates_per_step


def reported(problem: Problem, losses: Sequence[Tensor]) -> Tensor:
    """Returns the losses before each step, [k] or [T, k], from those before each update."""
    return torch.stack(list(losses[:: problem.updates_per_step]), -1)


def start_gradients(problem: Problem, adjoint: Sequence[Tensor]) -> list[Tensor]:
    """Returns the gradients of the leaves that the caller asked for, from the cotangents of the first carry."""
    found = iter(adjoint)
    by_leaf = [next(found) if flag else None for flag in problem.carry]
    wanted = [value for value, flag in zip(by_leaf, problem.differentiated.start, strict=True) if flag]
    assert all(value is not None for value in wanted), "a leaf that requires grad is always part of the carry's cotangent"
    shared = problem.task_axis and not problem.start_has_task_axis
    return [value.sum(0) if shared else value for value in wanted if value is not None]
