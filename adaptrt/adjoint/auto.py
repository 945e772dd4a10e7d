"""Which adjoint to use when the user does not say."""

from __future__ import annotations

import torch

from adaptrt.adjoint.base import Adjoint
from adaptrt.adjoint.replay import Replay
from adaptrt.adjoint.unrolled import Unrolled

MAX_UNROLLED_OPERATIONS = 400
"""Operations of k steps up to which one graph is used. Its meta-gradient has about three times as many; Inductor takes some 30 s for it on
two cores, and the time grows faster than the graph."""


def choose(num_operations: int, k: int, device: torch.device) -> tuple[Adjoint, str]:
    """An adjoint, and the reason in words.

    Args:
      num_operations: of one inner step, as captured.
      k: number of steps.
      device: where the model is.
    """
    total = num_operations * k
    size = f"{k} steps of {num_operations} operations are {total} on {device.type}"
    if total <= MAX_UNROLLED_OPERATIONS:
        return Unrolled(), f"{size}, within the {MAX_UNROLLED_OPERATIONS} that compile well as one graph"
    return Replay(), f"{size}, above the {MAX_UNROLLED_OPERATIONS} that compile well as one graph"
