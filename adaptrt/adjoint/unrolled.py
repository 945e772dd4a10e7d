"""All k steps, the query loss and the meta-gradient in one graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from adaptrt.adjoint.base import Adaptation, Adjoint, Gradients, Problem, Programs, Query, Task, Wrt
from adaptrt.inner.step import Batch, Carry, Fixed
from adaptrt.inner.unroll import unroll


@dataclasses.dataclass(frozen=True, slots=True)
class Unrolled(Adjoint):
    """Reverse mode through the whole loop, as one program.

    It needs the fewest kernel calls, and the compiler sees all of it. Graph and compile time grow with k, and memory holds the activations
    of k steps, so it is right for small models and small k. The pullback of `adapt` runs the steps again rather than keep activations
    between calls.
    """

    takes_any_k = False
    sees_all_data = True

    def adapt_program(self, programs: Programs, problem: Problem) -> Callable[..., Any]:
        return programs.program("adapt", _steps(problem), ("start", "fixed", "support", "noise"))

    def meta_gradient_program(self, programs: Programs, problem: Problem) -> Callable[..., Any]:
        of = problem.differentiated
        wrt = Wrt((of.start, of.fixed, of.support, None, of.query, None), (True,))
        arguments = ("start", "fixed", "support", "noise", "query", "noise")
        return programs.pullback("meta-gradient", _meta_loss(problem), arguments, wrt, value=True)

    def adapt(self, programs: Programs, problem: Problem, task: Task, keep: bool) -> Adaptation:
        del keep
        carry, losses = self.adapt_program(programs, problem)(*task)
        return Adaptation(carry, losses, None)

    def adapt_pullback(
        self, programs: Programs, problem: Problem, task: Task, kept: Any, carry: Sequence[Tensor], losses: Tensor
    ) -> Gradients:
        del kept
        of = problem.differentiated
        wrt = Wrt((of.start, of.fixed, of.support, None), (*problem.carry, True))
        pullback = programs.pullback("adapt pullback", _steps(problem), ("start", "fixed", "support", "noise"), wrt)
        start, fixed, support, _ = pullback(*task, [*carry, losses])
        return Gradients(start, fixed, support, ())

    def meta_loss(self, programs: Programs, problem: Problem, task: Task, query: Query) -> Tensor:
        return programs.program("meta-loss", _meta_loss(problem), ("start", "fixed", "support", "noise", "query", "noise"))(*task, *query)

    def meta_loss_and_gradients(
        self, programs: Programs, problem: Problem, task: Task, query: Query, cotangent: Tensor
    ) -> tuple[Tensor, Gradients]:
        pullback = self.meta_gradient_program(programs, problem)
        loss, (start, fixed, support, _, batch, _) = pullback(*task, *query, [cotangent])
        return loss, Gradients(start, fixed, support, batch)


def _steps(problem: Problem) -> Any:
    def run(start: Carry, fixed: Fixed, support: Batch, noise: Sequence[Sequence[Tensor]]) -> tuple[Carry, Tensor]:
        return unroll(
            problem.step, problem.k, start, fixed, support, noise, per_step=problem.per_step, updates_per_step=problem.updates_per_step
        )

    return run


def _meta_loss(problem: Problem) -> Any:
    def run(
        start: Carry, fixed: Fixed, support: Batch, noise: Sequence[Sequence[Tensor]], query: Batch, query_noise: Sequence[Tensor]
    ) -> Tensor:
        carry, _ = _steps(problem)(start, fixed, support, noise)
        return problem.step.query(carry, fixed, query, query_noise)

    return run
