"""The programs of one input shape, each captured and compiled at its first call."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from adaptrt import tree
from adaptrt.adjoint.base import Loop, Wrt, pull_back
from adaptrt.backend import Backend
from adaptrt.backend.base import COMPILING, Building, rehearsal, rehearsing
from adaptrt.backend.guards import Known
from adaptrt.backend.launch import Constant, Launcher, Recording
from adaptrt.errors import NotDifferentiable
from adaptrt.graph.capture import capture
from adaptrt.graph.cost import returns_input
from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.batch import batch
from adaptrt.graph.passes.check_finite import check_finite
from adaptrt.graph.passes.hoist import hoist
from adaptrt.graph.passes.partition import partition
from adaptrt.graph.signature import Input, Role
from adaptrt.inner.constants import constant_reader
from adaptrt.inner.step import Carry, Fixed
from adaptrt.runtime.program import Program
from adaptrt.tree import Spec, Tree


def _unchanged(graph: Graph, args: Sequence[Tree]) -> set[int]:
    """Which leaves of the carry, a graph's first argument and first result, are returned as they were."""
    return {index for index in range(len(tree.leaves(args[0]))) if returns_input(graph, index)}


def _shared_by(loop: Loop | None) -> list[Tensor]:
    """What all calls of the loop share, as far as it is known."""
    return [] if loop is None or loop.shared is None else loop.shared


def _as_they_are(graph: Graph, kept: Sequence[Tensor]) -> Graph:
    """The graph for these values of its inputs of role KEPT, which may have any strides.

    Kernels differ from what fake tensors say of them: in layout, and layer_norm's of bfloat16 on the CPU in dtype.
    """
    values = iter(kept)

    def real(entry: Input) -> Input:
        if entry.role is not Role.KEPT:
            return entry
        value = next(values)
        return dataclasses.replace(entry, spec=Spec.of(value), own_strides=value.stride())

    inputs = tuple([real(entry) for entry in graph.signature.inputs])
    return dataclasses.replace(graph, signature=dataclasses.replace(graph.signature, inputs=inputs))


def _roles(kind: str, example: Tree) -> list[Role]:
    """A role for each leaf of an argument."""
    if isinstance(example, Carry):
        parts: Sequence[tuple[Tree, Role]] = ((example.params, Role.PARAM), (example.opt_state, Role.STATE), (example.buffers, Role.BUFFER))
    elif isinstance(example, Fixed):
        parts = ((example.params, Role.PARAM), (example.loss_params, Role.PARAM), (example.hyper, Role.HYPER))
    else:
        roles = {"noise": Role.NOISE, "cotangent": Role.COTANGENT, "weights": Role.COTANGENT}
        parts = ((example, roles.get(kind, Role.DATA)),)
    return [role for part, role in parts for _ in tree.leaves(part)]


_Key = tuple[str, Wrt | None]
_T = TypeVar("_T")


