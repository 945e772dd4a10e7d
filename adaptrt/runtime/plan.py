"""Decides, once for each shape of support, query and prediction data, how it is computed. Nothing is compiled here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.adjoint.auto import MAX_KEPT_BYTES, choose, one_by_one
from adaptrt.adjoint.base import Adjoint, Problem
from adaptrt.adjoint.each_task import EachTask
from adaptrt.adjoint.steps import STEP
from adaptrt.backend import Eager
from adaptrt.backend.launch import Launcher
from adaptrt.errors import InvalidArgument, NothingToAdapt
from adaptrt.graph.capture import capture, record_operations
from adaptrt.graph.cost import num_bytes_to_keep, num_flops, returns_input
from adaptrt.graph.cut import varying
from adaptrt.graph.gradient_mode import GradientMode
from adaptrt.graph.indices import IndexBound
from adaptrt.graph.ir import Graph
from adaptrt.graph.noise import Noise, draw
from adaptrt.inner import check, diagnose
from adaptrt.inner.executed import Executed
from adaptrt.inner.guard import Guard
from adaptrt.inner.step import Batch, Carry, Fixed, Step, as_data
from adaptrt.runtime import independent
from adaptrt.runtime.cache import Cache
from adaptrt.runtime.calls import Calls
from adaptrt.runtime.capture import CaptureSettings, TaskAxis, capture_graph, without_leading_axis
from adaptrt.runtime.probe import Prediction, Probe, noise_specs, probe, probe_guard, probe_prediction, undone_after
from adaptrt.runtime.program_set import ProgramSet
from adaptrt.runtime.settings import Settings
from adaptrt.runtime.validation import Validation
from adaptrt.tree import Spec, Tree


class Arguments(NamedTuple):
    """Describes the arguments that a plan is for.

    Attributes:
      carry, fixed: specs for one task.
      data: specs of a batch, or of a model's inputs, for one task; and for one step where each step has its own.
      shapes: the data in words, with all its axes.
      tasks: the task axis.
      require_current: raises if modes or Python values are not those that the plan is for.
      note_code: takes note of Python code that ran, and whose values the plan is for.
      sample: returns the tensors of which `carry`, `fixed` and `data` are the specs: those of the first task, and the first step.
    """

    carry: Carry
    fixed: Fixed
    data: Any
    shapes: tuple[str, ...]
    tasks: TaskAxis
    require_current: Callable[[], None]
    note_code: Callable[[Executed], None]
    sample: Callable[[], tuple[Carry, Fixed, Any]]

    @staticmethod
    def of(
        carry: Carry,
        fixed: Fixed,
        data: Tree,
        tasks: TaskAxis,
        python: tuple[Callable[[], None], Callable[[Executed], None]],
        per_step: bool = False,
    ) -> Arguments:
        """Describes a call's tensors.

        Args:
          carry, fixed, data, tasks: the arguments, with all their axes.
          python: `require_current` and `note_code`.
          per_step: whether the data has an axis of steps behind that of tasks.
        """
        one = _specs(data, tasks.num_tasks is not None)

        def sample() -> tuple[Carry, Fixed, Any]:
            axes_of_data = (tasks.num_tasks is not None) + per_step
            return _first(carry, int(tasks.start_has_it)), tree.map_leaves(Tensor.detach, fixed), _first(data, axes_of_data)

        return Arguments(
            _specs(carry, tasks.start_has_it),
            tasks.specs_of_one("fixed", fixed),
            _specs(one, True) if per_step else one,
            in_words(data),
            tasks,
            *python,
            sample,
        )


def _first(part: Tree, num_axes: int) -> Tree:
    """Returns the tensors of the first element along each of so many leading axes."""
    return tree.map_leaves(lambda value: value.detach()[(0,) * num_axes], part)


def in_words(data: Tree) -> tuple[str, ...]:
    """Returns shape and dtype of each tensor as text."""
    return tuple(str(tree.Spec.of(leaf)) for leaf in tree.leaves(data))


def _specs(part: Tree, leading_axis: bool) -> Tree:
    """Returns the specs of the tensors, or those of one element along their first axes."""
    return tree.map_leaves(without_leading_axis, part) if leading_axis else tree.specs(part)


@dataclasses.dataclass(frozen=True, slots=True)
class SupportPlan:
    """The plan for one shape of support data, which holds the programs that see no query data.

    Attributes:
      step: the inner step.
      adjoint, reason: how the meta-gradient is formed, and why in this way.
      probe: noise and indices of a step.
      validation: who validates the values of support and query data.
      programs, calls: the programs, and what runs whole calls of them.
      carry: for each leaf of the carry whether a gradient flows through it from step to step; through running statistics none does.
      shapes: the data in words.
      queries: the plans for query data that follows such support data.
      guards: the plans for guards, which decide whether the state after such support data is kept.
      problems: the problems met so far, by their keys.
    """

    step: Step
    adjoint: Adjoint
    reason: str
    probe: Probe
    validation: Validation
    programs: ProgramSet
    calls: Calls
    carry: tuple[bool, ...]
    shapes: tuple[str, ...]
    queries: Cache[QueryPlan]
    guards: Cache[GuardPlan]
    problems: dict[Hashable, Problem] = dataclasses.field(default_factory=dict[Hashable, Problem])


@dataclasses.dataclass(frozen=True, slots=True)
class QueryPlan:
    """The plan for one shape of query data after a support plan, which holds the programs that see both.

    Attributes:
      probe: noise and indices of the query loss.
      programs, calls, shapes: as for `SupportPlan`.
      weights: each task's weight in the meta-loss, [T], or 0-dim without a task axis.
    """

    probe: Probe
    programs: ProgramSet
    calls: Calls
    shapes: tuple[str, ...]
    weights: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class PredictionPlan:
    """The plan for what an adapted model computes of data of one shape: its output for inputs, or query loss and output of a batch.

    Attributes:
      step: whose `predict` or `query_and_output` is computed.
      is_of_batch: whether it is the latter.
      bounds, noise, executed, asks_mode: which inputs are indices, what random operations draw, which Python code ran, and whether it
        asks for the gradient mode.
      validation, programs, calls, shapes: as for `SupportPlan`.
    """

    step: Step
    is_of_batch: bool
    bounds: tuple[IndexBound, ...]
    noise: tuple[Noise, ...]
    executed: Executed
    asks_mode: bool
    validation: Validation
    programs: ProgramSet
    calls: Calls
    shapes: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the program is called."""
        return "evaluate" if self.is_of_batch else "predict"

    @property
    def function(self) -> Callable[..., Tree]:
        """What is computed: (carry, fixed, data, noise) -> results."""
        return self.step.query_and_output if self.is_of_batch else self.step.predict


