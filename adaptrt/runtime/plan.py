"""What is decided once for each shape of support and query data, before anything is compiled."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.adjoint.auto import MAX_KEPT_BYTES, choose, one_by_one
from adaptrt.adjoint.base import Adjoint, Problem
from adaptrt.adjoint.each_task import EachTask
from adaptrt.backend.base import COMPILING
from adaptrt.functional import refuse_state, watch_attributes
from adaptrt.graph.capture import capture, record_operations
from adaptrt.graph.cost import num_bytes_to_keep, num_flops, returns_input
from adaptrt.graph.cut import varying
from adaptrt.graph.indices import IndexBound, index_bounds
from adaptrt.graph.ir import Graph
from adaptrt.graph.noise import Noise
from adaptrt.graph.passes.lift_noise import record_noise
from adaptrt.graph.signature import Role
from adaptrt.inner import check, diagnose
from adaptrt.inner.step import Batch, Carry, Fixed, Step
from adaptrt.runtime.program_set import ProgramSet
from adaptrt.tree import Spec, Tree

Explain = Callable[[Callable[[], Graph]], Graph]
MakePrograms = Callable[[Step, Explain, bool], ProgramSet]
"""Of a step, of what explains a failure, and whether tasks are done one after the other."""


class Probe(NamedTuple):
    """What one forward pass on fake tensors tells.

    Attributes:
      noise: what its random operations draw, in order.
      bounds: which data are class labels or indices.
      live_buffers: for each buffer whether its update can be differentiated.
      loss: spec of the loss.
    """

    noise: tuple[Noise, ...]
    bounds: tuple[IndexBound, ...]
    live_buffers: tuple[bool, ...]
    loss: Spec


@dataclasses.dataclass(frozen=True, slots=True)
class SupportPlan:
    """For one shape of support data: the inner step, the adjoint and why, and the programs that see no query data.

    Attributes:
      carry: for each leaf of the carry whether a gradient flows through it from step to step; through running statistics none does.
      shapes: the data in words.
      problems: by which leaves the caller differentiates.
    """

    step: Step
    adjoint: Adjoint
    reason: str
    probe: Probe
    programs: ProgramSet
    carry: tuple[bool, ...]
    shapes: tuple[str, ...]
    queries: Cache[QueryPlan]
    problems: dict[Hashable, Problem] = dataclasses.field(default_factory=dict[Hashable, Problem])

    @property
    def checks_data(self) -> bool:
        """Whether the programs themselves refuse NaN and infinity in the data."""
        return self.adjoint.sees_all_data and self.programs.checks_data

    def look_at(self, support: Batch) -> tuple[Batch, Tensor | None]:
        """As `check.sound`."""
        return check.sound(support, self.probe.bounds, self.programs.checks_data)


@dataclasses.dataclass(frozen=True, slots=True)
class QueryPlan:
    """For one shape of query data after that: the programs that see it, and each task's weight in the meta-loss ([T], or 0-dim)."""

    probe: Probe
    programs: ProgramSet
    shapes: tuple[str, ...]
    weights: Tensor

    def look_at(self, query: Batch) -> tuple[Batch, Tensor | None]:
        """As `check.sound`."""
        return check.sound(query, self.probe.bounds, self.programs.checks_data)


@dataclasses.dataclass(frozen=True, slots=True)
class PredictionPlan:
    """For one shape of a model's inputs: the programs that predict, and noise and indices of one prediction."""

    bounds: tuple[IndexBound, ...]
    noise: tuple[Noise, ...]
    programs: ProgramSet
    shapes: tuple[str, ...]

    def look_at(self, inputs: Tree) -> tuple[Tree, Tensor | None]:
        """As `check.sound`."""
        batch, is_sound = check.sound(Batch(inputs, None), self.bounds, self.programs.checks_data)
        return batch.inputs, is_sound


Entry = TypeVar("Entry")


