"""Implicit differentiation: the meta-gradient at a fixed point of the inner steps, whatever steps led there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptrt.adjoint.base import Adaptation, Adjoint, Gradients, Problem, Programs, Task
from adaptrt.adjoint.steps import STEP, batch_of_update, first_carry, loop_of, num_updates, reported, start_gradients, wrt_step
from adaptrt.errors import InvalidArgument, InvalidType
from adaptrt.inner.step import Carry

RESIDUAL, STILL_MOVES = "residual of the linear system", "share of the way that the last step made"
MAX_RESIDUAL, MAX_STILL_MOVES = 0.01, 0.05
"""Above which a warning says that the gradient is not to be trusted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Implicit(Adjoint):
    """The gradient at a fixed point of the steps (Rajeswaran et al. 2019; Lorraine et al. 2020).

    Where phi = S(phi, eta), the derivative is dphi/deta = (I - dS/dphi)^-1 dS/deta. For gradient steps that is the derivative of the
    minimiser: minus the inverse Hessian times the mixed derivative. The inverse is applied by Hessian-vector products, which are the step's
    pullback at the last state. Memory does not depend on k; and as the fixed point does not depend on where the steps started, the start
    gets a gradient of zero, but for what the optimiser remembers of it, such as the anchor of `optim.proximal` (iMAML).

    It is wrong by as much as the steps have not converged. `explain()` says how far the last step went, compared with the whole way, and
    the residual of the linear system; where one of them is large, there is a warning (on the CPU, where looking costs little). The losses
    that `adapt` returns are constants.

    Args:
      solver: "cg" for conjugate gradients, which need a symmetric dS/dphi: one learning rate for all parameters. "neumann" for the
        series, which needs steps that contract, as all steps that converge do.
      iterations: Hessian-vector products, at least 1.
      damping: added to the diagonal of I - dS/dphi, at least 0; for "cg" where the Hessian is singular or has negative curvature.
      tolerance: conjugate gradients leave a task alone once its residual, relative to the right-hand side, is below this.
    """

    solver: str = "cg"
    iterations: int = 20
    damping: float = 0.0
    tolerance: float = 1e-10

    needs_fixed_point = True

    def __post_init__(self) -> None:
        if self.solver not in ("cg", "neumann"):
            raise InvalidArgument(f"Implicit(solver={self.solver!r}): the solver must be 'cg' or 'neumann'")
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise InvalidArgument(f"Implicit(iterations={self.iterations!r}): it must be an int of at least 1")
        for name in ("damping", "tolerance"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InvalidType(f"Implicit({name}={value!r}): it must be a number")
            if not (value >= 0 and math.isfinite(value)):
                raise InvalidArgument(f"Implicit({name}={value!r}): it must be a finite number of at least 0")

    def adapt(self, programs: Programs, problem: Problem, task: Task, keep: bool) -> Adaptation:
        step = programs.program("step", problem.step, STEP, loop_of(problem))
        carry = before = first = first_carry(problem, task)
        losses: list[Tensor] = []
        for index in range(num_updates(problem)):
            before = carry
            carry, loss = step(carry, task.fixed, batch_of_update(problem, task, index), task.noise[index])
            losses.append(loss)
        if keep:
            way, last = (_norm(problem, _difference(carry, other)) for other in (first, before))
            programs.report(STILL_MOVES, last / torch.where(way > 0, way, 1.0), MAX_STILL_MOVES, _ADVICE)
        return Adaptation(carry, reported(problem, losses), carry if keep else None)

    def adapt_pullback(
        self, programs: Programs, problem: Problem, task: Task, kept: Any, carry: Sequence[Tensor], losses: Tensor
    ) -> Gradients:
        pullback = programs.pullback("step pullback", problem.step, STEP, wrt_step(problem), loop=loop_of(problem))
        batch, noise = batch_of_update(problem, task, 0), task.noise[0]
        num_params = len(kept.params)
        state = list(carry[num_params:])
        nothing = [*[torch.zeros_like(value) for value in state], torch.zeros_like(losses.select(-1, 0))]
        layout = _Layout(problem, carry[:num_params])

        def pull(vector: Tensor) -> Any:
            return pullback(kept, task.fixed, batch, noise, [*layout.split(vector), *nothing])

        def product(vector: Tensor) -> Tensor:
            return (1.0 + self.damping) * vector - layout.joined(pull(vector)[0][:num_params])

        right = layout.joined(carry[:num_params])
        solve = self._conjugate_gradients if self.solver == "cg" else self._neumann
        found = solve(layout, product, right)
        of_carry, of_fixed, of_batch, _ = pull(found)
        residual = right - ((1.0 + self.damping) * found - layout.joined(of_carry[:num_params]))
        size = layout.norm(right)
        programs.report(RESIDUAL, layout.norm(residual) / torch.where(size > 0, size, 1.0), MAX_RESIDUAL, _ADVICE)
        of_state = [own + through for own, through in zip(state, of_carry[num_params:], strict=True)]
        of_start = start_gradients(problem, [*[torch.zeros_like(value) for value in carry[:num_params]], *of_state])
        return Gradients(of_start, of_fixed, of_batch, ())

    def _conjugate_gradients(self, layout: _Layout, product: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
        found, residual = torch.zeros_like(right), right
        direction, square = right, layout.dot(right, right)
        limit = square * self.tolerance**2
        for _ in range(self.iterations):
            image = product(direction)
            curvature = layout.dot(direction, image)
            length = torch.where((square > limit) & (curvature != 0), square / torch.where(curvature != 0, curvature, 1.0), 0.0)
            found = found + layout.wide(length) * direction
            residual = residual - layout.wide(length) * image
            after = layout.dot(residual, residual)
            direction = residual + layout.wide(after / torch.where(square > 0, square, 1.0)) * direction
            square = after
        return found

    def _neumann(self, layout: _Layout, product: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
        scale = 1.0 / (1.0 + self.damping)
        found = right * scale
        for _ in range(self.iterations):
            found = found + scale * (right - product(found))
        return found


_ADVICE = (
    "the meta-gradient of Implicit() is not that of a fixed point; make more steps or larger ones, allow the solver more iterations, or "
    "use an exact adjoint. unroll.explain() has the number"
)


class _Layout(NamedTuple):
    """How cotangents of the parameters lie in one vector, [N], or [T, N] with tasks."""

    problem: Problem
    like: Sequence[Tensor]

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        axis = int(self.problem.task_axis)
        return torch.cat([value.flatten(axis) if value.dim() > axis else value.unsqueeze(-1) for value in values], -1)

    def split(self, vector: Tensor) -> list[Tensor]:
        axis = int(self.problem.task_axis)
        parts = vector.split([math.prod(value.shape[axis:]) for value in self.like], -1)
        return [part.reshape(value.shape).to(value.dtype) for part, value in zip(parts, self.like, strict=True)]

    def dot(self, one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum(-1)

    def norm(self, vector: Tensor) -> Tensor:
        return self.dot(vector, vector).sqrt()

    def wide(self, number: Tensor) -> Tensor:
        return number.unsqueeze(-1)


def _difference(one: Carry, other: Carry) -> list[Tensor]:
    return [new - old for new, old in zip(one.params.values(), other.params.values(), strict=True)]


def _norm(problem: Problem, values: Sequence[Tensor]) -> Tensor:
    layout = _Layout(problem, values)
    return layout.norm(layout.joined(values))