@dataclasses.dataclass(frozen=True, slots=True)
class GuardPlan:
    """The plan for a guard after a support plan.

    Attributes:
      step: with the guard.
      programs, calls: as for `SupportPlan`.
    """

    step: Step
    programs: ProgramSet
    calls: Calls


def plan_support(settings: Settings, launcher: Launcher | None, step_of: Callable[[bool], Step], arguments: Arguments) -> SupportPlan:
    """Decides how to adapt on support batches of one shape.

    Args:
      settings: of the unroll.
      launcher: makes a call one launch; None if programs run one by one.
      step_of: returns the step, with or without detached gradients.
      arguments: what the plan is for.
    """
    step = step_of(settings.adjoint is not None and settings.adjoint.detach_gradient)
    carry, fixed, batch, _, tasks, *_ = arguments
    found, forward = probe(step, "support", carry, fixed, batch)
    if not carry.params:
        _require_written_buffers(step, found, arguments)
    if settings.weighted:
        _require_independent(settings, "support", step, found, arguments)
    flops = num_flops(forward)
    each_task = tasks.num_tasks is not None and settings.device.type == "cpu" and one_by_one(flops)
    capturing = capture_settings(settings, step, found, arguments, each_task)
    if settings.adjoint is None:
        adjoint, reason = _choose(settings, step, found.noise, arguments, capturing)
    else:
        adjoint, reason = settings.adjoint, "asked for"
    if adjoint.needs_fixed_point:
        _require_fixed_point(settings, step, found, arguments, capturing)
    if each_task:
        adjoint = EachTask(adjoint)
        reason += f"; model and loss on a task are {flops / 1e6:,.0f} MFLOP, enough for one task after the other"
    validation = _validation(settings, launcher, adjoint.sees_all_data)
    programs = ProgramSet(settings.backend, settings.modules, capturing, validation.in_program)
    floating = [tree.Spec.of(leaf).dtype.is_floating_point for leaf in tree.leaves((carry.params, carry.opt_state))]
    return SupportPlan(
        step=step,
        adjoint=adjoint,
        reason=reason,
        probe=found,
        validation=validation,
        programs=programs,
        calls=_calls(settings, launcher, programs),
        carry=(*floating, *found.live_buffers),
        shapes=arguments.shapes,
        queries=Cache(settings.cache_size),
        guards=Cache(settings.cache_size),
    )


