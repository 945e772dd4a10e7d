"""Makes calls nodes of eager autograd: `backward()` through their results runs the compiled adjoint.

A gradient cannot itself be differentiated: there is no program for the meta-gradient of a meta-gradient, so that raises.
"""

# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from adaptrt import tree
from adaptrt.adjoint.base import Adaptation, Gradients, Query, Task, Wrt
from adaptrt.adjoint.each_task import EachTask, along_tasks, fixed_of_tasks
from adaptrt.backend.engine import graph_is_kept, refuse_freed
from adaptrt.backend.entry_points import entry_point
from adaptrt.errors import NotDifferentiable
from adaptrt.inner import unroll as inner
from adaptrt.inner.guard import guarded
from adaptrt.inner.step import Batch, Carry, Fixed, as_data
from adaptrt.runtime.calls import Validate
from adaptrt.runtime.plan import GuardPlan, PredictionPlan, QueryPlan, SupportPlan
from adaptrt.runtime.route import Route
from adaptrt.tree import Tree


class Call(NamedTuple):
    """A call that is ready to run.

    Attributes:
      route: the plans and the problem to run.
      task, query: the arguments.
      inputs: the leaves that the caller differentiates, of start, fixed, support and query in this order.
    """

    route: Route
    task: Task
    query: Query | None
    inputs: tuple[Tensor, ...]


def adapt(call: Call) -> tuple[Sequence[Tensor], Tensor]:
    """Returns the carry's leaves after k steps and the losses, differentiable if the call has anything to differentiate."""
    if not call.inputs:
        carry, losses, _ = _adapt(call, keep=False)
        return call.route.form.leaves(carry), losses
    *leaves, losses = _Adapt.apply(call, *call.inputs)  # type: ignore[misc]
    return leaves, losses


def meta_loss(call: Call) -> Tensor:
    """Returns the query loss, averaged over tasks, differentiable if the call has anything to differentiate."""
    if not call.inputs:
        return _meta_loss(call).mean()
    return _MetaLoss.apply(call, *call.inputs)  # type: ignore[return-value]


# --- the functions that a call runs


def _adapt(call: Call, keep: bool) -> Adaptation:
    plan, problem = call.route.plan, call.route.problem

    def run(task: Task) -> Adaptation:
        return plan.adjoint.adapt(plan.programs, problem, task, keep)

    def validate(task: Task) -> tuple[tuple[Task], Tensor | None]:
        support, is_valid = plan.validation.within(task.support, plan.probe.bounds)
        return (task._replace(support=support),), is_valid

    return plan.calls.run("adapt, kept" if keep else "adapt", problem.key, run, (call.task,), validate)


def _adapt_pullback(call: Call, task: Task, kept: Any, carry: Sequence[Tensor], losses: Tensor) -> Gradients:
    plan, problem = call.route.plan, call.route.problem

    def run(task: Task, kept: Any, carry: Sequence[Tensor], losses: Tensor) -> Gradients:
        return plan.adjoint.adapt_pullback(plan.programs, problem, task, kept, carry, losses)

    return plan.calls.run("adapt pullback", problem.key, run, (task, kept, carry, losses))


def _meta_loss(call: Call) -> Tensor:
    plan, query_plan, problem = call.route.plan, call.route.query_plan, call.route.problem
    assert query_plan is not None

    def run(task: Task, query: Query) -> Tensor:
        return plan.adjoint.meta_loss(query_plan.programs, problem, task, query)

    return query_plan.calls.run("meta-loss", problem.key, run, (call.task, call.query), _validate_both(plan, query_plan))


def _meta_loss_and_gradients(call: Call) -> tuple[Tensor, Gradients]:
    plan, query_plan, problem = call.route.plan, call.route.query_plan, call.route.problem
    assert query_plan is not None

    def run(task: Task, query: Query) -> tuple[Tensor, Gradients]:
        return plan.adjoint.meta_loss_and_gradients(query_plan.programs, problem, task, query, query_plan.weights)

    return query_plan.calls.run("meta-gradient", problem.key, run, (call.task, call.query), _validate_both(plan, query_plan))


def _validate_both(plan: SupportPlan, query_plan: QueryPlan) -> Validate:
    def validate(task: Task, query: Query) -> tuple[tuple[Task, Query], Tensor | None]:
        support, first = plan.validation.within(task.support, plan.probe.bounds)
        batch, second = plan.validation.within(query.batch, query_plan.probe.bounds)
        flags = [flag for flag in (first, second) if flag is not None]
        args = task._replace(support=support), query._replace(batch=batch)
        return args, torch.stack(flags).all() if flags else None

    return validate


