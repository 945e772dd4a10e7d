"""What the engine runs: the programs of an unroll over tasks, or those of an export."""

from __future__ import annotations

import abc
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from adaptrt import Adapted, CompiledUnroll, Exported, load, stack
from adaptrt.errors import InvalidArgument, InvalidType
from adaptrt.serve import trees
from adaptrt.serve.sizes import Sizes

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

    @abc.abstractmethod
    def adapt(self, rows: Sequence[Adapted], support: Any) -> tuple[list[Adapted], list[bool], list[list[float]]]:
        """Adapts the tasks of a batch.

        Args:
          rows: what each starts from, T.
          support: data [T, S, ...].
        Returns:
          For each the adaptation, whether the guard kept it, and the losses before each step.
        """

    @abc.abstractmethod
    def predict(self, rows: Sequence[Adapted], inputs: Any) -> Any:
        """Returns what the tasks' models, T of them, compute for inputs [T, S, ...], as a tree of tensors [T, ...]."""

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
    """The programs of an unroll over tasks.

    Args:
      unroll: of one task.
      lanes: numbers of tasks.
      num_sizes: how many sizes of support or query data there are at most.
      keep: the guard.
    """

    def __init__(self, unroll: CompiledUnroll, lanes: tuple[int, ...], num_sizes: int, keep: Keep) -> None:
        if unroll.has_task_axis:
            raise InvalidArgument("the engine makes batches itself; pass the unroll of one task, before vmap()")
        if unroll.per_step:
            raise InvalidArgument("the engine takes one support batch for all steps; compile without per_step=True")
        self.lanes = lanes
        self.weighted = unroll.examples == "weighted"
        self._keep = guard(keep)
        self._target = self._many = unroll.vmap(cache_size=len(lanes) * num_sizes, on_new_shape="error")
        with torch.inference_mode():
            self.base = self._many.start()
        self.fingerprint = _fingerprint(unroll.fingerprint(), self.base)

    def warm(self, support: Any, inputs: Any, lanes: int) -> None:
        """As `Programs.warm`."""
        self._many.warmup(support, start=stack([self.base] * lanes), keep=self._keep, inputs=inputs)

    def adapt(self, rows: Sequence[Adapted], support: Any) -> tuple[list[Adapted], list[bool], list[list[float]]]:
        """As `Programs.adapt`."""
        return _results(self._many.adapt(support, start=stack(rows), keep=self._keep))

    def predict(self, rows: Sequence[Adapted], inputs: Any) -> Any:
        """As `Programs.predict`."""
        return stack(rows)(inputs)

    def num_programs(self) -> int:
        """As `Programs.num_programs`."""
        return len(self._many.graphs())


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
        self.adapt([self.base] * lanes, support)
        self.predict([self.base] * lanes, inputs)

    def adapt(self, rows: Sequence[Adapted], support: Any) -> tuple[list[Adapted], list[bool], list[list[float]]]:
        """As `Programs.adapt`."""
        if self._has_tasks:
            return _results(self._exported.adapt(support, start=stack(rows), keep=self._keep))
        (row,) = rows
        adapted = self._exported.adapt(trees.map_leaves(lambda leaf: leaf[0], support), start=row, keep=self._keep)
        return [adapted], [adapted.kept is None or bool(adapted.kept)], [adapted.losses.tolist()]

    def predict(self, rows: Sequence[Adapted], inputs: Any) -> Any:
        """As `Programs.predict`."""
        if self._has_tasks:
            return stack(rows)(inputs)
        (row,) = rows
        return trees.map_leaves(lambda leaf: leaf[None], row(trees.map_leaves(lambda leaf: leaf[0], inputs)))

    def num_programs(self) -> int:
        """As `Programs.num_programs`: those of the export, all compiled before."""
        return len(self._exported.manifest.programs)


def programs_of(target: Any, lanes: tuple[int, ...] | None, num_sizes: int, keep: Keep) -> Programs:
    """Returns the programs of what the user gave: an unroll, an export, or the folder of one.

    Raises:
      InvalidType, InvalidArgument: it is none of these, or has a task axis or `per_step` already; or lanes are given that an export lacks.
    """
    if isinstance(target, str | os.PathLike):
        target = load(target)
    if isinstance(target, CompiledUnroll):
        return OfUnroll(target, lanes or (1, 2, 4, 8, 16, 32), num_sizes, keep)
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

    rows = [programs.base] * lanes
    found = []
    for inputs in (data, trees.map_leaves(other, data)):
        torch_state = torch.get_rng_state()
        found.append(trees.leaves(programs.predict(rows, inputs)))
        torch.set_rng_state(torch_state)
    if not found[0] or any([leaf.dim() < 2 or leaf.shape[1] != size for leaf in found[0]]):
        return True
    return not all([torch.equal(one[:, 0], two[:, 0]) for one, two in zip(*found, strict=True)])


def _fingerprint(of_rest: dict[str, str], base: Adapted) -> dict[str, str]:
    """Returns the fingerprint of a base. A state that was adapted from other weights would fit, but is none of this model."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in base.state.named_tensors().items()}
    return {**of_rest, "what adaptations start from": hashlib.sha256(save(tensors)).hexdigest()}


def _results(batch: Adapted) -> tuple[list[Adapted], list[bool], list[list[float]]]:
    rows = batch.unbind()
    kept = [True] * len(rows) if batch.kept is None else batch.kept.tolist()
    return rows, kept, batch.losses.tolist()
