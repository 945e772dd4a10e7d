"""Truncated backpropagation: the meta-gradient returns through the last steps only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptrt.adjoint import stash
from adaptrt.adjoint.base import Adaptation, Adjoint, Gradients, Problem, Programs, Task
from adaptrt.errors import InvalidArgument


@dataclasses.dataclass(frozen=True, slots=True)
class Truncated(Adjoint):
    """Differentiates the last n steps; what earlier steps computed is constant (Shaban et al. 2019).

    The meta-gradient is that of a loop whose first k - n steps run without gradients: it is biased, and costs memory and time for n steps,
    whatever k is. So the start gets a gradient of zero if n < k, and hyperparameters and parameters that do not adapt get what the last n
    steps and the query loss contribute. It runs as `Stash()` does, and is equal to it for n >= k.

    Args:
      num_steps: n, at least 1.
    """

    num_steps: int

    def __post_init__(self) -> None:
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise InvalidArgument(f"Truncated({self.num_steps!r}): the number of steps must be an int of at least 1")

    def num_constant_steps(self, k: int) -> int:
        return max(0, k - self.num_steps)

    def adapt(self, programs: Programs, problem: Problem, task: Task, keep: bool) -> Adaptation:
        first_kept = self.num_constant_steps(problem.k) * problem.updates_per_step
        return stash.adapt(programs, problem, task, first_kept if keep else None)

    def adapt_pullback(
        self, programs: Programs, problem: Problem, task: Task, kept: Any, carry: Sequence[Tensor], losses: Tensor
    ) -> Gradients:
        return stash.adapt_pullback(programs, problem, task, kept, carry, losses)
