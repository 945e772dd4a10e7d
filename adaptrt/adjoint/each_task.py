"""Adapts tasks one after the other, where that is faster than all of them in each program."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.adjoint.base import Adaptation, Adjoint, Gradients, Problem, Programs, Query, Task
from adaptrt.inner.step import Fixed
from adaptrt.optim.tasks import are_per_task


@dataclasses.dataclass(frozen=True, slots=True)
class EachTask(Adjoint):
    """Uses another adjoint on one task at a time; results are as under a task axis.

    What a task needs stays in the processor's caches from its first step to the end of its pullback. Only one task's activations are kept
    at a time, unless `adapt` is differentiated.

    Args:
      adjoint: used on each task, with programs that know of no task axis.
    """

    adjoint: Adjoint

    @property
    def takes_any_k(self) -> bool:  # type: ignore[override]
        return self.adjoint.takes_any_k

    @property
    def needs_fixed_point(self) -> bool:  # type: ignore[override]
        return self.adjoint.needs_fixed_point

    @property
    def sees_all_data(self) -> bool:  # type: ignore[override]
        return self.adjoint.sees_all_data

    def num_constant_steps(self, k: int) -> int:
        return self.adjoint.num_constant_steps(k)

    def adapt(self, programs: Programs, problem: Problem, task: Task, keep: bool) -> Adaptation:
        one = _of_one(problem)
        found = [self.adjoint.adapt(programs, one, part, keep) for part in _tasks(problem, task)]
        carry = tree.map_leaves(lambda *values: torch.stack(values), *(part.carry for part in found))
        return Adaptation(carry, torch.stack([part.losses for part in found]), [part.kept for part in found])

    def adapt_pullback(
        self, programs: Programs, problem: Problem, task: Task, kept: Any, carry: Sequence[Tensor], losses: Tensor
    ) -> Gradients:
        one, total = _of_one(problem), _Gradients(problem, task)
        for part, own, cotangent, of_losses in zip(_tasks(problem, task), kept, zip(*carry, strict=True), losses, strict=True):
            total.add(self.adjoint.adapt_pullback(programs, one, part, own, cotangent, of_losses))
        return total.result()

    def meta_loss(self, programs: Programs, problem: Problem, task: Task, query: Query) -> Tensor:
        pairs = zip(_tasks(problem, task), along_tasks(query), strict=True)
        return torch.stack([self.adjoint.meta_loss(programs, _of_one(problem), part, asked) for part, asked in pairs])

    def meta_loss_and_gradients(
        self, programs: Programs, problem: Problem, task: Task, query: Query, cotangent: Tensor
    ) -> tuple[Tensor, Gradients]:
        one, total = _of_one(problem), _Gradients(problem, task)
        losses: list[Tensor] = []
        for part, asked, weight in zip(_tasks(problem, task), along_tasks(query), cotangent, strict=True):
            loss, gradients = self.adjoint.meta_loss_and_gradients(programs, one, part, asked, weight)
            losses.append(loss)
            total.add(gradients)
        return torch.stack(losses), total.result()


class _Gradients:
    """Collects the gradients of all tasks: stacked where a leaf has the task axis, summed where tasks share it."""

    def __init__(self, problem: Problem, task: Task) -> None:
        marks = zip(are_per_task(task.fixed), problem.differentiated.fixed, strict=True)
        self._of_fixed = [mark for mark, asked in marks if asked]
        self._of_start = [problem.start_has_task_axis] * sum(problem.differentiated.start)
        self._rows: list[list[Any]] = []  # of each gradient, by group: one of each task, or a sum

    def add(self, part: Gradients) -> None:
        are_stacked = self._of_start, self._of_fixed, [True] * len(part.support), [True] * len(part.query)
        if not self._rows:
            self._rows = [[[] if flag else 0 for flag in flags] for flags in are_stacked]
        for rows, values, flags in zip(self._rows, part, are_stacked, strict=True):
            for place, (value, is_stacked) in enumerate(zip(values, flags, strict=True)):
                rows[place] = [*rows[place], value] if is_stacked else rows[place] + value

    def result(self) -> Gradients:
        return Gradients(*[[torch.stack(row) if isinstance(row, list) else row for row in rows] for rows in self._rows])


def _of_one(problem: Problem) -> Problem:
    """The problem of one task."""
    return dataclasses.replace(problem, task_axis=False, start_has_task_axis=False)


def _tasks(problem: Problem, task: Task) -> list[Task]:
    parts = along_tasks((task.support, task.noise, *((task.start,) if problem.start_has_task_axis else ())))
    fixed = fixed_of_tasks(task.fixed, len(parts))
    return [Task(part[2] if len(part) > 2 else task.start, own, *part[:2]) for part, own in zip(parts, fixed, strict=True)]


def fixed_of_tasks(fixed: Fixed, num_tasks: int) -> list[Fixed]:
    """Returns what the steps of each task share: the same for all, but for hyperparameters with a value for each task."""
    values, structure = tree.flatten(fixed)
    marks = are_per_task(fixed)
    if True not in marks:
        return [fixed] * num_tasks
    columns = [value.unbind(0) if mark else [value] * num_tasks for value, mark in zip(values, marks, strict=True)]
    return [tree.unflatten(structure, row) for row in zip(*columns, strict=True)]


def along_tasks(part: Any) -> list[Any]:
    """Returns the tree of each task."""
    values, structure = tree.flatten(part)
    return [tree.unflatten(structure, rows) for rows in zip(*(value.unbind(0) for value in values), strict=True)]