class _Computation(NamedTuple):
    """One program that is a whole call, and its pullback.

    Attributes:
      name, function, kinds: of the program, as for `adaptrt.adjoint.base.Programs`.
      plan: holds the programs, and what runs them.
      validate: as for `Calls.run`.
    """

    name: str
    function: Callable[..., Tree]
    kinds: tuple[str, ...]
    plan: PredictionPlan | GuardPlan | SupportPlan
    validate: Validate | None = None

    def __call__(self, args: Any) -> Tree:
        def run(*args: Tree) -> Tree:
            return self.plan.programs.program(self.name, self.function, self.kinds)(*args)

        return self.plan.calls.run(self.name, None, run, args, self.validate)

    def pullback(self, wrt: Wrt, args: Any, cotangents: Sequence[Tensor]) -> Any:
        name = f"{self.name} pullback"

        def run(*args: Tree) -> Tree:
            return self.plan.programs.pullback(name, self.function, self.kinds, wrt)(*args)

        return self.plan.calls.run(name, wrt, run, (*args, cotangents))


# --- calls as nodes


def predict(plan: PredictionPlan, carry: Carry, fixed: Fixed, data: Tree, noise: tuple[Tensor, ...]) -> Tree:
    """Returns what the plan is for, differentiable if gradients are enabled and anything requires grad."""

    def validate(carry: Carry, fixed: Fixed, data: Tree, noise: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], Tensor | None]:
        batch, is_valid = plan.validation.within(as_data(data), plan.bounds)
        return (carry, fixed, batch if plan.is_of_batch else batch.inputs, noise), is_valid

    return _computed(_Computation(plan.name, plan.function, _PREDICT, plan, validate), (carry, fixed, data, noise))


def guard(plan: GuardPlan, each_task: bool, start_has_tasks: bool, args: tuple[Tree, ...]) -> tuple[Tensor, Tensor, Carry]:
    """Returns what `guarded` does of these arguments, differentiable if gradients are enabled and anything requires grad.

    Args:
      plan: of the guard.
      each_task: whether programs know of no task axis, and do one task after another.
      start_has_tasks: whether the state before the first step has a task axis.
      args: of `guarded`.
    """
    computation = _Computation("guard", functools.partial(guarded, plan.step), _GUARD, plan)
    return _computed_each(computation, args, start_has_tasks) if each_task else _computed(computation, args)


FIRST_STEP = "first step"


def first_step(route: Route, task: Task) -> tuple[Carry, Tensor, Tree]:
    """Returns what the function of that name in `adaptrt.inner.unroll` does, differentiable in the same way, with tasks if there are."""
    plan, problem = route.plan, route.problem

    def validate(start: Carry, fixed: Fixed, support: Batch, noise: Tree) -> tuple[tuple[Any, ...], Tensor | None]:
        support, is_valid = plan.validation.within(support, plan.probe.bounds)
        return (start, fixed, support, noise), is_valid

    computation = _Computation(
        FIRST_STEP, functools.partial(inner.first_step, plan.step, per_step=problem.per_step), _FIRST_STEP, plan, validate
    )
    args = task._replace(noise=task.noise[: problem.updates_per_step])
    if isinstance(plan.adjoint, EachTask):
        return _computed_each(computation, args, problem.start_has_task_axis)
    return _computed(computation, args)


def _computed_each(computation: _Computation, args: Sequence[Tree], start_has_tasks: bool) -> Any:
    """Does the same as `_computed` for one task after another, by programs that know of no task axis."""
    named = dict(zip(computation.kinds, args, strict=True))
    rows = along_tasks({kind: arg for kind, arg in named.items() if kind != "fixed" and (kind != "start" or start_has_tasks)})
    fixed = fixed_of_tasks(named["fixed"], len(rows))
    of_tasks = [tuple({**named, **row, "fixed": own}.values()) for row, own in zip(rows, fixed, strict=True)]
    return tree.map_leaves(lambda *values: torch.stack(values), *[_computed(computation, own) for own in of_tasks])


def _computed(computation: _Computation, args: tuple[Tree, ...]) -> Any:
    if not torch.is_grad_enabled():
        return computation(args)
    flags = tuple(tuple(leaf.requires_grad for leaf in tree.leaves(arg)) for arg in args)
    if not any(map(any, flags)):
        return computation(args)
    result: list[Any] = []
    wanted = [leaf for arg, marks in zip(args, flags, strict=True) for leaf, mark in zip(tree.leaves(arg), marks, strict=True) if mark]
    leaves = _Computed.apply(computation, args, flags, result, *wanted)
    return tree.unflatten(result[0], leaves)  # type: ignore[arg-type]


_PREDICT = ("carry", "fixed", "batch", "noise")
_GUARD = ("start", "carry", "fixed", "batch", "losses", "noise")
_FIRST_STEP = ("start", "fixed", "support", "noise")


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
    @entry_point
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        del ctx, cotangents
        raise NotDifferentiable(
            "a meta-gradient was differentiated (create_graph=True); adaptrt compiles first meta-gradients only. Detach it, or leave out "
            "create_graph"
        )


