"""Captures the functions of a plan as graphs, with a role for each input, and over tasks. Nothing is compiled here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from adaptrt import tree
from adaptrt.adjoint.base import Wrt, pull_back
from adaptrt.graph.capture import capture
from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.batch import batch
from adaptrt.graph.signature import Role
from adaptrt.inner.executed import Executed, record_code
from adaptrt.inner.step import Carry, Fixed
from adaptrt.optim.tasks import are_per_task
from adaptrt.tree import Spec, Tree


@dataclasses.dataclass(frozen=True, slots=True)
class TaskAxis:
    """Says which arguments have a leading axis of tasks.

    Attributes:
      num_tasks: its length, None without one.
      start_has_it: whether the first carry has it.

    What all steps share has none, but for hyperparameters with a value for each task.
    """

    num_tasks: int | None = None
    start_has_it: bool = False

    def are_on(self, kind: str, arg: Tree) -> list[bool]:
        """Returns for each leaf of an argument whether it has the axis (`adaptrt.adjoint.base.Programs` lists the kinds)."""
        if self.num_tasks is not None and kind == "fixed":
            return are_per_task(arg)
        is_on = self.num_tasks is not None and (kind != "start" or self.start_has_it)
        return [is_on] * len(tree.leaves(arg))

    def specs_of_one(self, kind: str, arg: Tree) -> Tree:
        """Returns the specs of an argument for one task."""
        leaves, structure = tree.flatten(arg)
        axes = self.are_on(kind, arg)
        return tree.unflatten(
            structure, [without_leading_axis(leaf) if axis else Spec.of(leaf) for leaf, axis in zip(leaves, axes, strict=True)]
        )


@dataclasses.dataclass(frozen=True, slots=True)
class CaptureSettings:
    """Says how the functions of one plan are captured.

    Attributes:
      tasks: the task axis.
      fused_attention: whether attention may keep kernels without a second derivative.
      for_fusion: whether the graph is for a backend to which small operations cost next to nothing.
      require_current: raises if what the model's Python code reads is not what the plan is for.
      note_code: takes note of Python code that ran in a capture, so that what it reads counts as read, too.
      explain_failure: runs a capture, and turns its errors into errors in the user's terms.
    """

    tasks: TaskAxis
    fused_attention: bool
    for_fusion: bool
    require_current: Callable[[], None]
    note_code: Callable[[Executed], None]
    explain_failure: Callable[[Callable[[], Graph]], Graph]


def capture_graph(fn: Callable[..., Any], arguments: Sequence[str], args: Sequence[Tree], settings: CaptureSettings) -> Graph:
    """Captures `fn`, over tasks if there is a task axis.

    Args:
      fn: a function of one task.
      arguments: what kind each argument is, as for `adaptrt.adjoint.base.Programs`.
      args: tensors or specs as in a call, with task axes.
      settings: how to capture.
    Raises:
      AdaptrtError: the user's code does something that cannot be captured.
    """
    return _capture(fn, arguments, args, settings, lambda graph: [False] * graph.result.num_leaves)


def capture_pullback(
    fn: Callable[..., Any], arguments: Sequence[str], args: Sequence[Tree], wrt: Wrt, value: bool, settings: CaptureSettings
) -> Graph:
    """Captures the pullback of `fn`: (*args, cotangents) -> gradients, or -> (results, gradients) if `value`.

    Gradients of what tasks share are summed over the tasks.

    Args:
      fn, settings: as for `capture_graph`.
      arguments, args: as for `capture_graph`, the cotangents last.
      wrt: what to differentiate.
      value: whether the graph returns the results, too.
    """

    def are_summed(graph: Graph) -> list[bool]:
        flags = [
            not axis
            for kind, arg, asked in zip(arguments[:-1], args[:-1], wrt.args, strict=True)
            for axis, is_asked in zip(settings.tasks.are_on(kind, arg), asked or (), strict=bool(asked))
            if is_asked
        ]
        return [False] * (graph.result.num_leaves - len(flags)) + flags

    # Some code runs only here: the `backward` of a custom autograd function in a prediction, or where a gradient is differentiated.
    executed, pullback = Executed(), pull_back(fn, wrt, value)

    def recorded(*args: Any) -> Any:
        with record_code(executed):
            return pullback(*args)

    graph = _capture(recorded, arguments, args, settings, are_summed)
    settings.note_code(executed)
    return graph


def capture_joint(
    fn: Callable[..., Any], arguments: Sequence[str], args: Sequence[Tree], wrt: Wrt, settings: CaptureSettings
) -> tuple[Graph, int]:
    """Captures `fn` together with its pullback: (*args, cotangents) -> (results, gradients).

    Arguments are as for `capture_pullback`, without the cotangents.

    Returns:
      The graph, and how many of its outputs are results.
    """
    outputs = [entry.spec for entry in capture_graph(fn, arguments, args, settings).signature.outputs]
    cotangents = [spec for spec, flag in zip(outputs, wrt.result, strict=True) if flag]
    joint = capture_pullback(fn, (*arguments, "cotangent"), (*args, cotangents), wrt, True, settings)
    return joint, len(outputs)


def _capture(
    fn: Callable[..., Any],
    arguments: Sequence[str],
    args: Sequence[Tree],
    settings: CaptureSettings,
    are_summed: Callable[[Graph], list[bool]],
) -> Graph:
    """Captures `fn`. Under a task axis, results for which `are_summed` holds are summed over the tasks."""
    tasks = settings.tasks
    examples = [tasks.specs_of_one(kind, arg) for kind, arg in zip(arguments, args, strict=True)]
    roles = [_roles(kind, example) for kind, example in zip(arguments, examples, strict=True)]
    names = ["carry" if kind == "start" else kind for kind in arguments]
    fused_attention, for_fusion = settings.fused_attention, settings.for_fusion
    settings.require_current()
    graph = settings.explain_failure(
        lambda: capture(fn, *examples, roles=roles, names=names, fused_attention=fused_attention, for_fusion=for_fusion)
    )
    settings.require_current()  # another thread may have changed it meanwhile
    if tasks.num_tasks is None:
        return graph
    batched = [axis for kind, arg in zip(arguments, args, strict=True) for axis in tasks.are_on(kind, arg)]
    return batch(graph, batched, are_summed(graph), tasks.num_tasks)


def without_leading_axis(value: Tensor | Spec) -> Spec:
    """Returns the spec of one element along the first axis."""
    spec = Spec.of(value)
    return Spec(spec.shape[1:], spec.dtype, spec.device)


def _roles(kind: str, example: Tree) -> list[Role]:
    """Returns a role for each leaf of an argument."""
    if isinstance(example, Carry):
        parts: Sequence[tuple[Tree, Role]] = ((example.params, Role.PARAM), (example.opt_state, Role.STATE), (example.buffers, Role.BUFFER))
    elif isinstance(example, Fixed):
        parts = [(part, Role.HYPER if part is example.hyper else Role.PARAM) for part in example]
    else:
        roles = {"noise": Role.NOISE, "cotangent": Role.COTANGENT, "weights": Role.COTANGENT}
        parts = ((example, roles.get(kind, Role.DATA)),)
    return [role for part, role in parts for _ in tree.leaves(part)]
