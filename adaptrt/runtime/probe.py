"""Runs a forward pass on fake tensors before anything is planned, to find what model and loss need, and what goes wrong in them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from adaptrt import tree
from adaptrt.functional import watch_calls
from adaptrt.graph.capture import capture
from adaptrt.graph.gradient_mode import GradientMode
from adaptrt.graph.indices import IndexBound, index_bounds
from adaptrt.graph.ir import Graph
from adaptrt.graph.noise import Noise
from adaptrt.graph.passes.lift_noise import record_noise
from adaptrt.graph.signature import Role
from adaptrt.inner import diagnose
from adaptrt.inner.executed import Executed, record_code
from adaptrt.inner.guard import guarded
from adaptrt.inner.hooks import refuse_hooks
from adaptrt.inner.questions import TensorQuestions
from adaptrt.inner.reachable import HOOKS_OF_ALL_MODULES
from adaptrt.inner.refused import refuse_code, refuse_questions
from adaptrt.inner.side_effects import attribute_writes, computes_the_same, is_unread_counter, refuse
from adaptrt.inner.snapshot import Snapshot, Write, is_same, undone
from adaptrt.inner.step import Batch, Carry, Fixed, Step, as_data
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
    """The same for a pass without an update."""

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
    executed, questions = Executed(), TensorQuestions()
    while True:
        noise: list[Noise] = []
        before = dict(live)

        def run(carry: Carry, fixed: Fixed, batch: Batch, noise: list[Noise] = noise, before: dict[str, bool] = before) -> Tree:
            """Loss, buffers, and for support batches what the update makes of them."""
            given, held = fixed.query_loss, step.query_loss
            params, fixed, batch = tree.map_leaves(_differentiable, (carry.params, fixed, batch))
            if isinstance(held, nn.Module):  # whose buffers are no parameters
                fixed = fixed._replace(query_loss={**given, **{name: fixed.query_loss[name] for name, _ in held.named_parameters()}})
            buffers = {key: _differentiable(value) if before[key] else value for key, value in carry.buffers.items()}
            mode = step.mode if name == "query" else GradientMode.GRAD
            with record_noise() as drawn, diagnose.running(name, batch), record_code(executed), questions, mode.within():
                loss, _, updated, update = step.evaluate(params, buffers, fixed, batch, of_query=name == "query")
            noise[:] = drawn  # a capture may run it twice
            live.update({key: value.requires_grad for key, value in updated.items()})
            if name != "support":
                return loss, updated, update
            with diagnose.pulling_back(loss), record_code(executed):
                grads = step.gradient(loss, params)
            with diagnose.updating(), record_code(executed), questions:
                result = step.update(grads, carry.opt_state, params, fixed.hyper)
            return loss, updated, update, result

        def forward(*args: Any, run: Callable[..., Tree] = run) -> Tensor:
            return run(*args)[0]

        capturing = functools.partial(capture, names=_NAMES, fused_attention=step.detach_gradient)
        seen = _watched(step, executed, lambda capturing=capturing, forward=forward: capturing(forward, carry, fixed, batch, roles=_ROLES))
        drawn = tuple(noise)
        _require_no_state(seen.writes, run, (carry, fixed, batch), step, executed)
        _require_no_answer(questions, run, (carry, fixed, batch), step, executed)
        # A buffer that is live may make others live, which read it; running statistics stay as they are.
        if live == before:
            graph = seen.graph
            loss, bounds = graph.signature.outputs[0].spec, tuple(index_bounds(graph))
            return Probe(drawn, bounds, tuple(live.values()), loss, executed, seen.leaves_traces, bool(executed.questions)), graph


def probe_prediction(step: Step, carry: Carry, fixed: Fixed, data: Tree) -> Prediction:
    """Runs the model on its inputs, or model and query loss on a `Batch`, without any update.

    Arguments and errors are as for `probe`.
    """
    noise: list[Noise] = []
    executed, questions = Executed(), TensorQuestions()
    name, part = ("query", "batch") if isinstance(data, Batch) else ("input", "batch.inputs")

    def forward(carry: Carry, fixed: Fixed, data: Tree) -> Tree:
        with record_noise() as drawn, diagnose.running(name, as_data(data)), record_code(executed), questions, step.mode.within():
            if isinstance(data, Batch):
                result: Tree = step.evaluate(carry.params, carry.buffers, fixed, data, of_query=True)[:2]
            else:
                result, _ = step.apply(carry.params, carry.buffers, fixed, data)
        noise[:] = drawn
        return result

    names = ("carry", "fixed", part)
    seen = _watched(step, executed, lambda: capture(forward, carry, fixed, data, roles=_ROLES, names=names))
    drawn = tuple(noise)
    _require_no_state(seen.writes, forward, (carry, fixed, data), step, executed)
    _require_no_answer(questions, forward, (carry, fixed, data), step, executed)
    return Prediction(drawn, tuple(index_bounds(seen.graph)), executed, seen.leaves_traces, bool(executed.questions))


def probe_guard(step: Step, args: tuple[Tree, ...]) -> Executed:
    """Runs a guard on fake tensors, and returns the Python code that ran.

    Args:
      step: with the guard.
      args: specs of the arguments of `guarded` for one task, without the step.
    Raises:
      InvalidArgument, DataDependentControlFlow, NotTraceable: see `adaptrt.errors`.
    """
    executed = Executed()

    def run(*args: Tree) -> Tree:
        with record_code(executed):
            return guarded(step, *args)

    seen = _watched(step, executed, lambda: capture(run, *args))
    _require_no_state(seen.writes, run, args, step, executed)
    return executed


class _Seen(NamedTuple):
    """A graph, what its capture wrote, and whether to objects outside of the model, too."""

    graph: Graph
    writes: list[Write]
    leaves_traces: bool


def _watched(step: Step, executed: Executed, run: Callable[[], Graph]) -> _Seen:
    """Captures, watches what the user's code does, and undoes what it has written."""
    with undone(_roots(step), executed) as world, watch_calls() as calls:
        graph = run()
        outside = world.writes()
    refuse_code(executed, step.mode)
    refuse_hooks(step.model)
    writes = [*outside, *(write for base, twin in calls.made for write in attribute_writes(base, twin, executed))]
    return _Seen(graph, writes, bool(outside))


