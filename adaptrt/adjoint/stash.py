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
        loop = loop_of(problem)
        if keep:
            step, _ = programs.stashed("step", problem.step, STEP, wrt_step(problem), loop)
            try:
                return self._run(problem, task, step, loop)
            except NotDifferentiable as error:
                # There is nothing to leave behind. It is raised when the way back is asked for, which it may never be.
                return self.adapt(programs, problem, task, keep=False)._replace(kept=error.with_traceback(None))
        plain = programs.program("step", problem.step, STEP, loop)
        return self._run(problem, task, lambda *args: (plain(*args), None), loop)

    def _run(self, problem: Problem, task: Task, step: Callable[..., Any], loop: Loop | None) -> Adaptation:
        """Runs all steps, and keeps what they share and, for each, the carry before it and what it left; the first carry is an argument."""
        carry = first_carry(problem, task)
        kept: list[Any] = []
        losses: list[Tensor] = []
        for index in range(num_updates(problem)):
            before = carry if index else None
            (carry, loss), stash = step(carry, task.fixed, batch_of_update(problem, task, index), task.noise[index])
            losses.append(loss)
            if stash is not None:
                kept.append((before, stash))
        shared = None if loop is None else loop.shared
        return Adaptation(carry, reported(problem, losses), (shared, kept) if kept else None)

    def adapt_pullback(
        self, programs: Programs, problem: Problem, task: Task, kept: Any, carry: Sequence[Tensor], losses: Tensor
    ) -> Gradients:
        if isinstance(kept, NotDifferentiable):
            raise kept
        shared, steps = kept
        _, pullback = programs.stashed("step", problem.step, STEP, wrt_step(problem), loop_of(problem, shared))

        def pull(index: int, cotangents: Sequence[Tensor]) -> Any:
            before, stash = steps[index]
            before = first_carry(problem, task) if before is None else before
            return pullback(before, task.fixed, batch_of_update(problem, task, index), task.noise[index], stash, cotangents)

        return backwards(problem, task, pull, carry, losses)