def _final(gradients: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns the gradients of `inputs`; under `create_graph=True`, connected by a node that raises to all that they depend on.

    They depend on the cotangents, too: a weight of the meta-loss, for example, or what `torch.autograd.functional.jvp` differentiates.
    """
    if not gradients or not torch.is_grad_enabled():
        return gradients
    return _Final.apply(len(gradients), *gradients, *inputs, *cotangents)  # type: ignore[return-value]


def _saveable(part: Tree) -> tuple[list[Tensor], tree.Structure]:
    """Returns the tensors of a tree, with copies of those made in inference mode, which autograd does not save; and its structure."""
    values, structure = tree.flatten(part)
    return [value.clone() if value.is_inference() else value for value in values], structure


def _computed_hyper(call: Call) -> Sequence[Tensor]:
    """Returns the hyperparameters that are differentiated and were computed from something else."""
    if True not in call.route.problem.differentiated.fixed:
        return ()
    return [value for value in tree.leaves(call.task.fixed.hyper) if value.grad_fn is not None]


class _Adapt(Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        carry, losses, ctx.kept = _adapt(call, keep=True)
        ctx.call, ctx.inputs = call._replace(task=None, inputs=()), inputs
        ctx.computed = _computed_hyper(call)
        values, ctx.structure = _saveable(call.task)
        # Saved rather than kept: PyTorch then notices if one is changed in place before the way back.
        ctx.save_for_backward(*values)
        outputs = tree.leaves(carry)
        ctx.mark_non_differentiable(*[value for value, flows in zip(outputs, call.route.problem.carry, strict=True) if not flows])
        return *outputs, losses

    @staticmethod
    @entry_point
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        if ctx.computed:
            refuse_freed(ctx.computed)
        task = tree.unflatten(ctx.structure, ctx.saved_tensors)
        with torch.no_grad():
            carry = [value for value, flows in zip(cotangents, call.route.problem.carry, strict=False) if flows]
            found = _adapt_pullback(call, task, ctx.kept, carry, cotangents[-1])
        return None, *_final((*found.start, *found.fixed, *found.support), ctx.inputs, cotangents)


class _MetaLoss(Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor) -> Tensor:
        ctx.inputs = inputs
        ctx.computed = _computed_hyper(call)
        whole = call.route.whole
        if whole is not None:
            assert call.query is not None and call.route.query_plan is not None
            args = (*call.task, *call.query, [call.route.query_plan.weights])
            losses, *found = whole.run_leaves(whole.leaves_of(args))
            ctx.found = found[: len(inputs)]
        else:
            losses, found = _meta_loss_and_gradients(call)
            ctx.found = *found.start, *found.fixed, *found.support, *found.query
        return losses.mean() if losses.dim() else losses

    @staticmethod
    @entry_point
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.found
        if found is None:
            raise RuntimeError("backward() was called a second time on a meta-loss; pass retain_graph=True to the first call")
        if ctx.computed:
            refuse_freed(ctx.computed)
        if not graph_is_kept():
            ctx.found = None
            if not torch.is_grad_enabled() and cotangent.device.type == "cpu" and _is_one(cotangent):  # as in loss.backward()
                return None, *found
        with torch.no_grad():
            found = [value * cotangent for value in found]
        return None, *_final(found, ctx.inputs, (cotangent,))


def _is_one(cotangent: Tensor) -> bool:
    try:
        return cotangent.item() == 1.0
    except RuntimeError:  # it stands for several, which were asked for at once
        return False


class _Computed(Function):
    @staticmethod
    def forward(ctx: Any, computation: _Computation, args: Any, flags: Any, result: list[Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        output = computation(args)
        leaves, structure = tree.flatten(output)
        result.append(structure)
        floating = tuple(leaf.is_floating_point() for leaf in leaves)
        ctx.computation, ctx.wrt, ctx.inputs = computation, Wrt(flags, floating), inputs
        values, ctx.structure = _saveable(args)
        ctx.save_for_backward(*values)
        ctx.mark_non_differentiable(*[leaf for leaf, flag in zip(leaves, floating, strict=True) if not flag])
        return tuple(leaves)

    @staticmethod
    @entry_point
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        args = tree.unflatten(ctx.structure, ctx.saved_tensors)
        with torch.no_grad():
            wanted = [value for value, flag in zip(cotangents, ctx.wrt.result, strict=True) if flag]
            found = ctx.computation.pullback(ctx.wrt, args, wanted)
        return None, None, None, None, *_final([value for group in found for value in group], ctx.inputs, cotangents)
