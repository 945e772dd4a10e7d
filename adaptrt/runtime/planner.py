"""Finds the plan for a call by the shapes of its data, or makes it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.backend import Tiered
from adaptrt.backend.launch import RUNNING
from adaptrt.backend.tiered import call_ended
from adaptrt.errors import ModelChanged, ShapeChanged
from adaptrt.graph.gradient_mode import GradientMode
from adaptrt.graph.noise import Noise, draw
from adaptrt.graph.surroundings import refuse_transforms
from adaptrt.inner.executed import Executed
from adaptrt.inner.guard import Guard
from adaptrt.inner.reader import Reader, Start
from adaptrt.inner.step import Batch, Carry, Fixed
from adaptrt.runtime.cache import Cache
from adaptrt.runtime.capture import TaskAxis
from adaptrt.runtime.plan import (
    Arguments,
    GuardPlan,
    PredictionPlan,
    QueryPlan,
    SupportPlan,
    in_words,
    plan_guard,
    plan_prediction,
    plan_query,
    plan_support,
)
from adaptrt.runtime.program import Program
from adaptrt.runtime.settings import Settings
from adaptrt.tree import Tree


class _TieredCall:
    def close(self) -> None:
        call_ended()


_TIERED_CALL = _TieredCall()
_NOTHING = contextlib.nullcontext()


class Planner:
    """Holds the plans of one unroll.

    Args:
      settings: of the unroll.
      reader: of model and optimiser.
      of_one_step: whether the plans are for the single steps of an unroll, between which the query is evaluated.
    """

    def __init__(self, settings: Settings, reader: Reader, of_one_step: bool = False) -> None:
        self._of_one_step = of_one_step
        self._settings = settings
        self._reader = reader
        self._launcher = settings.backend.launcher(settings.device)
        self._is_tiered = isinstance(settings.backend, Tiered)
        self.supports: Cache[SupportPlan] = Cache(settings.cache_size)
        self.predictions: Cache[PredictionPlan] = Cache(settings.cache_size)

    def support(self, batch: Batch, start: Start, num_tasks: int | None, warm: bool) -> SupportPlan:
        """Returns the plan for adapting on data like `batch`.

        Args:
          batch: with all its axes.
          start: what the call starts from.
          num_tasks: length of the task axis, None without one.
          warm: whether a plan may be made although data of new shapes is refused.
        Raises:
          ShapeChanged: there is none, and none may be made; and what `plan_support` raises.
        """

        def make() -> SupportPlan:
            self._require_warm("support", batch, [plan.shapes for plan in self.supports.entries()], warm, start.has_tasks)
            arguments = Arguments.of(
                start.carry, start.fixed, batch, TaskAxis(num_tasks, start.has_tasks), self.python(), self._settings.per_step
            )
            plan = plan_support(self._settings, self._launcher, self._reader.step, arguments)
            self._reader.python.add(plan.probe.executed)
            return plan

        # The trees of carry and fixed follow from the reader's structure; what remains of them are shapes and dtypes.
        key = start.structure, _key(batch), _kinds(start.carry_leaves), _kinds(start.fixed_leaves), start.has_tasks
        return self.supports.get_or_make(key, make)

    def query(
        self,
        plan: SupportPlan,
        batch: Batch,
        start: Start,
        num_tasks: int | None,
        warm: bool,
        mode: GradientMode = GradientMode.GRAD,
    ) -> QueryPlan:
        """Returns the plan for evaluating data like `batch` after `plan`, in one gradient mode. Other arguments are as for `support`."""

        def make() -> QueryPlan:
            self._require_warm("query", batch, [known.shapes for known in plan.queries.entries()], warm, start.has_tasks)
            tasks = TaskAxis(num_tasks, start.has_tasks)
            arguments = Arguments.of(start.carry, start.fixed, batch, tasks, self.python())
            query_plan = plan_query(self._settings, self._launcher, plan, arguments, mode)
            self._reader.python.add(query_plan.probe.executed)
            return query_plan

        return plan.queries.get_or_make((_key(batch), mode), make)

    def guard(self, k: int, plan: SupportPlan, guard: Guard, batch: Batch, start: Start, num_tasks: int | None, warm: bool) -> GuardPlan:
        """Returns the plan for a guard after k steps of `plan`. `batch` is that of the last step; other arguments are as for `support`."""

        def make() -> GuardPlan:
            if self._settings.must_be_warm and not warm:
                raise ShapeChanged(
                    "no program was compiled for this guard; call unroll.warmup(support, keep=...) with it first, and steps="
                )
            tasks = TaskAxis(num_tasks, start.has_tasks)
            require_of_model, note_of_model = self.python()
            number = guard.python.number()

            def require() -> None:
                require_of_model()
                if guard.python.number() != number:
                    raise ModelChanged(
                        "a Python value that keep= reads was changed between a call and its first backward(), so that the program for it "
                        "cannot be captured; call backward() before the change"
                    )

            def note(executed: Executed) -> None:
                note_of_model(executed)
                guard.python.add(executed)

            arguments = Arguments.of(start.carry, start.fixed, batch, tasks, (require, note))
            return plan_guard(self._settings, self._launcher, plan, guard, k, arguments)

        return plan.guards.get_or_make((guard, guard.python.number(), k), make)

    def prediction(
        self,
        data: Tree,
        carry: Carry,
        fixed: Fixed,
        num_tasks: int | None,
        warm: bool,
        mode: GradientMode = GradientMode.GRAD,
    ) -> PredictionPlan:
        """Returns the plan for predicting on inputs, or for evaluating a `Batch`, in one gradient mode. Others are as for `support`."""

        def make() -> PredictionPlan:
            is_of_batch = isinstance(data, Batch)
            known = [plan.shapes for plan in self.predictions.entries() if plan.is_of_batch is is_of_batch]
            self._require_warm("query" if is_of_batch else "input", data, known, warm, is_evaluated=is_of_batch)
            arguments = Arguments.of(carry, fixed, data, TaskAxis(num_tasks, num_tasks is not None), self.python())
            step = dataclasses.replace(self._reader.step(detach_gradient=False), mode=mode)
            plan = plan_prediction(self._settings, self._launcher, step, arguments)
            self._reader.python.add(plan.executed)
            return plan

        return self.predictions.get_or_make((self._reader.mode(), _key((data, carry, fixed)), num_tasks, mode), make)

    def require_program(self, plan: SupportPlan, name: str, advice: str, warm: bool) -> None:
        """Raises ShapeChanged if the plan has no such program, and none may be compiled; `advice` says which call compiles it."""
        if self._settings.must_be_warm and not warm and not plan.programs.has(name):
            raise ShapeChanged(f"no program '{name}' was compiled for this data; call unroll.{advice} first")

    def python(self) -> tuple[Callable[[], None], Callable[[Executed], None]]:
        """Returns what captures do about the Python values that programs are for, which are captured when they are first needed.

        Returns:
          A function that raises if modes or Python values have changed since, and one that takes note of code that a capture has run.
        """
        expected = self._reader.mode()

        def require() -> None:
            if self._reader.mode() != expected:
                raise ModelChanged(
                    "a train or eval mode, a default of PyTorch's, or a Python value that the model or the loss reads, was changed between "
                    "a call and its first backward(), or by another thread during a call, so that the program for it cannot be captured; "
                    "call backward() before the change"
                )

        return require, self._reader.python.add

    def draw(self, noises: Sequence[Noise], generator: torch.Generator | None, num_tasks: int | None) -> tuple[Tensor, ...]:
        """Draws noise as `graph.noise.draw` does; where calls are launches, waits until no thread records one."""
        if not noises:
            return ()
        with RUNNING if self._launcher is not None else _NOTHING:
            return draw(noises, generator, num_tasks)

    def call(self) -> contextlib.AbstractContextManager[object]:
        """Returns the context in which a call runs. Its end is told to a background compiler, which waits for calls that capture.

        Raises:
          WithinTransform: this thread is within a transformation of `torch.func`.
          CannotRecord: calls are launches, and none can be made here and now.
        """
        refuse_transforms()
        if self._launcher is not None:
            self._launcher.refuse()
        return contextlib.closing(_TIERED_CALL) if self._is_tiered else _NOTHING

    def programs(self) -> list[tuple[str, Program]]:
        """Returns all programs with their names, those of the shapes used last at the end."""
        plans = self.supports.entries()
        parts = [(plan, *plan.queries.entries(), *plan.guards.entries()) for plan in plans]
        sets = [part.programs for group in parts for part in group]
        sets += [prediction.programs for prediction in self.predictions.entries()]
        return [entry for programs in sets for entry in programs.named()]

    def _require_warm(
        self, name: str, part: Tree, known: list[tuple[str, ...]], warm: bool, from_tasks: bool = False, is_evaluated: bool = False
    ) -> None:
        if warm or not self._settings.must_be_warm:
            return
        advice = "Call unroll.warmup() with this shape first, or pad to a shape that was."
        if from_tasks:
            advice = "Call unroll.warmup(support, query, start=True) first: with a task axis, calls with start= need programs of their own."
        if is_evaluated or self._of_one_step:
            advice = "Call unroll.warmup(support, query, evaluate=True) first: losses by task or step need programs of their own."
        if not known:
            raise ShapeChanged(f"{name} {tree.describe(part)}: nothing was compiled yet. {advice}")
        for index, (before, now) in enumerate(zip(known[-1], in_words(part), strict=False)):
            if before != now:
                raise ShapeChanged(f"{name} tensor {index} was traced as {before}, got {now}. {advice}")
        raise ShapeChanged(f"{name} was traced as {', '.join(known[-1])} in another mode, structure or optimiser setting. {advice}")


def _key(part: Tree) -> Hashable:
    leaves, structure = tree.flatten(part)
    return structure, _kinds(leaves)


def _kinds(leaves: Sequence[Tensor]) -> Hashable:
    return tuple([(value.shape, value.dtype) for value in leaves])