def _require_no_state(writes: Sequence[Write], run: Callable[..., Tree], args: tuple[Tree, ...], step: Step, executed: Executed) -> None:
    """If a pass has written anything, or asked a clock, runs two, the second on other inputs, and raises if it differs from the first.

    Raises:
      NotTraceable: names what was written, or what was asked.
    """
    if not writes and not executed.sources:
        return
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

    if not _are_the_same(twice, args, step, executed) or unsettled:
        refuse(unsettled or writes, executed, again=bool(unsettled))


def _are_the_same(twice: Callable[[Tree, Tree], Tree], args: tuple[Tree, ...], step: Step, executed: Executed) -> bool:
    """Whether two passes, each of inputs of its own, compute the same function."""
    with undone(_roots(step), executed):
        graph = capture(twice, args, args, fused_attention=step.detach_gradient)
    return computes_the_same(graph, len(tree.leaves(args)), graph.result.num_leaves // 2)


def _require_no_answer(
    questions: TensorQuestions, run: Callable[..., Tree], args: tuple[Tree, ...], step: Step, executed: Executed
) -> None:
    """If code has asked tensors about autograd, runs it again with the opposite answers, and raises if it then computes anything else.

    Raises:
      NotTraceable: names the line.
    """
    if not questions.lines:
        return

    def twice(first: tuple[Tree, ...], second: tuple[Tree, ...]) -> Tree:
        results = run(*first)
        questions.negates = True
        return results, run(*second)

    try:
        is_same = _are_the_same(twice, args, step, executed)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # the other branch cannot be run
        is_same = False
    finally:
        questions.negates = False
    if not is_same:
        refuse_questions(questions.lines)


def _roots(step: Step) -> dict[str, Any]:
    losses = {"loss": step.loss, "query_loss": step.query_loss}
    functions = {"the optimiser's update": step.optimizer.update, **({} if step.guard is None else {"keep": step.guard})}
    return {"model": step.model, **losses, **functions, **HOOKS_OF_ALL_MODULES}


def undone_after(step: Step, executed: Executed, run: Callable[[], Graph]) -> Graph:
    """A capture, after which what model, loss and optimiser have written to objects outside of the model is undone."""
    with undone(_roots(step), executed):
        return run()


def noise_specs(noise: Sequence[Noise]) -> tuple[Spec, ...]:
    """Returns the specs of what is drawn."""
    return tuple([entry.spec for entry in noise])


def _differentiable(value: Tensor) -> Tensor:
    return value.detach().requires_grad_() if value.is_floating_point() else value
