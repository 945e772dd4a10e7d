"""`compile_unroll`: puts the pipeline together and runs it on the user's data.

Known limits: which parameters adapt is decided when `compile_unroll` is called; layers added to the model later are not seen. Programs are
compiled for one set of shapes each. Python numbers in the model's attributes are constants of a program. Autocast is off inside programs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adaptrt import autograd, check, tree
from adaptrt.adjoint import Adjoint
from adaptrt.adjoint.base import Problem, Query, Task
from adaptrt.autograd import Call
from adaptrt.backend import Backend, Eager, Inductor
from adaptrt.backend.inductor import warn_if_missing
from adaptrt.errors import InvalidArgument, InvalidType, NothingToAdapt, OptimizerMismatch, ShapeChanged
from adaptrt.explain import Explanation, explain
from adaptrt.functional import canonical_names
from adaptrt.graph.ir import Graph
from adaptrt.graph.noise import draw
from adaptrt.optim import Optimizer
from adaptrt.optim.source import source
from adaptrt.plan import Cache, Explain, MakePrograms, PredictionPlan, QueryPlan, SupportPlan, plan_prediction, plan_query, plan_support
from adaptrt.program import ProgramSet, without_leading_axis
from adaptrt.reader import Reader
from adaptrt.step import LOSS_BUFFER, Batch, Carry, Fixed, LossFunction, Step
from adaptrt.tree import Tree
from adaptrt.unroll import batch_of_step, unroll

Select = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None


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
) -> CompiledUnroll:
    """k steps of `opt` on a support batch, and their meta-gradient, as compiled programs.

    Nothing is compiled until data of some shape is seen (`warmup` does it ahead of time). The model is never changed: not its parameters,
    buffers, mode, hooks or `.grad`.

    Args:
      model: any module. Its parameters, buffers and train/eval mode are read at every call.
      opt: an instance of `torch.optim` (SGD, Adam, AdamW), whose groups, hyperparameters and state are read at every call and left alone,
        or one of `adaptrt.optim`. Hyperparameters are inputs: changing one does not recompile, and a tensor that requires grad gets its
        meta-gradient.
      k: number of inner steps, at least 1.
      loss: `loss(output, target)`, or `loss(output)` for batches without target; returns a scalar. A module's parameters are meta-learned
        with the model's. None: cross-entropy for integer targets, mean squared error for floating ones, the output itself (or its
        `.loss`) when that is a scalar already.
      params: which parameters adapt: a glob on their names, a list of globs, or a predicate of (name, parameter). Left out: all that
        require grad, and with a `torch.optim` instance only those it holds. The rest are used unchanged, and get meta-gradients through
        support and query losses if they require grad.
      adjoint: `Unrolled()`, `Replay(every=n)`, `FirstOrder()`, or "auto" to choose by the size of the graph.
      backend: "inductor", "eager", a `Backend`, or "auto": inductor where a compiler is found, with a warning where none is.
      per_step: support has a leading axis of length k, one batch for each step.
      on_new_shape: what data of a shape not seen before does: "compile", or "error" to allow what `warmup` has seen only.
      cache_size: how many support shapes are kept, and query shapes for each; the least recently used is dropped.
      nonfinite: "error" refuses data with NaN or infinity, "ignore" does not look.
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
    if loss is not None and not callable(loss):
        raise InvalidType(f"loss must be a function, a module or None, got {type(loss).__name__}")
    if isinstance(adjoint, str):
        check.one_of("adjoint", adjoint, ("auto",))
    elif not isinstance(adjoint, Adjoint):
        raise InvalidType(f"adjoint must be 'auto', Unrolled(), Replay(), or FirstOrder(), got {adjoint!r}")
    adapted = _adapted_names(model, opt, params)
    return CompiledUnroll(
        _Settings(
            model=model,
            loss=loss,
            adapted=adapted,
            source=source(opt, {name: param for name, param in model.named_parameters() if name in adapted}),
            k=k,
            adjoint=None if isinstance(adjoint, str) else adjoint,
            backend=_backend(backend, device),
            per_step=bool(per_step),
            must_be_warm=on_new_shape == "error",
            cache_size=cache_size,
            check_finite=nonfinite == "error",
            device=device,
        )
    )


