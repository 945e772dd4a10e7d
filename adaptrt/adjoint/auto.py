"""Chooses an adjoint where the user has not."""

from __future__ import annotations

from collections.abc import Callable

import torch

from adaptrt.adjoint.base import Adjoint
from adaptrt.adjoint.replay import Replay
from adaptrt.adjoint.stash import Stash
from adaptrt.adjoint.unrolled import Unrolled

MAX_UNROLLED_OPERATIONS = 400
"""Operations of k steps up to which one graph is used. Its meta-gradient has about three times as many; Inductor takes some 30 s for it on
two cores, and the time grows faster than the graph."""


MAX_KEPT_BYTES = 1_000_000_000
"""Up to which the activations of all steps are kept rather than computed again."""


MIN_FLOPS_OF_A_TASK = 25_000_000
"""For each thread, of model and loss on the support batch, from which on tasks are done one after the other on the CPU: each keeps the
processor busy, and a program of all tasks would have to fetch its intermediate results from memory again and again. Measured on two cores,
by `benchmarks/convolutions_over_tasks.py`."""


def one_by_one(num_flops: int) -> bool:
    """Whether tasks are done faster one after the other than together on the CPU.

    Args:
      num_flops: of model and loss on the support batch of one task.
    """
    return num_flops >= MIN_FLOPS_OF_A_TASK * torch.get_num_threads()


def choose(num_operations: int, num_shared: int, k: int, num_kept_bytes: Callable[[], int], device: torch.device) -> tuple[Adjoint, str]:
    """Returns an adjoint, and the reason for it in words.

    Args:
      num_operations: of one inner step, as captured.
      num_shared: those of them that are the same in every step, such as a frozen backbone on a support batch that all share; one graph
        holds them once.
      k: number of steps.
      num_kept_bytes: returns about how many bytes of activations the pullbacks of all steps need; called only where it matters.
      device: where the model is.
    """
    own = num_operations - num_shared
    total = own * k + num_shared
    size = f"{k} steps of {own} operations{f' and {num_shared} that all share' if num_shared else ''} are {total} on {device.type}"
    if total <= MAX_UNROLLED_OPERATIONS:
        return Unrolled(), f"{size}, within the {MAX_UNROLLED_OPERATIONS} that compile well as one graph"
    size += f", above the {MAX_UNROLLED_OPERATIONS} that compile well as one graph"
    num_bytes = num_kept_bytes()
    kept = f"what the way back needs of them is about {num_bytes / 1e6:,.1f} MB"
    if num_bytes <= MAX_KEPT_BYTES:
        return Stash(), f"{size}; {kept}, within {MAX_KEPT_BYTES / 1e6:,.0f} MB"
    return Replay(), f"{size}; {kept}, above {MAX_KEPT_BYTES / 1e6:,.0f} MB"
