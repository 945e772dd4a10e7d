"""Functions of PyTorch's that are traced by their formulas, because their own code reads values or has no second derivative."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

_NEVER = -1e30
"""The log-probability of what cannot happen. Infinity would make gradients NaN."""


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int] | int,
    target_lengths: Tensor | Sequence[int] | int,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """`F.ctc_loss` by the forward recursion of Graves et al. 2006, which has derivatives of every order.

    The loss is minus the logarithm of the probability that the frames, with repeats and blanks removed, spell the target. The recursion
    runs over frames; its state is, for each prefix of the target with blanks around its labels, the probability to have come so far.

    Where lengths are longer than what they are of, which PyTorch refuses, or a target holds the blank, for which PyTorch's value means
    nothing, the loss is NaN. A label that does not exist is found by the kernel that looks it up.

    PyTorch's own gradient takes for granted that `log_probs` comes from `log_softmax`; then the two agree.

    Args:
      log_probs: [T, N, C] or [T, C] = frames, examples, classes.
      targets: [N, S], of which each row counts up to its length, or all targets in one row.
      input_lengths, target_lengths: of each example.
      blank, reduction, zero_infinity: as for `F.ctc_loss`.
    Raises:
      ValueError: lengths that are known while this is traced are too long.
    """
    alone = log_probs.dim() == 2
    frames = log_probs.unsqueeze(1) if alone else log_probs
    num_frames, num_examples, _ = frames.shape
    lasting, spelt = (_lengths(value, num_examples, frames.device) for value in (input_lengths, target_lengths))
    labels = _rows(targets, spelt, num_examples, blank)
    _require((lasting >= 0) & (lasting <= num_frames), f"input_lengths must be 0 to {num_frames}, the number of frames")
    _require((spelt >= 0) & (spelt <= labels.shape[1]), f"target_lengths must be 0 to {labels.shape[1]}, the length of the targets")
    inside = torch.arange(labels.shape[1], device=frames.device) < spelt.unsqueeze(1)
    is_valid = (lasting >= 0) & (lasting <= num_frames) & (spelt >= 0) & ~(inside & (labels == blank)).any(1)
    padded = torch.full((num_examples, 2 * labels.shape[1] + 1), blank, dtype=torch.long, device=frames.device)
    padded = padded.index_copy(1, torch.arange(1, padded.shape[1], 2, device=frames.device), labels)
    emitted = frames.gather(2, padded.expand(num_frames, -1, -1)).clamp(min=_NEVER)
    # A blank may be left out between two labels that differ.
    skips = F.pad((padded[:, 2:] != padded[:, :-2]) & (padded[:, 2:] != blank), (min(2, padded.shape[1]), 0))[:, : padded.shape[1]]
    reached = torch.where(torch.arange(padded.shape[1], device=frames.device) < 2, emitted[0], _NEVER)
    for frame in range(1, num_frames):
        from_before = torch.stack([reached, _moved(reached, 1), torch.where(skips, _moved(reached, 2), _NEVER)])
        reached = torch.where((frame < lasting).unsqueeze(1), torch.logsumexp(from_before, 0) + emitted[frame], reached)
    ends = torch.stack([2 * spelt, (2 * spelt - 1).clamp(min=0)], 1)
    last = reached.gather(1, ends)
    last = torch.stack([last[:, 0], torch.where(spelt > 0, last[:, 1], _NEVER)])
    total = torch.where(lasting > 0, torch.logsumexp(last, 0), torch.where(spelt > 0, _NEVER, 0.0))
    impossible = total < _NEVER / 2
    # As PyTorch's, the loss is infinite then, and its gradient is none: a factor, since a branch would hide the second.
    loss = torch.where(impossible, 0.0, -total) if zero_infinity else -total * torch.where(impossible, math.inf, 1.0)
    loss = torch.where(is_valid, loss, math.nan)
    if reduction == "mean":
        return (loss / spelt.clamp(min=1)).mean()
    return loss.sum() if reduction == "sum" else loss[0] if alone else loss


def _lengths(value: Tensor | Sequence[int] | int, num_examples: int, device: torch.device) -> Tensor:
    return torch.as_tensor(value, device=device).long().reshape(-1).expand(num_examples)


def _require(is_valid: Tensor, text: str) -> None:
    """Raises if it is known while a function is traced that not all are valid."""
    try:
        all_valid = bool(is_valid.all())
    except DataDependentOutputException:
        return
    if not all_valid:
        raise ValueError(text)


def _rows(targets: Tensor, spelt: Tensor, num_examples: int, blank: int) -> Tensor:
    """The targets as [N, S], with blanks where a target has ended."""
    targets = targets.long()
    if targets.dim() == 1 and num_examples == 1:
        targets = targets.unsqueeze(0)
    counts = torch.arange(targets.shape[-1], device=targets.device)
    inside = counts < spelt.unsqueeze(1)
    if targets.dim() == 1:
        first = spelt.cumsum(0) - spelt
        targets = targets[(first.unsqueeze(1) + counts).clamp(max=max(targets.shape[0] - 1, 0))]
    return torch.where(inside, targets, blank)


def _moved(values: Tensor, places: int) -> Tensor:
    return F.pad(values, (places, 0), value=_NEVER)[:, : values.shape[1]]


def gaussian_nll_loss(
    input: Tensor, target: Tensor, var: Tensor | float, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """`F.gaussian_nll_loss` without looking at the variances: where one is negative, which PyTorch refuses, the loss is NaN.

    Raises:
      ValueError: `var` or `reduction` is of no allowed form.
    """
    if not isinstance(var, Tensor):
        if var < 0:
            raise ValueError("var has negative entry/entries")
        var = torch.full_like(input, var)
    elif var.shape != input.shape:
        if input.shape[:-1] == var.shape:
            var = var.unsqueeze(-1)
        elif var.dim() != input.dim() or sum(size for size, other in zip(var.shape, input.shape, strict=True) if size != other) != 1:
            raise ValueError("var is of incorrect size")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not valid")
    clamped = var.clone()
    with torch.no_grad():  # the gradient is that of the variance itself
        clamped.clamp_(min=eps)
    loss = 0.5 * (torch.log(clamped) + (input - target) ** 2 / clamped)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    loss = torch.where(var < 0, math.nan, loss)
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


FORMULAS: dict[Any, Callable[..., Tensor]] = {F.ctc_loss: ctc_loss, F.gaussian_nll_loss: gaussian_nll_loss}