def _adapted_names(model: nn.Module, opt: Any, select: Select) -> frozenset[str]:
    """Names of the parameters that adapt."""
    named = dict(model.named_parameters())
    held = {id(param) for group in opt.param_groups for param in group["params"]} if isinstance(opt, torch.optim.Optimizer) else None
    own = {id(param) for param in named.values()}
    foreign = [param for group in opt.param_groups for param in group["params"] if id(param) not in own] if held is not None else []
    if foreign:
        raise OptimizerMismatch(
            f"opt holds {len(foreign)} parameters that the model does not have (the first of shape {list(foreign[0].shape)}); build it "
            "from this model's parameters()"
        )
    if select is None:
        chosen = {name for name, param in named.items() if param.requires_grad and (held is None or id(param) in held)}
        reason = "none requires grad" if held is None else "none that requires grad is in opt"
    else:
        chosen = {name for name, param in named.items() if _selects(select, name, param)}
        reason = f"params={select!r} matches none of {', '.join(named)}"
        missing = [name for name in chosen if held is not None and id(named[name]) not in held]
        if missing:
            raise OptimizerMismatch(
                f"params= asks for {', '.join(sorted(missing))}, which opt does not hold; add them to a parameter group"
            )
    if not chosen:
        raise NothingToAdapt(f"no parameter to adapt: {reason}")
    return frozenset(chosen)


def _selects(select: Select, name: str, param: nn.Parameter) -> bool:
    if isinstance(select, str):
        return fnmatch.fnmatchcase(name, select)
    if isinstance(select, Sequence) and all(isinstance(pattern, str) for pattern in select):
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in select)
    if callable(select):
        return bool(select(name, param))
    raise InvalidType(f"params must be a glob, a list of globs or a predicate of (name, parameter), got {select!r}")


def _backend(backend: Backend | str, device: torch.device) -> Backend:
    if isinstance(backend, Backend):
        return backend
    check.one_of("backend", backend, ("auto", "eager", "inductor"))
    if backend == "eager" or (backend == "auto" and warn_if_missing(device)):
        return Eager()
    return Inductor()


class _Settings(NamedTuple):
    """What `compile_unroll` was asked for."""

    model: nn.Module
    loss: LossFunction
    adapted: frozenset[str]
    source: Any
    k: int
    adjoint: Adjoint | None
    backend: Backend
    per_step: bool
    must_be_warm: bool
    cache_size: int
    check_finite: bool
    device: torch.device


