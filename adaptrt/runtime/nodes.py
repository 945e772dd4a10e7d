"""Programs as nodes of eager autograd: what is computed from their results may be differentiated once, by running the compiled adjoint.

Differentiating the gradient itself raises; the meta-gradient of a meta-gradient is not a program.
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from adaptrt import tree
from adaptrt.adjoint.base import Adaptation, Gradients, Problem, Query, Task, Wrt
from adaptrt.backend.engine import graph_is_kept
from adaptrt.errors import NonFiniteInput, NotDifferentiable
from adaptrt.inner.step import Carry, Fixed, Step
from adaptrt.runtime.plan import PredictionPlan, QueryPlan, SupportPlan
from adaptrt.runtime.program import Program
from adaptrt.tree import Tree


class Call(NamedTuple):
    """One call, ready to run.

    Attributes:
      plan, query_plan: what to run.
      problem, task, query: on what.
      num_tasks: length of the task axis, None without one.
      inputs: the leaves that the caller differentiates, of start, fixed, support and query in this order.
      alone: the program that is all of it, if there is one.
    """

    plan: SupportPlan
    query_plan: QueryPlan | None
    problem: Problem
    task: Task
    query: Query | None
    num_tasks: int | None
    inputs: tuple[Tensor, ...]
    alone: Program | None = None


def adapt(call: Call) -> tuple[Carry, Tensor]:
    """The carry after k steps and the losses, differentiable if the call has anything to differentiate."""
    if not call.inputs:
        carry, losses, _ = _adapt(call, keep=False)
        return carry, losses
    *leaves, losses = _Adapt.apply(call, *call.inputs)  # type: ignore[misc]
    return tree.unflatten(tree.flatten(call.task.start)[1], leaves), losses


def meta_loss(call: Call) -> Tensor:
    """The query loss, averaged over tasks, differentiable if the call has anything to differentiate."""
    if not call.inputs:
        return _meta_loss(call).mean()
    return _MetaLoss.apply(call, *call.inputs)  # type: ignore[return-value]


# --- one call of the adjoint, which may be one launch; then data is looked at in it


def _adapt(call: Call, keep: bool) -> Adaptation:
    plan, problem = call.plan, call.problem
    if not plan.programs.launches_calls:
        return plan.programs.rehearsed(
            "adapt, kept" if keep else "adapt", lambda: plan.adjoint.adapt(plan.programs, problem, call.task, keep)
        )

    def run(task: Task) -> tuple[Adaptation, Tensor | None]:
        support, is_sound = plan.look_at(task.support)
        return plan.adjoint.adapt(plan.programs, problem, task._replace(support=support), keep), is_sound

    return _if_sound(*plan.programs.launch("adapt, kept" if keep else "adapt", problem.marks, run, call.task))


def _adapt_pullback(call: Call, task: Task, kept: Any, carry: Sequence[Tensor], losses: Tensor) -> Gradients:
    plan, problem = call.plan, call.problem

    def run(task: Task, kept: Any, carry: Sequence[Tensor], losses: Tensor) -> Gradients:
        return plan.adjoint.adapt_pullback(plan.programs, problem, task, kept, carry, losses)

    return plan.programs.launch("adapt pullback", problem.marks, run, task, kept, carry, losses)


def _meta_loss(call: Call) -> Tensor:
    plan, query_plan, problem = call.plan, call.query_plan, call.problem
    assert call.query is not None and query_plan is not None
    if not query_plan.programs.launches_calls:
        programs, query = query_plan.programs, call.query
        return programs.rehearsed("meta-loss", lambda: plan.adjoint.meta_loss(programs, problem, call.task, query))

    def run(task: Task, query: Query) -> tuple[Tensor, Any]:
        task, query, are_sound = _looked_at(plan, query_plan, task, query)
        return plan.adjoint.meta_loss(query_plan.programs, problem, task, query), are_sound

    return _if_sound(*query_plan.programs.launch("meta-loss", problem.marks, run, call.task, call.query))


def _meta_loss_and_gradients(call: Call) -> tuple[Tensor, Gradients]:
    plan, query_plan, problem = call.plan, call.query_plan, call.problem
    assert call.query is not None and query_plan is not None
    if not query_plan.programs.launches_calls:
        programs, query, weights = query_plan.programs, call.query, query_plan.weights
        return programs.rehearsed(
            "meta-gradient", lambda: plan.adjoint.meta_loss_and_gradients(programs, problem, call.task, query, weights)
        )

    def run(task: Task, query: Query) -> tuple[tuple[Tensor, Gradients], Any]:
        task, query, are_sound = _looked_at(plan, query_plan, task, query)
        return plan.adjoint.meta_loss_and_gradients(query_plan.programs, problem, task, query, query_plan.weights), are_sound

    return _if_sound(*query_plan.programs.launch("meta-gradient", problem.marks, run, call.task, call.query))


def _looked_at(plan: SupportPlan, query_plan: QueryPlan, task: Task, query: Query) -> tuple[Task, Query, Tensor | None]:
    support, first = plan.look_at(task.support)
    batch, second = query_plan.look_at(query.batch)
    flags = [flag for flag in (first, second) if flag is not None]
    return task._replace(support=support), query._replace(batch=batch), torch.stack(flags).all() if flags else None


def _if_sound(result: Any, is_sound: Tensor | None) -> Any:
    if is_sound is not None and not is_sound.item():
        raise NonFiniteInput("the data holds NaN, infinity, or an index of what does not exist")
    return result


def _predict(plan: PredictionPlan, step: Step, args: Any) -> Tree:
    if not plan.programs.launches_calls:
        return plan.programs.program("predict", step.predict, _PREDICT)(*args)

    def run(carry: Carry, fixed: Fixed, inputs: Tree, noise: tuple[Tensor, ...]) -> tuple[Tree, Tensor | None]:
        inputs, is_sound = plan.look_at(inputs)
        return plan.programs.program("predict", step.predict, _PREDICT)(carry, fixed, inputs, noise), is_sound

    return _if_sound(*plan.programs.launch("predict", None, run, *args))


def _predict_pullback(plan: PredictionPlan, step: Step, wrt: Wrt, args: Any, cotangents: Sequence[Tensor]) -> Any:
    def run(*args: Tree) -> Tree:
        return plan.programs.pullback("predict pullback", step.predict, _PREDICT, wrt)(*args)

    return plan.programs.launch("predict pullback", wrt, run, *args, cotangents)


# --- calls as nodes


def predict(
    plan: PredictionPlan, step: Step, carry: Carry, fixed: Fixed, inputs: Tree, noise: tuple[Tensor, ...], differentiable: bool
) -> Tree:
    """The model's output, differentiable if asked for and anything requires grad."""
    args = (carry, fixed, inputs, noise)
    if not differentiable:
        return _predict(plan, step, args)
    flags = tuple(tuple(leaf.requires_grad for leaf in tree.leaves(arg)) for arg in args)
    if not any(map(any, flags)):
        return _predict(plan, step, args)
    result: list[Any] = []
    wanted = [leaf for arg, marks in zip(args, flags, strict=True) for leaf, mark in zip(tree.leaves(arg), marks, strict=True) if mark]
    leaves = _Predict.apply(plan, step, args, flags, result, *wanted)
    return tree.unflatten(result[0], leaves)  # type: ignore[arg-type]


