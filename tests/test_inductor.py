"""The Inductor backend: what it compiled is found again, and only by what is equal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptrt.backend import Inductor, inductor
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


def test_no_trials_of_vector_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpu_vec_isa

    monkeypatch.setattr(inductor, "_trusts_the_processor", None)
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    built: list[str] = []
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda self, code: built.append(code) or True)
    x = torch.randn(5)
    torch.testing.assert_close(compiled(lambda x: (3.5 * x).cos(), x), (3.5 * x).cos())
    assert cpu_vec_isa.VecISA._avx_code not in built and inductor._trusts_the_processor is True


def test_trials_where_the_first_program_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx, config

    asked: list[bool | None] = []
    compile_fx_inner = compile_fx.compile_fx_inner

    def once(*args: Any, **kwargs: Any) -> Any:
        asked.append(config.cpp.vec_isa_ok)
        if config.cpp.vec_isa_ok:
            raise RuntimeError("unrecognized option -mavx512f")
        return compile_fx_inner(*args, **kwargs)

    monkeypatch.setattr(inductor, "_trusts_the_processor", None)
    monkeypatch.setattr(compile_fx, "compile_fx_inner", once)
    x = torch.randn(5)
    for factor in (4.5, 5.5):
        torch.testing.assert_close(compiled(lambda x, factor=factor: (factor * x).cos(), x), (factor * x).cos())
    assert asked == [True, None, None]
