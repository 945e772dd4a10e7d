"""Implicit differentiation: the meta-gradient at a fixed point of the inner steps, whatever steps led there."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptrt.adjoint.base import Adaptation, Adjoint, Gradients, Problem, Programs, Task
from adaptrt.adjoint.steps import STEP, batch_of_update, first_carry, loop_of, num_updates, reported, start_gradients, wrt_step
from adaptrt.errors import InvalidArgument, InvalidType
from adaptrt.inner.step import Carry

RESIDUAL, ASYMMETRY = "residual of the linear system", "asymmetry of the linear system"
DISTANCE = "distance to the fixed point, relative to the parameters"
MAX_RESIDUAL, MAX_ASYMMETRY, MAX_DISTANCE = 0.01, 1e-3, 0.05
"""Above which a warning says that the gradient is not to be trusted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Implicit(Adjoint):
    """The gradient at a fixed point of the steps (Rajeswaran et al. 2019; Lorraine et al. 2020).

    Where phi = S(phi, eta), the derivative is dphi/deta = (I - dS/dphi)^-1 dS/deta. For gradient steps that is the derivative of the
    minimiser: minus the inverse Hessian times the mixed derivative. The inverse is applied by Hessian-vector products, which are the step's
    pullback at the last state. Memory does not depend on k; and as the fixed point does not depend on where the steps started, the start
    gets a gradient of zero, but for what the optimiser remembers of it, such as the anchor of `optim.proximal` (iMAML).

    It is wrong by as much as the steps have not converged. `explain()` says how far the fixed point still is, which is estimated from the
    last two steps as if each were the same multiple of the one before, and the residual of the linear system; with "cg" also how far the
    system is from a symmetric one. Where one of them is large, there is a warning (on the CPU, where looking costs little). The losses that
    `adapt` returns are constants.

    Args:
      solver: "cg" for conjugate gradients, which need a symmetric dS/dphi: one learning rate for all parameters, and no rule that mixes
        them. "neumann" for the series, which needs steps that contract, as all steps that converge do.
      iterations: Hessian-vector products, at least 1. All of them are made.
      damping: added to the diagonal of I - dS/dphi, at least 0; for "cg" where the Hessian is singular or has negative curvature.
      tolerance: conjugate gradients change the result for a task no more once its residual, relative to the right-hand side, is below this.
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
        carry = first_carry(problem, task)
        last = [carry]
        losses: list[Tensor] = []
        for index in range(num_updates(problem)):
            carry, loss = step(carry, task.fixed, batch_of_update(problem, task, index), task.noise[index])
            losses.append(loss)
            last = [*last[-2:], carry]
        if keep:
            programs.report(DISTANCE, _distance_left(problem, last), MAX_DISTANCE, _OF_STEPS)
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

        # Scaled, and in single precision at least, so that squares of small numbers are not 0.
        right = layout.joined(carry[:num_params])
        right = right.to(torch.promote_types(right.dtype, torch.float32))
        largest = right.abs().amax(-1)
        unit = layout.wide(torch.where(largest > 0, largest, 1.0))
        if self.solver == "cg":
            found, asymmetry = self._conjugate_gradients(layout, product, right / unit)
            programs.report(ASYMMETRY, asymmetry, MAX_ASYMMETRY, _OF_SYMMETRY)
        else:
            found = self._neumann(layout, product, right / unit)
        found = found * unit
        of_carry, of_fixed, of_batch, _ = pull(found)
        residual = right - ((1.0 + self.damping) * found - layout.joined(of_carry[:num_params]))
        size = layout.norm(right / unit)
        programs.report(RESIDUAL, layout.norm(residual / unit) / torch.where(size > 0, size, 1.0), MAX_RESIDUAL, _OF_SOLVER)
        of_state = [own + through for own, through in zip(state, of_carry[num_params:], strict=True)]
        of_start = start_gradients(problem, [*[torch.zeros_like(value) for value in carry[:num_params]], *of_state])
        return Gradients(of_start, of_fixed, of_batch, ())

    def _conjugate_gradients(self, layout: _Layout, product: Callable[[Tensor], Tensor], right: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the iterate of the least residual, and how far the products were from those of a symmetric matrix, relative to them."""
        found, residual = torch.zeros_like(right), right
        direction, square = right, layout.dot(right, right)
        limit = square * self.tolerance**2
        best, least, asymmetry = found, square, torch.zeros_like(square)
        last: tuple[Tensor, Tensor] | None = None
        for _ in range(self.iterations):
            image = product(direction)
            if last is not None:
                difference = (layout.dot(direction, last[1]) - layout.dot(last[0], image)).abs()
                size = layout.norm(direction) * layout.norm(last[1])
                asymmetry = torch.where((square > limit) & (size > 0), torch.maximum(asymmetry, difference / size), asymmetry)
            last = direction, image
            curvature = layout.dot(direction, image)
            length = torch.where((square > limit) & (curvature != 0), square / torch.where(curvature != 0, curvature, 1.0), 0.0)
            found = found + layout.wide(length) * direction
            residual = residual - layout.wide(length) * image
            after = layout.dot(residual, residual)
            direction = residual + layout.wide(after / torch.where(square > 0, square, 1.0)) * direction
            square = after
            is_better = square < least
            best, least = torch.where(layout.wide(is_better), found, best), torch.where(is_better, square, least)
        return best, asymmetry

    def _neumann(self, layout: _Layout, product: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
        scale = 1.0 / (1.0 + self.damping)
        found = right * scale
        for _ in range(self.iterations):
            found = found + scale * (right - product(found))
        return found


_WRONG = "the meta-gradient of Implicit() is not to be trusted; "
_OF_STEPS = _WRONG + "make more steps or larger ones, or use an exact adjoint. unroll.explain() has the number"
_OF_SOLVER = _WRONG + "allow the solver more iterations, or some damping, or use an exact adjoint. unroll.explain() has the number"
_OF_SYMMETRY = (
    _WRONG + "conjugate gradients need one learning rate for all parameters, and an optimiser that does not mix them; use "
    "Implicit(solver='neumann'), or an exact adjoint"
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


def _distance_left(problem: Problem, last: Sequence[Carry]) -> Tensor:
    """Returns how far the fixed point is from the last of three states, relative to its norm, as if steps shrank by the same factor."""
    before, move = (_norm(problem, _difference(new, old)) for old, new in itertools.pairwise(last))
    size = _norm(problem, list(last[-1].params.values()))
    size = torch.where(size > 0, size, 1.0)
    factor = torch.where(before > 0, move / torch.where(before > 0, before, 1.0), 0.0)
    left = move / (1.0 - factor).clamp(min=1e-6) / size
    return torch.where(move <= 8 * torch.finfo(move.dtype).eps * size, 0.0, left)  # which is rounding


def _norm(problem: Problem, values: Sequence[Tensor]) -> Tensor:
    layout = _Layout(problem, values)
    joined = layout.joined(values)
    return layout.norm(joined.to(torch.promote_types(joined.dtype, torch.float32)))
