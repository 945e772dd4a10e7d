"""Runs the calls of one unroll: finds what runs them, draws their noise, and makes results of what programs return."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.adjoint.base import Query, Task
from adaptrt.adjoint.each_task import EachTask
from adaptrt.errors import InvalidArgument, InvalidType, NonFiniteInput, OptimizerMismatch
from adaptrt.graph.noise import restored_on_any_error, restored_on_error
from adaptrt.inner import check
from adaptrt.inner.guard import Guard, Guards
from adaptrt.inner.reader import Reader, Start
from adaptrt.inner.step import Batch, Carry, as_call
from adaptrt.inner.unroll import batch_of_step
from adaptrt.runtime import nodes
from adaptrt.runtime.adapted import Adapted, is_of_unroll_of, num_links_after
from adaptrt.runtime.exportable import Exporter
from adaptrt.runtime.nodes import Call
from adaptrt.runtime.plan import PredictionPlan, SupportPlan
from adaptrt.runtime.planner import Planner
from adaptrt.runtime.predict import ModelPredictor
from adaptrt.runtime.program import Program
from adaptrt.runtime.route import Route, Router
from adaptrt.runtime.saved import Source
from adaptrt.runtime.settings import Settings
from adaptrt.runtime.state import State


class Result(NamedTuple):
    """What `CompiledUnroll.evaluate` returns.

    Attributes:
      loss: the meta-loss, the mean of `losses`; a scalar.
      adapted: the model after adaptation.
      outputs: what the adapted model returns for the query inputs.
      losses: the query loss of each task, [T], or [] without a task axis.
    """

    loss: Tensor
    adapted: Adapted
    outputs: Any
    losses: Tensor


class Execution:
    """Runs the calls of an unroll.

    Args:
      settings: of the unroll.
      task_axis: whether data has a leading axis of tasks.
      of_one_step: whether it makes the single steps of another.
    """

    def __init__(self, settings: Settings, task_axis: bool, of_one_step: bool = False) -> None:
        self.settings = settings
        self.task_axis = task_axis
        what = settings.model, settings.loss, settings.query_loss, settings.adapted, settings.source, settings.device
        reader = Reader(*what, dtype=settings.dtype, selection=settings.selection)
        self.planner = Planner(settings, reader, of_one_step)
        self.router = Router(settings, task_axis, reader, self.planner)
        self._predictor = ModelPredictor(settings, reader, self.planner)
        self._guards = Guards()

    def first(
        self, params: Mapping[str, Tensor] | None, opt_state: Any, buffers: Mapping[str, Tensor] | None, num_tasks: int | None
    ) -> Adapted:
        """As `CompiledUnroll.start`."""
        return self.router.first(self._predictor, params, opt_state, buffers, num_tasks)

    def load(self, source: Source, fingerprint: Mapping[str, str] | None) -> Adapted:
        """As `CompiledUnroll.load`."""
        return self.router.loaded(self._predictor, source, fingerprint)

    def fingerprint(self) -> dict[str, str]:
        """As `CompiledUnroll.fingerprint`."""
        return self.router.fingerprint(self._predictor)

    def predict_from(self, start: Adapted | None, query: Any, generator: torch.Generator | None) -> Any:
        """As `CompiledUnroll.predict`."""
        if start is None:
            start = self.first(None, None, None, None)
        elif not isinstance(start, Adapted):
            raise InvalidType(f"start must be what adapt(), start() or load() returned, got {type(start).__name__}")
        elif not is_of_unroll_of(start, self._predictor):
            raise OptimizerMismatch("start was adapted with another unroll; predict with that, or call start itself")
        args, kwargs = as_call(query)
        return self._predictor.predict(start.state, start.fixed, kwargs or args, generator)

    def adapt(
        self,
        support: Any,
        start: Adapted | None,
        generator: torch.Generator | None,
        warm: bool = False,
        keep: Any = None,
        k: int | None = None,
        outputs: str | None = None,
    ) -> Adapted:
        """As `CompiledUnroll.adapt`. `warm`: whether plans may be made although data of new shapes is refused; `k`: of steps."""
        guard = None if keep is None else self._guard(keep)
        route, begin, batch, _, inputs = self.router.find(support, None, start, warm, k)
        plan = route.plan
        if keep == "not_worse" and self.settings.opt is None and self.settings.loss is None and batch.target is None:
            raise InvalidArgument("keep='not_worse' compares losses, and there is none here; pass loss=, or a function of (before, after)")
        plan.validation.before("support", batch, plan.probe.bounds)
        output = None
        with restored_on_error(plan.probe.noise, generator):
            try:
                if outputs is not None:
                    leaves, losses, output = self._with_output(route, begin, batch, generator, warm, inputs)
                elif route.whole is not None:
                    results = route.whole.run_leaves([*begin.carry_leaves, *begin.fixed_leaves, *tree.leaves(batch)])
                    num_leaves = len(begin.carry_leaves)
                    leaves, losses = results[:num_leaves], results[num_leaves]
                else:
                    task = Task(begin.carry, begin.fixed, batch, self._step_noise(route, generator))
                    leaves, losses = nodes.adapt(Call(route, task, None, inputs))
            except NonFiniteInput:
                plan.validation.report("support", batch, plan.probe.bounds)
                raise
            kept = final_loss = None
            if guard is not None:
                kept, final_loss, leaves = self._guarded(guard, route, begin, batch, leaves, losses, generator, warm)
        num_links = num_links_after(start, leaves) if start is not None and torch.is_grad_enabled() else 0
        state = State(tuple(leaves), route.form, route.num_tasks)
        return Adapted(self._predictor, state, losses, begin.fixed, num_links, kept, final_loss, output)

    def _with_output(
        self, route: Route, begin: Start, support: Batch, generator: torch.Generator | None, warm: bool, inputs: tuple[Tensor, ...]
    ) -> tuple[Sequence[Tensor], Tensor, Any]:
        """Returns the leaves of the carry after all steps, the losses, and what the model returned in the first step.

        That step is a program of its own, and the others are an adaptation that goes on from it.
        """
        plan, problem, settings = route.plan, route.problem, self.settings
        self.planner.require_program(plan, nodes.FIRST_STEP, "warmup(support, outputs='first')", warm)
        noise = tuple([self.planner.draw(plan.probe.noise, generator, route.num_tasks) for _ in range(problem.updates_per_step)])
        is_constant = plan.adjoint.num_constant_steps(problem.k) > 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_constant):
            carry, loss, output = nodes.first_step(route, Task(begin.carry, begin.fixed, support, noise))
        if plan.adjoint.needs_fixed_point:  # what it makes of the first state is none of its steps alone
            leaves, losses = nodes.adapt(Call(route, Task(begin.carry, begin.fixed, support, noise * problem.k), None, inputs))
            return leaves, losses, output
        leaves, losses = _constant_where_none_flows(route, carry), loss.unsqueeze(-1)
        if problem.k > 1:
            first = Adapted(self._predictor, State(tuple(leaves), route.form, route.num_tasks), losses, begin.fixed)
            axis, num_left = int(self.task_axis), problem.k - 1
            if settings.per_step:
                support = tree.map_leaves(lambda value: value.narrow(axis, 1, num_left), support)
            rest = self if plan.adjoint.takes_any_k else self._of_one_less
            after = rest.adapt(support, rest._of_this(first, route.num_tasks), generator, warm, k=num_left if rest is self else None)
            leaves, losses = after.state.leaves, torch.cat([losses, after.losses], -1)
        return leaves, losses, output

    def _guard(self, keep: Any) -> Guard:
        if keep == "not_worse" and self.settings.per_step:
            raise InvalidArgument(
                "keep='not_worse' compares losses on one batch, and with per_step=True each step has another; give a function "
                "of (before, after) that compares what you mean"
            )
        return self._guards.find(keep)

    def _guarded(
        self,
        guard: Guard,
        route: Route,
        begin: Start,
        support: Batch,
        leaves: Sequence[Tensor],
        losses: Tensor,
        generator: torch.Generator | None,
        warm: bool,
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Returns what a guard decides, the loss after the last step, and the leaves of the state that remains."""
        plan, settings = route.plan, self.settings
        batch = batch_of_step(support, route.problem.k - 1, per_step=settings.per_step, task_axis=self.task_axis)
        guard_plan = self.planner.guard(route.problem.k, plan, guard, batch, begin, route.num_tasks, warm)
        noise = self.planner.draw(plan.probe.noise, generator, route.num_tasks)
        args = begin.carry, route.form.tree(leaves), begin.fixed, batch, losses, noise
        kept, final_loss, carry = nodes.guard(guard_plan, isinstance(plan.adjoint, EachTask), begin.has_tasks, args)
        return kept, final_loss, _constant_where_none_flows(route, carry)

    def meta_loss(self, support: Any, query: Any, start: Adapted | None, generator: torch.Generator | None, warm: bool = False) -> Tensor:
        """As a call of `CompiledUnroll`: the mean over tasks of the query loss after the last step."""
        route, begin, batch, asked, inputs = self.router.find(support, (query,), start, warm)
        plan, query_plan = route.plan, route.query_plan
        assert query_plan is not None and asked is not None
        plan.validation.before("support", batch, plan.probe.bounds)
        plan.validation.before("query", asked, query_plan.probe.bounds)
        with restored_on_error((*plan.probe.noise, *query_plan.probe.noise), generator):
            task = Task(begin.carry, begin.fixed, batch, self._step_noise(route, generator))
            drawn = query_plan.probe.noise
            noise = self.planner.draw(drawn, generator, route.num_tasks) if drawn else ()
            try:
                return nodes.meta_loss(Call(route, task, Query(asked, noise), inputs))
            except NonFiniteInput:
                plan.validation.report("support", batch, plan.probe.bounds)
                plan.validation.report("query", asked, query_plan.probe.bounds)
                raise

    def evaluate(self, support: Any, query: Any, start: Adapted | None, generator: torch.Generator | None, warm: bool = False) -> Result:
        """As `CompiledUnroll.evaluate`."""
        asked = self.settings.batch("query", query)
        with restored_on_any_error(self.settings.device, generator):
            adapted = self.adapt(support, start, generator, warm)
            losses, outputs = self._predictor.evaluate(adapted.state, adapted.fixed, asked, generator, warm)
        return Result(losses.mean(), adapted, outputs, losses)

    @property
    def exporter(self) -> Exporter:
        """What captures programs without compiling them."""
        return Exporter(self.settings, self.router, self.planner, self._predictor)

    def losses_of_steps(
        self, support: Any, query: Any, start: Adapted | None, generator: torch.Generator | None, warm: bool = False
    ) -> Tensor:
        """Returns the query loss after each step, (k,) or [T, k].

        It does one step at a time, each a call of an unroll of one step that goes on from the one before, and evaluates the query in
        between. So the programs are those of one step whatever k is, and every adjoint returns through the steps as through a chain of
        adaptations.
        """
        one, settings = self._of_one_step, self.settings
        if not self.differentiates_steps:
            raise InvalidArgument(
                f"every_step= and step_weights= go back through each step, which {settings.adjoint} does not; use another adjoint"
            )
        batch, num_tasks = self.router.support(support)
        asked = settings.batch("query", query)
        if start is not None:
            self.router.require_start(start, num_tasks)
        adapted = one.first(None, None, None, num_tasks) if start is None else one._of_this(start, num_tasks)
        losses: list[Tensor] = []
        num_constant = 0 if settings.adjoint is None else settings.adjoint.num_constant_steps(settings.k)
        axis = int(self.task_axis)
        with restored_on_any_error(settings.device, generator):
            for index in range(settings.k):
                part = batch
                if settings.per_step:
                    part = tree.map_leaves(lambda value, index=index: value.narrow(axis, index, 1), batch)
                with torch.set_grad_enabled(torch.is_grad_enabled() and index >= num_constant):
                    after = one.adapt(part, adapted, generator, warm)
                adapted = Adapted(one._predictor, after.state, after.losses, after.fixed)  # as of a first call: no chain of the user's
                losses.append(one._predictor.evaluate(adapted.state, adapted.fixed, asked, generator, warm)[0])
        return torch.stack(losses, -1)

    @property
    def differentiates_steps(self) -> bool:
        """Whether the adjoint goes back through steps at all."""
        return self.settings.adjoint is None or not self.settings.adjoint.needs_fixed_point

    def predict(self, adapted: Adapted, query: Any, generator: torch.Generator | None, warm: bool = False) -> Any:
        """Returns the adapted model's output for the inputs of a query batch."""
        args, kwargs = as_call(self.settings.batch("query", query).inputs)
        return self._predictor.predict(adapted.state, adapted.fixed, kwargs or args, generator, warm)

    def warm_for_inputs(self, adapted: Adapted, inputs: Any, generator: torch.Generator) -> None:
        """Makes the plan and the program for predictions on inputs, which are given as one argument of an adapted model."""
        args, kwargs = as_call(check.as_batch("inputs", (inputs,), self.settings.device).inputs)
        self._predictor.predict(adapted.state, adapted.fixed, kwargs or args, generator, warm=True)

    def plans(self) -> tuple[list[SupportPlan], list[PredictionPlan]]:
        """Returns all plans, those of parts of the steps included."""
        supports, predictions = self.planner.supports.entries(), self.planner.predictions.entries()
        for part in self._parts():
            more = part.plans()
            supports, predictions = [*supports, *more[0]], [*predictions, *more[1]]
        return supports, predictions

    def programs(self) -> list[tuple[str, Program]]:
        """Returns all programs with their names, those of the shapes used last at the end, and those of parts of the steps behind them."""
        return [*self.planner.programs(), *[entry for part in self._parts() for entry in part.programs()]]

    def _parts(self) -> list[Execution]:
        """Returns the executions of parts of the steps that have been made."""
        return [self.__dict__[name] for name in ("_of_one_step", "_of_one_less") if name in self.__dict__]

    @functools.cached_property
    def _of_one_less(self) -> Execution:
        return Execution(dataclasses.replace(self.settings, k=self.settings.k - 1), self.task_axis)

    @functools.cached_property
    def _of_one_step(self) -> Execution:
        return Execution(dataclasses.replace(self.settings, k=1), self.task_axis, of_one_step=True)

    def _of_this(self, start: Adapted, num_tasks: int | None) -> Adapted:
        """Returns a start that was made for an unroll of more steps as one for this, with a task axis if calls have one."""
        state = start.state
        if num_tasks is not None and state.num_tasks is None:
            state = state.over_tasks(num_tasks)
        return Adapted(self._predictor, state, start.losses, start.fixed)

    def _step_noise(self, route: Route, generator: torch.Generator | None) -> tuple[tuple[Tensor, ...], ...]:
        """What each update's random operations return."""
        noise, num_updates = route.plan.probe.noise, route.problem.k * route.problem.updates_per_step
        if not noise:
            return ((),) * num_updates
        return tuple([self.planner.draw(noise, generator, route.num_tasks) for _ in range(num_updates)])


def _constant_where_none_flows(route: Route, carry: Carry) -> list[Tensor]:
    """Returns the leaves of a carry, detached where no gradient flows from step to step, as in running statistics."""
    return [value if flows else value.detach() for value, flows in zip(route.form.leaves(carry), route.problem.carry, strict=True)]
