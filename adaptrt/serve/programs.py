"""What the engine runs: the programs of an unroll over tasks, or those of an export."""

from __future__ import annotations

import abc
import bisect
import hashlib
import io
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from adaptrt import Adapted, CompiledUnroll, Exported, load, stack
from adaptrt.errors import InvalidArgument, InvalidType
from adaptrt.serve import trees
from adaptrt.serve.sizes import Sizes

_TRIES, _TRYING_S = 5, 0.5
_FASTER = 0.9  # times the time together: a batch is computed one by one only where that is clearly faster

Keep = str | float | Callable[[Any, Any], Tensor] | None
"""A guard of `CompiledUnroll.adapt`, or the largest Euclidean norm that a change of all parameters may have."""


class Programs(abc.ABC):
    """Programs for batches of tasks.

    Attributes:
      lanes: numbers of tasks that there are programs for, in ascending order.
      base: the adaptation of no steps, of one task.
      weighted: whether support data ends with weights of examples.
      fingerprint: of the base, for saved states: of what does not adapt, and of what adaptations start from.
      num_bytes: of one task's state.
    """

    lanes: tuple[int, ...]
    base: Adapted
    weighted: bool
    fingerprint: dict[str, str]
    _target: CompiledUnroll | Exported

    @abc.abstractmethod
    def warm(self, support: Any, inputs: Any, lanes: int) -> None:
        """Compiles for data [T, S, ...] of this support and these inputs, T = lanes."""

    def choose(self, support: Any, inputs: Any, lanes: int) -> None:
        """Finds out how batches of T = lanes tasks are computed best, once all is warm. Data is as for `warm`."""
        del support, inputs, lanes

    def lanes_for(self, num_tasks: int) -> int:
        """Returns how many tasks a batch is filled up to that has this many."""
        return self.lanes[bisect.bisect_left(self.lanes, num_tasks)]

    @abc.abstractmethod
    def is_together(self, kind: str, lanes: int) -> bool:
        """Whether one program computes batches of T = lanes tasks; otherwise their tasks are computed one by one. `kind`: as of `Work`."""

    @abc.abstractmethod
    def adapt(self, rows: Sequence[Adapted], support: Any) -> tuple[list[Adapted], list[bool], list[list[float]]]:
        """Adapts the tasks of a batch together.

        Args:
          rows: what each starts from, T.
          support: data [T, S, ...].
        Returns:
          For each the adaptation, whether the guard kept it, and the losses before each step.
        """

    @abc.abstractmethod
    def adapt_one(self, row: Adapted, support: Any) -> Adapted:
        """Adapts one task to data [S, ...]."""

    @abc.abstractmethod
    def predict(self, rows: Sequence[Adapted], inputs: Any) -> Any:
        """Returns what the tasks' models, T of them, compute together for inputs [T, S, ...], as a tree of tensors [T, ...]."""

    @abc.abstractmethod
    def predict_one(self, row: Adapted, inputs: Any) -> Any:
        """Returns what one task's model computes for inputs [S, ...]."""

    def adapt_all(self, rows: Sequence[Adapted], support: Any) -> list[Adapted]:
        """Adapts the tasks of a batch in the way that batches of this size are computed. Arguments are as for `adapt`."""
        if self.is_together("adapt", len(rows)):
            return self.adapt(rows, support)[0]
        return [self.adapt_one(row, _row(support, index)) for index, row in enumerate(rows)]

    def predict_all(self, rows: Sequence[Adapted], inputs: Any) -> Any:
        """Predicts in the way that batches of this size are computed. Arguments and result are as of `predict`."""
        if self.is_together("predict", len(rows)):
            return self.predict(rows, inputs)
        found = [self.predict_one(row, _row(inputs, index)) for index, row in enumerate(rows)]
        return trees.map_leaves(lambda *leaves: torch.stack(leaves), *found)

    @abc.abstractmethod
    def num_programs(self) -> int:
        """Returns how many programs there are."""

    @property
    def k(self) -> int:
        """The number of inner steps."""
        return self._target.k

    @property
    def num_bytes(self) -> int:
        """Bytes of one task's state."""
        return sum([value.numel() * value.element_size() for value in self.base.state.leaves])

    @property
    def version(self) -> str:
        """As `Engine.version`."""
        hyper = self.base.fixed.hyper
        numbers = [(place, leaf.tolist()) for place, leaf in zip(trees.paths(hyper), trees.leaves(hyper), strict=True)]
        return hashlib.sha256(repr([sorted(self.fingerprint.items()), self.k, numbers]).encode()).hexdigest()[:12]

    def save(self, row: Adapted) -> bytes:
        """Returns a task's state as `Adapted.save` writes it."""
        file = io.BytesIO()
        row.save(file, fingerprint=self.fingerprint)
        return file.getvalue()

    def load(self, data: bytes) -> Adapted:
        """Returns the state in what `save` returned.

        Raises:
          InvalidState: it is damaged, has a task axis, or belongs to another base.
        """
        with torch.inference_mode():
            return self._target.load(data, fingerprint=self.fingerprint)


