"""What makes compiling faster leaves what is compiled as it was."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaptrt.backend import Inductor
from adaptrt.backend.inductor.few_libraries import _deal, _Kernels, few_libraries
from adaptrt.backend.inductor.index_strides import StridesOf
from adaptrt.graph.capture import capture

pytestmark = pytest.mark.usefixtures("empty_cache")


# --- few libraries


@pytest.mark.parametrize("num_threads, num_libraries", [(1, 4), (2, 2), (3, 3), (16, 4)])
def test_as_many_libraries_as_threads_and_no_more_than_kernels(num_threads: int, num_libraries: int, libraries: list[str]) -> None:
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile

    def fn(x: Tensor, w: Tensor) -> Tensor:
        for factor in (1.0, 2.0, 3.0):
            x = (factor * x).sin() @ w  # a product of its own between kernels, one of whose names is that of another
        return x.cos().softmax(-1) + num_threads

    x, w = torch.randn(65, 65, dtype=torch.float64), torch.randn(65, 65, dtype=torch.float64)
    one_each = AsyncCompile.cpp_pybinding
    with config.patch(compile_threads=num_threads):
        (result,) = Inductor().compile(capture(fn, x, w))([x, w])
    assert len(libraries) == num_libraries
    assert AsyncCompile.cpp_pybinding is one_each
    torch.testing.assert_close(result, fn(x, w), rtol=1e-12, atol=1e-12)


_SCALE = """
#include <cmath>
static float helper(float x) {{ return {factor} * x; }}
extern "C"  void  kernel(const float* in_ptr0,
                       float* out_ptr0)
{{
    for (int i = 0; i < 3; ++i) out_ptr0[i] = helper(in_ptr0[i]);
}}
"""
_FAILS = """
#include <stdexcept>
extern "C" void kernel(float* out_ptr0) { throw std::runtime_error("division by zero"); }
"""


def test_kernels_of_a_library_do_not_meet() -> None:
    kernels = _Kernels(1)
    for source in (*(_SCALE.format(factor=factor) for factor in (2, 3, 5)), _FAILS):
        kernels.add(source)
    functions = kernels.functions()
    x = torch.tensor([1.0, -2.0, 4.0])
    for place, factor in enumerate((2, 3, 5)):
        out = torch.empty(3)
        functions[place](x, out)
        torch.testing.assert_close(out, factor * x, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="division by zero"):
        functions[3](x)
    with pytest.raises(RuntimeError, match="another number of tensors"):
        functions[0](x)
    with pytest.raises(RuntimeError):
        functions[0](1.0, torch.empty(3))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.integers(1, 5))
def test_shares_are_about_equal(sizes: list[int], num_shares: int) -> None:
    shares = _deal(sizes, num_shares)
    assert sorted(place for share in shares for place in share) == list(range(len(sizes)))
    assert len(shares) == min(num_shares, len(sizes))
    totals = [sum(sizes[place] for place in share) for share in shares]
    # The largest got its last place when it was the smallest.
    largest = shares[totals.index(max(totals))]
    assert max(totals) - min(sizes[place] for place in largest) <= min(totals)


def test_libraries_of_other_threads_are_left_alone() -> None:
    from torch._inductor.async_compile import AsyncCompile

    waits: list[Any] = []
    before, found = AsyncCompile.wait, list[Any]()
    with few_libraries(waits):
        scope: dict[str, Any] = {}
        other = threading.Thread(target=lambda: found.append(AsyncCompile().wait(scope)))
        other.start()
        other.join()
        assert found == [None] and not waits
        AsyncCompile().wait(scope)
        assert len(waits) == 1
    assert AsyncCompile.wait is before


def _divided_by_zero() -> Any:
    return 1 / 0


def test_a_library_that_fails_fails_again() -> None:
    kernels = _Kernels(2)
    for source in (_SCALE.format(factor=7), _SCALE.format(factor=11)):
        kernels.add(source)
    kernels.start()
    (first, library), (second, _) = kernels._libraries
    kernels._libraries[1] = second, _divided_by_zero
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            kernels.functions()
    kernels._libraries[1] = second, library
    assert set(kernels.functions()) == {*first, *second}


# --- strides of indices


def _index(terms: Sequence[tuple[str, str, int, int]]) -> Any:
    from torch.utils._sympy.functions import FloorDiv, ModularIndexing

    total: Any = sympy.S.Zero
    for kind, name, factor, divisor in terms:
        var: Any = sympy.Symbol(name, integer=True, nonnegative=True)
        what: Any = {
            "plain": var,
            "floor": FloorDiv(var, divisor),
            "modular": ModularIndexing(var, 1, divisor),
            "both": FloorDiv(var + sympy.Symbol("d0", integer=True, nonnegative=True), divisor),
            "number": sympy.Integer(divisor),
        }[kind]
        total = total + factor * what
    return total


_TERMS = st.tuples(
    st.sampled_from(["plain", "plain", "floor", "modular", "both", "number"]),
    st.sampled_from(["d0", "d1", "d2"]),
    st.integers(-3, 40),
    st.sampled_from([2, 3, 8, 16, 32, 48]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(_TERMS, max_size=5), st.sampled_from(["d0", "d1", "d2"]), st.sampled_from([None, 8, 16]))
def test_strides_are_those_that_algebra_finds(terms: list[tuple[str, str, int, int]], name: str, vec_length: int | None) -> None:
    from torch._inductor.codegen.cpp import stride_at_vec_range  # pyright: ignore[reportPrivateImportUsage]  # where it is exchanged; the module that defines it varies

    index, var = _index(terms), sympy.Symbol(name, integer=True, nonnegative=True)
    expected = stride_at_vec_range(index, var, vec_length)
    assert sympy.expand(StridesOf(stride_at_vec_range)(index, var, vec_length) - expected) == 0


def test_algebra_is_asked_for_what_cannot_be_read_off() -> None:
    asked: list[Any] = []

    def by_algebra(index: Any, var: Any, vec_length: int | None) -> Any:
        asked.append(index)
        return sympy.Integer(1)

    stride = StridesOf(by_algebra)
    d0, d1 = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("d0", "d1"))
    assert stride(64 * d0 + d1 + 3, d0, 16) == 64
    assert stride(64 * d0 + _index([("floor", "d1", 1, 3)]), d0, 16) == 64
    assert stride(d1, d0, 16) == 0
    assert not asked
    s0, x = sympy.Symbol("s0", integer=True, positive=True), sympy.Symbol("x")
    assert stride(7, d0, 16) == 0
    assert not asked
    for other in (s0 * d0, d0 * d1, d0**2, 2**d0):
        stride(other + x + 3 * d1, d0, 16)
        assert asked.pop() == other
    rest = _index([("floor", "d0", 2, 3)])
    for _ in range(2):
        assert stride(64 * d0 + rest + d1, d0, 16) == 65
    assert asked == [rest]


def test_indices_with_quotients_and_remainders() -> None:
    """Slices of a padded image; the numbers are right, and PyTorch's function is back in its place."""

    def fn(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (1, 2, 2, 1))
        return padded[:, ::2].reshape(3, -1).cumsum(0).roll(5, 1) * 2.0

    from torch._inductor.codegen import cpp

    x, by_algebra = torch.randn(3, 20, 37), vars(cpp)["stride_at_vec_range"]
    (result,) = Inductor().compile(capture(fn, x))([x])
    assert vars(cpp)["stride_at_vec_range"] is by_algebra
    torch.testing.assert_close(result, fn(x))
