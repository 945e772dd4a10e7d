"""Reports what an unroll decided, and what its programs cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from adaptrt.backend import Backend
from adaptrt.backend.tiered import TieredRunner
from adaptrt.graph.cost import num_bytes, num_flops
from adaptrt.graph.ir import PassRecord
from adaptrt.runtime.plan import GuardPlan, PredictionPlan, QueryPlan, SupportPlan
from adaptrt.runtime.program import Program


@dataclasses.dataclass(frozen=True, slots=True)
class ProgramReport:
    """Reports on one program.

    Attributes:
      name: what it computes.
      shapes: the data it is for.
      num_nodes: operations in its graph.
      passes: number of operations before and after each pass.
      flops: of one run, matrix products and convolutions only.
      num_bytes: of its inputs and outputs.
      capture_s, compile_s: seconds spent on making it.
      is_pending: whether it runs operation by operation until it is compiled (`tiered=True`).
    """

    name: str
    shapes: str
    num_nodes: int
    passes: tuple[PassRecord, ...]
    flops: int
    num_bytes: int
    capture_s: float
    compile_s: float
    is_pending: bool = False

    def __str__(self) -> str:
        sizes = f"{self.num_nodes} operations, {self.flops / 1e6:.3g} MFLOP, {self.num_bytes / 1e6:.3g} MB in and out"
        compiled = "to be compiled in the background" if self.is_pending else f"compiled in {self.compile_s:.2f} s"
        times = f"captured in {self.capture_s:.2f} s, {compiled}"
        passes = ", ".join(f"{record.name} {record.num_nodes_before}->{record.num_nodes_after}" for record in self.passes)
        return f"    {self.name}: {sizes}; {times}\n      passes: {passes}"


@dataclasses.dataclass(frozen=True, slots=True)
class Explanation:
    """Reports on an unroll; `str()` of it is a text for people.

    Attributes:
      num_steps: k.
      backend: its name.
      adjoints: for each shape of support data, in words: shapes, adjoint and why it was chosen.
      programs: all programs compiled so far.
      calls: where calls are recorded, for each recorded so far: shapes, name, and whether it is one launch.
      exchanged: names of what the backend exchanges or uses of PyTorch's private parts, as far as this PyTorch has them
        (`adaptrt.backend.inductor.exchange.TABLE`); empty until something is compiled.
    """

    num_steps: int
    backend: str
    adjoints: tuple[tuple[str, str, str], ...]
    programs: tuple[ProgramReport, ...]
    calls: tuple[tuple[str, str, bool], ...] = ()
    exchanged: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"unroll of {self.num_steps} steps on backend {self.backend}"]
        if not self.programs:
            lines.append("  nothing compiled yet: call it, or warmup(support, query)")
        shapes = list(dict.fromkeys([*(shapes for shapes, _, _ in self.adjoints), *(program.shapes for program in self.programs)]))
        for group in shapes:
            lines.append(f"  data {group}")
            lines += [f"    adjoint {adjoint}: {reason}" for shape, adjoint, reason in self.adjoints if shape == group]
            lines += [str(program) for program in self.programs if program.shapes == group]
            calls = [(name, "one launch" if whole else "could not be recorded") for shapes, name, whole in self.calls if shapes == group]
            lines += [f"    a call of {name}: {how}" for name, how in calls]
        if self.exchanged:
            lines.append(f"  private parts of PyTorch {torch.__version__} in use: {', '.join(self.exchanged)}")
        return "\n".join(lines)


def explain(num_steps: int, backend: Backend, plans: Sequence[SupportPlan], predictions: Sequence[PredictionPlan]) -> Explanation:
    """Returns the report on everything planned and compiled so far."""
    adjoints: list[tuple[str, str, str]] = []
    programs: list[ProgramReport] = []
    calls: list[tuple[str, str, bool]] = []

    def add(shapes: str, plan: SupportPlan | QueryPlan | GuardPlan | PredictionPlan) -> None:
        programs.extend(_report(name, shapes, program) for name, program in plan.programs.named())
        calls.extend((shapes, recording.name, recording.is_one_launch) for recording in plan.calls.recordings())

    for plan in plans:
        support = ", ".join(plan.shapes)
        found = [f"; {name} in the last call: {value.max().item():.2g}" for name, value in plan.programs.reports.items()]
        adjoints.append((support, repr(plan.adjoint), plan.reason + "".join(found)))
        add(support, plan)
        for guard in plan.guards.entries():
            add(f"{support}; guarded", guard)
        for query in plan.queries.entries():
            add(f"{support}; query {', '.join(query.shapes)}", query)
    for prediction in predictions:
        add(f"inputs {', '.join(prediction.shapes)}", prediction)
    exchanged = backend.private_parts() if programs else ()
    return Explanation(num_steps, backend.name, tuple(adjoints), tuple(programs), tuple(calls), exchanged)


def _report(name: str, shapes: str, program: Program) -> ProgramReport:
    graph = program.graph
    return ProgramReport(
        name,
        shapes,
        graph.num_nodes,
        graph.history,
        num_flops(graph),
        num_bytes(graph),
        program.capture_s,
        program.compile_s,
        isinstance(program.run, TieredRunner) and program.run.is_pending,
    )
