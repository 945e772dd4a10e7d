"""Computes predictions and query losses of adapted models."""

from __future__ import annotations

import itertools
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
from adaptrt.inner.step import Batch, Carry, Fixed, as_data
from adaptrt.runtime import nodes, saved
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
        self.unroll = settings.source  # which vmap() shares, whatever else it changes, and a deep copy does not
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
        # Neither the loss nor the optimiser's hyperparameters matter here, so no program depends on their form.
        return self._compute("input", state, Fixed(fixed.params, {}, {}, {}), inputs, generator, warm)

    def evaluate(
        self, state: State, fixed: Fixed, batch: Batch, generator: torch.Generator | None, warm: bool = False
    ) -> tuple[Tensor, Any]:
        """Returns the query loss of a batch, [] or [T], and the model's output. Other arguments are as for `predict`."""
        return self._compute("query", state, fixed._replace(hyper={}), batch, generator, warm)

    def state_dict(self, state: State, fixed: Fixed) -> dict[str, Tensor]:
        """Returns the whole model's state dict, detached."""
        return self._reader.state_dict({**fixed.params, **state.params, **state.buffers})

    def state_dict_names(self) -> dict[str, str]:
        """Returns for each tensor of the model's state dict the name of the parameter or buffer that it is."""
        return self._reader.state_dict_names()

    def fingerprint(self, fixed: Fixed) -> dict[str, str]:
        """Returns digests of what does not adapt: parameters, what the losses hold, and tensors that modules have as plain attributes."""
        return {
            "the parameters that did not adapt": saved.digest(tree.named_leaves(fixed.params)),
            "what the losses hold": saved.digest(tree.named_leaves((fixed.loss_params, fixed.query_loss))),
            **{name: saved.digest([(name, value)]) for name, value in self._reader.plain_tensors()},
        }

    def _compute(self, name: str, state: State, fixed: Fixed, data: Tree, generator: torch.Generator | None, warm: bool) -> Any:
        """Runs the plan for `data`: a `Batch`, or a model's inputs. `name` is what messages call it."""
        with self._planner.call():
            params, _, buffers = state.carry
            carry = Carry(params, (), buffers)  # nor does the optimiser's state
            if in_forward_mode():
                refuse_tangents(tree.leaves((carry, fixed, data)))
            plan = self._plan(name, carry, fixed, data, state.num_tasks, warm)
            batch = as_data(data)
            plan.validation.before(name, batch, plan.bounds)
            with restored_on_error(plan.noise, generator):
                noise = self._planner.draw(plan.noise, generator, state.num_tasks)
                try:
                    return nodes.predict(plan, carry, fixed, data, noise)
                except NonFiniteInput:
                    plan.validation.report(name, batch, plan.bounds)
                    raise

    def _plan(self, name: str, carry: Carry, fixed: Fixed, data: Tree, num_tasks: int | None, warm: bool) -> PredictionPlan:
        """Checks the data and returns their plan; a call that is like the last one in all that matters takes its plan."""
        usual = not warm and isinstance(data, tuple) and all([isinstance(value, Tensor) and not value.is_nested for value in data])
        of_losses = fixed.loss_params.values(), fixed.query_loss.values()
        leaves = (
            [*carry.params.values(), *carry.buffers.values(), *fixed.params.values(), *itertools.chain(*of_losses), *data] if usual else []
        )
        kind = name, torch.is_inference_mode_enabled(), torch.is_grad_enabled(), len(leaves), num_tasks is None
        mode = self._reader.mode()
        plan = self._recent.find(kind, mode, leaves) if usual else None
        if plan is not None:
            return plan
        check.as_batch(name, data if isinstance(data, Batch) else (data,), self._settings.device)
        refuse_recorders()
        if num_tasks is not None:
            check.leading_axis(name, data, 0, num_tasks, "tasks")
        plan = self._planner.prediction(data, carry, fixed, num_tasks, warm)
        if plan.asks_mode and (current := GradientMode.current()) is not GradientMode.GRAD:
            plan = self._planner.prediction(data, carry, fixed, num_tasks, True, current)
        if num_tasks is not None and isinstance(data, Batch):
            check.class_axis(name, data, plan.bounds, 1)
        if usual:
            self._recent.keep(kind, mode, leaves, plan)
        return plan
