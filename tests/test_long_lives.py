"""A process that sees ever new shapes and makes ever new unrolls keeps no more of them than it was told to."""

from __future__ import annotations

import contextvars
import gc
import linecache
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adaptrt import CompiledUnroll, Unrolled, compile_unroll, optim
from adaptrt.backend.inductor import library, tables
from adaptrt.graph import forgetting
from tests.zygote import mean_of_squares


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is kept, so that few programs are enough to see that it is not more."""
    monkeypatch.setattr(forgetting, "MAX_FAKE_RESULTS", 50)
    monkeypatch.setattr(forgetting, "MAX_SOURCES", 5)
    monkeypatch.setattr(tables, "MAX_ENTRIES", 2)


def make(backend: str) -> CompiledUnroll:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    return compile_unroll(model, optim.sgd(lr=0.1), 2, loss=mean_of_squares, adjoint=Unrolled(), backend=backend, cache_size=2)


def meta_gradients(unroll: CompiledUnroll, sizes: Iterator[int] | range) -> None:
    for size in sizes:
        unroll((torch.randn(size, 2), torch.randn(size, 1)), (torch.randn(2, 2), torch.randn(2, 1))).backward()


def leftovers() -> dict[str, int]:
    """How much there is of everything that PyTorch keeps for ever."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx import GraphModule, graph_module

    gc.collect()
    return {
        "fake results": len(FakeTensorMode.cache),
        "generated sources": len(graph_module._loader.eval_cache),
        "their lines": sum(name.startswith("<eval_with_key>") for name in linecache.cache),
        "context variables": len(contextvars.copy_context()),
        "modules": len(sys.modules),
        "graph modules": sum(issubclass(type(value), GraphModule) for value in gc.get_objects()),
    }


def count(kind: type) -> int:
    """How many objects of a class there are."""
    gc.collect()
    return sum(type(value) is kind for value in gc.get_objects())


def assert_no_more(before: dict[str, int], after: dict[str, int]) -> None:
    """Nothing is more than it was, or than what is kept."""
    sources = forgetting.MAX_SOURCES
    kept = {"fake results": forgetting.MAX_FAKE_RESULTS, "generated sources": sources, "their lines": sources}
    more = {name: (before[name], count) for name, count in after.items() if count > max(before[name], kept.get(name, 0))}
    assert not more


def mapped() -> set[str]:
    """The libraries of kernels that are in this process."""
    return {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/library.so" in line}


@pytest.mark.usefixtures("few")
def test_new_shapes() -> None:
    unroll = make("eager")
    meta_gradients(unroll, range(1, 6))
    before = leftovers()
    meta_gradients(unroll, range(6, 14))
    assert_no_more(before, leftovers())


@pytest.mark.usefixtures("few")
def test_new_unrolls() -> None:
    meta_gradients(make("eager"), range(3, 4))
    before = leftovers()
    for _ in range(8):
        meta_gradients(make("eager"), range(3, 4))
    assert_no_more(before, leftovers())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is mapped is only known on Linux")
@pytest.mark.usefixtures("few", "empty_cache")
def test_new_shapes_that_are_compiled() -> None:
    from torch._dynamo.utils import compilation_time_metrics
    from torch._inductor.codecache import PyCodeCache
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    others, opened = mapped(), set(library._open)  # pyright: ignore[reportPrivateUsage]
    unroll = make("inductor")
    meta_gradients(unroll, range(1, 3))
    before, libraries = leftovers(), len(mapped() - others)
    loaded = [len(PyCodeCache.modules), len(PyCodeCache.modules_no_attr), len(PyCodeCache.linemaps)]
    num_shapes = count(ShapeEnv)  # earlier tests may have left some behind
    gc.disable()
    try:
        meta_gradients(unroll, range(3, 7))
        gc_off = len(mapped() - others)
    finally:
        gc.enable()
    assert 0 < gc_off <= libraries + 1  # a shape may have one more than another; four were dropped
    assert_no_more(before, leftovers())
    assert [len(PyCodeCache.modules), len(PyCodeCache.modules_no_attr), len(PyCodeCache.linemaps)] == loaded
    assert count(ShapeEnv) <= num_shapes + 2  # four shapes of two programs each were traced
    assert max(map(len, compilation_time_metrics.values())) <= tables.MAX_ENTRIES + 1
    del unroll
    gc.collect()
    assert set(library._open) <= opened  # pyright: ignore[reportPrivateUsage]
    assert len(mapped() - others) <= 1  # the one that calls kernels


def test_a_pytorch_with_other_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Private names that are missing, or are of another kind, leave tables alone and break nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx import graph_module
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from adaptrt.backend.inductor.tables import shorten_tables

    monkeypatch.setattr(ShapeEnv, "get_axioms", lambda self: ())
    monkeypatch.delattr(ShapeEnv, "simplify")
    monkeypatch.setattr("torch._dynamo.utils.compilation_time_metrics", None)
    shorten_tables()
    for loader in (None, SimpleNamespace(next_id="0", eval_cache=None)):
        monkeypatch.setattr(graph_module, "_loader", loader)
        monkeypatch.setattr(FakeTensorMode, "cache", SimpleNamespace(clear=None))
        assert forgetting.forgetting(lambda: 3)() == 3
    monkeypatch.delattr(graph_module, "_loader")
    monkeypatch.delattr(FakeTensorMode, "cache")
    assert forgetting.forgetting(lambda: 3)() == 3
