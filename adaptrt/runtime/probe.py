"""Runs a forward pass on fake tensors before anything is planned, to find what model and loss need, and what goes wrong in them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from adaptrt import tree
from adaptrt.functional import watch_calls
from adaptrt.graph.capture import capture
from adaptrt.graph.gradient_mode import GradientMode, questions
from adaptrt.graph.indices import IndexBound, index_bounds
from adaptrt.graph.ir import Graph
from adaptrt.graph.noise import Noise
from adaptrt.graph.passes.lift_noise import record_noise
from adaptrt.graph.signature import Role
from adaptrt.inner import diagnose
from adaptrt.inner.side_effects import attribute_writes, computes_the_same, is_unread_counter, refuse
from adaptrt.inner.snapshot import Snapshot, Write, is_same, undone
from adaptrt.inner.step import Batch, Carry, Fixed, Step
from adaptrt.inner.user_code import Executed, record_code
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
      executed: the Python code that ran.
      leaves_traces: whether it writes to objects outside of the model, which has to be undone after each capture.
      asks_mode: whether Python code asks for the gradient mode, so that a program is for one mode only.
    """

    noise: tuple[Noise, ...]
    bounds: tuple[IndexBound, ...]
    live_buffers: tuple[bool, ...]
    loss: Spec
    executed: Executed
    leaves_traces: bool
    asks_mode: bool = False


class Prediction(NamedTuple):
    """The same for the model without the loss."""

    noise: tuple[Noise, ...]
    bounds: tuple[IndexBound, ...]
    executed: Executed
    leaves_traces: bool
    asks_mode: bool = False


def probe(step: Step, name: str, carry: Carry, fixed: Fixed, batch: Batch) -> tuple[Probe, Graph]:
    """Runs model and loss once on fake tensors, and for the support batch gradient and update, too.

    Args:
      step: the inner step.
      name: "support" or "query", for messages.
      carry, fixed, batch: trees of tensors or specs of one task.
    Raises:
      InvalidBatch, InvalidLoss, NothingToAdapt, DataDependentControlFlow, UnsupportedRandomness, NotTraceable: see `adaptrt.errors`.
    Returns:
      What the pass has shown, and the graph of model and loss.
    """
    live = {key: False for key in carry.buffers}
    executed = Executed()
    while True:
        noise: list[Noise] = []
        before = dict(live)

        def run(carry: Carry, fixed: Fixed, batch: Batch, noise: list[Noise] = noise, before: dict[str, bool] = before) -> Tree:
            """Loss, buffers, and for support batches what the update makes of them."""
            params, fixed, batch = tree.map_leaves(_differentiable, (carry.params, fixed, batch))
            buffers = {key: _differentiable(value) if before[key] else value for key, value in carry.buffers.items()}
            mode = step.mode if name == "query" else GradientMode.GRAD
            with record_noise() as drawn, diagnose.running(name, batch), record_code(executed), mode.within():
                loss, updated = step.evaluate(params, buffers, fixed, batch)
            noise.extend(drawn)
            live.update({key: value.requires_grad for key, value in updated.items()})
            if name != "support":
                return loss, updated
            with diagnose.pulling_back(loss), record_code(executed):
                grads = step.gradient(loss, params)
            with diagnose.updating(), record_code(executed):
                result = step.update(grads, carry.opt_state, params, fixed.hyper)
            return loss, updated, result

        def forward(*args: Any, run: Callable[..., Tree] = run) -> Tensor:
            return run(*args)[0]

        capturing = functools.partial(capture, names=_NAMES, fused_attention=step.detach_gradient)
        seen = _watched(step, executed, lambda capturing=capturing, forward=forward: capturing(forward, carry, fixed, batch, roles=_ROLES))
        drawn = tuple(noise)
        if seen.writes or executed.sources:
            _require_no_state(seen.writes, run, (carry, fixed, batch), step, executed)
        # A buffer that is live may make others live, which read it; running statistics stay as they are.
        if live == before:
            graph = seen.graph
            loss, bounds = graph.signature.outputs[0].spec, tuple(index_bounds(graph))
            return Probe(drawn, bounds, tuple(live.values()), loss, executed, seen.leaves_traces, seen.asks_mode), graph