class Adapted:
    """A model after adaptation.

    Attributes:
      params: adapted parameters by name; with a task axis [T, ...] if made by `vmap()`.
      buffers: buffers by name, as the support batches left them.
      opt_state: the optimiser's state.
      losses: support loss before each step, (k,) or [T, k].
    """

    def __init__(self, owner: CompiledUnroll, carry: Carry, losses: Tensor, fixed: Fixed, num_tasks: int | None) -> None:
        self._owner = owner
        self._carry = carry
        self._fixed = fixed
        self.num_tasks = num_tasks
        self.losses = losses
        self.params = carry.params
        self.opt_state = carry.opt_state
        self.buffers = {name: value for name, value in carry.buffers.items() if not name.startswith(LOSS_BUFFER)}

    def __call__(self, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
        """What the adapted model returns for these arguments; differentiable outside `no_grad`.

        Args:
          args, kwargs: as the model takes them; with a task axis on every tensor if made by `vmap()`.
          generator: where dropout and the like draw from; None for the global generator.
        Buffers that this call would update are left as they are.
        """
        if args and kwargs:
            raise InvalidType("pass the model's inputs all by position or all by keyword")
        inputs = kwargs if kwargs else args if len(args) != 1 else args[0]
        return self._owner._predict(self, inputs, generator)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole model's state after adaptation, detached, under the names of `model.state_dict()`."""
        return self._owner._state_dict(self)


class CompiledUnroll:
    """k inner steps and their meta-gradient, as programs. Made by `compile_unroll`; safe to call from several threads."""

    def __init__(self, settings: _Settings, task_axis: bool = False) -> None:
        self._settings = settings
        self._task_axis = task_axis
        self._plans: Cache[SupportPlan] = Cache(settings.cache_size)
        self._predictions: Cache[PredictionPlan] = Cache(settings.cache_size)
        self._reader = Reader(settings.model, settings.loss, settings.adapted, settings.source, settings.device)

    # --- what users call

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
        call = self._prepare(support, None, start, generator)
        carry, losses = autograd.adapt(call)
        return Adapted(self, carry, losses, call.task.fixed, call.num_tasks)

    def __call__(self, support: Any, query: Any, *, start: Adapted | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The meta-loss: the loss of the adapted model on the query batch, a scalar; the mean over tasks with `vmap()`.

        With gradients enabled, loss and meta-gradient are computed together, and `backward()` only scales them.

        Args:
          support, start, generator: as for `adapt`.
          query: like support, without the axis of steps.
        Raises:
          As `adapt`.
        """
        return autograd.meta_loss(self._prepare(support, query, start, generator))

    def vmap(self) -> CompiledUnroll:
        """The same unroll over tasks: a leading task axis on support, query and results; the meta-loss is the mean over tasks.

        Each task starts from the same parameters and has noise of its own. Name and meaning as in `torch.func`.
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
            call = self._prepare(support, None, None, generator, warm=True)
            adapted = Adapted(self, *autograd.adapt(call), call.task.fixed, call.num_tasks)
            if query is not None:
                self._predict(adapted, check.as_batch("query", query, self._settings.device).inputs, generator, warm=True)
        if query is not None:
            autograd.meta_loss(self._prepare(support, query, None, generator, warm=True))
        return self

    def explain(self) -> Explanation:
        """Which adjoint was chosen and why, and each program's size before and after each pass, FLOPs, bytes and compile time."""
        return explain(self._settings.k, self._settings.backend.name, self._plans.entries(), self._predictions.entries())

    def graphs(self) -> dict[str, Graph]:
        """The graphs compiled so far, by program name, for the shapes used last."""
        sets = [plan.programs for plan in self._plans.entries()]
        sets += [query.programs for plan in self._plans.entries() for query in plan.queries.entries()]
        sets += [prediction.programs for prediction in self._predictions.entries()]
        return {name: program.graph for programs in sets for name, program in programs.named()}

    # --- how a call is made ready

    def _prepare(self, support: Any, query: Any, start: Adapted | None, generator: torch.Generator | None, warm: bool = False) -> Call:
        settings = self._settings
        batch = check.as_batch("support", support, settings.device)
        num_tasks = self._num_tasks("support", batch)
        if settings.per_step:
            check.leading_axis("support", batch, int(self._task_axis), settings.k, "inner steps")
        check.batch_sizes("support", batch, int(self._task_axis) + int(settings.per_step))
        query_batch: Batch | None = None
        if query is not None:
            query_batch = check.as_batch("query", query, settings.device)
            check.batch_sizes("query", query_batch, int(self._task_axis))
            if num_tasks is not None:
                check.leading_axis("query", query_batch, 0, num_tasks, "tasks")
        carry, fixed = self._reader.read()
        if start is not None:
            carry = self._start(start, carry, num_tasks)
        start_has_tasks = start is not None and start.num_tasks is not None
        plan, query_plan = self._plan(batch, query_batch, carry, fixed, start_has_tasks, num_tasks, warm)
        check.labels("support", batch, plan.probe.bounds)
        if settings.check_finite:
            check.finite("support", batch)
        if query_batch is not None and query_plan is not None:
            check.labels("query", query_batch, query_plan.probe.bounds)
            if settings.check_finite:
                check.finite("query", query_batch)
        problem, inputs = self._problem(plan, carry, fixed, batch, query_batch, start_has_tasks)
        # Drawn last: an error above leaves the random state alone.
        noise = tuple(draw(plan.probe.noise, generator, num_tasks) for _ in range(settings.k))
        asked = None
        if query_batch is not None and query_plan is not None:
            asked = Query(query_batch, draw(query_plan.probe.noise, generator, num_tasks))
        return Call(plan, query_plan, problem, Task(carry, fixed, batch, noise), asked, num_tasks, inputs)

    def _num_tasks(self, name: str, batch: Tree) -> int | None:
        return check.leading_axis(name, batch, 0, None, "tasks") if self._task_axis else None

    def _start(self, start: Adapted, carry: Carry, num_tasks: int | None) -> Carry:
        if not isinstance(start, Adapted):
            raise InvalidType(f"start must be what adapt() returned, got {type(start).__name__}")
        if start.num_tasks is not None and start.num_tasks != num_tasks:
            raise InvalidArgument(f"start holds {start.num_tasks} tasks, the support batch {num_tasks or 'no task axis'}")
        if tree.flatten(start._carry)[1] != tree.flatten(carry)[1]:
            raise OptimizerMismatch("start was adapted with another optimiser or other parameters; pass a result of this unroll")
        return start._carry

    def _plan(
        self,
        batch: Batch,
        query: Batch | None,
        carry: Carry,
        fixed: Fixed,
        start_has_tasks: bool,
        num_tasks: int | None,
        warm: bool,
    ) -> tuple[SupportPlan, QueryPlan | None]:
        settings = self._settings
        modules = [part for part in (settings.model, settings.loss) if isinstance(part, nn.Module)]
        key = (self._reader.structure(), _key(batch), _key(fixed.hyper), start_has_tasks)
        one_task = tree.map_leaves(without_leading_axis, carry) if start_has_tasks else tree.specs(carry)
        one_fixed = tree.specs(fixed)

        def programs(parent: ProgramSet | None) -> MakePrograms:
            def make(step: Step, explain_failure: Explain) -> ProgramSet:
                return ProgramSet(settings.backend, modules, num_tasks, start_has_tasks, step.detach_gradient, explain_failure, parent)

            return make

        def make_plan() -> SupportPlan:
            self._require_warm("support", batch, [plan.shapes for plan in self._plans.entries()], warm)
            one = _one(batch, num_tasks is not None)
            one = tree.map_leaves(without_leading_axis, one) if settings.per_step else one
            return plan_support(
                self._reader.step,
                settings.adjoint,
                settings.k,
                one_task,
                one_fixed,
                one,
                _shapes(batch),
                programs(None),
                settings.cache_size,
            )

        plan = self._plans.get_or_make(key, make_plan)
        if query is None:
            return plan, None

        def make_query_plan() -> QueryPlan:
            self._require_warm("query", query, [known.shapes for known in plan.queries.entries()], warm)
            return plan_query(
                plan, one_task, one_fixed, _one(query, num_tasks is not None), _shapes(query), programs(plan.programs), num_tasks
            )

        return plan, plan.queries.get_or_make(_key(query), make_query_plan)

    def _require_warm(self, name: str, batch: Tree, known: list[tuple[str, ...]], warm: bool) -> None:
        if warm or not self._settings.must_be_warm:
            return
        advice = "Call unroll.warmup() with this shape first, or pad to a shape that was."
        if not known:
            raise ShapeChanged(f"{name} {tree.describe(batch)}: nothing was compiled yet. {advice}")
        for index, (before, now) in enumerate(zip(known[-1], _shapes(batch), strict=False)):
            if before != now:
                raise ShapeChanged(f"{name} tensor {index} was traced as {before}, got {now}. {advice}")
        raise ShapeChanged(f"{name} was traced as {', '.join(known[-1])} in another mode, structure or optimiser setting. {advice}")

    def _problem(
        self, plan: SupportPlan, carry: Carry, fixed: Fixed, batch: Batch, query: Batch | None, start_has_tasks: bool
    ) -> tuple[Problem, tuple[Tensor, ...]]:
        wanted: list[Tensor] = []

        def marks(part: Tree) -> tuple[bool, ...]:
            values = tree.leaves(part)
            wanted.extend(value for value in values if torch.is_grad_enabled() and value.requires_grad)
            return tuple([torch.is_grad_enabled() and value.requires_grad for value in values])

        problem = Problem(
            step=plan.step,
            unroll=unroll,
            batch_of_step=batch_of_step,
            k=self._settings.k,
            per_step=self._settings.per_step,
            start=marks(carry),
            fixed=marks(fixed),
            support=marks(batch),
            query=marks(query),
            carry=plan.carry,
            task_axis=self._task_axis,
            start_has_task_axis=start_has_tasks,
        )
        return problem, tuple(wanted)

    # --- prediction

    def _predict(self, adapted: Adapted, inputs: Tree, generator: torch.Generator | None, warm: bool = False) -> Any:
        settings = self._settings
        check.as_batch("input", (inputs,), settings.device)
        carry, fixed, num_tasks = adapted._carry, adapted._fixed, adapted.num_tasks
        if num_tasks is not None:
            check.leading_axis("input", inputs, 0, num_tasks, "tasks")
        if settings.check_finite:
            check.finite("input", Batch(inputs, None))
        one_carry = tree.map_leaves(without_leading_axis, carry) if num_tasks is not None else tree.specs(carry)
        step = self._reader.step(False)

        def programs(step: Step, explain_failure: Explain) -> ProgramSet:
            return ProgramSet(settings.backend, [settings.model], num_tasks, True, False, explain_failure)

        def make() -> PredictionPlan:
            self._require_warm("input", inputs, [known.shapes for known in self._predictions.entries()], warm)
            return plan_prediction(step, one_carry, tree.specs(fixed), _one(inputs, num_tasks is not None), _shapes(inputs), programs)

        plan = self._predictions.get_or_make((self._reader.mode(), _key(inputs), num_tasks), make)
        return autograd.predict(plan, step, carry, fixed, inputs, draw(plan.noise, generator, num_tasks), torch.is_grad_enabled())

    def _state_dict(self, adapted: Adapted) -> dict[str, Tensor]:
        model = self._settings.model
        values = {**self._reader.params(), **adapted._fixed.params, **adapted.params, **adapted.buffers}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        first = canonical_names(named)
        return {name: values[first[name]].detach() if name in first else held for name, held in model.state_dict().items()}


def _key(part: Tree) -> Hashable:
    values, structure = tree.flatten(part)
    return structure, tuple([(value.shape, value.dtype) for value in values])


def _shapes(part: Tree) -> tuple[str, ...]:
    return tuple(str(tree.Spec.of(leaf)) for leaf in tree.leaves(part))


def _one(part: Tree, task_axis: bool) -> Tree:
    """Specs of one task."""
    return tree.map_leaves(without_leading_axis, part) if task_axis else tree.specs(part)
