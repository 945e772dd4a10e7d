"""`compile_unroll`, the entry point: puts the pipeline together and runs it on the user's data.

Known limits: which parameters adapt is decided when `compile_unroll` is called; layers added to the model later are not seen. Programs are
compiled for one set of shapes each. Python values that the model reads are constants of a program. The caller's autocast is off
inside programs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from adaptrt import tree
from adaptrt.adjoint import Adjoint
from adaptrt.adjoint.base import Query, Task
from adaptrt.backend import Backend, CudaGraph, Eager, Inductor, Tiered
from adaptrt.backend.entry_points import entry_point
from adaptrt.backend.inductor import warn_if_missing
from adaptrt.backend.tiered import TieredRunner, call_ended
from adaptrt.errors import CannotBePickled, CannotBeSet, InvalidArgument, InvalidType, NonFiniteInput
from adaptrt.graph.ir import Graph
from adaptrt.graph.noise import restored_on_error
from adaptrt.inner import check
from adaptrt.inner.reader import Reader, Select, Selection
from adaptrt.inner.refused import unwrapped
from adaptrt.inner.step import LossFunction, as_call
from adaptrt.optim import Optimizer
from adaptrt.optim.source import source
from adaptrt.runtime import nodes
from adaptrt.runtime.adapted import Adapted
from adaptrt.runtime.explain import Explanation, explain
from adaptrt.runtime.nodes import Call
from adaptrt.runtime.planner import Planner
from adaptrt.runtime.predict import ModelPredictor
from adaptrt.runtime.route import Route, Router
from adaptrt.runtime.settings import Settings
from adaptrt.runtime.state import State


@entry_point
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
    """Compiles k steps of `opt` on a support batch, and their meta-gradient.

    Programs are compiled when data of a shape is first seen; `warmup` does it ahead of time. The model is never changed: neither its
    parameters, buffers and mode, nor its hooks and `.grad`.

    Args:
      model: any module. Its parameters, buffers and train/eval mode are read at every call. Of a `DataParallel` the module in it is taken,
        whose parameters' names count; of what `torch.compile` made the names count that it gives, such as "_orig_mod.weight".
      opt: an instance of `torch.optim` (docs/optimisers.md says which), whose groups, hyperparameters and state are read at every call and
        never changed, or an optimiser of `adaptrt.optim`. Hyperparameters are inputs: changing one does not recompile, and a tensor that
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
      nonfinite: "error" refuses data with NaN or infinity, "ignore" accepts it.
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
    model = unwrapped(model)
    device = check.model_device(model)
    check.positive_int("k", k)
    check.positive_int("cache_size", cache_size)
    check.one_of("on_new_shape", on_new_shape, ("compile", "error"))
    check.one_of("nonfinite", nonfinite, ("error", "ignore"))
    if dtype is not None:
        check.precision(dict(model.named_parameters()), dtype)
    check.loss(loss)
    if adjoint != "auto" and not isinstance(adjoint, Adjoint):
        kind = InvalidArgument if isinstance(adjoint, str) else InvalidType
        raise kind(f"adjoint must be 'auto', Unrolled(), Replay(every=n), Stash() or FirstOrder(), got {adjoint!r}")
    selection = Selection(model, opt, params)
    adapted = selection()
    check.shared_tensors(model, loss, adapted)
    return CompiledUnroll(
        Settings(
            model=model,
            loss=loss,
            adapted=adapted,
            opt=opt,
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
            selection=selection,
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


class CompiledUnroll:
    """k inner steps and their meta-gradient, as programs. Made by `compile_unroll`; safe to call from several threads.

    A deep copy has copies of model, loss and optimiser, and compiles programs of its own. An unroll cannot be pickled.
    """

    _settings: Settings
    _task_axis: bool
    _planner: Planner
    _router: Router
    _predictor: ModelPredictor

    def __init__(self, settings: Settings, task_axis: bool = False) -> None:
        what = settings.model, settings.loss, settings.adapted, settings.source, settings.device
        reader = Reader(*what, dtype=settings.dtype, selection=settings.selection)
        planner = Planner(settings, reader)
        held = self.__dict__  # attributes cannot be set
        held["_settings"] = settings
        held["_task_axis"] = task_axis
        held["_planner"] = planner
        held["_router"] = Router(settings, task_axis, reader, planner)
        held["_predictor"] = ModelPredictor(settings, reader, planner)

    def __setattr__(self, name: str, value: object = None) -> NoReturn:
        del value
        raise CannotBeSet(
            f"an unroll has no attribute '{name}' that can be set; call compile_unroll for other settings. Weights, buffers, modes and "
            "hyperparameters are read from model and optimiser at every call"
        )

    __delattr__ = __setattr__  # pyright: ignore

    def __copy__(self) -> CompiledUnroll:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledUnroll:
        return CompiledUnroll(copy.deepcopy(self._settings, memo), self._task_axis)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        del protocol
        raise CannotBePickled(
            "an unroll holds compiled programs and cannot be pickled; save model.state_dict(), or send it to a process that was started "
            "with the method 'spawn', and call compile_unroll there"
        )

    def __repr__(self) -> str:
        tasks = ", over tasks" if self._task_axis else ""
        return f"CompiledUnroll({type(self._settings.model).__name__}, k={self._settings.k}, backend={self._settings.backend.name}{tasks})"

    @property
    def k(self) -> int:
        """The number of inner steps."""
        return self._settings.k

    @property
    def device(self) -> torch.device:
        """Where the model was when the unroll was made, and where data has to be."""
        return self._settings.device

    @entry_point
    def adapt(self, support: Any, *, start: Adapted | None = None, generator: torch.Generator | None = None) -> Adapted:
        """Adapts the model to a support batch.

        Differentiable outside `no_grad`: parameters, hyperparameters, support data and `start` that require grad get gradients from
        whatever is computed from the result.

        Args:
          support: `(inputs, target)` or `(inputs,)`; inputs a tensor, tuple or dict. Axes [S, ...] = support examples first, behind steps k
            with `per_step` and tasks T with `vmap`: [T, k, S, ...].
          start: go on from an earlier result, its optimiser state included, or from what `start()` returned, instead of from the present
            values of model and optimiser. With a task axis each task goes on from its own; a start without one is that of every task.
          generator: where random operations draw from; None for the global generator.
        Raises:
          InvalidBatch, LabelOutOfRange, NonFiniteInput, DeviceMismatch, ShapeChanged, InvalidLoss, NothingToAdapt,
          DataDependentControlFlow, NotDifferentiable: see `adaptrt.errors`.
        """
        with self._planner.call():
            return self._adapt(support, start, generator, warm=False)

    @entry_point
    def start(
        self,
        *,
        params: Mapping[str, Tensor] | None = None,
        opt_state: Any = None,
        buffers: Mapping[str, Tensor] | None = None,
        num_tasks: int | None = None,
    ) -> Adapted:
        """Returns the adaptation of zero steps, for `start=`: the values that model and optimiser have now, or others.

        Values that are not given are copied, so that later changes of the model do not show; gradients flow to the model's parameters, and
        to what is given.

        Args:
          params, buffers: values by name, in the place of the model's own; parameters of those that adapt.
          opt_state: all of the optimiser's state. None: its present state, or the initial one of an optimiser of `adaptrt.optim`, which
            is computed from the parameters given if it depends on them.
          num_tasks: T, for a start that has a task axis. Values then have one, [T, ...], or are given to every task.
        Raises:
          InvalidArgument, InvalidType, DeviceMismatch: a name that is not there, something that is no tensor, or a shape, dtype, structure
            or device that does not fit.

        Example:
          >>> unroll = compile_unroll(nn.Linear(3, 2), optim.sgd(lr=0.1), k=2, backend="eager")
          >>> prototypes = torch.randn(2, 3)
          >>> start = unroll.start(params={"weight": prototypes})
          >>> unroll.adapt((torch.randn(6, 3), torch.randint(2, (6,))), start=start).params["weight"].shape
          torch.Size([2, 3])
        """
        return self._router.first(self._predictor, params, opt_state, buffers, num_tasks)

    @entry_point
    def __call__(self, support: Any, query: Any, *, start: Adapted | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The meta-loss: the loss of the adapted model on the query batch, a scalar; the mean over tasks with `vmap()`.

        With gradients enabled, loss and meta-gradient are computed together, and `backward()` only scales them.

        Args:
          support, start, generator: as for `adapt`.
          query: like support, without the axis of steps.
        Raises:
          As `adapt`.
        """
        with self._planner.call():
            return self._meta_loss(support, query, start, generator, warm=False)

    def vmap(self) -> CompiledUnroll:
        """The same unroll over tasks: a leading task axis on support, query and results; the meta-loss is the mean over tasks.

        Each task starts from the same parameters and has noise of its own. Name and meaning as in `torch.func`. On the CPU large tasks are
        done one after the other, which `explain()` shows as `EachTask(...)` around the adjoint; results differ by rounding.
        """
        if self._task_axis:
            raise InvalidArgument("vmap() was called on an unroll that has a task axis already")
        return CompiledUnroll(self._settings, task_axis=True)

    @entry_point
    def warmup(self, support: Any, query: Any = None, *, start: bool = False) -> CompiledUnroll:
        """Compiles for data of these shapes ahead of time; returns the unroll itself.

        That is what `adapt` needs without gradients; with `query` also prediction on its inputs, and the meta-loss, with its gradient
        if gradients are enabled here. The global random state does not change.

        Args:
          support, query: as for `adapt` and for a call.
          start: also compile for calls with `start=`. With a task axis these need programs of their own, because each task then starts from
            values of its own. Without one, `adapt` needs none.
        """
        generator = torch.Generator(self._settings.device)
        with torch.no_grad():
            adapted = self._adapt(support, None, generator, warm=True)
            if start:
                self._adapt(support, adapted, generator, warm=True)
            if query is not None:
                args, kwargs = as_call(check.as_batch("query", query, self._settings.device).inputs)
                self._predictor.predict(adapted.state, adapted.fixed, kwargs or args, generator, warm=True)
        if query is not None:
            self._meta_loss(support, query, None, generator, warm=True)
            if start:
                self._meta_loss(support, query, adapted, generator, warm=True)
        call_ended()
        for _, program in self._planner.programs():
            if isinstance(program.run, TieredRunner):
                program.run.wait()
        return self

    def explain(self) -> Explanation:
        """Which adjoint was chosen and why, and each program's size before and after each pass, FLOPs, bytes and compile time."""
        return explain(self._settings.k, self._settings.backend, self._planner.supports.entries(), self._planner.predictions.entries())

    def graphs(self) -> dict[str, Graph]:
        """The graphs compiled so far by program name; a number is added where several shapes have a program of that name."""
        found: dict[str, Graph] = {}
        for name, program in self._planner.programs():
            count = sum(known == name or known.startswith(f"{name} #") for known in found)
            found[f"{name} #{count + 1}" if count else name] = program.graph
        return found

    def _adapt(self, support: Any, start: Adapted | None, generator: torch.Generator | None, warm: bool) -> Adapted:
        route, begin, batch, _, inputs = self._router.find(support, None, start, warm)
        plan = route.plan
        plan.validation.before("support", batch, plan.probe.bounds)
        with restored_on_error(plan.probe.noise, generator):
            try:
                if route.whole is not None:
                    results = route.whole.run_leaves([*begin.carry_leaves, *begin.fixed_leaves, *tree.leaves(batch)])
                    num_leaves = len(begin.carry_leaves)
                    leaves, losses = results[:num_leaves], results[num_leaves]
                else:
                    task = Task(begin.carry, begin.fixed, batch, self._step_noise(route, generator))
                    leaves, losses = nodes.adapt(Call(route, task, None, inputs))
            except NonFiniteInput:
                plan.validation.report("support", batch, plan.probe.bounds)
                raise
        num_links = 0 if start is None else start.num_links_after(leaves)
        return Adapted(self._predictor, State(tuple(leaves), route.form, route.num_tasks), losses, begin.fixed, num_links)

    def _meta_loss(self, support: Any, query: Any, start: Adapted | None, generator: torch.Generator | None, warm: bool) -> Tensor:
        route, begin, batch, asked, inputs = self._router.find(support, (query,), start, warm)
        plan, query_plan = route.plan, route.query_plan
        assert query_plan is not None and asked is not None
        plan.validation.before("support", batch, plan.probe.bounds)
        plan.validation.before("query", asked, query_plan.probe.bounds)
        with restored_on_error((*plan.probe.noise, *query_plan.probe.noise), generator):
            task = Task(begin.carry, begin.fixed, batch, self._step_noise(route, generator))
            noise = self._planner.draw(query_plan.probe.noise, generator, route.num_tasks)
            try:
                return nodes.meta_loss(Call(route, task, Query(asked, noise), inputs))
            except NonFiniteInput:
                plan.validation.report("support", batch, plan.probe.bounds)
                plan.validation.report("query", asked, query_plan.probe.bounds)
                raise

    def _step_noise(self, route: Route, generator: torch.Generator | None) -> tuple[tuple[Tensor, ...], ...]:
        """What each update's random operations return."""
        noise, num_updates = route.plan.probe.noise, self._settings.k * route.plan.step.optimizer.updates_per_step
        if not noise:
            return ((),) * num_updates
        return tuple([self._planner.draw(noise, generator, route.num_tasks) for _ in range(num_updates)])
