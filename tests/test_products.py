"""Larger products by oneDNN: the same numbers, only where they are worth it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptrt.backend import Inductor
from adaptrt.backend.inductor import compile as inductor
from adaptrt.backend.inductor.processor import mkl_is_slow
from adaptrt.backend.inductor.rewrites import inline_small_matmuls
from adaptrt.backend.inductor.rewrites import products_by_onednn as file
from adaptrt.backend.inductor.rewrites.products_by_onednn import products_by_onednn
from adaptrt.graph.capture import capture
from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.base import apply
from tests.tolerances import LONG_SUM, assert_close

aten = torch.ops.aten

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor, and for small products."""
    monkeypatch.setattr(file, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(file, "MIN_MULTIPLICATIONS", 1000)


def products(graph: Graph) -> int:
    return sum("linear_by_onednn" in str(node.target) for node in graph.module.graph.nodes)


CASES: dict[str, tuple[Callable[..., Any], int]] = {
    "mm": (lambda a, b, c: a @ b, 1),
    "transposed": (lambda a, b, c: b.t() @ a.t() + (a.t() @ a).sum(), 2),
    "bias": (lambda a, b, c: torch.addmm(c, a, b), 1),
    "scaled": (lambda a, b, c: torch.addmm(c, a, b, beta=0.5), 0),
    "matrix added": (lambda a, b, c: torch.addmm(a @ b, a, b), 1),
    "double": (lambda a, b, c: a.double() @ b.double(), 0),
    "slices": (lambda a, b, c: a[::2, 1:] @ b[1:, ::3], 1),
}


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(("fn", "expected"), CASES.values(), ids=CASES)
def test_products_are_the_same(fn: Callable[..., Any], expected: int) -> None:
    values = [torch.randn(size) for size in ((24, 32), (32, 40), (40,))]
    graph = products_by_onednn.run(capture(fn, *values))
    assert products(graph) == expected
    assert_close(graph.run(*values), fn(*values), LONG_SUM)


@pytest.mark.usefixtures("everywhere")
def test_inductor_compiles_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        return torch.relu(torch.relu(a @ b) @ b.t()) + (a.t() @ a).sum()

    values = [torch.randn(48, 32), torch.randn(32, 40)]
    monkeypatch.setattr(inline_small_matmuls, "RULES", {})  # which would take them first
    graph = capture(fn, *values)
    assert products(apply(inductor.PASSES, graph)) == 3
    (found,) = Inductor().compile(graph)(list(values))
    assert_close(found, fn(*values), LONG_SUM)


def test_small_products_and_other_processors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = capture(lambda a, b: a @ b, torch.zeros(64, 64), torch.zeros(64, 64))
    monkeypatch.setattr(file, "mkl_is_slow", lambda: True)
    assert products(products_by_onednn.run(graph)) == 0
    large = capture(lambda a, b: a @ b, torch.zeros(256, 256), torch.zeros(256, 256))
    assert products(products_by_onednn.run(large)) == 1
    monkeypatch.setattr(file, "mkl_is_slow", lambda: False)
    assert products_by_onednn.run(large) is large


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_f": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_f": True, "cpu_name": "Intel(R) Xeon(R)"}, False),
        ({"avx512_f": False, "cpu_name": "AMD EPYC"}, False),
        ({"avx512_f": True}, False),
        ({}, False),
    ],
)
def test_which_processors(capabilities: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert mkl_is_slow.__wrapped__() is expected
