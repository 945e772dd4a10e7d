"""Batches whose task axis or step axis does not fit are refused."""

from __future__ import annotations

import pytest
import torch

from adaptrt.errors import InvalidBatch
from tests.bad_input import Case, attempt, check_refused, normal, zeros

CASES: list[Case] = [
    Case(
        "vmap: support disagrees with itself",
        lambda: attempt(vmap=True, support=(normal(2, 6, 4), zeros(3, 6))),
        InvalidBatch,
        r"support tensor 1.*must have 2 tasks along axis 0, got 3",
    ),
    Case(
        "vmap: query disagrees with support",
        lambda: attempt(vmap=True, support=(normal(2, 6, 4), zeros(2, 6)), query=(normal(3, 6, 4), zeros(3, 6)), call="meta"),
        InvalidBatch,
        r"query tensor 0.*must have 2 tasks along axis 0, got 3",
    ),
    Case(
        "vmap: no task axis",
        lambda: attempt(vmap=True, support=(torch.tensor(1.0), torch.tensor(1.0))),
        InvalidBatch,
        r"support tensor 0 \(float32\[\]\) needs an axis 0 of tasks",
    ),
    Case(
        "vmap: batch sizes differ",
        lambda: attempt(vmap=True, support=(normal(2, 6, 4), zeros(2, 5))),
        InvalidBatch,
        r"support target 0 has 5 rows.*6",
    ),
    Case(
        "per_step: too few batches",
        lambda: attempt(per_step=True, support=(normal(3, 6, 4), zeros(3, 6))),
        InvalidBatch,
        r"support tensor 0.*must have 2 inner steps along axis 0, got 3",
    ),
    Case(
        "per_step: target without the axis",
        lambda: attempt(per_step=True, support=(normal(2, 6, 4), zeros(6))),
        InvalidBatch,
        r"support tensor 1.*must have 2 inner steps along axis 0, got 6",
    ),
    Case(
        "per_step and vmap: wrong axis",
        lambda: attempt(per_step=True, vmap=True, support=(normal(5, 3, 6, 4), zeros(5, 3, 6))),
        InvalidBatch,
        r"support tensor 0.*must have 2 inner steps along axis 1, got 3",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    check_refused(case)
