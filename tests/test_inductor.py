"""The Inductor backend: what it compiled is found again, and only by what is equal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from adaptrt.backend import Inductor
from adaptrt.graph.capture import capture


@pytest.fixture(autouse=True, scope="module")
def empty_cache() -> Iterator[None]:
    """A cache on disk of this file's own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        from torch._inductor.utils import fresh_cache
    with fresh_cache():
        yield


def hits() -> int:
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_hit"]


def compiled(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`fn(x)` by Inductor, captured anew."""
    return Inductor().compile(capture(fn, torch.empty_like(x)))([x])[0]


def test_a_graph_is_compiled_once() -> None:
    x = torch.randn(5)
    before = hits()
    first = compiled(lambda x: (2.0 * x).sin(), x)
    assert hits() == before
    again = compiled(lambda x: (2.0 * x).sin(), -x)
    assert hits() == before + 1
    torch.testing.assert_close(first, (2.0 * x).sin())
    torch.testing.assert_close(again, -first)


def test_another_graph_is_not_taken_for_it() -> None:
    x = torch.randn(4, 4, dtype=torch.float64)
    cases: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda x: 2.0 * x, x),
        (lambda x: 2.0000000000000004 * x, x),
        (lambda x: 2.0 + x, x),
        (lambda x: x.sum(0), x),
        (lambda x: x.sum(1), x),
        (lambda x: 2.0 * x, x.float()),
        (lambda x: 2.0 * x, x[:3]),
    ]
    before = hits()
    for fn, x in cases:
        torch.testing.assert_close(compiled(fn, x), fn(x), rtol=1e-15, atol=0)
    assert hits() == before
