"""Adapts tasks one after the other, where that is faster than all of them in each program."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.adjoint.base import Adaptation, Adjoint, Gradients, Problem, Programs, Query, Task


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
        one, total = _of_one(problem), _Gradients(problem)
        for part, own, cotangent, of_losses in zip(_tasks(problem, task), kept, zip(*carry, strict=True), losses, strict=True):
            total.add(self.adjoint.adapt_pullback(programs, one, part, own, cotangent, of_losses))
        return total.result()

    def meta_loss(self, programs: Programs, problem: Problem, task: Task, query: Query) -> Tensor:
        pairs = zip(_tasks(problem, task), along_tasks(query), strict=True)
        return torch.stack([self.adjoint.meta_loss(programs, _of_one(problem), part, asked) for part, asked in pairs])

    def meta_loss_and_gradients(
        self, programs: Programs, problem: Problem, task: Task, query: Query, cotangent: Tensor
    ) -> tuple[Tensor, Gradients]:
        one, total = _of_one(problem), _Gradients(problem)
        losses: list[Tensor] = []
        for part, asked, weight in zip(_tasks(problem, task), along_tasks(query), cotangent, strict=True):
            loss, gradients = self.adjoint.meta_loss_and_gradients(programs, one, part, asked, weight)
            losses.append(loss)
            total.add(gradients)
        return torch.stack(losses), total.result()


class _Gradients:
    """Collects the gradients of all tasks: stacked where a leaf has the task axis, summed where tasks share it."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._parts: list[Gradients] = []
        self._shared: list[Tensor] = []

    def add(self, part: Gradients) -> None:
        shared = list(part.fixed) if self._problem.start_has_task_axis else [*part.start, *part.fixed]
        self._shared = [old + new for old, new in zip(self._shared, shared, strict=True)] if self._parts else shared
        self._parts.append(part._replace(start=part.start if self._problem.start_has_task_axis else (), fixed=()))

    def result(self) -> Gradients:
        start, _, support, query = (
            [torch.stack(values) for values in zip(*group, strict=True)] for group in zip(*self._parts, strict=True)
        )
        num_start = 0 if self._problem.start_has_task_axis else sum(self._problem.differentiated.start)
        return Gradients([*start, *self._shared[:num_start]], self._shared[num_start:], support, query)


def _of_one(problem: Problem) -> Problem:
    """The problem of one task."""
    return dataclasses.replace(problem, task_axis=False, start_has_task_axis=False)


def _tasks(problem: Problem, task: Task) -> list[Task]:
    parts = along_tasks((task.support, task.noise, *((task.start,) if problem.start_has_task_axis else ())))
    return [Task(start[0] if start else task.start, task.fixed, support, noise) for support, noise, *start in parts]


def along_tasks(part: Any) -> list[Any]:
    """Returns the tree of each task."""
    values, structure = tree.flatten(part)
    return [tree.unflatten(structure, rows) for rows in zip(*(value.unbind(0) for value in values), strict=True)]
