"""Computes predictions of adapted models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.backend.guards import in_forward_mode, refuse_tangents
from adaptrt.errors import NonFiniteInput
from adaptrt.graph.gradient_mode import GradientMode
from adaptrt.graph.noise import restored_on_error
from adaptrt.graph.surroundings import refuse_recorders
from adaptrt.inner import check
from adaptrt.inner.reader import Reader
from adaptrt.inner.step import Batch, Carry, Fixed
from adaptrt.runtime import nodes
from adaptrt.runtime.plan import PredictionPlan
from adaptrt.runtime.planner import Planner
from adaptrt.runtime.recent import Recent
from adaptrt.runtime.settings import Settings
from adaptrt.runtime.state import State
from adaptrt.tree import Tree


class ModelPredictor:
    """The `Predictor` of the adaptations that an unroll returns.

    Args:
      settings: of the unroll.
      reader: of the model.
      planner: of the unroll.
    """

    def __init__(self, settings: Settings, reader: Reader, planner: Planner) -> None:
        self.unroll = settings
        self._settings = settings
        self._reader = reader
        self._planner = planner
        self._recent: Recent[PredictionPlan] = Recent()

    def predict(self, state: State, fixed: Fixed, inputs: Tree, generator: torch.Generator | None, warm: bool = False) -> Any:
        """Returns the model's output for `inputs`, differentiable if gradients are enabled.

        Args:
          state: of the adaptation.
          fixed: what the model needs besides.
          inputs: a tuple or dict of the model's arguments.
          generator: where random operations draw from; None for the global generator.
          warm: whether a plan may be made although data of new shapes is refused.
        """
        with self._planner.call():
            # Neither the optimiser's state nor its hyperparameters matter here, so no program depends on their form.
            carry, fixed = Carry(state.carry.params, (), state.carry.buffers), Fixed(fixed.params, {}, {})
            if in_forward_mode():
                refuse_tangents(tree.leaves((carry, fixed, inputs)))
            plan = self._plan(carry, fixed, inputs, state.num_tasks, warm)
            batch = Batch(inputs, None)
            plan.validation.before("input", batch, plan.bounds)
            with restored_on_error(plan.noise, generator):
                noise = self._planner.draw(plan.noise, generator, state.num_tasks)
                try:
                    return nodes.predict(plan, carry, fixed, inputs, noise)
                except NonFiniteInput:
                    plan.validation.report("input", batch, plan.bounds)
                    raise

    def state_dict(self, state: State, fixed: Fixed) -> dict[str, Tensor]:
        """Returns the whole model's state dict, detached."""
        return self._reader.state_dict({**fixed.params, **state.params, **state.buffers})

    def _plan(self, carry: Carry, fixed: Fixed, inputs: Tree, num_tasks: int | None, warm: bool) -> PredictionPlan:
        """Checks the inputs and returns their plan; a prediction that is like the last one in all that matters takes its plan."""
        usual = not warm and type(inputs) is tuple and all([isinstance(value, Tensor) and not value.is_nested for value in inputs])
        leaves = [*carry.params.values(), *carry.buffers.values(), *fixed.params.values(), *inputs] if usual else []
        kind = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), len(leaves), num_tasks is None
        mode = self._reader.mode()
        plan = self._recent.find(kind, mode, leaves) if usual else None
        if plan is not None:
            return plan
        check.as_batch("input", (inputs,), self._settings.device)
        refuse_recorders()
        if num_tasks is not None:
            check.leading_axis("input", inputs, 0, num_tasks, "tasks")
        plan = self._planner.prediction(inputs, carry, fixed, num_tasks, warm)
        if plan.asks_mode and (current := GradientMode.current()) is not GradientMode.GRAD:
            plan = self._planner.prediction(inputs, carry, fixed, num_tasks, True, current)
        if usual:
            self._recent.keep(kind, mode, leaves, plan)
        return plan
