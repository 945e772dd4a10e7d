"""`compile_unroll`: puts the pipeline together and runs it on the user's data.

Known limits: which parameters adapt is decided when `compile_unroll` is called; layers added to the model later are not seen. Programs are
compiled for one set of shapes each. Python numbers in the model's attributes are constants of a program. The caller's autocast is off
inside programs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptrt import tree
from adaptrt.adjoint import Adjoint
from adaptrt.adjoint.base import Problem, Query, Task
from adaptrt.backend import Backend, CudaGraph, Eager, Inductor, Tiered
from adaptrt.backend.base import Building
from adaptrt.backend.guards import alike
from adaptrt.backend.inductor import warn_if_missing
from adaptrt.backend.tiered import TieredRunner, call_ended
from adaptrt.errors import InvalidArgument, InvalidType, NonFiniteInput, OptimizerMismatch
from adaptrt.graph.indices import IndexBound
from adaptrt.graph.ir import Graph
from adaptrt.graph.noise import restored_on_error
from adaptrt.inner import check
from adaptrt.inner.reader import Reader, Select, Start, adapted_names
from adaptrt.inner.step import Batch, Carry, Fixed, LossFunction, Step, as_call
from adaptrt.inner.unroll import batch_of_step, unroll
from adaptrt.optim import Optimizer
from adaptrt.optim.source import Source, source
from adaptrt.runtime import nodes
from adaptrt.runtime.adapted import Adapted
from adaptrt.runtime.explain import Explanation, explain
from adaptrt.runtime.nodes import Call
from adaptrt.runtime.plan import PredictionPlan, QueryPlan, SupportPlan
from adaptrt.runtime.planner import Planner
from adaptrt.runtime.program import Program
from adaptrt.runtime.program_set import without_leading_axis
from adaptrt.tree import Tree


def compile_unroll(
    model: nn.Module,
    opt: Optimizer | torch.optim.Optimizer,
    k: int,
    *,
    loss: LossFunction = None,
    params: Select = None,
    adjoint: Adjoint | str = "auto",
    backend: Backend | str = "auto",
    per_step: bool = False,
    on_new_shape: str = "compile",
    cache_size: int = 16,
    nonfinite: str = "error",
    tiered: bool = False,
    dtype: torch.dtype | None = None,
) -> CompiledUnroll:
    """k steps of `opt` on a support batch, and their meta-gradient, as compiled programs.

    Nothing is compiled until data of some shape is seen (`warmup` does it ahead of time). The model is never changed: not its parameters,
    buffers, mode, hooks or `.grad`.

    Args:
      model: any module. Its parameters, buffers and train/eval mode are read at every call.
      opt: an instance of `torch.optim` (docs/optimisers.md says which), whose groups, hyperparameters and state are read at every call and
        left alone, or an optimiser of `adaptrt.optim`. Hyperparameters are inputs: changing one does not recompile, and a tensor that
        requires grad gets its meta-gradient.
      k: number of inner steps, at least 1.
      loss: `loss(output, target)`, or `loss(output)` for batches without target; returns a scalar. A module's parameters are meta-learned
        with the model's. None: cross-entropy for integer targets, mean squared error for floating ones, the output itself (or its
        `.loss`) when that is a scalar already.
      params: which parameters adapt: a glob on their names, a list of globs, or a predicate of (name, parameter). Left out: all that
        require grad, and with a `torch.optim` instance only those it holds. The rest are used unchanged, and get meta-gradients through
        support and query losses if they require grad.
      adjoint: `Unrolled()`, `Replay(every=n)`, `Stash()`, `FirstOrder()`, or "auto" to choose by the size of the graph and of what it would
        keep.
      backend: "cudagraph" (compiled programs, and every call one launch), "inductor", "eager", a `Backend`, or "auto": cudagraph on CUDA,
        inductor elsewhere, and eager with a warning where no compiler is found.
      per_step: support has a leading axis of length k, one batch for each step.
      on_new_shape: what data of a shape not seen before does: "compile", or "error" to allow what `warmup` has seen only.
      cache_size: how many support shapes are kept, and query shapes for each; the least recently used is dropped.
      nonfinite: "error" refuses data with NaN or infinity, "ignore" does not look.
      tiered: answer from programs that run operation by operation at once, and compile in the background; each program is replaced when its
        compiled form is there. Numbers then change by rounding. `explain()` says what is still to come; `warmup()` waits for it.
      dtype: `torch.bfloat16` runs model and loss in it where `torch.autocast` would, and predicts in it; parameters, gradients, optimiser
        state and losses stay in float32. None: in the dtypes that the model has, whatever autocast is on around a call.
    Returns:
      A `CompiledUnroll`.
    Raises:
      InvalidArgument, InvalidType: an argument out of its domain or of the wrong kind.
      UnsupportedParameter: complex, integer, uninitialised or sparse parameters.
      UnsupportedOptimizer: a class of optimiser that cannot be converted; the message lists those that can.
      OptimizerMismatch: the optimiser holds parameters that are not the model's, or lacks one that `params` asks for.
      NothingToAdapt: no parameter is adaptable.

    Example:
      >>> model = nn.Linear(3, 2)
      >>> unroll = compile_unroll(model, torch.optim.SGD(model.parameters(), lr=0.1), k=2, backend="eager")
      >>> support = torch.randn(6, 3), torch.randint(2, (6,))
      >>> unroll.adapt(support)(torch.randn(4, 3)).shape
      torch.Size([4, 2])
      >>> unroll(support, support).backward()
      >>> model.weight.grad.shape
      torch.Size([2, 3])
    """
    device = check.model_device(model)
    check.positive_int("k", k)
    check.positive_int("cache_size", cache_size)
    check.one_of("on_new_shape", on_new_shape, ("compile", "error"))
    check.one_of("nonfinite", nonfinite, ("error", "ignore"))
    if dtype is not None:
        check.precision(dict(model.named_parameters()), dtype)
    if loss is not None and not callable(loss):
        raise InvalidType(f"loss must be a function, a module or None, got {type(loss).__name__}")
    if adjoint != "auto" and not isinstance(adjoint, Adjoint):
        kind = InvalidArgument if isinstance(adjoint, str) else InvalidType
        raise kind(f"adjoint must be 'auto', Unrolled(), Replay(every=n), Stash() or FirstOrder(), got {adjoint!r}")
    adapted = adapted_names(model, opt, params)
    check.shared_tensors(model, loss, adapted)
    return CompiledUnroll(
        _Settings(
            model=model,
            loss=loss,
            adapted=adapted,
            source=source(opt, {name: param for name, param in model.named_parameters() if name in adapted}),
            k=k,
            adjoint=adjoint if isinstance(adjoint, Adjoint) else None,
            backend=_backend(backend, device, tiered),
            per_step=bool(per_step),
            must_be_warm=on_new_shape == "error",
            cache_size=cache_size,
            check_finite=nonfinite == "error",
            device=device,
            dtype=dtype,
        )
    )


def _backend(backend: Backend | str, device: torch.device, tiered: bool) -> Backend:
    if not isinstance(backend, Backend):
        backend = _backend_named(backend, device, tiered)
    if tiered and isinstance(backend, Eager | CudaGraph):
        raise InvalidArgument(f"tiered=True needs backend='inductor', got backend={backend.name!r}; leave one of them out")
    return Tiered(backend) if tiered else backend


def _backend_named(name: str, device: torch.device, tiered: bool) -> Backend:
    check.one_of("backend", name, ("auto", "eager", "inductor", "cudagraph"))
    if name == "eager" or (name == "auto" and warn_if_missing(device)):
        return Eager()
    return CudaGraph() if name == "cudagraph" or (name == "auto" and device.type == "cuda" and not tiered) else Inductor()


_MAX_PROBLEMS = 64


class _Settings(NamedTuple):
    """What `compile_unroll` was asked for."""

    model: nn.Module
    loss: LossFunction
    adapted: frozenset[str]
    source: Source
    k: int
    adjoint: Adjoint | None
    backend: Backend
    per_step: bool
    must_be_warm: bool
    cache_size: int
    check_finite: bool
    device: torch.device
    dtype: torch.dtype | None


class _Ready(NamedTuple):
    """A checked call: what to run, on what; `inputs` are the leaves that the caller differentiates."""

    begin: Start
    support: Batch
    query: Batch | None
    plan: SupportPlan
    query_plan: QueryPlan | None
    problem: Problem
    inputs: tuple[Tensor, ...]
    num_tasks: int | None
    alone: Program | None = None


@dataclasses.dataclass(slots=True)
class _Recent:
    """What was found for the last call of its sort. It holds for any call of equal structure with tensors alike: nothing else matters.

    `alone` is the program that is all of such a call, once it is there.
    """

    structure: Hashable
    alike: Callable[..., bool]
    plan: SupportPlan
    query_plan: QueryPlan | None
    problem: Problem
    num_tasks: int | None
    alone: Program | None = None
    is_alone_known: bool = False


class _RecentPrediction(NamedTuple):
    """The same for predictions."""

    structure: Hashable
    alike: Callable[..., bool]
    plan: PredictionPlan
    step: Step


class _TieredCall:
    def close(self) -> None:
        call_ended()


_CALL = _TieredCall()
_NO_CALL = contextlib.nullcontext()


def _is_pair(batch: Any) -> bool:
    return type(batch) is tuple and len(batch) == 2 and isinstance(batch[0], Tensor) and isinstance(batch[1], Tensor)


class CompiledUnroll:
    """k inner steps and their meta-gradient, as programs. Made by `compile_unroll`; safe to call from several threads."""

    def __init__(self, settings: _Settings, task_axis: bool = False) -> None:
        self._settings = settings
        self._task_axis = task_axis
        self._recent: dict[tuple[bool, ...], _Recent] = {}
        self._recent_predictions: dict[Hashable, _RecentPrediction] = {}
        self._reader = Reader(settings.model, settings.loss, settings.adapted, settings.source, settings.device, settings.dtype)
        self._planner = Planner(
            self._reader,
            [part for part in (settings.model, settings.loss) if isinstance(part, nn.Module)],
            settings.adjoint,
            settings.backend,
            settings.k,
            settings.per_step,
            settings.cache_size,
            settings.must_be_warm,
            settings.check_finite,
            settings.device,
        )

    def __repr__(self) -> str:
        tasks = ", over tasks" if self._task_axis else ""
        return f"CompiledUnroll({type(self._settings.model).__name__}, k={self._settings.k}, backend={self._settings.backend.name}{tasks})"

    @property
    def device(self) -> torch.device:
        """Where the model was when the unroll was made, and where data has to be."""
        return self._settings.device

    def adapt(self, support: Any, *, start: Adapted | None = None, generator: torch.Generator | None = None) -> Adapted:
        """Adapts the model to a support batch.

        Differentiable outside `no_grad`: parameters, hyperparameters, support data and `start` that require grad get gradients from
        whatever is computed from the result.

        Args:
          support: `(inputs, target)` or `(inputs,)`; inputs a tensor, tuple or dict. Axes [S, ...] = support examples first, behind steps k
            with `per_step` and tasks T with `vmap`: [T, k, S, ...].
          start: go on from an earlier result, its optimiser state included, instead of from the model and optimiser as they stand.
          generator: where random operations draw from; None for the global generator.
        Raises:
          InvalidBatch, LabelOutOfRange, NonFiniteInput, DeviceMismatch, ShapeChanged, InvalidLoss, NothingToAdapt,
          DataDependentControlFlow, NotDifferentiable: see `adaptrt.errors`.
        """
        with self._call():
            return self._adapt(support, start, generator, warm=False)

    def __call__(self, support: Any, query: Any, *, start: Adapted | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The meta-loss: the loss of the adapted model on the query batch, a scalar; the mean over tasks with `vmap()`.

        With gradients enabled, loss and meta-gradient are computed together, and `backward()` only scales them.

        Args:
          support, start, generator: as for `adapt`.
          query: like support, without the axis of steps.
        Raises:
          As `adapt`.
        """
        with self._call():
            return self._meta_loss(support, query, start, generator, warm=False)

    def vmap(self) -> CompiledUnroll:
        """The same unroll over tasks: a leading task axis on support, query and results; the meta-loss is the mean over tasks.

        Each task starts from the same parameters and has noise of its own. Name and meaning as in `torch.func`. On the CPU large tasks are
        done one after the other, which `explain()` shows as `EachTask(...)` around the adjoint; results differ by rounding.
        """
        if self._task_axis:
            raise InvalidArgument("vmap() was called on an unroll that has a task axis already")
        return CompiledUnroll(self._settings, task_axis=True)

    def warmup(self, support: Any, query: Any = None) -> CompiledUnroll:
        """Compiles for data of these shapes ahead of time; returns the unroll itself.

        Compiles what `adapt` needs without gradients; with `query` also prediction on its inputs, and the meta-loss, with its gradient
        if gradients are enabled here. The global random state is left alone.
        """
        generator = torch.Generator(self._settings.device)
        with torch.no_grad():
            adapted = self._adapt(support, None, generator, warm=True)
            if query is not None:
                args, kwargs = as_call(check.as_batch("query", query, self._settings.device).inputs)
                self._predict(adapted, kwargs or args, generator, warm=True)
        if query is not None:
            self._meta_loss(support, query, None, generator, warm=True)
        call_ended()
        for program in (program for programs in self._planner.program_sets() for _, program in programs.named()):
            if isinstance(program.run, TieredRunner):
                program.run.wait()
        return self

    def explain(self) -> Explanation:
        """Which adjoint was chosen and why, and each program's size before and after each pass, FLOPs, bytes and compile time."""
        return explain(self._settings.k, self._settings.backend.name, self._planner.supports.entries(), self._planner.predictions.entries())

    def graphs(self) -> dict[str, Graph]:
        """The graphs compiled so far by program name; a number is added where several shapes have a program of that name."""
        found: dict[str, Graph] = {}
        for name, program in (entry for programs in self._planner.program_sets() for entry in programs.named()):
            count = sum(known == name or known.startswith(f"{name} #") for known in found)
            found[f"{name} #{count + 1}" if count else name] = program.graph
        return found

    def predict(self, adapted: Adapted, inputs: Tree, generator: torch.Generator | None = None) -> Any:
        """What `adapted(inputs)` returns."""
        with self._call():
            return self._predict(adapted, inputs, generator, warm=False)

    def state_dict(self, adapted: Adapted) -> dict[str, Tensor]:
        """What `adapted.state_dict()` returns."""
        return self._reader.state_dict({**adapted.fixed.params, **adapted.params, **adapted.buffers})

    def _call(self) -> contextlib.AbstractContextManager[object]:
        """What surrounds a call: a background compiler waits for it if it captures. Before anything else a launch may be refused."""
        self._planner.refuse()
        return contextlib.closing(_CALL) if isinstance(self._settings.backend, Tiered) else _NO_CALL

    def _adapt(self, support: Any, start: Adapted | None, generator: torch.Generator | None, warm: bool) -> Adapted:
        ready = self._prepare(support, None, start, warm)
        plan, begin, num_tasks = ready.plan, ready.begin, ready.num_tasks
        self._check_values("support", ready.support, plan.probe.bounds, plan.checks_data)
        with restored_on_error(plan.probe.noise, generator):
            try:
                if ready.alone is not None:
                    carry, losses = ready.alone(begin.carry, begin.fixed, ready.support, ())
                    return Adapted(self, carry, losses, begin.fixed, num_tasks)
                task = Task(begin.carry, begin.fixed, ready.support, self._step_noise(plan, generator, num_tasks))
                carry, losses = nodes.adapt(Call(plan, None, ready.problem, task, None, num_tasks, ready.inputs))
            except NonFiniteInput:
                self._look_at_values("support", ready.support, plan.probe.bounds)  # says where
                raise
        return Adapted(self, carry, losses, begin.fixed, num_tasks)

    def _meta_loss(self, support: Any, query: Any, start: Adapted | None, generator: torch.Generator | None, warm: bool) -> Tensor:
        ready = self._prepare(support, (query,), start, warm)
        plan, query_plan, begin, num_tasks = ready.plan, ready.query_plan, ready.begin, ready.num_tasks
        assert query_plan is not None and ready.query is not None
        self._check_values("support", ready.support, plan.probe.bounds, plan.checks_data)
        self._check_values("query", ready.query, query_plan.probe.bounds, plan.checks_data)
        with restored_on_error((*plan.probe.noise, *query_plan.probe.noise), generator):
            task = Task(begin.carry, begin.fixed, ready.support, self._step_noise(plan, generator, num_tasks))
            asked = Query(ready.query, self._planner.draw(query_plan.probe.noise, generator, num_tasks))
            try:
                call = Call(plan, query_plan, ready.problem, task, asked, num_tasks, ready.inputs, ready.alone)
                return nodes.meta_loss(call)
            except NonFiniteInput:
                self._look_at_values("support", ready.support, plan.probe.bounds)
                self._look_at_values("query", ready.query, query_plan.probe.bounds)
                raise

    def _predict(self, adapted: Adapted, inputs: Tree, generator: torch.Generator | None, warm: bool) -> Any:
        # Neither the optimiser's state nor its hyperparameters matter here, so no program depends on their form.
        carry, fixed = Carry(adapted.carry.params, (), adapted.carry.buffers), Fixed(adapted.fixed.params, {}, {})
        plan, step = self._prepare_prediction(adapted, carry, fixed, inputs, warm)
        self._check_values("input", Batch(inputs, None), plan.bounds)
        with restored_on_error(plan.noise, generator):
            noise = self._planner.draw(plan.noise, generator, adapted.num_tasks)
            try:
                return nodes.predict(plan, step, carry, fixed, inputs, noise, torch.is_grad_enabled())
            except NonFiniteInput:
                self._look_at_values("input", Batch(inputs, None), plan.bounds)
                raise

    def _prepare_prediction(self, adapted: Adapted, carry: Carry, fixed: Fixed, inputs: Tree, warm: bool) -> tuple[PredictionPlan, Step]:
        """Checks the inputs and finds the plan, or takes both over as `_prepare` does."""
        usual = not warm and adapted.comes_from(self) and type(inputs) is tuple and all([isinstance(value, Tensor) for value in inputs])
        leaves = [*carry.params.values(), *carry.buffers.values(), *fixed.params.values(), *inputs] if usual else []
        mode = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), len(leaves), adapted.num_tasks is None
        structure = self._reader.mode()
        recent = self._recent_predictions.get(mode) if usual else None
        if recent is not None and recent.structure == structure and recent.alike(*leaves):
            return recent.plan, recent.step
        check.as_batch("input", (inputs,), self._settings.device)
        if adapted.num_tasks is not None:
            check.leading_axis("input", inputs, 0, adapted.num_tasks, "tasks")
        step = self._reader.step(detach_gradient=False)
        plan = self._planner.prediction(step, inputs, carry, fixed, adapted.num_tasks, warm)
        if usual:
            self._recent_predictions[mode] = _RecentPrediction(structure, alike(leaves), plan, step)
        return plan, step

    def _prepare(self, support: Any, query: tuple[Any] | None, start: Adapted | None, warm: bool) -> _Ready:
        """Checks a call's arguments and finds its plans; a call that is like the one before in all that matters takes over what that found.

        Args:
          query: the query batch, or None for a call without.
        """
        if start is not None or warm or not _is_pair(support) or not (query is None or _is_pair(query[0])):
            return self._prepare_anew(support, query, start, warm)
        begin = self._reader.read()
        leaves = [*begin.carry_leaves, *begin.fixed_leaves, *support, *(query[0] if query is not None else ())]
        differentiable = torch.is_grad_enabled()
        mode = query is not None, differentiable, torch.is_inference_mode_enabled()
        recent = self._recent.get(mode)
        if recent is not None and recent.structure == begin.structure and recent.alike(*leaves):
            inputs = tuple([leaf for leaf in leaves if leaf.requires_grad]) if differentiable else ()
            asked = None if query is None else Batch(*query[0])
            if not recent.is_alone_known:
                self._find_alone(recent, bool(inputs))
            plans = recent.plan, recent.query_plan, recent.problem
            return _Ready(begin, Batch(*support), asked, *plans, inputs, recent.num_tasks, recent.alone)
        ready = self._prepare_anew(support, query, start, warm)
        self._recent[mode] = _Recent(begin.structure, alike(leaves), ready.plan, ready.query_plan, ready.problem, ready.num_tasks)
        return ready

    def _find_alone(self, recent: _Recent, differentiable: bool) -> None:
        """Looks for a program that is all of a call like this, by which the call's steps in Python can be left out."""
        plan, query_plan = recent.plan, recent.query_plan
        if plan.programs.launches_calls or plan.probe.noise or differentiable == (query_plan is None):
            found = None
        elif query_plan is None:
            found = plan.adjoint.adapt_alone(plan.programs, recent.problem)
        else:
            found = None if query_plan.probe.noise else plan.adjoint.meta_gradient_alone(query_plan.programs, recent.problem)
        recent.alone = found if isinstance(found, Program) and not isinstance(found.run, Building) else None
        recent.is_alone_known = found is None or recent.alone is not None  # not while it is still to be compiled, or built

    def _prepare_anew(self, support: Any, query: tuple[Any] | None, start: Adapted | None, warm: bool) -> _Ready:
        batch, num_tasks = self._support(support)
        asked = None if query is None else self._query(query[0], num_tasks)
        begin = self._start(start, num_tasks)
        if self._settings.dtype is not None:  # the model may have been converted since
            check.precision({**begin.carry.params, **begin.fixed.params, **begin.fixed.loss_params}, self._settings.dtype)
        plan = self._planner.support(batch, begin, num_tasks, warm)
        query_plan = None if asked is None else self._planner.query(plan, asked, begin, num_tasks, warm)
        problem, inputs = self._problem(plan, begin, batch, asked)
        return _Ready(begin, batch, asked, plan, query_plan, problem, inputs, num_tasks)

    def _query(self, query: Any, num_tasks: int | None) -> Batch:
        """The checked query batch."""
        batch = check.as_batch("query", query, self._settings.device)
        check.batch_sizes("query", batch, int(self._task_axis))
        if num_tasks is not None:
            check.leading_axis("query", batch, 0, num_tasks, "tasks")
        return batch

    def _support(self, support: Any) -> tuple[Batch, int | None]:
        """The checked support batch, and the number of tasks in it."""
        batch = check.as_batch("support", support, self._settings.device)
        num_tasks = check.leading_axis("support", batch, 0, None, "tasks") if self._task_axis else None
        if self._settings.per_step:
            check.leading_axis("support", batch, int(self._task_axis), self._settings.k, "inner steps")
        check.batch_sizes("support", batch, int(self._task_axis) + int(self._settings.per_step))
        return batch, num_tasks

    def _start(self, start: Adapted | None, num_tasks: int | None) -> Start:
        """Where to start: from the model and optimiser as they stand, or from an earlier result."""
        begin = self._reader.read()
        if start is None:
            return begin
        if not isinstance(start, Adapted):
            raise InvalidType(f"start must be what adapt() returned, got {type(start).__name__}")
        if start.num_tasks is not None and start.num_tasks != num_tasks:
            raise InvalidArgument(
                f"start holds {start.num_tasks} tasks, the support batch {num_tasks or 'no task axis'}; call the vmap() of the unroll, "
                f"with support of {start.num_tasks} tasks"
            )
        held = tree.map_leaves(without_leading_axis, start.carry) if start.num_tasks is not None else tree.specs(start.carry)
        wanted = tree.specs(begin.carry)
        if tree.flatten(held) != tree.flatten(wanted):
            raise OptimizerMismatch(f"start was adapted with another model or optimiser: {tree.difference(wanted, held)}")
        return begin._replace(carry=start.carry, carry_leaves=tree.leaves(start.carry), has_tasks=start.num_tasks is not None)

    def _check_values(self, name: str, batch: Batch, bounds: Sequence[IndexBound], program_looks: bool = False) -> None:
        if not self._planner.launches_calls:  # a launch looks itself
            self._look_at_values(name, batch, bounds, program_looks)

    def _look_at_values(self, name: str, batch: Batch, bounds: Sequence[IndexBound], program_looks: bool = False) -> None:
        check.indices(name, batch, bounds)
        if self._settings.check_finite and not program_looks:
            check.finite(name, batch)

    def _step_noise(self, plan: SupportPlan, generator: torch.Generator | None, num_tasks: int | None) -> tuple[tuple[Tensor, ...], ...]:
        num_updates = self._settings.k * plan.step.optimizer.updates_per_step
        if not plan.probe.noise:
            return ((),) * num_updates
        return tuple([self._planner.draw(plan.probe.noise, generator, num_tasks) for _ in range(num_updates)])

    def _problem(self, plan: SupportPlan, begin: Start, batch: Batch, query: Batch | None) -> tuple[Problem, tuple[Tensor, ...]]:
        """The problem, and the leaves that the caller differentiates."""
        groups = begin.carry_leaves, begin.fixed_leaves, tree.leaves(batch), tree.leaves(query)
        if torch.is_grad_enabled():
            marks = tuple([tuple([leaf.requires_grad for leaf in leaves]) for leaves in groups])
            wanted = tuple([leaf for leaves in groups for leaf in leaves if leaf.requires_grad])
        else:
            marks, wanted = tuple([(False,) * len(leaves) for leaves in groups]), ()
        problem = plan.problems.get((marks, begin.has_tasks))
        if problem is None:
            problem = self._make_problem(plan, begin.has_tasks, *marks)
            if len(plan.problems) >= _MAX_PROBLEMS:
                plan.problems.clear()
            plan.problems[marks, begin.has_tasks] = problem
        return problem, wanted

    def _make_problem(
        self,
        plan: SupportPlan,
        start_has_task_axis: bool,
        start: tuple[bool, ...],
        fixed: tuple[bool, ...],
        support: tuple[bool, ...],
        query: tuple[bool, ...],
    ) -> Problem:
        return Problem(
            step=plan.step,
            unroll=unroll,
            batch_of_step=batch_of_step,
            k=self._settings.k,
            per_step=self._settings.per_step,
            start=start,
            fixed=fixed,
            support=support,
            query=query,
            carry=tuple([flows or asked for flows, asked in zip(plan.carry, start, strict=True)]),
            task_axis=self._task_axis,
            start_has_task_axis=start_has_task_axis,
            updates_per_step=plan.step.optimizer.updates_per_step,
        )