class OfUnroll(Programs):
    """The programs of an unroll: of one task, and over tasks.

    Args:
      unroll: of one task.
      lanes: numbers of tasks.
      num_sizes: how many sizes of support or query data there are at most.
      keep: the guard.
      together: whether the tasks of a batch are computed by one program; None for what is faster, which `choose` finds out.
    """

    def __init__(self, unroll: CompiledUnroll, lanes: tuple[int, ...], num_sizes: int, keep: Keep, together: bool | None) -> None:
        if unroll.has_task_axis:
            raise InvalidArgument("the engine makes batches itself; pass the unroll of one task, before vmap()")
        if unroll.per_step:
            raise InvalidArgument("the engine takes one support batch for all steps; compile without per_step=True")
        self.lanes = lanes
        self.weighted = unroll.examples == "weighted"
        self._keep = guard(keep)
        self._one = self._target = unroll.clone(cache_size=num_sizes, on_new_shape="error")
        self._many = unroll.vmap(cache_size=len(lanes) * num_sizes, on_new_shape="error")
        alone = () if together else (1,) if together is None else (1, *lanes)
        self._one_by_one = {(kind, number) for kind in ("adapt", "predict") for number in alone}
        self._chooses = together is None
        with torch.inference_mode():
            self.base = self._one.start()
        self.fingerprint = _fingerprint(unroll.fingerprint(), self.base)

    def warm(self, support: Any, inputs: Any, lanes: int) -> None:
        """As `Programs.warm`."""
        may_be_alone = self._chooses or not self.is_together("adapt", lanes)
        if may_be_alone:
            self._one.warmup(_row(support, 0), start=self.base, keep=self._keep, inputs=_row(inputs, 0))
        if not may_be_alone or (self._chooses and lanes > 1):
            self._many.warmup(support, start=stack([self.base] * lanes), keep=self._keep, inputs=inputs)

    def choose(self, support: Any, inputs: Any, lanes: int) -> None:
        """As `Programs.choose`."""
        if not self._chooses or lanes == 1:
            return
        rows, one, one_input = [self.base] * lanes, _row(support, 0), _row(inputs, 0)

        def adapt_alone() -> object:
            return is_kept(self.adapt_one(self.base, one))

        def predict_alone() -> object:
            return self.predict_one(self.base, one_input)

        for kind, alone, together in (
            ("adapt", adapt_alone, lambda: self.adapt(rows, support)),
            ("predict", predict_alone, lambda: self.predict(rows, inputs)),
        ):
            if lanes * _seconds(alone) < _FASTER * _seconds(together):
                self._one_by_one.add((kind, lanes))

    def lanes_for(self, num_tasks: int) -> int:
        """As `Programs.lanes_for`; one task needs no batch."""
        return 1 if num_tasks == 1 and ("adapt", 1) in self._one_by_one else super().lanes_for(num_tasks)

    def is_together(self, kind: str, lanes: int) -> bool:
        """As `Programs.is_together`."""
        return (kind, lanes) not in self._one_by_one

    def adapt(self, rows: Sequence[Adapted], support: Any) -> tuple[list[Adapted], list[bool], list[list[float]]]:
        """As `Programs.adapt`."""
        return _results(self._many.adapt(support, start=stack(rows), keep=self._keep))

    def adapt_one(self, row: Adapted, support: Any) -> Adapted:
        """As `Programs.adapt_one`."""
        return self._one.adapt(support, start=row, keep=self._keep)

    def predict(self, rows: Sequence[Adapted], inputs: Any) -> Any:
        """As `Programs.predict`."""
        return self._many.predict(inputs, start=stack(rows))

    def predict_one(self, row: Adapted, inputs: Any) -> Any:
        """As `Programs.predict_one`."""
        return self._one.predict(inputs, start=row)

    def num_programs(self) -> int:
        """As `Programs.num_programs`."""
        return len(self._one.graphs()) + len(self._many.graphs())


class OfExport(Programs):
    """The programs of an export: of T tasks, then all batches have T lanes; or of one, then tasks run one by one.

    Args:
      exported: what `adaptrt.load` returned.
      keep: the guard.
    """

    def __init__(self, exported: Exported, keep: Keep) -> None:
        if exported.manifest.per_step:
            raise InvalidArgument("the engine takes one support batch for all steps; export an unroll without per_step=True")
        self._has_tasks = exported.manifest.num_tasks is not None
        self.lanes = (exported.manifest.num_tasks or 1,)
        self.weighted = exported.manifest.weighted
        self._keep = guard(keep)
        self._target = self._exported = exported
        with torch.inference_mode():
            self.base = exported.start()
        self.fingerprint = _fingerprint(exported.fingerprint(), self.base)

    def warm(self, support: Any, inputs: Any, lanes: int) -> None:
        """Runs the programs once, which opens them."""
        if self._has_tasks:
            self.predict(self.adapt([self.base] * lanes, support)[0], inputs)
        else:
            self.predict_one(self.adapt_one(self.base, _row(support, 0)), _row(inputs, 0))

    def is_together(self, kind: str, lanes: int) -> bool:
        """As `Programs.is_together`."""
        del kind, lanes
        return self._has_tasks

    def adapt(self, rows: Sequence[Adapted], support: Any) -> tuple[list[Adapted], list[bool], list[list[float]]]:
        """As `Programs.adapt`."""
        return _results(self._exported.adapt(support, start=stack(rows), keep=self._keep))

    def adapt_one(self, row: Adapted, support: Any) -> Adapted:
        """As `Programs.adapt_one`."""
        return self._exported.adapt(support, start=row, keep=self._keep)

    def predict(self, rows: Sequence[Adapted], inputs: Any) -> Any:
        """As `Programs.predict`."""
        return stack(rows)(inputs)

    def predict_one(self, row: Adapted, inputs: Any) -> Any:
        """As `Programs.predict_one`."""
        return row(inputs)

    def num_programs(self) -> int:
        """As `Programs.num_programs`: those of the export, all compiled before."""
        return len(self._exported.manifest.programs)


