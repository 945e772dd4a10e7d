"""Finds what runs a call: its arguments are checked, and its plans are looked up or made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptrt import tree
from adaptrt.adjoint.base import Differentiated, Problem
from adaptrt.backend.guards import in_forward_mode, refuse_tangents
from adaptrt.errors import InvalidArgument, InvalidBatch, InvalidType, OptimizerMismatch
from adaptrt.graph.gradient_mode import GradientMode
from adaptrt.graph.surroundings import refuse_recorders
from adaptrt.inner import check
from adaptrt.inner.reader import Reader, Start
from adaptrt.inner.step import Batch, Fixed, any_of
from adaptrt.optim.tasks import are_per_task
from adaptrt.runtime.adapted import Adapted, Predictor, restored
from adaptrt.runtime.capture import without_leading_axis
from adaptrt.runtime.plan import QueryPlan, SupportPlan
from adaptrt.runtime.planner import Planner
from adaptrt.runtime.program import Program
from adaptrt.runtime.recent import Recent, are_plain
from adaptrt.runtime.saved import Source
from adaptrt.runtime.settings import Settings
from adaptrt.runtime.state import State
from adaptrt.runtime.validation import Validator
from adaptrt.tree import Form, Spec

_MAX_PROBLEMS = 64


@dataclasses.dataclass(slots=True)
class Route:
    """Holds what runs a call, and every later call that is like it.

    Attributes:
      plan, query_plan, problem: what to run; no query plan for a call without query data.
      num_tasks: length of the task axis, None without one.
      form: of the carry.
      whole: a compiled program that is the whole call, None if there is none: with it the adjoint's Python code need not run.
      is_settled: whether it is known that there is one, or none.
    """

    plan: SupportPlan
    query_plan: QueryPlan | None
    problem: Problem
    num_tasks: int | None
    form: Form
    whole: Program | None = None
    is_settled: bool = False

    def settle(self, differentiated: bool) -> None:
        """Looks for the program that is the whole call. `differentiated`: whether the caller wants any gradient."""
        plan, query_plan = self.plan, self.query_plan
        if plan.validation.validator is Validator.LAUNCH or plan.probe.noise or differentiated == (query_plan is None):
            found = None
        elif query_plan is None:
            found = plan.adjoint.adapt_program(plan.programs, self.problem)
        else:
            found = None if query_plan.probe.noise else plan.adjoint.meta_gradient_program(query_plan.programs, self.problem)
        self.whole = found if isinstance(found, Program) and not found.is_building else None
        self.is_settled = found is None or self.whole is not None  # not while it is still to be compiled, or built


class Routed(NamedTuple):
    """The checked arguments of a call, and its route; `inputs` are the leaves that the caller differentiates."""

    route: Route
    begin: Start
    support: Batch
    query: Batch | None
    inputs: tuple[Tensor, ...]


class Router:
    """Checks the arguments of an unroll's calls and finds their routes.

    Args:
      settings: of the unroll.
      task_axis: whether data has a leading axis of tasks.
      reader: of model and optimiser.
      planner: of the unroll.
    """

    def __init__(self, settings: Settings, task_axis: bool, reader: Reader, planner: Planner) -> None:
        self._settings = settings
        self.has_task_axis = task_axis
        self._reader = reader
        self._planner = planner
        self._recent: Recent[Route] = Recent()
        self._num_parts = 3 if settings.weighted else 2

    def find(self, support: Any, query: tuple[Any] | None, start: Adapted | None, warm: bool, k: int | None = None) -> Routed:
        """Returns the route of a call; one that is like the last call in all that matters takes its route.

        Args:
          support, start, warm: as `CompiledUnroll` takes them.
          query: the query batch, None for a call without.
          k: number of steps, None for that of the unroll.
        """
        begin = self._reader.read()
        form = None
        if isinstance(start, Adapted):
            form = start.state.form
            begin = _going_on(begin, start.state)
        if in_forward_mode():
            refuse_tangents([*begin.carry_leaves, *begin.fixed_leaves, *tree.leaves((support, query))])
        usual = start is None or form is not None
        if warm or not usual or not are_plain(self._num_parts, *((support,) if query is None else (support, query[0]))):
            return self._find_anew(support, query, start, warm, k)
        leaves = [*begin.carry_leaves, *begin.fixed_leaves, *support, *(query[0] if query is not None else ())]
        differentiable = torch.is_grad_enabled()
        kind = query is not None, differentiable, torch.is_inference_mode_enabled(), form is not None, begin.has_tasks, k
        structure = begin.structure, form
        route = self._recent.find(kind, structure, leaves)
        if route is None:
            routed = self._find_anew(support, query, start, warm, k)
            self._recent.keep(kind, structure, leaves, routed.route)
            return routed
        inputs = tuple([leaf for leaf in leaves if leaf.requires_grad]) if differentiable else ()
        if not route.is_settled:
            route.settle(bool(inputs))
        return Routed(route, begin, Batch(*support), None if query is None else Batch(*query[0]), inputs)

    def start(self) -> Start:
        """Returns the present values of model and optimiser."""
        return self._reader.read()

    def first(
        self,
        predictor: Predictor,
        params: Mapping[str, Tensor] | None,
        opt_state: Any,
        buffers: Mapping[str, Tensor] | None,
        num_tasks: int | None,
    ) -> Adapted:
        """Returns the adaptation of zero steps, as `CompiledUnroll.start` documents. `predictor`: of the unroll."""
        begin = self._reader.read()
        state = State.of(begin.carry).map(torch.clone)
        if num_tasks is not None:
            state = state.over_tasks(check.positive_int("num_tasks", num_tasks))
        state = state.replace(params=params, buffers=buffers)
        if opt_state is None and params:
            opt_state = self._reader.opt_state_for(state.carry.params, num_tasks is not None)
        if opt_state is not None:
            state = state.replace(opt_state=opt_state)
        example = any_of(begin.carry.params, begin.fixed, begin.carry.buffers)
        dtype = example.dtype if example.is_floating_point() else torch.get_default_dtype()
        losses = example.new_empty((0,) if num_tasks is None else (num_tasks, 0), dtype=dtype)
        return Adapted(predictor, state, losses, begin.fixed)

    def loaded(self, predictor: Predictor, source: Source, fingerprint: Mapping[str, str] | None) -> Adapted:
        """Returns a saved adaptation, as `CompiledUnroll.load` documents. `predictor`: of the unroll."""
        begin = self._reader.read()
        return restored(predictor, source, begin.carry, begin.fixed, fingerprint or predictor.fingerprint(begin.fixed))

    def fingerprint(self, predictor: Predictor) -> dict[str, str]:
        """Returns digests of what does not adapt, by the names of its parts. `predictor`: of the unroll."""
        return predictor.fingerprint(self._reader.read().fixed)

    def _find_anew(self, support: Any, query: tuple[Any] | None, start: Adapted | None, warm: bool, k: int | None) -> Routed:
        batch, num_tasks = self.support(support, k)
        asked = None if query is None else self._query(query[0], num_tasks)
        self._reader.require_same_selection()
        refuse_recorders()
        begin = self._start(start, num_tasks)
        if self._settings.dtype is not None:  # the model may have been converted since
            fixed = begin.fixed
            of_query_loss = {name: value for name, value in fixed.query_loss.items() if isinstance(value, nn.Parameter)}
            check.precision({**begin.carry.params, **fixed.params, **fixed.loss_params, **of_query_loss}, self._settings.dtype)
        _require_values_for_tasks(begin.fixed, num_tasks)
        plan = self._plan(batch, begin, num_tasks, warm)
        query_plan = None if asked is None else self._planner.query(plan, asked, begin, num_tasks, warm)
        mode = GradientMode.current() if query_plan is not None and query_plan.probe.asks_mode else GradientMode.GRAD
        if asked is not None and mode is not GradientMode.GRAD:
            query_plan = self._planner.query(plan, asked, begin, num_tasks, True, mode)
        if self.has_task_axis:
            check.class_axis("support", batch, plan.probe.bounds, 1 + int(self._settings.per_step))
            if asked is not None and query_plan is not None:
                check.class_axis("query", asked, query_plan.probe.bounds, 1)
        if k is not None and k != self._settings.k and not plan.adjoint.takes_any_k:
            raise InvalidArgument(
                f"steps={k} needs programs of single steps, and {plan.adjoint} has one program of {self._settings.k} steps; pass "
                "adjoint=Replay(), Stash(), FirstOrder() or Truncated(n) to compile_unroll"
            )
        if k is not None and k < 2 and plan.adjoint.needs_fixed_point:
            raise InvalidArgument(f"steps={k} is too few for {plan.adjoint}, whose steps must converge; make as many as that takes")
        problem, inputs = self._problem(plan, begin, batch, asked, mode, k or self._settings.k)
        form = tree.form_of(tree.flatten(begin.carry)[1], begin.carry_leaves)
        return Routed(Route(plan, query_plan, problem, num_tasks, form), begin, batch, asked, inputs)

    def _plan(self, batch: Batch, begin: Start, num_tasks: int | None, warm: bool) -> SupportPlan:
        """As the planner's `support`; where that finds that the model cannot be run, the message says what was changed in the model."""
        try:
            return self._planner.support(batch, begin, num_tasks, warm)
        except InvalidBatch as error:
            changed = self._reader.changed_specs()
            if not changed:
                raise
            raise InvalidBatch(f"{error}\n  {changed}") from error

    def support(self, support: Any, k: int | None = None) -> tuple[Batch, int | None]:
        """Returns the checked support batch for k steps, and the number of tasks in it."""
        batch = self._settings.batch("support", support)
        num_tasks = check.leading_axis("support", batch, 0, None, "tasks") if self.has_task_axis else None
        if self._settings.per_step:
            check.leading_axis("support", batch, int(self.has_task_axis), k or self._settings.k, "inner steps")
        return batch, num_tasks

    def _query(self, query: Any, num_tasks: int | None) -> Batch:
        """Returns the checked query batch."""
        batch = self._settings.batch("query", query)
        if num_tasks is not None:
            check.leading_axis("query", batch, 0, num_tasks, "tasks")
        return batch

    def _start(self, start: Adapted | None, num_tasks: int | None) -> Start:
        """Returns what to start from: the present values of model and optimiser, or an earlier result."""
        return self._reader.read() if start is None else self.require_start(start, num_tasks)

    def require_start(self, start: Adapted, num_tasks: int | None) -> Start:
        """Returns an earlier result as what to start from, after checking that calls with so many tasks can go on from it.

        Raises:
          InvalidType, InvalidArgument, OptimizerMismatch: they cannot.
        """
        begin = self._reader.read()
        if not isinstance(start, Adapted):
            raise InvalidType(f"start must be what adapt() returned, got {type(start).__name__}")
        state = start.state
        if state.num_tasks is not None and state.num_tasks != num_tasks:
            raise InvalidArgument(
                f"start holds {start.num_tasks} tasks, the support batch {num_tasks or 'no task axis'}; call the vmap() of the unroll, "
                f"with support of {start.num_tasks} tasks"
            )
        held = state.form.tree([Spec.of(value) if state.num_tasks is None else without_leading_axis(value) for value in state.leaves])
        wanted = tree.specs(begin.carry)
        if tree.flatten(held) != tree.flatten(wanted):
            raise OptimizerMismatch(f"start was adapted with another model or optimiser: {tree.difference(wanted, held)}")
        return _going_on(begin, state)

    def _problem(
        self, plan: SupportPlan, begin: Start, batch: Batch, query: Batch | None, mode: GradientMode, k: int
    ) -> tuple[Problem, tuple[Tensor, ...]]:
        """Returns the problem, and the leaves that the caller differentiates. `mode`: in which the query loss is computed; k: of steps."""
        groups = begin.carry_leaves, begin.fixed_leaves, tree.leaves(batch), tree.leaves(query)
        enabled = torch.is_grad_enabled()
        differentiated = Differentiated(*[tuple([enabled and leaf.requires_grad for leaf in leaves]) for leaves in groups])
        inputs = tuple([leaf for leaves in groups for leaf in leaves if leaf.requires_grad]) if enabled else ()
        key = differentiated, begin.has_tasks, mode, k
        problem = plan.problems.get(key)
        if problem is None:
            problem = self._make_problem(plan, differentiated, begin.has_tasks, mode, k)
            if len(plan.problems) >= _MAX_PROBLEMS:
                plan.problems.clear()
            plan.problems[key] = problem
        return problem, inputs

    def _make_problem(
        self, plan: SupportPlan, differentiated: Differentiated, start_has_task_axis: bool, mode: GradientMode, k: int
    ) -> Problem:
        updates_per_step = plan.step.optimizer.updates_per_step
        return Problem(
            step=plan.step if mode is plan.step.mode else dataclasses.replace(plan.step, mode=mode),
            k=k,
            per_step=self._settings.per_step,
            differentiated=differentiated,
            carry=tuple([flows or asked for flows, asked in zip(plan.carry, differentiated.start, strict=True)]),
            task_axis=self.has_task_axis,
            start_has_task_axis=start_has_task_axis,
            updates_per_step=updates_per_step,
            in_loop=self._settings.k * updates_per_step > 1,  # as the programs were compiled, whatever k is
        )


def _require_values_for_tasks(fixed: Fixed, num_tasks: int | None) -> None:
    """Checks that hyperparameters with a value for each task have one for each of so many tasks."""
    leaves = zip(tree.paths(fixed.hyper), tree.leaves(fixed.hyper), are_per_task(fixed.hyper), strict=True)
    for name, value in [(name, value) for name, value, mark in leaves if mark]:
        if num_tasks != len(value):
            found = "the call has no task axis; call vmap()" if num_tasks is None else f"the support batch has {num_tasks} tasks"
            raise InvalidArgument(f"'{name.removesuffix('.values')}' has a value for each of {len(value)} tasks, and {found}")


def _going_on(begin: Start, state: State) -> Start:
    """Returns the start of a call that goes on from a state."""
    return Start(state.form, begin.fixed, state.leaves, begin.fixed_leaves, begin.structure, state.num_tasks is not None)
