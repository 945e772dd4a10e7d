"""Runs a forward pass on fake tensors before anything is planned, to find what model and loss need, and what goes wrong in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from adaptrt import tree
from adaptrt.functional import refuse_state, watch_attributes
from adaptrt.graph.capture import capture
from adaptrt.graph.gradient_mode import GradientMode, questions
from adaptrt.graph.indices import IndexBound, index_bounds
from adaptrt.graph.ir import Graph
from adaptrt.graph.noise import Noise
from adaptrt.graph.passes.lift_noise import record_noise
from adaptrt.graph.signature import Role
from adaptrt.inner import diagnose
from adaptrt.inner.step import Batch, Carry, Fixed, Step
from adaptrt.tree import Spec, Tree

# All that matters here is which inputs are data.
_ROLES = (Role.PARAM, Role.PARAM, Role.DATA)
_NAMES = ("carry", "fixed", "batch")


class Probe(NamedTuple):
    """What one forward pass on fake tensors has shown.

    Attributes:
      noise: what its random operations draw, in order.
      bounds: which data are class labels or indices.
      live_buffers: for each buffer whether its update can be differentiated.
      loss: spec of the loss.
      asks_mode: whether Python code asks for the gradient mode, so that a program is for one mode only.
    """

    noise: tuple[Noise, ...]
    bounds: tuple[IndexBound, ...]
    live_buffers: tuple[bool, ...]
    loss: Spec
    asks_mode: bool = False


def probe(step: Step, name: str, carry: Carry, fixed: Fixed, batch: Batch) -> tuple[Probe, Graph]:
    """Runs model and loss once on fake tensors, and for the support batch gradient and update, too.

    Args:
      step: the inner step.
      name: "support" or "query", for messages.
      carry, fixed, batch: trees of tensors or specs of one task.
    Raises:
      InvalidBatch, InvalidLoss, NothingToAdapt, DataDependentControlFlow, UnsupportedRandomness: see `adaptrt.errors`.
    Returns:
      What the pass has shown, and the graph of model and loss.
    """
    live = {key: False for key in carry.buffers}
    while True:
        noise: list[Noise] = []
        before = dict(live)

        def forward(carry: Carry, fixed: Fixed, batch: Batch, noise: list[Noise] = noise, before: dict[str, bool] = before) -> Tensor:
            params, fixed, batch = tree.map_leaves(_differentiable, (carry.params, fixed, batch))
            buffers = {key: _differentiable(value) if before[key] else value for key, value in carry.buffers.items()}
            mode = step.mode if name == "query" else GradientMode.GRAD
            with record_noise() as drawn, diagnose.running(name, batch), mode.within():
                loss, updated = step.evaluate(params, buffers, fixed, batch)
            noise.extend(drawn)
            live.update({key: value.requires_grad for key, value in updated.items()})
            if name == "support":
                grads = step.gradient(loss, params)
                with diagnose.updating():
                    step.update(grads, carry.opt_state, params, fixed.hyper)
            return loss

        with watch_attributes() as overwritten, questions() as asked:
            graph = capture(forward, carry, fixed, batch, roles=_ROLES, names=_NAMES, fused_attention=step.detach_gradient)
        refuse_state(graph.constants, overwritten)
        # A buffer that is live may make others live, which read it; running statistics stay as they are.
        if live == before:
            return Probe(
                tuple(noise), tuple(index_bounds(graph)), tuple(live.values()), graph.signature.outputs[0].spec, bool(asked)
            ), graph


def probe_prediction(step: Step, carry: Carry, fixed: Fixed, inputs: Tree) -> tuple[tuple[Noise, ...], tuple[IndexBound, ...], bool]:
    """Runs the model without the loss. Arguments and errors are as for `probe`.

    Returns:
      What its random operations draw, in order; which inputs are indices; and whether it asks for the gradient mode.
    """
    noise: list[Noise] = []

    def forward(carry: Carry, fixed: Fixed, inputs: Tree) -> Tree:
        with record_noise() as drawn, diagnose.running("input", Batch(inputs, None)), step.mode.within():
            output, _ = step.apply(carry.params, carry.buffers, fixed, inputs)
        noise.extend(drawn)
        return output

    with questions() as asked:
        graph = capture(forward, carry, fixed, inputs, roles=_ROLES, names=("carry", "fixed", "batch.inputs"))
    return tuple(noise), tuple(index_bounds(graph)), bool(asked)


def noise_specs(noise: Sequence[Noise]) -> tuple[Spec, ...]:
    """Returns the specs of what is drawn."""
    return tuple([entry.spec for entry in noise])


def _differentiable(value: Tensor) -> Tensor:
    return value.detach().requires_grad_() if value.is_floating_point() else value
