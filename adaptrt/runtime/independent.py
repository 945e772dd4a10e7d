"""Whether the examples of a batch are independent: the loss of each is the same whatever the others are, and so is every buffer.

Only then may padding be added to a batch. Model and loss are run with other data in the place of some examples, and what they compute of
the rest is compared. The sets of examples that are replaced are those whose index has a certain bit, or has it not. Any two examples differ
in a bit, so each is at some time kept while any other one is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from adaptrt import tree
from adaptrt.errors import InvalidArgument, NonFiniteInput
from adaptrt.graph.indices import IndexBound
from adaptrt.inner.step import Batch

Run = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
"""From a batch to the loss of each example, [S], and the buffers afterwards."""

_BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
_COARSE = 0.1
"""Relative differences in half precision, and in others: kernels may round a row by which other rows there are."""


def require(name: str, model: nn.Module, run: Run, batch: Batch, bounds: Sequence[IndexBound]) -> None:
    """Checks that examples do not depend on each other.

    Args:
      name: of the batch, for messages.
      model: for messages.
      run: computes losses and buffers; without autocast, whose rounding would hide what depends.
      batch: of one task and step, with weights [S]; its values are valid.
      bounds: which of it are indices.
    Raises:
      InvalidArgument: the loss of an example, or a buffer, depends on other examples.
      NonFiniteInput: the losses are not finite, and nothing can be said.
    """
    assert batch.weights is not None, "batches with weights only"
    num_examples = batch.weights.shape[0]
    if num_examples < 2:
        return
    with torch.no_grad():
        losses, buffers = run(batch)
        if not bool(losses.isfinite().all()):
            raise NonFiniteInput(
                f"with examples='weighted' the first {name} batch of a shape shows whether examples depend on each other, and its "
                "losses are not finite; call warmup() with data on which they are"
            )
        limits = {bound.position: bound.size for bound in bounds}
        found = [_dependent(run, batch, limits, axis, losses, buffers) for axis in _axes(batch, num_examples)]
    if None not in found:
        mixing = [f"'{path}' ({type(part).__name__})" for path, part in model.named_modules() if _mixes(part)]
        reason = f"; {', '.join(mixing)} in train mode does so: call eval() on it" if mixing else ""
        raise InvalidArgument(
            f"examples='weighted' needs examples that do not depend on each other, since padding is among them, and {found[0]} of the "
            f"{name} batch depends on other examples{reason or '; compute it for each example by itself'}. Or leave out examples="
        )


def _dependent(run: Run, batch: Batch, limits: Mapping[int, int], axis: int, losses: Tensor, buffers: Mapping[str, Tensor]) -> str | None:
    """Returns what depends on other examples, in words, or None. `axis`: of examples, where data has two that may be it."""
    others = _with_other_examples(batch, limits, axis)
    for replaced in _sets(losses.shape[0], losses.device):
        changed, after = run(_mixed(batch, others, replaced, axis))
        if not _is_close(changed[~replaced], losses[~replaced]):
            return "the loss of an example"
        for key, value in buffers.items():
            if not _is_close(after[key], value):
                return f"buffer '{key}' after a forward pass"
    return None


def _sets(num_examples: int, device: torch.device) -> Iterator[Tensor]:
    """Yields masks of examples to replace, [S]."""
    index = torch.arange(num_examples, device=device)
    for bit in range((num_examples - 1).bit_length()):
        has_bit = (index >> bit) % 2 == 1
        yield has_bit
        yield ~has_bit


def _with_other_examples(batch: Batch, limits: Mapping[int, int], axis: int) -> Batch:
    """Returns a batch in which every example is another: the one before it, or where all are the same, one that is made up."""
    values, structure = tree.flatten(batch._replace(weights=None))
    assert batch.weights is not None, "batches with weights only"
    num_examples = batch.weights.shape[0]
    generator = torch.Generator(batch.weights.device).manual_seed(0)
    for position, value in enumerate(values):
        place = _axis_of(value, num_examples, axis)
        if place is not None:
            other = value.roll(1, place)
            values[position] = other if not torch.equal(other, value) else _made_up(value, place, limits.get(position), generator)
    return tree.unflatten(structure, values)._replace(weights=batch.weights)


def _made_up(value: Tensor, axis: int, limit: int | None, generator: torch.Generator) -> Tensor:
    """Returns other data in the place of examples that are all the same. `limit`: below which indices have to be."""
    if value.is_floating_point():
        return value + torch.randn(value.shape, generator=generator, device=value.device).to(value.dtype)
    if value.dtype is torch.bool:
        return ~value
    if limit is not None:
        return torch.randint(limit, value.shape, generator=generator, dtype=value.dtype, device=value.device)
    steps = torch.arange(1, value.shape[axis] + 1, dtype=value.dtype, device=value.device)
    return value + steps.reshape([-1 if index == axis else 1 for index in range(value.dim())])


def _mixed(batch: Batch, others: Batch, replaced: Tensor, axis: int) -> Batch:
    """Returns a batch with some of its examples replaced by those of another."""

    def choose(value: Tensor, other: Tensor) -> Tensor:
        place = _axis_of(value, replaced.shape[0], axis)
        if place is None:
            return value
        return torch.where(replaced.reshape([-1 if index == place else 1 for index in range(value.dim())]), other, value)

    return tree.map_leaves(choose, batch, others)._replace(weights=batch.weights)


def _axes(batch: Batch, num_examples: int) -> Iterator[int]:
    """Yields which axis to take for that of examples: the second, too, if there is data in which both have their number."""
    yield 0
    if any(value.shape[:2] == (num_examples, num_examples) for value in tree.leaves(batch)):
        yield 1


def _axis_of(value: Tensor, num_examples: int, preferred: int) -> int | None:
    """Returns the axis of examples, None if there is none: the first, or the second of sequences."""
    fitting = [axis for axis, size in enumerate(value.shape[:2]) if size == num_examples]
    return preferred if preferred in fitting else fitting[0] if fitting else None


def _is_close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    scale = other.abs()[other.isfinite()].max().item() if bool(other.isfinite().any()) else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=_TOLERANCES.get(one.dtype, _COARSE) * scale, equal_nan=True)


def _mixes(part: nn.Module) -> bool:
    return isinstance(part, _BATCH_NORMS) and (part.training or part.running_mean is None)
