"""The meta-gradient by running the inner steps again, backwards.

With one step phi' = S(phi, eta, batch, noise), the way back is lambda <- lambda^T dS/dphi, and eta's gradient collects lambda^T dS/deta.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.adjoint.base import Adaptation, Adjoint, Gradients, Problem, Programs, Query, Task, Wrt
from adaptrt.errors import InvalidArgument
from adaptrt.step import Batch, Carry

_STEP = ("carry", "fixed", "batch", "noise")


@dataclasses.dataclass(frozen=True, slots=True)
class Replay(Adjoint):
    """Keeps the carry of every n-th step, and evaluates each step once more on the way back.

    Compiles one step, one step's pullback and the query's, whatever k is. Memory is `k / every` copies of the carry (adapted
    parameters, optimiser state, buffers) plus `every` more and one step's activations, where reverse mode through the whole loop keeps k
    steps' activations. Cost: one evaluation of each step besides its pullback, two for `every > 1`. Checkpointing as in Griewank & Walther
    2000 (Algorithm 799), with a uniform schedule.

    Args:
      every: keep every n-th carry; n = sqrt(k) minimises the sum of both memories.
    """

    every: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise InvalidArgument(f"Replay(every={self.every!r}): every must be an int of at least 1")

    def adapt(self, programs: Programs, problem: Problem, task: Task, keep: bool) -> Adaptation:
        step = programs.program("step", problem.step, _STEP)
        carry = first_carry(problem, task)
        kept: list[Carry] = []
        losses: list[Tensor] = []
        for index in range(_num_updates(problem)):
            # The first carry is an argument of the call; the way back takes it from there.
            if keep and index % self.every == 0 and index > 0:
                kept.append(carry)
            carry, loss = step(carry, task.fixed, _batch(problem, task, index), task.noise[index])
            losses.append(loss)
        return Adaptation(carry, torch.stack(losses[:: problem.updates_per_step], -1), kept)

    def adapt_pullback(
        self, programs: Programs, problem: Problem, task: Task, kept: Any, carry: Sequence[Tensor], losses: Tensor
    ) -> Gradients:
        return self._backwards(programs, problem, task, kept, list(carry), losses.unbind(-1), _Sum())

    def meta_loss(self, programs: Programs, problem: Problem, task: Task, query: Query) -> Tensor:
        carry = self.adapt(programs, problem, task, keep=False).carry
        return programs.program("query", problem.step.query, ("carry", "fixed", "query", "noise"))(carry, task.fixed, *query)

    def meta_loss_and_gradients(
        self, programs: Programs, problem: Problem, task: Task, query: Query, cotangent: Tensor
    ) -> tuple[Tensor, Gradients]:
        carry, losses, kept = self.adapt(programs, problem, task, keep=True)
        wrt = Wrt((problem.carry, problem.fixed, problem.query, None), (True,))
        pullback = programs.pullback("query pullback", problem.step.query, ("carry", "fixed", "query", "noise"), wrt, value=True)
        loss, (adjoint, fixed, batch, _) = pullback(carry, task.fixed, *query, [cotangent])
        # No cotangent reaches the support losses; zeros keep one pullback program for this call and for that of `adapt`.
        zeros = torch.zeros_like(losses).unbind(-1)
        gradients = self._backwards(programs, problem, task, kept, list(adjoint), zeros, _Sum(fixed))
        return loss, gradients._replace(query=batch)

    def _backwards(
        self,
        programs: Programs,
        problem: Problem,
        task: Task,
        kept: Sequence[Carry],
        adjoint: list[Tensor],
        losses: Sequence[Tensor],
        fixed: _Sum,
    ) -> Gradients:
        wrt = Wrt((problem.carry, problem.fixed, problem.support, None), (*problem.carry, True))
        pullback = programs.pullback("step pullback", problem.step, _STEP, wrt)
        none = torch.zeros_like(losses[0])
        support = [_Sum() for _ in range(problem.k if problem.per_step else 1)]
        for begin in reversed(range(0, _num_updates(problem), self.every)):
            carries = self._segment(programs, problem, task, kept, begin)
            while carries:
                index = begin + len(carries) - 1
                batch = _batch(problem, task, index)
                # Of the updates of a step, the loss before the first is reported.
                of_step, later = divmod(index, problem.updates_per_step)
                cotangents = [*adjoint, none if later else losses[of_step]]
                adjoint, of_fixed, of_batch, _ = pullback(carries.pop(), task.fixed, batch, task.noise[index], cotangents)
                fixed.add(of_fixed)
                support[of_step if problem.per_step else 0].add(of_batch)
        of_support = support[0].total
        if problem.per_step:
            axis = 1 if problem.task_axis else 0
            of_support = [torch.stack(rows, axis) for rows in zip(*(part.total for part in support), strict=True)]
        return Gradients(_of_start(problem, adjoint), fixed.total, of_support, ())

    def _segment(self, programs: Programs, problem: Problem, task: Task, kept: Sequence[Carry], begin: int) -> list[Carry]:
        """The carries before steps begin, begin + 1, ... up to the next one that was kept."""
        carries = [kept[begin // self.every - 1] if begin else first_carry(problem, task)]
        step = programs.program("step", problem.step, _STEP)
        for index in range(begin, min(begin + self.every, _num_updates(problem)) - 1):
            carries.append(step(carries[-1], task.fixed, _batch(problem, task, index), task.noise[index])[0])
        return carries


class _Sum:
    """A running sum of lists of tensors. The first term is kept as it is, so a sum of one costs nothing."""

    def __init__(self, first: Sequence[Tensor] = ()) -> None:
        self.total = list(first)

    def add(self, terms: Sequence[Tensor]) -> None:
        self.total = [old + new for old, new in zip(self.total, terms, strict=True)] if self.total else list(terms)


def first_carry(problem: Problem, task: Task) -> Carry:
    """The carry to start from, with the task axis that every later carry has."""
    if not problem.task_axis or problem.start_has_task_axis:
        return task.start
    num_tasks = tree.leaves(task.support)[0].shape[0]
    return tree.map_leaves(lambda value: value.unsqueeze(0).expand(num_tasks, *value.shape), task.start)


def _batch(problem: Problem, task: Task, index: int) -> Batch:
    return problem.batch_of_step(task.support, index // problem.updates_per_step, problem.per_step, problem.task_axis)


def _num_updates(problem: Problem) -> int:
    return problem.k * problem.updates_per_step


def _of_start(problem: Problem, adjoint: Sequence[Tensor]) -> list[Tensor]:
    """From cotangents of the first carry to gradients of the leaves that the caller asked for."""
    found = iter(adjoint)
    by_leaf = [next(found) if flag else None for flag in problem.carry]
    wanted = [value for value, flag in zip(by_leaf, problem.start, strict=True) if flag]
    assert all(value is not None for value in wanted), "a leaf that requires grad is always part of the carry's cotangent"
    shared = problem.task_axis and not problem.start_has_task_axis
    return [value.sum(0) if shared else value for value in wanted if value is not None]
