"""First-order MAML: the meta-gradient with the inner gradients held constant."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptrt.adjoint.base import Adaptation, Adjoint, Gradients, Problem, Programs, Task
from adaptrt.adjoint.replay import Replay


@dataclasses.dataclass(frozen=True, slots=True)
class FirstOrder(Adjoint):
    """First-order MAML (Finn et al. 2017, section 5.2): a biased meta-gradient at the cost of k + 1 gradients.

    Each step's gradient is a constant, so dS/dphi holds the optimiser's own dependence on the parameters only (the identity for plain SGD).
    Gradients of hyperparameters keep every term but those through the inner gradients; a parameter that does not adapt gets its gradient
    from the query loss only. Attention keeps its fused kernels, since nothing is differentiated twice. It runs as `Replay(every=1)` does.
    """

    detach_gradient = True

    def adapt(self, programs: Programs, problem: Problem, task: Task, keep: bool) -> Adaptation:
        return _REPLAY.adapt(programs, problem, task, keep)

    def adapt_pullback(
        self, programs: Programs, problem: Problem, task: Task, kept: Any, carry: Sequence[Tensor], losses: Tensor
    ) -> Gradients:
        return _REPLAY.adapt_pullback(programs, problem, task, kept, carry, losses)


_REPLAY = Replay()
