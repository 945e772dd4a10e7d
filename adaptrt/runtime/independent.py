"""Whether the examples of a batch are independent: the loss of each is the same whatever the others are, and so is every buffer.

Only then may padding be added to a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from adaptrt import tree
from adaptrt.errors import InvalidArgument
from adaptrt.inner.step import Batch

Run = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
"""From a batch to the loss of each example, [S], and the buffers afterwards."""

_BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
_COARSE = 0.1
"""Relative differences in lower precision, and in others: kernels may round a row by which other rows there are."""


def require(name: str, model: nn.Module, run: Run, batch: Batch, dtype: torch.dtype | None) -> None:
    """Runs a batch three times, each time with other data for other examples, and compares what should be the same.

    Args:
      name: of the batch, for messages.
      model: for messages.
      run: computes losses and buffers.
      batch: of one task and step, with weights [S].
      dtype: of the autocast, None without one.
    Raises:
      InvalidArgument: the loss of an example, or a buffer, depends on other examples.
    """
    assert batch.weights is not None, "batches with weights only"
    num_examples = batch.weights.shape[0]
    if num_examples < 2:
        return
    with torch.no_grad():
        losses, buffers = run(batch)
        found = [_dependent(run, batch, axis, losses, buffers, dtype) for axis in _axes(batch, num_examples)]
    if found and None not in found:
        mixing = [f"'{path}' ({type(part).__name__})" for path, part in model.named_modules() if _mixes(part)]
        reason = f"; {', '.join(mixing)} in train mode does so: call eval() on it" if mixing else ""
        raise InvalidArgument(
            f"examples='weighted' needs examples that do not depend on each other, since padding is among them, and {found[0]} of the "
            f"{name} batch depends on other examples{reason or '; compute it for each example by itself'}. Or leave out examples="
        )


def _dependent(run: Run, batch: Batch, axis: int, losses: Tensor, buffers: dict[str, Tensor], dtype: torch.dtype | None) -> str | None:
    """Returns what depends on other examples, in words, or None. `axis`: of examples, where data has two that may be it."""
    num_examples = losses.shape[0]
    for parity in (0, 1):
        other = torch.arange(num_examples, device=losses.device) % 2 == parity
        changed, after = run(_with_others(batch, other, axis))
        if not _is_close(changed[~other], losses[~other], dtype):
            return "the loss of an example"
        for key, value in buffers.items():
            if not _is_close(after[key], value, dtype):
                return f"buffer '{key}' after a forward pass"
    return None


def _with_others(batch: Batch, other: Tensor, axis: int) -> Batch:
    """Returns a batch with other data for some examples: numbers far away, and labels and indices of other examples."""

    def change(value: Tensor) -> Tensor:
        place = _axis_of(value, other.shape[0], axis)
        if place is None:
            return value
        replaced = value * -3 + 1 if value.is_floating_point() else ~value if value.dtype is torch.bool else value.roll(1, place)
        mask = other.reshape([-1 if index == place else 1 for index in range(value.dim())])
        return torch.where(mask, replaced, value)

    return batch._replace(inputs=tree.map_leaves(change, batch.inputs), target=tree.map_leaves(change, batch.target))


def _axes(batch: Batch, num_examples: int) -> Iterator[int]:
    """Yields which axis to take for that of examples: the second, too, if there is data in which both have their number."""
    yield 0
    if any(value.shape[:2] == (num_examples, num_examples) for value in tree.leaves(batch)):
        yield 1


def _axis_of(value: Tensor, num_examples: int, preferred: int) -> int | None:
    """Returns the axis of examples, None if there is none: the first, or the second of sequences."""
    fitting = [axis for axis, size in enumerate(value.shape[:2]) if size == num_examples]
    return preferred if preferred in fitting else fitting[0] if fitting else None


def _is_close(one: Tensor, other: Tensor, dtype: torch.dtype | None) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    tolerance = _TOLERANCES.get(one.dtype, _COARSE) if dtype is None else _COARSE
    scale = other.abs()[other.isfinite()].max().item() if bool(other.isfinite().any()) else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=tolerance * scale, equal_nan=True)


def _mixes(part: nn.Module) -> bool:
    return isinstance(part, _BATCH_NORMS) and (part.training or part.running_mean is None)
