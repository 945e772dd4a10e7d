"""Finds the plan for a call by the shapes of its data, or makes it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from adaptrt import tree
from adaptrt.adjoint import Adjoint
from adaptrt.backend import Backend
from adaptrt.backend.launch import RUNNING
from adaptrt.errors import ShapeChanged
from adaptrt.graph.noise import Noise, draw
from adaptrt.inner.reader import Reader, Start
from adaptrt.inner.step import Batch, Carry, Fixed, Step
from adaptrt.runtime.plan import (
    Cache,
    Explain,
    MakePrograms,
    PredictionPlan,
    QueryPlan,
    SupportPlan,
    plan_prediction,
    plan_query,
    plan_support,
)
from adaptrt.runtime.program_set import ProgramSet, without_leading_axis
from adaptrt.tree import Tree


class Planner:
    """The plans of one unroll.

    Args:
      reader: of model and optimiser.
      modules: where plain tensor attributes are looked up.
      adjoint: None to choose by graph size.
      backend: what runs the programs.
      k: number of steps.
      per_step: whether support has an axis of steps.
      cache_size: how many support shapes, query shapes for each, and prediction shapes to keep.
      must_be_warm: whether only `warm=True` may make a plan.
      check_finite: whether NaN and infinity in data are refused; where a program can look at little cost, it does.
      device: of the model.
    """

    def __init__(
        self,
        reader: Reader,
        modules: Sequence[nn.Module],
        adjoint: Adjoint | None,
        backend: Backend,
        k: int,
        per_step: bool,
        cache_size: int,
        must_be_warm: bool,
        check_finite: bool,
        device: torch.device,
    ) -> None:
        self._reader = reader
        self._modules = modules
        self._adjoint = adjoint
        self._backend = backend
        self._k = k
        self._per_step = per_step
        self._cache_size = cache_size
        self._must_be_warm = must_be_warm
        self._launcher = backend.launcher(device)
        self._rehearses = backend.builds_ahead(device)
        self._checks_data = check_finite and backend.fuses
        self.supports: Cache[SupportPlan] = Cache(cache_size)
        self.predictions: Cache[PredictionPlan] = Cache(cache_size)

    def support(self, batch: Batch, start: Start, num_tasks: int | None, warm: bool) -> SupportPlan:
        """The plan for adapting on data like `batch`.

        Args:
          batch: with all its axes.
          start: what the call starts from.
          num_tasks: length of the task axis, None without one.
          warm: whether a plan may be made under `must_be_warm`.
        Raises:
          ShapeChanged: there is none, and none may be made; and what `plan_support` raises.
        """

        def make() -> SupportPlan:
            self._require_warm("support", batch, [plan.shapes for plan in self.supports.entries()], warm)
            one = _one(batch, num_tasks is not None)
            return plan_support(
                self._reader.step,
                self._adjoint,
                self._k,
                self._per_step,
                num_tasks,
                _one(start.carry, start.has_tasks),
                tree.specs(start.fixed),
                _one(one, True) if self._per_step else one,
                _shapes(batch),
                self._programs(num_tasks, start.has_tasks, None),
                self._cache_size,
            )

        # The trees of carry and fixed follow from the reader's structure; what remains of them are shapes and dtypes.
        key = start.structure, _key(batch), _kinds(start.carry_leaves), _kinds(start.fixed_leaves), start.has_tasks
        return self.supports.get_or_make(key, make)

    def query(self, plan: SupportPlan, batch: Batch, start: Start, num_tasks: int | None, warm: bool) -> QueryPlan:
        """The plan for evaluating data like `batch` after `plan`. Arguments and errors as for `support`."""

        def make() -> QueryPlan:
            self._require_warm("query", batch, [known.shapes for known in plan.queries.entries()], warm)
            return plan_query(
                plan,
                _one(start.carry, start.has_tasks),
                tree.specs(start.fixed),
                _one(batch, num_tasks is not None),
                _shapes(batch),
                self._programs(num_tasks, start.has_tasks, plan.programs),
                num_tasks,
            )

        return plan.queries.get_or_make(_key(batch), make)

    def prediction(self, step: Step, inputs: Tree, carry: Carry, fixed: Fixed, num_tasks: int | None, warm: bool) -> PredictionPlan:
        """The plan for predicting on inputs like `inputs`. Arguments and errors as for `support`."""

        def make() -> PredictionPlan:
            self._require_warm("input", inputs, [known.shapes for known in self.predictions.entries()], warm)
            tasks = num_tasks is not None
            programs = self._programs(num_tasks, tasks, None)
            return plan_prediction(step, _one(carry, tasks), tree.specs(fixed), _one(inputs, tasks), _shapes(inputs), programs)

        return self.predictions.get_or_make((self._reader.mode(), _key((inputs, carry, fixed)), num_tasks), make)

    @property
    def launches_calls(self) -> bool:
        """Whether each call is one launch."""
        return self._launcher is not None

    def draw(self, noises: Sequence[Noise], generator: torch.Generator | None, num_tasks: int | None) -> tuple[Tensor, ...]:
        """As `graph.noise.draw`; where calls are launches, not while another thread records one."""
        if self._launcher is None or not noises:
            return draw(noises, generator, num_tasks)
        with RUNNING:
            return draw(noises, generator, num_tasks)

    def refuse(self) -> None:
        """Raises `CannotRecord` if calls are launches, and none can be made here and now."""
        if self._launcher is not None:
            self._launcher.refuse()

    def program_sets(self) -> list[ProgramSet]:
        """All sets of programs, those of the shapes used last at the end."""
        plans = self.supports.entries()
        sets = [part for plan in plans for part in (plan.programs, *(query.programs for query in plan.queries.entries()))]
        return [*sets, *(prediction.programs for prediction in self.predictions.entries())]

    def _programs(self, num_tasks: int | None, carry_has_tasks: bool, parent: ProgramSet | None) -> MakePrograms:
        def make(step: Step, explain_failure: Explain, each_task: bool) -> ProgramSet:
            return ProgramSet(
                self._backend,
                self._modules,
                None if each_task else num_tasks,
                carry_has_tasks,
                step.detach_gradient,
                explain_failure,
                self._checks_data,
                self._launcher,
                self._rehearses,
                parent,
            )

        return make

    def _require_warm(self, name: str, part: Tree, known: list[tuple[str, ...]], warm: bool) -> None:
        if warm or not self._must_be_warm:
            return
        advice = "Call unroll.warmup() with this shape first, or pad to a shape that was."
        if not known:
            raise ShapeChanged(f"{name} {tree.describe(part)}: nothing was compiled yet. {advice}")
        for index, (before, now) in enumerate(zip(known[-1], _shapes(part), strict=False)):
            if before != now:
                raise ShapeChanged(f"{name} tensor {index} was traced as {before}, got {now}. {advice}")
        raise ShapeChanged(f"{name} was traced as {', '.join(known[-1])} in another mode, structure or optimiser setting. {advice}")


def _key(part: Tree) -> Hashable:
    leaves, structure = tree.flatten(part)
    return structure, _kinds(leaves)


def _kinds(leaves: Sequence[Tensor]) -> Hashable:
    return tuple([(value.shape, value.dtype) for value in leaves])


def _shapes(part: Tree) -> tuple[str, ...]:
    return tuple(str(tree.Spec.of(leaf)) for leaf in tree.leaves(part))


def _one(part: Tree, leading_axis: bool) -> Tree:
    """Specs of one task, or one step."""
    return tree.map_leaves(without_leading_axis, part) if leading_axis else tree.specs(part)