class Cache(Generic[Entry]):
    """The `size` entries used last. Safe to use from threads; an entry is made once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._order = threading.Lock()

    def get(self, key: Hashable) -> Entry | None:
        entry = self._entries.get(key)
        if entry is not None and len(self._entries) > 1:
            with self._order:
                if key in self._entries:
                    self._entries.move_to_end(key)
        return entry

    def get_or_make(self, key: Hashable, make: Callable[[], Entry]) -> Entry:
        """The entry under `key`; made under the compilation lock if there is none."""
        entry = self.get(key)
        if entry is not None:
            return entry
        with COMPILING:
            entry = self.get(key)
            if entry is None:
                entry = make()
                with self._order:
                    self._entries[key] = entry
                    while len(self._entries) > self._size:
                        self._entries.popitem(last=False)
        return entry

    def entries(self) -> list[Entry]:
        """All entries, the one used last at the end."""
        with self._order:
            return list(self._entries.values())


# All that matters here is which inputs are data.
_ROLES = (Role.PARAM, Role.PARAM, Role.DATA)
_NAMES = ("carry", "fixed", "batch")


def probe(step: Step, name: str, carry: Carry, fixed: Fixed, batch: Batch) -> tuple[Probe, Graph]:
    """Runs model and loss once on fake tensors, and for the support batch gradient and update, to find what goes wrong and what they need.

    Returns that, and the graph of model and loss.

    Args:
      step: the inner step.
      name: "support" or "query", for messages.
      carry, fixed, batch: trees of tensors or specs of one task.
    Raises:
      InvalidBatch, InvalidLoss, NothingToAdapt, DataDependentControlFlow, UnsupportedRandomness: see there.
    """
    live = {key: False for key in carry.buffers}
    while True:
        noise: list[Noise] = []
        before = dict(live)

        def forward(carry: Carry, fixed: Fixed, batch: Batch, noise: list[Noise] = noise, before: dict[str, bool] = before) -> Tensor:
            params, fixed, batch = tree.map_leaves(_differentiable, (carry.params, fixed, batch))
            buffers = {key: _differentiable(value) if before[key] else value for key, value in carry.buffers.items()}
            with record_noise() as drawn, diagnose.running(name, batch):
                loss, updated = step.evaluate(params, buffers, fixed, batch)
            noise.extend(drawn)
            live.update({key: value.requires_grad for key, value in updated.items()})
            if name == "support":
                grads = step.gradient(loss, params)
                with diagnose.updating():
                    step.update(grads, carry.opt_state, params, fixed.hyper)
            return loss

        with watch_attributes() as overwritten:
            graph = capture(forward, carry, fixed, batch, roles=_ROLES, names=_NAMES, fused_attention=step.detach_gradient)
        refuse_state(graph.constants, overwritten)
        # A buffer that is live may make others live, which read it; running statistics stay as they are.
        if live == before:
            return Probe(tuple(noise), tuple(index_bounds(graph)), tuple(live.values()), graph.signature.outputs[0].spec), graph


def _differentiable(value: Tensor) -> Tensor:
    return value.detach().requires_grad_() if value.is_floating_point() else value


def plan_support(
    step_of: Callable[[bool], Step],
    adjoint: Adjoint | None,
    k: int,
    per_step: bool,
    num_tasks: int | None,
    carry: Carry,
    fixed: Fixed,
    batch: Batch,
    shapes: tuple[str, ...],
    make_programs: MakePrograms,
    cache_size: int,
) -> SupportPlan:
    """Decides how to adapt on support batches of one shape.

    Args:
      step_of: the step with or without detached gradients.
      adjoint: None to choose by graph size.
      k: number of steps.
      per_step: whether each has a batch of its own.
      num_tasks: length of the task axis, None without one.
      carry, fixed, batch: specs of one task and one step.
      shapes: the support data in words.
      make_programs: makes the empty set of programs.
      cache_size: how many shapes of query data to keep.
    """
    step = step_of(adjoint is not None and adjoint.detach_gradient)
    found, forward = probe(step, "support", carry, fixed, batch)
    device = next(iter(carry.params.values())).device
    each_task = num_tasks is not None and device.type == "cpu" and one_by_one(num_flops(forward))
    programs = make_programs(step, _explained(step, found.noise, carry, fixed, batch), each_task)
    if adjoint is None:
        noise = tuple(entry.spec for entry in found.noise)
        graph = capture(step, carry, fixed, batch, noise)
        num_carry, num_fixed, num_batch = (len(tree.leaves(part)) for part in (carry, fixed, batch))
        same = {index for index in range(num_carry) if returns_input(graph, index)}
        same |= set(range(num_carry, num_carry + num_fixed + (0 if per_step else num_batch)))
        num_updates = k * step.optimizer.updates_per_step

        def num_kept_bytes() -> int:
            steps = num_updates * (num_tasks or 1)  # `adapt` keeps those of all tasks where it is differentiated
            kept = num_bytes_to_keep(graph, same) * steps
            if kept > MAX_KEPT_BYTES and programs.lowers:
                # Decomposed, more can be computed again, and less is kept; it takes another capture to see how much.
                kept = num_bytes_to_keep(programs.lowered(step, carry, fixed, batch, noise), same) * steps
            return kept

        num_shared = graph.num_nodes - sum(node.op == "call_function" for node in varying(graph, same))
        adjoint, reason = choose(graph.num_nodes, num_shared, num_updates, num_kept_bytes, device)
    else:
        reason = "asked for"
    if each_task:
        adjoint = EachTask(adjoint)
        reason += f"; model and loss on a task are {num_flops(forward) / 1e6:,.0f} MFLOP, enough for one task after the other"
    floating = [tree.Spec.of(leaf).dtype.is_floating_point for leaf in tree.leaves((carry.params, carry.opt_state))]
    return SupportPlan(step, adjoint, reason, found, programs, (*floating, *found.live_buffers), shapes, Cache(cache_size))


def plan_query(
    plan: SupportPlan,
    carry: Carry,
    fixed: Fixed,
    batch: Batch,
    shapes: tuple[str, ...],
    make_programs: MakePrograms,
    num_tasks: int | None,
) -> QueryPlan:
    """Decides how to evaluate query batches of one shape. Arguments as for `plan_support`; `num_tasks` is None without a task axis."""
    found, _ = probe(plan.step, "query", carry, fixed, batch)
    shape = () if num_tasks is None else (num_tasks,)
    with torch.inference_mode(False):
        weights = torch.full(shape, 1.0 / (num_tasks or 1), dtype=found.loss.dtype, device=found.loss.device)
    explained = _explained(plan.step, found.noise, carry, fixed, batch)
    programs = make_programs(plan.step, explained, isinstance(plan.adjoint, EachTask))
    return QueryPlan(found, programs, shapes, weights)


def plan_prediction(
    step: Step, carry: Carry, fixed: Fixed, inputs: Tree, shapes: tuple[str, ...], make_programs: MakePrograms
) -> PredictionPlan:
    """Decides how to predict for inputs of one shape. Arguments as for `plan_support`."""
    noise: list[Noise] = []

    def forward(carry: Carry, fixed: Fixed, inputs: Tree) -> Tree:
        with record_noise() as drawn, diagnose.running("input", Batch(inputs, None)):
            output, _ = step.apply(carry.params, carry.buffers, fixed, inputs)
        noise.extend(drawn)
        return output

    graph = capture(forward, carry, fixed, inputs, roles=_ROLES, names=("carry", "fixed", "batch.inputs"))
    programs = make_programs(step, _explained(step, noise, carry, fixed, Batch(inputs, None)), False)
    return PredictionPlan(tuple(index_bounds(graph)), tuple(noise), programs, shapes)


def _explained(step: Step, noise: Sequence[Noise], carry: Carry, fixed: Fixed, batch: Batch) -> Explain:
    """Turns a missing second derivative into an error that names the module, by running the model once more."""
    specs = tuple(entry.spec for entry in noise)

    def forward() -> list[tuple[str, str]]:
        return record_operations(step.predict, carry, fixed, batch.inputs, specs)

    return lambda run: diagnose.differentiating(run, step.model, forward)