def plan_query(
    settings: Settings, launcher: Launcher | None, plan: SupportPlan, arguments: Arguments, mode: GradientMode = GradientMode.GRAD
) -> QueryPlan:
    """Decides how to evaluate query batches of one shape after `plan`, in one gradient mode. Other arguments as for `plan_support`."""
    found, _ = probe(dataclasses.replace(plan.step, mode=mode), "query", arguments.carry, arguments.fixed, arguments.data)
    if settings.weighted:
        _require_independent(settings, "query", plan.step, found, arguments)
    num_tasks = arguments.tasks.num_tasks
    shape = () if num_tasks is None else (num_tasks,)
    with torch.inference_mode(False):
        weights = torch.full(shape, 1.0 / (num_tasks or 1), dtype=found.loss.dtype, device=found.loss.device)
    capturing = capture_settings(settings, plan.step, found, arguments, isinstance(plan.adjoint, EachTask))
    programs = ProgramSet(settings.backend, settings.modules, capturing, plan.validation.in_program, parent=plan.programs)
    return QueryPlan(found, programs, _calls(settings, launcher, programs), arguments.shapes, weights)


def plan_guard(settings: Settings, launcher: Launcher | None, plan: SupportPlan, guard: Guard, k: int, arguments: Arguments) -> GuardPlan:
    """Decides how a guard is computed after k steps of `plan`. Other arguments as for `plan_support`."""
    step, carry, found = guard.step(plan.step), arguments.carry, plan.probe
    losses = Spec((k,), found.loss.dtype, found.loss.device)
    args = carry, carry, arguments.fixed, arguments.data, losses, noise_specs(found.noise)
    guard.python.add(probe_guard(step, args))
    capturing = capture_settings(settings, step, found, arguments, isinstance(plan.adjoint, EachTask))
    programs = ProgramSet(settings.backend, settings.modules, capturing)
    return GuardPlan(step, programs, _calls(settings, launcher, programs))


def plan_prediction(settings: Settings, launcher: Launcher | None, step: Step, arguments: Arguments) -> PredictionPlan:
    """Decides how to predict for inputs of one shape, or to evaluate a `Batch`. Arguments as for `plan_support`."""
    found = probe_prediction(step, arguments.carry, arguments.fixed, arguments.data)
    if settings.weighted and isinstance(arguments.data, Batch):
        _require_independent(settings, "query", step, found, arguments)
    validation = _validation(settings, launcher, sees_all_data=False)
    inputs = arguments._replace(data=as_data(arguments.data))
    programs = ProgramSet(settings.backend, settings.modules, capture_settings(settings, step, found, inputs, False))
    return PredictionPlan(
        step=step,
        is_of_batch=isinstance(arguments.data, Batch),
        bounds=found.bounds,
        noise=found.noise,
        executed=found.executed,
        asks_mode=found.asks_mode,
        validation=validation,
        programs=programs,
        calls=_calls(settings, launcher, programs),
        shapes=arguments.shapes,
    )


def _require_written_buffers(step: Step, found: Probe, arguments: Arguments) -> None:
    """Checks that a step without an optimiser changes any buffer.

    Raises:
      NothingToAdapt: it changes none.
    """
    carry, fixed, batch = arguments[:3]
    graph = capture(step, carry, fixed, batch, noise_specs(found.noise))
    if all(returns_input(graph, place) for place in range(len(carry.buffers))):
        raise NothingToAdapt(
            "without an optimiser only buffers adapt, and forward changes none of them: "
            f"{', '.join(carry.buffers)}. Running statistics change after model.train()"
        )


def _require_independent(settings: Settings, name: str, step: Step, found: Probe | Prediction, arguments: Arguments) -> None:
    """Checks that examples do not depend on each other, as `independent.require` does. `name`: of the batch."""
    carry, fixed, batch = arguments.sample()
    check.weights(name, batch)
    check.indices(name, batch, found.bounds)
    if settings.check_finite:
        check.finite(name, batch)
    step = dataclasses.replace(step, dtype=None)
    capturing = capture_settings(settings, step, found, arguments._replace(tasks=TaskAxis()), False)
    losses = functools.partial(step.losses_of_examples, of_query=name == "query")
    run = ProgramSet(Eager(), settings.modules, capturing).program("losses of examples", losses, ("carry", "fixed", "batch", "noise"))
    noise = draw(found.noise, torch.Generator(settings.device).manual_seed(0), None)
    independent.require(name, settings.model, lambda batch: run(carry, fixed, batch, noise), batch, found.bounds)


