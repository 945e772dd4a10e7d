"""Programs as nodes of eager autograd: what is computed from their results may be differentiated once, by running the compiled adjoint.

Differentiating the gradient itself raises; the meta-gradient of a meta-gradient is not a program.
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from adaptrt import tree
from adaptrt.adjoint.base import Problem, Query, Task, Wrt
from adaptrt.plan import PredictionPlan, QueryPlan, SupportPlan
from adaptrt.step import Carry, Fixed, Step
from adaptrt.tree import Tree


class Call(NamedTuple):
    """One call, ready to run.

    Attributes:
      plan, query_plan: what to run.
      problem, task, query: on what.
      num_tasks: length of the task axis, None without one.
      inputs: the leaves that the caller differentiates, of start, fixed, support and query in this order.
    """

    plan: SupportPlan
    query_plan: QueryPlan | None
    problem: Problem
    task: Task
    query: Query | None
    num_tasks: int | None
    inputs: tuple[Tensor, ...]


def adapt(call: Call) -> tuple[Carry, Tensor]:
    """The carry after k steps and the losses, differentiable if the call has anything to differentiate."""
    if not call.inputs:
        carry, losses, _ = call.plan.adjoint.adapt(call.plan.programs, call.problem, call.task, keep=False)
        return carry, losses
    *leaves, losses = _Adapt.apply(call, *call.inputs)  # type: ignore[misc]
    return tree.unflatten(tree.flatten(call.task.start)[1], leaves), losses


def meta_loss(call: Call) -> Tensor:
    """The query loss, averaged over tasks, differentiable if the call has anything to differentiate."""
    assert call.query is not None and call.query_plan is not None
    if not call.inputs:
        return call.plan.adjoint.meta_loss(call.query_plan.programs, call.problem, call.task, call.query).mean()
    return _MetaLoss.apply(call, *call.inputs)  # type: ignore[return-value]


def predict(
    plan: PredictionPlan, step: Step, carry: Carry, fixed: Fixed, inputs: Tree, noise: tuple[Tensor, ...], differentiable: bool
) -> Tree:
    """The model's output, differentiable if asked for and anything requires grad."""
    args = (carry, fixed, inputs, noise)
    flags = tuple(tuple(differentiable and leaf.requires_grad for leaf in tree.leaves(arg)) for arg in args)
    if not any(map(any, flags)):
        return plan.programs.program("predict", step.predict, _PREDICT)(*args)
    result: list[Any] = []
    wanted = [leaf for arg, marks in zip(args, flags, strict=True) for leaf, mark in zip(tree.leaves(arg), marks, strict=True) if mark]
    leaves = _Predict.apply(plan, step, args, flags, result, *wanted)
    return tree.unflatten(result[0], leaves)  # type: ignore[arg-type]


_PREDICT = ("carry", "fixed", "batch", "noise")


class _Adapt(Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        del inputs
        carry, losses, ctx.kept = call.plan.adjoint.adapt(call.plan.programs, call.problem, call.task, keep=True)
        ctx.call = call._replace(task=None, inputs=())
        values, ctx.structure = tree.flatten(call.task)
        ctx.save_for_backward(*values)
        outputs = tree.leaves(carry)
        live = [flag or asked for flag, asked in zip(call.plan.live, call.problem.start, strict=True)]
        ctx.mark_non_differentiable(*[value for value, flag in zip(outputs, live, strict=True) if not flag])
        return *outputs, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        task = tree.unflatten(ctx.structure, ctx.saved_tensors)
        carry = [value for value, flows in zip(cotangents, call.problem.carry, strict=False) if flows]
        found = call.plan.adjoint.adapt_pullback(call.plan.programs, call.problem, task, ctx.kept, carry, cotangents[-1])
        return None, *found.start, *found.fixed, *found.support


class _MetaLoss(Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor) -> Tensor:
        del inputs
        assert call.query is not None and call.query_plan is not None
        weights = call.query_plan.weights
        losses, found = call.plan.adjoint.meta_loss_and_gradients(call.query_plan.programs, call.problem, call.task, call.query, weights)
        ctx.found = (*found.start, *found.fixed, *found.support, *found.query)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(value * cotangent for value in ctx.found)


class _Predict(Function):
    @staticmethod
    def forward(
        ctx: Any, plan: PredictionPlan, step: Step, args: Any, flags: Any, result: list[Any], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        del inputs
        output = plan.programs.program("predict", step.predict, _PREDICT)(*args)
        leaves, structure = tree.flatten(output)
        result.append(structure)
        floating = tuple(leaf.is_floating_point() for leaf in leaves)
        ctx.plan, ctx.step, ctx.wrt = plan, step, Wrt(flags, floating)
        values, ctx.structure = tree.flatten(args)
        ctx.save_for_backward(*values)
        ctx.mark_non_differentiable(*[leaf for leaf, flag in zip(leaves, floating, strict=True) if not flag])
        return tuple(leaves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        args = tree.unflatten(ctx.structure, ctx.saved_tensors)
        wanted = [value for value, flag in zip(cotangents, ctx.wrt.result, strict=True) if flag]
        pullback = ctx.plan.programs.pullback("predict pullback", ctx.step.predict, _PREDICT, ctx.wrt)
        found = pullback(*args, wanted)
        return None, None, None, None, None, *(value for group in found for value in group)
