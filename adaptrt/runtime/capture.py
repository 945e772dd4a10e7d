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
from adaptrt.tree import Spec, Tree


@dataclasses.dataclass(frozen=True, slots=True)
class TaskAxis:
    """Says which arguments have a leading axis of tasks.

    Attributes:
      num_tasks: its length, None without one.
      start_has_it: whether the first carry has it.
    """

    num_tasks: int | None = None
    start_has_it: bool = False

    def is_on(self, kind: str) -> bool:
        """Whether arguments of this kind have the axis (`adaptrt.adjoint.base.Programs` lists the kinds)."""
        return self.num_tasks is not None and kind != "fixed" and (kind != "start" or self.start_has_it)


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
        gradients = graph.result.children[1] if value else graph.result
        flags = [
            not settings.tasks.is_on(kind)
            for kind, child in zip(arguments[:-1], gradients.children, strict=True)
            for _ in range(child.num_leaves)
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
    axes = [tasks.is_on(kind) for kind in arguments]
    examples = [tree.map_leaves(without_leading_axis, arg) if axis else tree.specs(arg) for arg, axis in zip(args, axes, strict=True)]
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
    batched = [axis for arg, axis in zip(args, axes, strict=True) for _ in tree.leaves(arg)]
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