class ProgramSet:
    """The programs of one input shape: an `adaptrt.adjoint.base.Programs` that captures and compiles at a program's first call.

    Args:
      backend: what runs the graphs.
      modules: where plain tensor attributes are looked up.
      num_tasks: length of the task axis, None without one.
      start_has_task_axis: whether the first carry has it.
      fused_attention: whether attention may keep kernels without second derivative.
      explain_failure: runs a capture, and puts what goes wrong into the user's terms.
      checks_data: whether launches, or programs that see all data of a call, refuse NaN and infinity in it.
      launcher: makes a call one launch, None to run its programs one by one.
      rehearses: whether the first call of a kind is preceded by a rehearsal.
      parent: holds the programs that see no query data, for sets that differ in the query's shape only.
    """

    def __init__(
        self,
        backend: Backend,
        modules: Sequence[nn.Module],
        num_tasks: int | None,
        start_has_task_axis: bool,
        fused_attention: bool,
        explain_failure: Callable[[Callable[[], Graph]], Graph],
        checks_data: bool,
        launcher: Launcher | None = None,
        rehearses: bool = False,
        parent: ProgramSet | None = None,
    ) -> None:
        self.checks_data = checks_data
        self._launcher = launcher
        self._rehearses = rehearses
        self._recordings: dict[Hashable, Recording] = {}
        self._backend = backend
        self._modules = modules
        self._num_tasks = num_tasks
        self._start_has_task_axis = start_has_task_axis
        self._fused_attention = fused_attention
        self._explain_failure = explain_failure
        self._parent = parent
        self._programs: dict[_Key, Program] = {}
        self._firsts: dict[_Key, Program] = {}  # computes what all calls of a loop share
        self._unchanged: set[int] = set()  # leaves of the carry that a step returns as they were
        self._second_halves: dict[_Key, Graph] = {}
        self._refused: dict[_Key, NotDifferentiable] = {}
        self._rehearsed: set[str] = set()

    def rehearsed(self, name: str, fn: Callable[[], _T]) -> _T:
        """`fn()`, which runs programs of this set; the first time they are compiled beforehand, while the code of others is being built.

        Args:
          name: what it is.
        """
        if name not in self._rehearsed and self._rehearses:
            with COMPILING:
                if name not in self._rehearsed:
                    with rehearsal():
                        fn()
                    self._take_what_was_built()
                    self._rehearsed.add(name)
        return fn()

    def _take_what_was_built(self) -> None:
        for table in (self._programs, self._firsts):
            for key, program in table.items():
                if isinstance(program.run, Building):
                    began = time.perf_counter()
                    run = program.run.finish()
                    table[key] = dataclasses.replace(program, run=run, compile_s=program.compile_s + time.perf_counter() - began)
        if self._parent is not None:
            self._parent._take_what_was_built()

    def program(self, name: str, fn: Callable[..., Any], arguments: Sequence[str], loop: Loop | None = None) -> Callable[..., Any]:
        return self._lazy((name, None), fn, arguments, _sum_nothing, loop)

    def pullback(
        self,
        name: str,
        fn: Callable[..., Any],
        arguments: Sequence[str],
        wrt: Wrt,
        value: bool = False,
        loop: Loop | None = None,
    ) -> Callable[..., Any]:
        kinds = (*arguments, "weights" if value else "cotangent")
        return self._lazy((name, wrt), pull_back(fn, wrt, value), kinds, functools.partial(self._summed, arguments, value), loop)

    def stashed(
        self, name: str, fn: Callable[..., Any], arguments: Sequence[str], wrt: Wrt, loop: Loop | None
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        if self._parent is not None and "query" not in arguments:
            return self._parent.stashed(name, fn, arguments, wrt, loop)
        forward, backward = (f"{name} with stash", wrt), (f"{name} pullback from stash", wrt)

        def run_forward(*args: Tree) -> Any:
            with COMPILING:
                if forward in self._refused:
                    raise NotDifferentiable(*self._refused[forward].args)
                if forward not in self._programs:
                    began = time.perf_counter()
                    try:
                        joint, num_results = self._joint(fn, arguments, args, wrt)
                    except NotDifferentiable as error:
                        self._refused[forward] = NotDifferentiable(*error.args)
                        raise
                    capture_s = time.perf_counter() - began
                    joint, shared = self._hoisted(joint, args, loop, _unchanged(joint, args))
                    first, self._second_halves[backward] = partition(joint, num_results)
                    program = self._finish(_as_they_are(first, _shared_by(loop)), capture_s)
                    self._add(forward, program, shared)
                    if shared is not None:
                        self._firsts[backward] = shared
            return self._in_loop(forward, loop)(*args)

        def run_backward(*args: Tree) -> Any:
            with COMPILING:
                if backward not in self._programs:
                    kept = [*_shared_by(loop), *tree.leaves(args[len(arguments)])]
                    self._programs[backward] = self._finish(_as_they_are(self._second_halves[backward], kept), 0.0)
                    del self._second_halves[backward]
            return self._in_loop(backward, loop)(*args)

        return (
            self._in_loop(forward, loop) if forward in self._programs else run_forward,
            self._in_loop(backward, loop) if backward in self._programs else run_backward,
        )

    @property
    def lowers(self) -> bool:
        """Whether the backend puts other operations in the place of a graph's."""
        return self._backend.fuses

    def lowered(self, fn: Callable[..., Any], *examples: Tree) -> Graph:
        """The graph of `fn` for one task as the backend gets to see it, from tensors or specs without task axes. Nothing is compiled."""
        capturing = functools.partial(capture, fused_attention=self._fused_attention, for_fusion=self._backend.fuses)
        return self._backend.lower(self._explain_failure(lambda: capturing(fn, *examples)))

    @property
    def launches_calls(self) -> bool:
        """Whether `launch` makes a call one launch."""
        return self._launcher is not None

    def launch(self, name: str, key: Hashable, fn: Callable[..., Tree], *args: Tree) -> Tree:
        """`fn(*args)`, where `fn` runs programs of this set: as one launch where there is a launcher.

        Args:
          name: what it is, for messages and reports.
          key: all that `fn` depends on besides its arguments.
        Raises:
          OutOfDeviceMemory: see `adaptrt.errors`; and what `fn` raises.
        """
        launcher = self._launcher
        if launcher is None:
            return self.rehearsed(name, lambda: fn(*args))
        recording = self._recordings.get((name, key, launcher.settings()))
        if recording is None or not recording.is_current:
            with COMPILING:
                full_key = name, key, launcher.settings()  # as they are while it is recorded
                recording = self._recordings.get(full_key)
                if recording is None or not recording.is_current:
                    recording = self._recordings[full_key] = launcher.record(name, fn, args, self._constants)
        return recording(*args)

    def recordings(self) -> list[Recording]:
        """The calls recorded so far."""
        return list(self._recordings.values())

    def _constants(self) -> list[Constant]:
        own = [read for program in list(self._programs.values()) for read in program.constants]
        return own if self._parent is None else [*own, *self._parent._constants()]

    def _joint(self, fn: Callable[..., Any], arguments: Sequence[str], args: Sequence[Tree], wrt: Wrt) -> tuple[Graph, int]:
        """The graph (*args, cotangents) -> (results, gradients) as the backend gets to see it, and the number of results."""
        plain = self._capture(fn, arguments, args, _sum_nothing)
        outputs = [entry.spec for entry in plain.signature.outputs]
        cotangents = [spec for spec, flag in zip(outputs, wrt.result, strict=True) if flag]
        summed = functools.partial(self._summed, arguments, True)
        joint = self._capture(pull_back(fn, wrt, True), (*arguments, "cotangent"), (*args, cotangents), summed)
        return self._backend.lower(joint), len(outputs)

    def _hoisted(self, graph: Graph, args: Sequence[Tree], loop: Loop | None, unchanged: set[int]) -> tuple[Graph, Program | None]:
        """The graph without what is the same in all calls of the loop, and the program of that, which is run.

        Args:
          unchanged: positions of those leaves of the carry that every call returns as they were.
        """
        if loop is None:
            return graph, None
        # Cotangents come after the arguments that the loop knows of, and never stay the same.
        flags = [flag for arg, flag in zip(args, loop.same, strict=False) for _ in tree.leaves(arg)]
        halves = hoist(graph, {index for index, flag in enumerate(flags) if flag} | unchanged)
        if halves is None:
            return graph, None
        first = self._finish(halves[0], 0.0)
        loop.shared = (first.rehearsed if rehearsing() else first)(*args[: len(loop.same)])
        return halves[1], first

    def _add(self, key: _Key, program: Program, shared: Program | None) -> None:
        if shared is not None:
            self._firsts[key] = self._programs[f"{key[0]}, what all steps share", key[1]] = shared
        self._programs[key] = program

    def _in_loop(self, key: _Key, loop: Loop | None) -> Callable[..., Any]:
        """The program, given what all calls of the loop share."""
        program, first = self._programs[key], self._firsts.get(key)
        if rehearsing():
            program, first = program.rehearsed, first and first.rehearsed
        if loop is None or first is None:
            return program
        place = len(loop.same)

        def run(*args: Tree) -> Any:
            if loop.shared is None:
                loop.shared = first(*args[:place])
            return program(*args[:place], loop.shared, *args[place:])

        return run

    def _summed(self, arguments: Sequence[str], value: bool, graph: Graph) -> list[bool]:
        """Which results of a pullback's graph are summed over tasks: gradients of what tasks share. `value` as for `pullback`."""
        gradients = graph.result.children[1] if value else graph.result
        flags = [
            not self._has_task_axis(kind)
            for kind, child in zip(arguments, gradients.children, strict=True)
            for _ in range(child.num_leaves)
        ]
        return [False] * (graph.result.num_leaves - len(flags)) + flags

    def named(self) -> list[tuple[str, Program]]:
        """The programs compiled so far, without those of the parent."""
        return [(key[0], program) for key, program in list(self._programs.items())]

    def _lazy(
        self, key: _Key, fn: Callable[..., Any], arguments: Sequence[str], summed: Callable[[Graph], list[bool]], loop: Loop | None
    ) -> Callable[..., Any]:
        if self._parent is not None and "query" not in arguments:
            return self._parent._lazy(key, fn, arguments, summed, loop)
        if key in self._programs:
            return self._in_loop(key, loop)

        def compile_and_run(*args: Tree) -> Any:
            with COMPILING:
                if key not in self._programs:
                    self._compile(key, fn, arguments, args, summed, loop)
            return self._in_loop(key, loop)(*args)

        return compile_and_run

    def _has_task_axis(self, kind: str) -> bool:
        return self._num_tasks is not None and kind != "fixed" and (kind != "start" or self._start_has_task_axis)

    def _compile(
        self,
        key: _Key,
        fn: Callable[..., Any],
        arguments: Sequence[str],
        args: Sequence[Tree],
        summed: Callable[[Graph], list[bool]],
        loop: Loop | None,
    ) -> None:
        began = time.perf_counter()
        graph = self._capture(fn, arguments, args, summed)
        capture_s = time.perf_counter() - began
        if loop is not None and key[1] is None:
            self._unchanged = _unchanged(graph, args)  # which holds for the pullback, too: the steps are this program's
        graph, shared = self._hoisted(graph, args, loop, self._unchanged)
        graph = _as_they_are(graph, _shared_by(loop))
        checked: list[int] = []
        if self.checks_data and self._launcher is None and "support" in arguments and arguments[-1] != "cotangent":
            kinds = [kind for kind, arg in zip(arguments, args, strict=True) for _ in tree.leaves(arg)]
            specs = [entry.spec for entry in graph.signature.inputs]
            checked = [i for i, kind in enumerate(kinds) if kind in ("support", "query") and specs[i].dtype.is_floating_point]
        if checked:
            graph = check_finite(graph, checked)
        self._add(key, self._finish(graph, capture_s, bool(checked)), shared)

    def _capture(
        self, fn: Callable[..., Any], arguments: Sequence[str], args: Sequence[Tree], summed: Callable[[Graph], list[bool]]
    ) -> Graph:
        """The graph of `fn`, over tasks if there are some. The arguments are as in a call, with task axes."""
        axes = [self._has_task_axis(kind) for kind in arguments]
        examples = [tree.map_leaves(without_leading_axis, arg) if axis else tree.specs(arg) for arg, axis in zip(args, axes, strict=True)]
        roles = [_roles(kind, example) for kind, example in zip(arguments, examples, strict=True)]
        names = ["carry" if kind == "start" else kind for kind in arguments]
        fused_attention, for_fusion = self._fused_attention, self._backend.fuses
        graph = self._explain_failure(
            lambda: capture(fn, *examples, roles=roles, names=names, fused_attention=fused_attention, for_fusion=for_fusion)
        )
        if self._num_tasks is None:
            return graph
        batched = [axis for arg, axis in zip(args, axes, strict=True) for _ in tree.leaves(arg)]
        return batch(graph, batched, summed(graph), self._num_tasks)

    def _finish(self, graph: Graph, capture_s: float, checks_data: bool = False) -> Program:
        began = time.perf_counter()
        run = self._backend.compile(graph)
        inputs = graph.signature.inputs
        return Program(
            graph,
            run,
            tuple(constant_reader(value, self._modules) for value in graph.constants),
            [entry.spec.shape for entry in inputs],
            [entry.spec.dtype for entry in inputs],
            [entry.spec.device for entry in inputs],
            [entry.strides for entry in inputs],
            Known(),
            tree.leaves_by(graph.arguments),
            tree.unflatten_by(graph.result.children[0] if checks_data else graph.result),
            checks_data,
            self._backend.name,
            capture_s,
            time.perf_counter() - began,
            run.forms if isinstance(run, Building) else None,
        )


def _sum_nothing(graph: Graph) -> list[bool]:
    return [False] * graph.result.num_leaves


def without_leading_axis(value: Tensor | Spec) -> Spec:
    """The spec of one element along the first axis."""
    spec = Spec.of(value)
    return Spec(spec.shape[1:], spec.dtype, spec.device)
