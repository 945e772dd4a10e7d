"""The programs for one shape of data."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from adaptrt import tree
from adaptrt.adjoint.base import Loop, Wrt
from adaptrt.backend import Backend
from adaptrt.backend.base import COMPILING, rehearsing
from adaptrt.errors import NotConverged, NotDifferentiable
from adaptrt.graph.cost import returns_input
from adaptrt.graph.ir import Constant, Graph
from adaptrt.graph.passes.check_finite import check_finite
from adaptrt.graph.passes.hoist import hoist
from adaptrt.graph.passes.partition import partition
from adaptrt.graph.signature import Input, Role
from adaptrt.inner.user_code import outside
from adaptrt.runtime.capture import CaptureSettings, capture_graph, capture_joint, capture_pullback
from adaptrt.runtime.program import Program
from adaptrt.tree import Spec, Tree

_Key = tuple[str, Wrt | None]


class ProgramSet:
    """Keeps the programs for one shape of data; each is captured and compiled at its first call.

    It is the `adaptrt.adjoint.base.Programs` of the adjoints, which documents `program`, `pullback` and `stashed`.

    Args:
      backend: what runs the graphs.
      modules: where plain tensor attributes are looked up.
      capture: how functions are captured.
      checks_data: whether programs that see all data of a call refuse NaN and infinity in it.
      parent: holds the programs that see no query data, for sets that differ in the query's shape only.
    """

    def __init__(
        self,
        backend: Backend,
        modules: Sequence[nn.Module],
        capture: CaptureSettings,
        checks_data: bool = False,
        parent: ProgramSet | None = None,
    ) -> None:
        self._backend = backend
        self._modules = modules
        self._settings = capture
        self._checks_data = checks_data
        self._parent = parent
        self._programs: dict[_Key, Program] = {}
        self._firsts: dict[_Key, Program] = {}  # computes what all calls of a loop share
        self._unchanged: set[int] = set()  # leaves of the carry that a step returns as they were
        self._second_halves: dict[_Key, Graph] = {}
        self._refused: dict[_Key, NotDifferentiable] = {}
        self.reports: dict[str, Tensor] = {}
        self._warned: set[str] = set()

    def program(self, name: str, fn: Callable[..., Any], arguments: Sequence[str], loop: Loop | None = None) -> Callable[..., Any]:
        owner = self._owner_of(arguments)
        return owner._lazy((name, None), arguments, loop, lambda args: capture_graph(fn, arguments, args, owner._settings))

    def pullback(
        self,
        name: str,
        fn: Callable[..., Any],
        arguments: Sequence[str],
        wrt: Wrt,
        value: bool = False,
        loop: Loop | None = None,
    ) -> Callable[..., Any]:
        owner = self._owner_of(arguments)
        kinds = (*arguments, "weights" if value else "cotangent")
        return owner._lazy((name, wrt), kinds, loop, lambda args: capture_pullback(fn, kinds, args, wrt, value, owner._settings))

    def report(self, name: str, value: Tensor, limit: float, advice: str) -> None:
        if self._parent is not None:
            self._parent.report(name, value, limit, advice)
        elif not rehearsing():
            self.reports[name] = value.detach()
            if value.device.type == "cpu" and name not in self._warned and not bool((value <= limit).all()):
                self._warned.add(name)
                warnings.warn(f"the {name} is {value.max().item():.2g}, above {limit:g}: {advice}", NotConverged, stacklevel=outside())

    def stashed(
        self, name: str, fn: Callable[..., Any], arguments: Sequence[str], wrt: Wrt, loop: Loop | None
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        owner = self._owner_of(arguments)
        if owner is not self:
            return owner.stashed(name, fn, arguments, wrt, loop)
        forward, backward = (f"{name} with stash", wrt), (f"{name} pullback from stash", wrt)

        def run_forward(*args: Tree) -> Any:
            with COMPILING:
                if forward not in self._programs:
                    self._compile_halves(forward, backward, lambda: capture_joint(fn, arguments, args, wrt, self._settings), args, loop)
            return self._in_loop(forward, loop)(*args)

        def run_backward(*args: Tree) -> Any:
            with COMPILING:
                if backward not in self._programs:
                    kept = [*_shared_by(loop), *tree.leaves(args[len(arguments)])]
                    self._programs[backward] = self._compiled(_as_they_are(self._second_halves[backward], kept))
                    del self._second_halves[backward]
            return self._in_loop(backward, loop)(*args)

        return (
            self._in_loop(forward, loop) if forward in self._programs else run_forward,
            self._in_loop(backward, loop) if backward in self._programs else run_backward,
        )

    def has(self, name: str) -> bool:
        """Whether there is a program of this name, pullbacks aside."""
        return (name, None) in self._programs

    def named(self) -> list[tuple[str, Program]]:
        """Returns the programs compiled so far with their names, without those of the parent."""
        return [(key[0], program) for key, program in list(self._programs.items())]

    def constants(self) -> list[Constant]:
        """Returns readers of what the programs use besides their arguments, those of the parent included."""
        own = [read for program in list(self._programs.values()) for read in program.constants]
        return own if self._parent is None else [*own, *self._parent.constants()]

    def finish_building(self) -> None:
        """Waits for all code that is still being built."""
        for table in (self._programs, self._firsts):
            for key, program in table.items():
                if program.is_building:
                    table[key] = program.built()
        if self._parent is not None:
            self._parent.finish_building()

    def _owner_of(self, arguments: Sequence[str]) -> ProgramSet:
        """Returns the set that holds programs of such arguments."""
        return self if self._parent is None or "query" in arguments else self._parent._owner_of(arguments)

    def _lazy(
        self, key: _Key, arguments: Sequence[str], loop: Loop | None, capture: Callable[[Sequence[Tree]], Graph]
    ) -> Callable[..., Any]:
        if key in self._programs:
            return self._in_loop(key, loop)

        def compile_and_run(*args: Tree) -> Any:
            with COMPILING:
                if key not in self._programs:
                    self._compile(key, arguments, args, loop, capture)
            return self._in_loop(key, loop)(*args)

        return compile_and_run

    def _compile(
        self, key: _Key, arguments: Sequence[str], args: Sequence[Tree], loop: Loop | None, capture: Callable[[Sequence[Tree]], Graph]
    ) -> None:
        began = time.perf_counter()
        graph = capture(args)
        capture_s = time.perf_counter() - began
        if loop is not None and key[1] is None:
            self._unchanged = _unchanged(graph, args)  # which holds for the pullback, too: the steps are this program's
        graph, first = self._hoisted(graph, args, loop, self._unchanged)
        graph = _as_they_are(graph, _shared_by(loop))
        checked: list[int] = []
        if self._checks_data and "support" in arguments and arguments[-1] != "cotangent":
            kinds = [kind for kind, arg in zip(arguments, args, strict=True) for _ in tree.leaves(arg)]
            specs = [entry.spec for entry in graph.signature.inputs]
            checked = [i for i, kind in enumerate(kinds) if kind in ("support", "query") and specs[i].dtype.is_floating_point]
        if checked:
            graph = check_finite(graph, checked)
        self._add(key, self._compiled(graph, capture_s, bool(checked)), first)

    def _compile_halves(
        self, forward: _Key, backward: _Key, capture: Callable[[], tuple[Graph, int]], args: Sequence[Tree], loop: Loop | None
    ) -> None:
        """Compiles the first half of a graph of results and gradients; the second is kept until the form of its inputs is known."""
        if forward in self._refused:
            raise NotDifferentiable(*self._refused[forward].args)
        began = time.perf_counter()
        try:
            joint, num_results = capture()
        except NotDifferentiable as error:
            self._refused[forward] = NotDifferentiable(*error.args)
            raise
        joint = self._backend.lower(joint)  # so that the cut knows which operations there will be
        capture_s = time.perf_counter() - began
        joint, first = self._hoisted(joint, args, loop, _unchanged(joint, args))
        half, self._second_halves[backward] = partition(joint, num_results)
        self._add(forward, self._compiled(_as_they_are(half, _shared_by(loop)), capture_s), first)
        if first is not None:
            self._firsts[backward] = first

    def _hoisted(self, graph: Graph, args: Sequence[Tree], loop: Loop | None, unchanged: set[int]) -> tuple[Graph, Program | None]:
        """Takes what is the same in all calls of the loop out of the graph; returns both parts, that one as a program, which is run.

        Args:
          unchanged: positions of those leaves of the carry that every call returns unchanged.
        """
        if loop is None:
            return graph, None
        # Cotangents come after the arguments that the loop knows of, and never stay the same.
        flags = [flag for arg, flag in zip(args, loop.same, strict=False) for _ in tree.leaves(arg)]
        halves = hoist(graph, {index for index, flag in enumerate(flags) if flag} | unchanged)
        if halves is None:
            return graph, None
        first = self._compiled(halves[0])
        loop.shared = (first.rehearsed if rehearsing() else first)(*args[: len(loop.same)])
        return halves[1], first

    def _compiled(self, graph: Graph, capture_s: float = 0.0, checks_data: bool = False) -> Program:
        return Program.compile(graph, self._backend, self._modules, capture_s, checks_data)

    def _add(self, key: _Key, program: Program, first: Program | None) -> None:
        if first is not None:
            self._firsts[key] = self._programs[f"{key[0]}, what all steps share", key[1]] = first
        self._programs[key] = program

    def _in_loop(self, key: _Key, loop: Loop | None) -> Callable[..., Any]:
        """Returns the program, which is given what all calls of the loop share."""
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


def _unchanged(graph: Graph, args: Sequence[Tree]) -> set[int]:
    """Returns the positions of leaves of the carry, a graph's first argument and first result, that are returned unchanged."""
    return {index for index in range(len(tree.leaves(args[0]))) if returns_input(graph, index)}


def _shared_by(loop: Loop | None) -> list[Tensor]:
    """Returns what all calls of the loop share, as far as it is known."""
    return [] if loop is None or loop.shared is None else loop.shared


def _as_they_are(graph: Graph, kept: Sequence[Tensor]) -> Graph:
    """Returns the graph for inputs of role KEPT that are like these values, which may have any strides.

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
