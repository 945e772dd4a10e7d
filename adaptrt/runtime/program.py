"""A program: a graph together with what runs it. It checks its inputs, and is safe to call from several threads."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from adaptrt import tree
from adaptrt.backend import Backend
from adaptrt.backend.base import Building, Form, Runner, without_values
from adaptrt.backend.guards import Known, in_forward_mode, refuse_tangents
from adaptrt.errors import InvalidType, LabelOutOfRange, NonFiniteInput, ShapeChanged
from adaptrt.graph.in_memory import in_memory
from adaptrt.graph.ir import Constant, Graph, autocast_off
from adaptrt.graph.surroundings import holds_mapped
from adaptrt.inner.constants import constant_reader
from adaptrt.tree import Spec, Tree

_OUT_OF_RANGE = ("out of bounds", "out of range")
"""What kernels say of an index that does not exist, the compiled ones included."""
_OTHER_DTYPE = "expected scalar type"
"""What they say of operands whose dtypes differ, where fake tensors accept them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """A compiled graph.

    Attributes:
      graph: what was compiled.
      run: the backend's callable.
      constants: read at each call, so that a plain tensor attribute of the model is used with its present value.
      shapes, dtypes, devices, strides: of each input, constants included.
      known: kinds of inputs that were found to have these.
      leaves_of, result_of: arguments to tensors, and tensors to what the captured function returned.
      checks_data: whether the graph was made by `check_finite`: then its last result says whether the data is finite.
      backend: the backend's name.
      capture_s, compile_s: seconds spent on each.
      forms: of the results, if a rehearsal need not compute them.
    """

    graph: Graph
    run: Runner
    constants: tuple[Constant, ...]
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    devices: list[torch.device]
    strides: list[tuple[int, ...]]
    known: Known
    leaves_of: Callable[[Tree], list[Tensor]]
    result_of: Callable[[Sequence[Tensor]], Tree]
    checks_data: bool
    backend: str
    capture_s: float
    compile_s: float
    forms: Sequence[Form] | None

    @staticmethod
    def compile(graph: Graph, backend: Backend, modules: Sequence[nn.Module], capture_s: float = 0.0, checks_data: bool = False) -> Program:
        """Compiles a graph.

        Args:
          graph: the graph.
          backend: compiles it.
          modules: where plain tensor attributes are looked up.
          capture_s, checks_data: as for the class.
        """
        began = time.perf_counter()
        run = backend.compile(graph)
        inputs = graph.signature.inputs
        return Program(
            graph=graph,
            run=run,
            constants=tuple(constant_reader(value, modules) for value in graph.constants),
            shapes=[entry.spec.shape for entry in inputs],
            dtypes=[entry.spec.dtype for entry in inputs],
            devices=[entry.spec.device for entry in inputs],
            strides=[entry.strides for entry in inputs],
            known=Known(),
            leaves_of=tree.leaves_by(graph.arguments),
            result_of=tree.unflatten_by(graph.result.children[0] if checks_data else graph.result),
            checks_data=checks_data,
            backend=backend.name,
            capture_s=capture_s,
            compile_s=time.perf_counter() - began,
            forms=run.forms if isinstance(run, Building) else None,
        )

    @property
    def is_building(self) -> bool:
        """Whether the backend is still building its code."""
        return isinstance(self.run, Building)

    def built(self) -> Program:
        """Waits until the code has been built, and returns the program with it."""
        if not isinstance(self.run, Building):
            return self
        began = time.perf_counter()
        run = self.run.finish()
        return dataclasses.replace(self, run=run, compile_s=self.compile_s + time.perf_counter() - began)

    @property
    def rehearsed(self) -> Program:
        """The program in the form in which it runs in a rehearsal: it returns memory without values if that is possible."""
        forms = self.forms
        return self if forms is None else dataclasses.replace(self, run=lambda values: [without_values(form) for form in forms])

    def __call__(self, *args: Tree) -> Tree:
        """Runs the program on arguments of the captured structure and shapes; records nothing for autograd.

        Raises:
          ShapeChanged: an argument differs in shape, dtype or device from what was captured.
          LabelOutOfRange: an index that the program computes does not exist.
          NonFiniteInput: data holds NaN or infinity, if the program looks.
        """
        return self.result_of(self.run_leaves(self.leaves_of(args)))

    def run_leaves(self, values: list[Tensor]) -> Sequence[Tensor]:
        """Does the same from the arguments' tensors in order to the results' tensors in order. It may empty the list."""
        if self.constants:
            constants = [read() for read in self.constants]
            if in_forward_mode():
                refuse_tangents(constants)
            values = [*values, *constants]
        if values not in self.known:
            if holds_mapped(values):  # gradients for several cotangents at once, which only PyTorch's own kernels take
                with torch.no_grad(), autocast_off():
                    return self.graph.function()(*values)
            values = self._checked(values)
        try:
            if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
                with torch.no_grad(), autocast_off():
                    results = self.run(values)
            else:
                results = self.run(values)
        except (IndexError, RuntimeError) as error:
            if any(text in str(error) for text in _OUT_OF_RANGE) and "storage" not in str(error):
                raise LabelOutOfRange(
                    f"a kernel was given an index that does not exist ({error}). The model or the loss computes it, from data such as "
                    "the targets of ctc_loss or from a buffer such as a step counter; keep it within the table or the axis that it indexes"
                ) from error
            if _OTHER_DTYPE in str(error):
                raise InvalidType(
                    f"a kernel refuses the dtypes that it was given ({error}). Let the model's buffers have the dtype of its parameters, "
                    "as model.float() or model.double() does"
                ) from error
            raise
        if self.checks_data and not math.isfinite(results[-1].item()):
            raise NonFiniteInput("the data holds NaN or infinity")
        return results

    def _checked(self, values: list[Tensor]) -> list[Tensor]:
        """Returns the values with the strides that the program takes.

        Raises:
          ShapeChanged: one differs in shape, dtype or device from what was captured.
          InvalidType: the values of one are not in its memory.
        """
        if (
            [value.shape for value in values] != self.shapes
            or [value.dtype for value in values] != self.dtypes
            or [value.device for value in values] != self.devices
        ):
            raise ShapeChanged(self._difference(values))
        values = [in_memory(value) for value in values]
        if [value.stride() for value in values] != self.strides:
            return [_with_strides(value, strides) for value, strides in zip(values, self.strides, strict=True)]
        self.known.add(values)
        return values

    def _difference(self, values: Sequence[Tensor]) -> str:
        """Names the first input that is not what was captured."""
        for entry, value in zip(self.graph.signature.inputs, values, strict=True):
            if Spec.of(value) != entry.spec:
                return f"{entry.name} was traced as {entry.spec}, got {Spec.of(value)} on {value.device}"
        raise AssertionError("every input is what was captured")


def _with_strides(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    if value.stride() == strides:
        return value
    # An axis of length 1 may have any stride in what PyTorch calls contiguous; compiled kernels check it.
    if value.is_contiguous() and Spec.of(value).strides == strides:
        return value.as_strided(value.shape, strides)
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)