def programs_of(target: Any, lanes: tuple[int, ...] | None, num_sizes: int, keep: Keep, together: bool | None = None) -> Programs:
    """Returns the programs of what the user gave: an unroll, an export, or the folder of one.

    Raises:
      InvalidType, InvalidArgument: it is none of these, or has a task axis or `per_step` already; or lanes are given that an export lacks.
    """
    if isinstance(target, str | os.PathLike):
        target = load(target)
    if isinstance(target, CompiledUnroll):
        return OfUnroll(target, lanes or (1, 2, 4, 8, 16, 32), num_sizes, keep, together)
    if isinstance(target, Exported):
        made = OfExport(target, keep)
        if lanes is not None and lanes != made.lanes:
            raise InvalidArgument(f"the export is for batches of {made.lanes[0]} tasks, got lanes={lanes}; leave lanes= out")
        return made
    raise InvalidType(f"the engine runs an unroll, an export or the folder of one, got {type(target).__name__}")


def guard(keep: Keep) -> Any:
    """Returns the guard that `adapt(keep=...)` takes.

    Raises:
      InvalidArgument: a number that is not positive.
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        return keep
    if not keep > 0:
        raise InvalidArgument(f"keep={keep} must be the largest norm that an update may have, more than 0")
    bound = float(keep)

    def at_most(before: Any, after: Any) -> Tensor:
        held = trees.leaves([after.loss, after.params, after.buffers, after.loss_buffers, after.opt_state])
        finite = [torch.isfinite(value).all() for value in held if value.is_floating_point()]
        return torch.stack([after.update_norm <= bound, *finite]).all()

    return at_most


def rows_depend_on_each_other(programs: Programs, queries: Sizes) -> bool:
    """Whether an output for one query example may depend on others, so that rows must not be added to it.

    The model predicts twice for data that differs in all rows but the first. Only if the output for that row is the same, bit for bit,
    and every output has one row for each example, do rows count as independent.
    """
    size, lanes = queries.sizes[-1], programs.lanes[0]
    if size == 1:
        return len(queries.sizes) > 1
    data = queries.warm(size, lanes)

    def other(leaf: Tensor) -> Tensor:
        rest = leaf[:, 1:]
        changed = 3 * rest + 1 if leaf.is_floating_point() else leaf[:, :1].expand_as(rest)
        return torch.cat([leaf[:, :1], changed], 1)

    found = []
    for inputs in (data, trees.map_leaves(other, data)):
        torch_state = torch.get_rng_state()
        found.append(trees.leaves(programs.predict_all([programs.base] * lanes, inputs)))
        torch.set_rng_state(torch_state)
    if not found[0] or any([leaf.dim() < 2 or leaf.shape[1] != size for leaf in found[0]]):
        return True
    return not all([torch.equal(one[:, 0], two[:, 0]) for one, two in zip(*found, strict=True)])


def _fingerprint(of_rest: dict[str, str], base: Adapted) -> dict[str, str]:
    """Returns the fingerprint of a base. A state that was adapted from other weights would fit, but is none of this model."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in base.state.named_tensors().items()}
    return {**of_rest, "what adaptations start from": hashlib.sha256(save(tensors)).hexdigest()}


def _row(tree: Any, index: int) -> Any:
    return trees.map_leaves(lambda leaf: leaf[index], tree)


def is_kept(adapted: Adapted) -> bool:
    """Whether the guard kept an adaptation of one task."""
    return adapted.kept is None or bool(adapted.kept)


def _seconds(run: Callable[[], object]) -> float:
    """Returns how long something takes: the least of a few times, or of those that it does within a short while."""
    taken: list[float] = []
    while len(taken) < _TRIES and (not taken or sum(taken) < _TRYING_S):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)


def _results(batch: Adapted) -> tuple[list[Adapted], list[bool], list[list[float]]]:
    rows = batch.unbind()
    kept = [True] * len(rows) if batch.kept is None else batch.kept.tolist()
    return rows, kept, batch.losses.tolist()
