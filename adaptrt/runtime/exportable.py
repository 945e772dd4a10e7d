"""Captures the programs that are exported, without compiling anything.

An exported program is a pure function of everything: parameters, optimiser state, buffers, hyperparameters and noise are inputs of it
beside the data. There are four for each shape of data:

- adapt: (state, fixed, support, noise) -> (state, losses)
- adapt_predict: (state, fixed, support, noise, inputs, noise of the prediction) -> (outputs, losses)
- predict: (state without that of the optimiser, parameters that do not adapt, inputs, noise) -> outputs
- loss: (state, fixed, batch, noise) -> the support loss, which guards compare

With a task axis the state has one, too, so that each task may start from its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.graph.capture import record_operations
from adaptrt.graph.cut import part
from adaptrt.graph.indices import IndexBound
from adaptrt.graph.ir import Graph
from adaptrt.graph.noise import Noise
from adaptrt.graph.passes.lift_noise import lift_noise
from adaptrt.inner import check
from adaptrt.inner.reader import Start
from adaptrt.inner.step import Batch, Carry, Fixed, Step, as_call
from adaptrt.inner.unroll import batch_of_step, unroll
from adaptrt.optim import per_parameter as arithmetic
from adaptrt.runtime.capture import TaskAxis, capture_graph
from adaptrt.runtime.plan import Arguments, SupportPlan, capture_settings
from adaptrt.runtime.planner import Planner
from adaptrt.runtime.predict import ModelPredictor
from adaptrt.runtime.route import Router
from adaptrt.runtime.settings import Settings
from adaptrt.tree import Tree

Specs = Tree
"""A tree of specs."""


@dataclasses.dataclass(frozen=True, slots=True)
class Exportable:
    """A program that can be exported.

    Attributes:
      name: "adapt", "adapt_predict", "predict" or "loss".
      graph: what it computes. Its arguments and their names are those of the module's docstring.
      noise: what its noise inputs are drawn from, in order, those of the steps first.
      bounds: which of its inputs are indices, counted among its inputs of role DATA.
      num_tasks: length of the task axis, None without one.
    """

    name: str
    graph: Graph
    noise: tuple[Noise, ...]
    bounds: tuple[IndexBound, ...]
    num_tasks: int | None


class Exporter:
    """Captures the programs of an unroll.

    Args:
      settings, router, planner, predictor: of the unroll.
    """

    def __init__(self, settings: Settings, router: Router, planner: Planner, predictor: ModelPredictor) -> None:
        self._settings = settings
        self._router = router
        self._planner = planner
        self._predictor = predictor

    def start(self) -> Start:
        """Returns the values that model and optimiser have now, without what only the query loss holds."""
        begin = self._router.start()
        fixed = begin.fixed._replace(query_loss={})
        return begin._replace(fixed=fixed, fixed_leaves=tree.leaves(fixed))

    def fingerprint(self) -> dict[str, str]:
        """Returns digests of what does not adapt, as saved states have them."""
        return self._predictor.fingerprint(self._router.start().fixed)

    def state_dict_names(self) -> dict[str, str]:
        """Returns for each tensor of the model's state dict the name of the parameter or buffer that it is."""
        return self._predictor.state_dict_names()

    def callers(self, query: Any) -> dict[str, str]:
        """Returns for each operation of a prediction, such as "addmm", the path of the module that calls it first.

        Args:
          query: as for `programs`.
        """
        begin = self.start()
        args, kwargs = as_call(check.as_batch("query", (query,), self._settings.device).inputs)
        inputs = kwargs or args
        if self._router.has_task_axis:
            inputs = tree.map_leaves(lambda value: value[0], inputs)
        short, alone = Carry(begin.carry.params, (), begin.carry.buffers), Fixed(begin.fixed.params, {}, {}, {})
        prediction = self._planner.prediction(inputs, short, alone, None, warm=True)
        noise = tuple([entry.spec for entry in prediction.noise])
        found: dict[str, str] = {}
        for name, path in record_operations(prediction.step.predict, begin.carry, begin.fixed, inputs, noise):
            found.setdefault(name, path)
        return found

    def programs(self, support: Any, query: Any, for_fusion: bool) -> list[Exportable]:
        """Captures the programs for data of one shape.

        Nobody differentiates an export, and PyTorch writes some gradients, such as that of group normalisation, in more operations if they
        are to be differentiated again. So they are not, where the optimiser is one of the library's own, which never ask for it.

        Args:
          support: as for `CompiledUnroll.adapt`.
          query: inputs of predictions, as one argument of an adapted model.
          for_fusion: whether they are for a backend to which small operations cost next to nothing.
        Raises:
          AdaptrtError: whatever a call raises that compiles for this data.
        """
        begin = self.start()
        batch, num_tasks = self._router.support(support)
        route = self._router.find(support, None, None, warm=True).route
        plan, k = route.plan, self._settings.k * route.problem.updates_per_step
        args, kwargs = as_call(check.as_batch("query", (query,), self._settings.device).inputs)
        inputs = kwargs or args
        if num_tasks is not None:
            check.leading_axis("query", inputs, 0, num_tasks, "tasks")
        carry = begin.carry
        if num_tasks is not None:
            carry = tree.map_leaves(lambda value: value.detach().unsqueeze(0).expand(num_tasks, *value.shape), carry)
        short, alone = Carry(carry.params, (), carry.buffers), Fixed(begin.fixed.params, {}, {}, {})
        prediction = self._planner.prediction(inputs, short, alone, num_tasks, warm=True)
        noise = tuple([tuple([entry.spec for entry in plan.probe.noise]) for _ in range(k)])
        of_prediction = tuple([entry.spec for entry in prediction.noise])
        lead = () if num_tasks is None else (num_tasks,)
        noise, of_prediction = tree.map_leaves(lambda spec: dataclasses.replace(spec, shape=(*lead, *spec.shape)), (noise, of_prediction))
        one_batch = batch_of_step(batch, 0, per_step=self._settings.per_step, task_axis=num_tasks is not None)
        step = plan.step
        if _is_of_library(step.optimizer.update):
            step = dataclasses.replace(step, detach_gradient=True, as_differentiable=True)
        steps = _steps(step, self._settings, k)

        def both(
            carry: Carry, fixed: Fixed, support: Batch, noise: Sequence[Sequence[Tensor]], inputs: Tree, of_prediction: Sequence[Tensor]
        ) -> Tree:
            carry, losses = steps(carry, fixed, support, noise)
            return carry, losses, step.predict(carry, fixed, inputs, of_prediction)

        def predict(carry: Carry, fixed: Fixed, inputs: Tree, noise: Sequence[Tensor]) -> Tree:
            return step.predict(carry, fixed, inputs, noise)

        def loss(carry: Carry, fixed: Fixed, batch: Batch, noise: Sequence[Tensor]) -> Tensor:
            with lift_noise(noise):
                return step.evaluate(carry.params, carry.buffers, fixed, batch).loss

        drawn, later = plan.probe.noise * k, prediction.noise
        bounds = tuple(plan.probe.bounds)
        num_support = len(tree.leaves(batch))
        shifted = tuple([bound._replace(position=bound.position + num_support) for bound in prediction.bounds])
        captured = self._capture(begin, for_fusion, num_tasks, plan)
        whole = captured(both, _BOTH, (carry, begin.fixed, batch, noise, inputs, of_prediction))
        of_predict = captured(predict, _PREDICT, (short, alone, inputs, of_prediction))
        of_loss = captured(loss, _LOSS, (carry, begin.fixed, one_batch, noise[0]))
        return [
            Exportable("adapt", part(whole, (0, 1, 2, 3), (0, 1)), drawn, bounds, num_tasks),
            Exportable("adapt_predict", part(whole, range(6), (2, 1)), drawn + later, bounds + shifted, num_tasks),
            Exportable("predict", of_predict, later, tuple(prediction.bounds), num_tasks),
            Exportable("loss", of_loss, plan.probe.noise, bounds, num_tasks),
        ]

    def _capture(self, begin: Start, for_fusion: bool, num_tasks: int | None, plan: SupportPlan) -> Callable[..., Graph]:
        tasks = TaskAxis(num_tasks, num_tasks is not None)

        def captured(fn: Callable[..., Tree], kinds: Sequence[str], args: Sequence[Tree]) -> Graph:
            arguments = Arguments.of(begin.carry, begin.fixed, args[2], tasks, self._planner.python())
            settings = dataclasses.replace(capture_settings(self._settings, plan.step, plan.probe, arguments, False), for_fusion=for_fusion)
            with torch.no_grad():
                return capture_graph(fn, kinds, args, settings)

        return captured


_BOTH = ("carry", "fixed", "support", "noise", "query", "noise")
_PREDICT = ("carry", "fixed", "query", "noise")
_LOSS = ("carry", "fixed", "batch", "noise")


def _is_of_library(update: Callable[..., object]) -> bool:
    """Whether an optimiser's update is arithmetic of `adaptrt.optim` alone, and not a chain or a function of the user's."""
    parts = [cell.cell_contents for cell in getattr(update, "__closure__", None) or ()]
    functions = [part for part in parts if callable(part)]
    names = [getattr(function, "__module__", "") for function in (update, *functions)]
    return names[0] == arithmetic.__name__ and all(name.startswith("adaptrt.optim.") for name in names)


def _steps(step: Step, settings: Settings, num_updates: int) -> Callable[..., tuple[Carry, Tensor]]:
    updates_per_step = num_updates // settings.k

    def run(carry: Carry, fixed: Fixed, support: Batch, noise: Sequence[Sequence[Tensor]]) -> tuple[Carry, Tensor]:
        return unroll(step, settings.k, carry, fixed, support, noise, per_step=settings.per_step, updates_per_step=updates_per_step)

    return run
