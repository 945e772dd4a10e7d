"""Reverse mode step by step: each step keeps what its pullback needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from adaptrt.adjoint.base import Adaptation, Adjoint, Gradients, Loop, Problem, Programs, Task
from adaptrt.adjoint.steps import STEP, backwards, batch_of_update, first_carry, loop_of, num_updates, reported, wrt_step
from adaptrt.errors import NotDifferentiable


@dataclasses.dataclass(frozen=True, slots=True)
class Stash(Adjoint):
    """Keeps what each step's pullback needs, so that nothing expensive is evaluated twice.

    One step and one step's pullback are compiled, as with `Replay`, whatever k is. It is faster than `Replay` where products and
    convolutions take most of the time. Memory grows with k as in reverse mode through the whole loop, with k steps' activations. A minimum
    cut of the step's graph decides which of them are kept, and which are computed again from those.
    """

    def adapt(self, programs: Programs, problem: Problem, task: Task, keep: bool) -> Adaptation:
        return adapt(programs, problem, task, 0 if keep else None)

    def adapt_pullback(
        self, programs: Programs, problem: Problem, task: Task, kept: Any, carry: Sequence[Tensor], losses: Tensor
    ) -> Gradients:
        return adapt_pullback(programs, problem, task, kept, carry, losses)


def adapt(programs: Programs, problem: Problem, task: Task, first_kept: int | None) -> Adaptation:
    """Runs all steps, and keeps what the pullbacks of some need.

    Args:
      programs, problem, task: as an adjoint gets them.
      first_kept: the update from which on is kept what a pullback needs, None to keep nothing.
    """
    loop = loop_of(problem)
    if first_kept is None:
        return _run(problem, task, _keeping_nothing(programs, problem, loop), None, num_updates(problem), loop)
    step, _ = programs.stashed("step", problem.step, STEP, wrt_step(problem), loop)
    plain = _keeping_nothing(programs, problem, loop) if first_kept else step
    try:
        return _run(problem, task, plain, step, first_kept, loop)
    except NotDifferentiable as error:
        # There is nothing to leave behind. It is raised when the way back is asked for, which it may never be.
        return adapt(programs, problem, task, None)._replace(kept=error.with_traceback(None))


def _keeping_nothing(programs: Programs, problem: Problem, loop: Loop | None) -> Callable[..., Any]:
    plain = programs.program("step", problem.step, STEP, loop)
    return lambda *args: (plain(*args), None)


def _run(problem: Problem, task: Task, plain: Callable[..., Any], step: Any, first_kept: int, loop: Loop | None) -> Adaptation:
    """Runs `plain` up to the update `first_kept`, and `step` from there; keeps what the steps share and, for each that leaves something,
    the carry before it and what it left. The first carry is an argument.
    """
    carry = first_carry(problem, task)
    kept: list[Any] = []
    losses: list[Tensor] = []
    for index in range(num_updates(problem)):
        before = carry if index else None
        run = plain if index < first_kept else step
        (carry, loss), stash = run(carry, task.fixed, batch_of_update(problem, task, index), task.noise[index])
        losses.append(loss)
        if stash is not None:
            kept.append((before, stash))
    shared = None if loop is None else loop.shared
    return Adaptation(carry, reported(problem, losses), (shared, kept) if kept else None)


def adapt_pullback(programs: Programs, problem: Problem, task: Task, kept: Any, carry: Sequence[Tensor], losses: Tensor) -> Gradients:
    """Pulls cotangents back through the updates for which `adapt` kept what that needs; the carry before them is a constant."""
    if isinstance(kept, NotDifferentiable):
        raise kept
    shared, steps = kept
    first_kept = num_updates(problem) - len(steps)
    _, pullback = programs.stashed("step", problem.step, STEP, wrt_step(problem), loop_of(problem, shared))

    def pull(index: int, cotangents: Sequence[Tensor]) -> Any:
        before, stash = steps[index - first_kept]
        before = first_carry(problem, task) if before is None else before
        return pullback(before, task.fixed, batch_of_update(problem, task, index), task.noise[index], stash, cotangents)

    return backwards(problem, task, pull, carry, losses, first_kept)