_PREDICT = ("carry", "fixed", "batch", "noise")


class _Final(Function):
    """Passes gradients through, and raises where they are differentiated.

    `once_differentiable` would not do: it raises only where the incoming cotangent requires grad, and its node is not connected to the
    inputs, so a gradient penalty on a meta-gradient would silently count for nothing.
    """

    @staticmethod
    def forward(ctx: Any, num_gradients: int, *values: Tensor) -> tuple[Tensor, ...]:
        del ctx
        return tuple(value.view_as(value) for value in values[:num_gradients])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        del ctx, cotangents
        raise NotDifferentiable(
            "a meta-gradient was differentiated (create_graph=True); adaptrt compiles first meta-gradients only. Detach it, or leave out "
            "create_graph"
        )


def _final(gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients of `inputs`, connected to them in a way that raises if `create_graph=True` asked for more than their values."""
    return _Final.apply(len(gradients), *gradients, *inputs) if torch.is_grad_enabled() and gradients else gradients  # type: ignore[return-value]


class _Adapt(Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        carry, losses, ctx.kept = _adapt(call, keep=True)
        ctx.call, ctx.inputs = call._replace(task=None, inputs=()), inputs
        values, ctx.structure = tree.flatten(call.task)
        # Saved rather than kept: PyTorch then notices if one is changed in place before the way back.
        ctx.save_for_backward(*values)
        outputs = tree.leaves(carry)
        ctx.mark_non_differentiable(*[value for value, flows in zip(outputs, call.problem.carry, strict=True) if not flows])
        return *outputs, losses

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        task = tree.unflatten(ctx.structure, ctx.saved_tensors)
        with torch.no_grad():
            carry = [value for value, flows in zip(cotangents, call.problem.carry, strict=False) if flows]
            found = _adapt_pullback(call, task, ctx.kept, carry, cotangents[-1])
        return None, *_final((*found.start, *found.fixed, *found.support), ctx.inputs)


class _MetaLoss(Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor) -> Tensor:
        ctx.inputs = inputs
        if call.alone is not None:
            assert call.query is not None and call.query_plan is not None
            args = (*call.task, *call.query, [call.query_plan.weights])
            losses, *found = call.alone.run_leaves(call.alone.leaves_of(args))
            ctx.found = found[: len(inputs)]
        else:
            losses, found = _meta_loss_and_gradients(call)
            ctx.found = *found.start, *found.fixed, *found.support, *found.query
        return losses.mean() if losses.dim() else losses

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.found
        if found is None:
            raise RuntimeError("backward() was called a second time on a meta-loss; pass retain_graph=True to the first call")
        if not graph_is_kept():
            ctx.found = None
            if cotangent.device.type == "cpu" and cotangent.item() == 1.0:  # as in loss.backward()
                return None, *found
        with torch.no_grad():
            found = [value * cotangent for value in found]
        return None, *_final(found, ctx.inputs)


class _Predict(Function):
    @staticmethod
    def forward(
        ctx: Any, plan: PredictionPlan, step: Step, args: Any, flags: Any, result: list[Any], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        output = _predict(plan, step, args)
        leaves, structure = tree.flatten(output)
        result.append(structure)
        floating = tuple(leaf.is_floating_point() for leaf in leaves)
        ctx.plan, ctx.step, ctx.wrt, ctx.inputs = plan, step, Wrt(flags, floating), inputs
        values, ctx.structure = tree.flatten(args)
        ctx.save_for_backward(*values)
        ctx.mark_non_differentiable(*[leaf for leaf, flag in zip(leaves, floating, strict=True) if not flag])
        return tuple(leaves)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        args = tree.unflatten(ctx.structure, ctx.saved_tensors)
        with torch.no_grad():
            wanted = [value for value, flag in zip(cotangents, ctx.wrt.result, strict=True) if flag]
            found = _predict_pullback(ctx.plan, ctx.step, ctx.wrt, args, wanted)
        return None, None, None, None, None, *_final([value for group in found for value in group], ctx.inputs)
