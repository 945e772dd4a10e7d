"""Finds the program of a call of an export, and what it starts from.

A call that is like the last of its kind, with plain tuples of tensors, takes its program without being looked at in detail.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.backend.guards import in_forward_mode, refuse_tangents
from adaptrt.errors import InvalidArgument, InvalidType, NotDifferentiable, OptimizerMismatch, ShapeChanged
from adaptrt.export.manifest import Manifest
from adaptrt.export.program import Program
from adaptrt.inner import check
from adaptrt.inner.step import Batch, as_call
from adaptrt.runtime.adapted import Adapted
from adaptrt.runtime.recent import Recent, are_plain
from adaptrt.runtime.state import State
from adaptrt.tree import Spec, Tree

_CPU = torch.device("cpu")


class _Compared(NamedTuple):
    """What a call is compared with others by."""

    kind: tuple[str, bool, bool]
    structure: Any
    tensors: list[Tensor]


class Call(NamedTuple):
    """A call before it runs.

    Attributes:
      program: that computes it.
      data: its support batch or inputs, or both.
      begin: what it starts from.
      held, fixed: the tensors of the state, and those that do not adapt, which the program takes.
      is_known: whether the last call of its kind was like it in all that matters.
      compared: with what later calls are compared. None if they cannot be.
    """

    program: Program
    data: tuple[Tree, ...]
    begin: State
    held: Sequence[Tensor]
    fixed: Sequence[Tensor]
    is_known: bool
    compared: _Compared | None


class Calls:
    """Finds programs for calls.

    Args:
      manifest: of the export.
      programs: those of the format that runs.
      base: the state that was exported.
      fixed: all tensors that do not adapt, in order.
      of_model: those of them that are the model's.
    """

    def __init__(
        self, manifest: Manifest, programs: Sequence[Program], base: State, fixed: Sequence[Tensor], of_model: Sequence[Tensor]
    ) -> None:
        self._manifest = manifest
        self._programs = tuple(programs)
        self._base = base
        self._fixed, self._of_model = tuple(fixed), tuple(of_model)
        self._num_params, self._num_buffers = len(base.carry.params), len(base.carry.buffers)
        self._num_parts = 3 if manifest.weighted else 2
        self._recent: Recent[Program] = Recent()

    def with_support(self, kind: str, support: Any, query: tuple[Any] | None, start: Adapted | None) -> Call:
        """Finds the program of a call with a support batch, and checks the form of its arguments.

        Args:
          kind: "adapt", or "adapt_predict" with a query.
          support, query, start: as they were given.
        Raises:
          ShapeChanged, InvalidBatch, InvalidType, InvalidArgument, OptimizerMismatch, NotDifferentiable: see `Exported.adapt`.
        """
        compared = None
        if are_plain(self._num_parts, support) and (start is None or type(start) is Adapted):
            state = self._base if start is None else start.state
            if state.num_tasks == self._manifest.num_tasks and (query is None or are_plain(1, query)):
                compared, program = self._compared(kind, state, state.leaves, self._fixed, (*support, *(query or ())))
                if program is not None:
                    data = (Batch(*support),) if query is None else (Batch(*support), query)
                    begin = State(state.leaves, self._base.form, state.num_tasks)
                    return Call(program, data, begin, begin.leaves, self._fixed, True, compared)
        batch = check.as_batch("support", support, _CPU, self._manifest.weighted)
        data = (batch,) if query is None else (batch, _inputs(query))
        program, begin = self.find(kind, data), self.begin(start)
        _refuse_derivatives(data, begin)
        return Call(program, data, begin, begin.leaves, self._fixed, False, compared)

    def of_prediction(self, state: State, inputs: Tree) -> Call:
        """Finds the program of a prediction, and checks the form of its inputs.

        Args:
          state: with a task axis if the programs have one.
          inputs: as they were given; a tuple of the model's arguments.
        Raises:
          ShapeChanged, InvalidBatch, InvalidType, NotDifferentiable: see `Exported.adapt`.
        """
        leaves, compared = state.leaves, None
        held = (*leaves[: self._num_params], *leaves[len(leaves) - self._num_buffers :])  # all but the optimiser's
        if are_plain(None, inputs):
            compared, program = self._compared("predict", state, held, self._of_model, inputs)
            if program is not None:
                return Call(program, (inputs,), state, held, self._of_model, True, compared)
        data = (_inputs((inputs,)),)
        program = self.find("predict", data)
        _refuse_derivatives(data, state)
        return Call(program, data, state, held, self._of_model, False, compared)

    def keep(self, call: Call) -> None:
        """Lets calls that are like this one take its program."""
        if call.compared is not None:
            self._recent.keep(*call.compared, call.program)

    def find(self, kind: str, data: Sequence[Tree]) -> Program:
        """Returns the program for such data.

        Raises:
          ShapeChanged: there is none.
        """
        programs = [program for program in self._programs if program.entry.kind == kind]
        for program in programs:
            if program.takes(data):
                return program
        known = "; ".join(dict.fromkeys(program.in_words() for program in programs)) or "none"
        found = ", ".join(tree.describe(part) for part in data)
        raise ShapeChanged(f"no program '{kind}' was exported for {found}, only for {known}; pad the data, or export this shape, too")

    def begin(self, start: Adapted | None) -> State:
        """Returns what to start from, with a task axis if the programs have one.

        Raises:
          InvalidArgument, InvalidType, OptimizerMismatch: it is another kind of start than these programs take.
        """
        num_tasks = self._manifest.num_tasks
        state = self._base if start is None else self._state_of(start)
        if num_tasks is not None and state.num_tasks is None:
            return state.over_tasks(num_tasks)
        if state.num_tasks != num_tasks:
            found = "no task axis" if state.num_tasks is None else f"{state.num_tasks} tasks"
            raise InvalidArgument(f"start holds {found}, and the programs are for {num_tasks or 'no task axis'}")
        return state

    def _state_of(self, start: Adapted) -> State:
        if not isinstance(start, Adapted):
            raise InvalidType(f"start must be what adapt(), start() or load() returned, got {type(start).__name__}")
        state = start.state
        held, wanted = state.named_tensors(), self._base.named_tensors()
        lead = () if state.num_tasks is None else (state.num_tasks,)
        specs = {name: Spec((*lead, *value.shape), value.dtype, _CPU) for name, value in wanted.items()}
        if specs != {name: Spec.of(value) for name, value in held.items()}:
            raise OptimizerMismatch(f"start was adapted with another model or optimiser: {tree.difference(specs, held)}")
        return State(state.leaves, self._base.form, state.num_tasks)

    def _compared(
        self, kind: str, state: State, held: Sequence[Tensor], fixed: Sequence[Tensor], data: tuple[Tensor, ...]
    ) -> tuple[_Compared | None, Program | None]:
        """Returns what a call is compared by, None in forward mode, and the program of the last of its kind if that was like it."""
        if in_forward_mode():
            return None, None
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        compared = _Compared((kind, *modes), (state.form, state.num_tasks), [*held, *fixed, *data])
        return compared, self._recent.find(*compared)


def _inputs(query: tuple[Any]) -> Tree:
    args, kwargs = as_call(check.as_batch("query", query, _CPU).inputs)
    return kwargs or args


def _refuse_derivatives(data: Tree, state: State) -> None:
    """Raises NotDifferentiable if the caller could ask for a gradient, or something has a tangent."""
    if in_forward_mode():
        refuse_tangents([*tree.leaves(data), *state.leaves])
    if torch.is_grad_enabled() and any(value.requires_grad for value in (*tree.leaves(data), *state.leaves)):
        raise NotDifferentiable("exported programs have no gradient; call under torch.no_grad(), or detach what requires grad")