def _require_fixed_point(settings: Settings, step: Step, found: Probe, arguments: Arguments, capturing: CaptureSettings) -> None:
    """Checks that k steps can converge to a state that one more step leaves as it is.

    Raises:
      InvalidArgument: they cannot; says why.
    """

    def refuse(reason: str, advice: str) -> None:
        raise InvalidArgument(f"Implicit() needs steps that converge to a fixed point: {reason}. {advice}, or use another adjoint")

    if not arguments.carry.params:
        refuse("without an optimiser only buffers adapt", "Pass one")
    if settings.k < 2:
        refuse(f"k={settings.k} is too few", "Make as many steps as it takes")
    if settings.per_step:
        refuse("with per_step=True each step has another batch", "Leave per_step out")
    if step.optimizer.updates_per_step > 1:
        refuse(f"this optimiser makes {step.optimizer.updates_per_step} updates a step", "Take one that makes one")
    if found.noise:
        refuse("model or loss draw random numbers", "Call model.eval()")
    if any(found.live_buffers):
        refuse("gradients flow through a buffer that forward changes", "Detach what is written to it")
    carry, fixed, batch = arguments[:3]
    graph = capturing.explain_failure(lambda: capture(step, carry, fixed, batch, ()))
    names = tree.paths(carry.opt_state)
    for place, (name, spec) in enumerate(zip(names, map(tree.Spec.of, tree.leaves(carry.opt_state)), strict=True), len(carry.params)):
        if not returns_input(graph, place):
            advice = "Take one without memory, such as optim.sgd without momentum"
            if not spec.dtype.is_floating_point:
                advice = "Take one whose steps are all alike, without a schedule"
            refuse(f"the optimiser remembers '{name}', which every step changes", advice)


def _choose(
    settings: Settings, step: Step, noise: Sequence[Noise], arguments: Arguments, capturing: CaptureSettings
) -> tuple[Adjoint, str]:
    """Chooses an adjoint by the size of a step's graph and of what would be kept of it; returns it and the reason in words."""
    carry, fixed, batch, _, tasks, *_ = arguments
    args = (carry, fixed, batch, noise_specs(noise))
    graph = capturing.explain_failure(lambda: capture(step, *args))
    num_carry, num_fixed, num_batch = (len(tree.leaves(part)) for part in (carry, fixed, batch))
    same = {index for index in range(num_carry) if returns_input(graph, index)}
    same |= set(range(num_carry, num_carry + num_fixed + (0 if settings.per_step else num_batch)))
    num_updates = settings.k * step.optimizer.updates_per_step

    def num_kept_bytes() -> int:
        steps = num_updates * (tasks.num_tasks or 1)  # `adapt` keeps those of all tasks where it is differentiated
        kept = num_bytes_to_keep(graph, same) * steps
        if kept > MAX_KEPT_BYTES and settings.backend.fuses:
            # Decomposed, more can be computed again, and less is kept; it takes another capture to see how much.
            of_one = dataclasses.replace(capturing, tasks=TaskAxis())
            kept = num_bytes_to_keep(settings.backend.lower(capture_graph(step, STEP, args, of_one)), same) * steps
        return kept

    num_shared = graph.num_nodes - sum(node.op == "call_function" for node in varying(graph, same))
    return choose(graph.num_nodes, num_shared, num_updates, num_kept_bytes, settings.device)


def capture_settings(settings: Settings, step: Step, found: Probe | Prediction, arguments: Arguments, each_task: bool) -> CaptureSettings:
    """Says how a plan's functions are captured. `each_task`: tasks are done one after the other, by programs without a task axis."""
    tasks = TaskAxis(None, arguments.tasks.start_has_it) if each_task else arguments.tasks
    return CaptureSettings(
        tasks,
        step.detach_gradient,
        settings.backend.fuses,
        arguments.require_current,
        arguments.note_code,
        _explained(step, found, arguments),
    )


def _validation(settings: Settings, launcher: Launcher | None, sees_all_data: bool) -> Validation:
    is_launched = launcher is not None
    return Validation.decide(finite=settings.check_finite, backend=settings.backend, is_launched=is_launched, sees_all_data=sees_all_data)


def _calls(settings: Settings, launcher: Launcher | None, programs: ProgramSet) -> Calls:
    return Calls(programs, launcher, settings.backend.builds_ahead(settings.device))


def _explained(step: Step, found: Probe | Prediction, arguments: Arguments) -> Callable[[Callable[[], Graph]], Graph]:
    """Returns what turns a missing second derivative into an error that names the module; to find it, the model is run once more."""
    carry, fixed, batch = arguments[:3]

    def forward() -> list[tuple[str, str]]:
        return record_operations(step.predict, carry, fixed, batch.inputs, noise_specs(found.noise))

    def run_explained(run: Callable[[], Graph]) -> Graph:
        return diagnose.differentiating(run, step.model, forward)

    if not found.leaves_traces:
        return run_explained
    return lambda run: undone_after(step, found.executed, lambda: run_explained(run))
