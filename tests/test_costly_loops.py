"""Loops over expensive functions are vectorised where their loads are scattered; others are left to Inductor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adaptrt.backend.inductor import costly_loops
from tests.graphs import compiled
from tests.tolerances import OPERATIONS, assert_close

pytestmark = pytest.mark.usefixtures("empty_cache")
ROWS, COLUMNS = 16, 256


def low_rank(a: Tensor, b: Tensor) -> Tensor:
    """A product of rank 4, written as a sum so that it becomes a loop, in which `b` is read by columns: [ROWS, 4] and [COLUMNS, 4]."""
    return (a.unsqueeze(2) * b.T).sum(1)


def arguments() -> tuple[Tensor, Tensor]:
    return torch.rand(ROWS, 4, dtype=torch.float64), torch.rand(COLUMNS, 4, dtype=torch.float64) + 0.1


def unit(z: Tensor) -> Tensor:
    """Into (0, 1), where all functions are defined."""
    return 0.1 + z / 6.0


FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    *(torch.exp, torch.exp2, torch.expm1, torch.log, torch.log1p, torch.log2, torch.log10, torch.sigmoid, torch.tanh, torch.sinh),
    *(torch.cosh, torch.asinh, torch.atanh, torch.sin, torch.cos, torch.tan, torch.asin, torch.acos, torch.atan, torch.erf, torch.erfc),
    *(torch.erfinv, torch.lgamma, lambda z: torch.acosh(1.0 + z), lambda z: z**1.7, lambda z: torch.atan2(z, 1.0 - z)),
]


def test_numbers_of_all_functions(libraries: list[str]) -> None:
    assert len(FUNCTIONS) == len(costly_loops.COSTLY)
    a, b = arguments()
    found = compiled(lambda a, b: [fn(unit(low_rank(a, b))) for fn in FUNCTIONS], a, b)()
    assert any("at::vec::Vectorized" in source for source in libraries)
    for fn, value in zip(FUNCTIONS, found, strict=True):
        assert_close(value, fn(unit(low_rank(a, b))), OPERATIONS)


@pytest.mark.parametrize("fn, is_vectorised", [(torch.tanh, True), (torch.relu, False)])
def test_only_costly_loops(fn: Callable[[Tensor], Tensor], is_vectorised: bool, libraries: list[str]) -> None:
    from torch._inductor.codegen import cpp

    a, b = arguments()
    by_heuristic = cpp.TilingSelect.select_tiling  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    (found,) = compiled(lambda a, b: fn(low_rank(a, b)), a, b)()
    assert_close(found, fn(low_rank(a, b)), OPERATIONS)
    assert any("at::vec::Vectorized" in source for source in libraries) == is_vectorised
    assert cpp.TilingSelect.select_tiling is by_heuristic  # pyright: ignore[reportUnknownMemberType]