def probe_prediction(step: Step, carry: Carry, fixed: Fixed, inputs: Tree) -> Prediction:
    """Runs the model without the loss. Arguments and errors are as for `probe`."""
    noise: list[Noise] = []
    executed = Executed()

    def forward(carry: Carry, fixed: Fixed, inputs: Tree) -> Tree:
        with record_noise() as drawn, diagnose.running("input", Batch(inputs, None)), record_code(executed), step.mode.within():
            output, _ = step.apply(carry.params, carry.buffers, fixed, inputs)
        noise.extend(drawn)
        return output

    names = ("carry", "fixed", "batch.inputs")
    seen = _watched(step, executed, lambda: capture(forward, carry, fixed, inputs, roles=_ROLES, names=names))
    drawn = tuple(noise)
    if seen.writes or executed.sources:
        _require_no_state(seen.writes, forward, (carry, fixed, inputs), step, executed)
    return Prediction(drawn, tuple(index_bounds(seen.graph)), executed, seen.leaves_traces, seen.asks_mode)


class _Seen(NamedTuple):
    """A graph, what its capture wrote, whether to objects outside of the model, too, and whether it asked for the gradient mode."""

    graph: Graph
    writes: list[Write]
    leaves_traces: bool
    asks_mode: bool


def _watched(step: Step, executed: Executed, run: Callable[[], Graph]) -> _Seen:
    """Captures, watches what the user's code does, and undoes what it has written."""
    with undone(_roots(step), executed) as world, watch_calls() as calls, questions() as asked:
        graph = run()
        outside = world.writes()
    writes = [*outside, *(write for base, twin in calls.made for write in attribute_writes(base, twin, executed))]
    return _Seen(graph, writes, bool(outside), bool(asked))


def _require_no_state(writes: Sequence[Write], run: Callable[..., Tree], args: tuple[Tree, ...], step: Step, executed: Executed) -> None:
    """Runs two passes in succession, the second on other inputs, and raises if it does anything else than the first.

    Raises:
      NotTraceable: names what was written.
    """
    unsettled: list[Write] = []

    def twice(first: tuple[Tree, ...], second: tuple[Tree, ...]) -> Tree:
        with watch_calls(follow=True) as calls:
            results = run(*first)
            num_calls = len(calls.made)
            world = Snapshot(_roots(step), executed)
            results = results, run(*second)
            later = [*world.writes(), *(write for base, twin in calls.made[num_calls:] for write in attribute_writes(base, twin, executed))]
            later = [write for write in later if not is_unread_counter(write, executed)]
            unsettled.extend(write for write in later if not is_same(write.before, write.after, {}, settled=True))
        return results

    with undone(_roots(step), executed):
        graph = capture(twice, args, args, fused_attention=step.detach_gradient)
    num_inputs, num_outputs = len(tree.leaves(args)), graph.result.num_leaves // 2
    if unsettled or not computes_the_same(graph, num_inputs, num_outputs):
        refuse(unsettled or writes, executed, again=bool(unsettled))


def _roots(step: Step) -> dict[str, Any]:
    return {"model": step.model, "loss": step.loss, "the optimiser's update": step.optimizer.update}


def undone_after(step: Step, executed: Executed, run: Callable[[], Graph]) -> Graph:
    """A capture, after which what model, loss and optimiser have written to objects outside of the model is undone."""
    with undone(_roots(step), executed):
        return run()


def noise_specs(noise: Sequence[Noise]) -> tuple[Spec, ...]:
    """Returns the specs of what is drawn."""
    return tuple([entry.spec for entry in noise])


def _differentiable(value: Tensor) -> Tensor:
    return value.detach().requires_grad_() if value.is_floating_point() else value
