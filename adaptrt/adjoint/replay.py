"""Checkpointing: only carries are kept, and each step is evaluated again on the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from adaptrt.adjoint.base import Adaptation, Adjoint, Gradients, Problem, Programs, Task
from adaptrt.adjoint.steps import STEP, backwards, batch_of_update, first_carry, loop_of, num_updates, reported, wrt_step
from adaptrt.errors import InvalidArgument
from adaptrt.inner.step import Carry


@dataclasses.dataclass(frozen=True, slots=True)
class Replay(Adjoint):
    """Keeps the carry of every n-th step, and evaluates each step once more on the way back.

    Three programs are compiled, whatever k is: a step, a step's pullback and the query's. The memory is that of `k / every + every` copies
    of the carry (adapted parameters, optimiser state, buffers), of one step's activations, and of what all steps share, once for the steps
    and once for their pullbacks; reverse mode through the whole loop keeps k steps' activations. Each step is evaluated once besides its
    pullback, twice for `every > 1`. Checkpointing as in Griewank & Walther 2000 (Algorithm 799), with a uniform schedule.

    Args:
      every: keep every n-th carry; n = sqrt(k) minimises the sum of both memories.
    """

    every: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise InvalidArgument(f"Replay(every={self.every!r}): every must be an int of at least 1")

    def adapt(self, programs: Programs, problem: Problem, task: Task, keep: bool) -> Adaptation:
        loop = loop_of(problem)
        step = programs.program("step", problem.step, STEP, loop)
        carry = first_carry(problem, task)
        kept: list[Carry] = []
        losses: list[Tensor] = []
        for index in range(num_updates(problem)):
            # The first carry is an argument of the call; the way back takes it from there.
            if keep and index % self.every == 0 and index > 0:
                kept.append(carry)
            carry, loss = step(carry, task.fixed, batch_of_update(problem, task, index), task.noise[index])
            losses.append(loss)
        # Steps are evaluated again only between two carries that were kept.
        shared = loop.shared if keep and loop is not None and self.every > 1 else None
        return Adaptation(carry, reported(problem, losses), (shared, kept))

    def adapt_pullback(
        self, programs: Programs, problem: Problem, task: Task, kept: Any, carry: Sequence[Tensor], losses: Tensor
    ) -> Gradients:
        shared, kept_carries = kept
        step = programs.program("step", problem.step, STEP, loop_of(problem, shared))
        pullback = programs.pullback("step pullback", problem.step, STEP, wrt_step(problem), loop=loop_of(problem))
        carries: list[Carry] = []

        def pull(index: int, cotangents: Sequence[Tensor]) -> Any:
            if not carries:
                carries.extend(self._segment(step, problem, task, kept_carries, index - index % self.every, index))
            return pullback(carries.pop(), task.fixed, batch_of_update(problem, task, index), task.noise[index], cotangents)

        return backwards(problem, task, pull, carry, losses)

    def _segment(self, step: Callable[..., Any], problem: Problem, task: Task, kept: Sequence[Carry], begin: int, end: int) -> list[Carry]:
        """The carries before updates begin, begin + 1, ... end, of which the first was kept."""
        carries = [kept[begin // self.every - 1] if begin else first_carry(problem, task)]
        for index in range(begin, end):
            carries.append(step(carries[-1], task.fixed, batch_of_update(problem, task, index), task.noise[index])[0])
        return carries
