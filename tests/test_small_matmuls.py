"""Small matrix products in the code of a program: all layouts, sizes that fill registers and that do not, and every set of instructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from adaptrt.backend.inductor import compile as inductor
from tests.graphs import compiled
from tests.tolerances import PRODUCT

pytestmark = pytest.mark.usefixtures("empty_cache")

SIZES = [(2, 2, 2), (3, 5, 7), (10, 40, 40), (33, 17, 16), (5, 129, 3), (16, 16, 64), (31, 9, 65), (64, 64, 48), (7, 3, 130)]
"""Rows, sum, columns."""


def pairs(sizes: Sequence[tuple[int, int, int]], dtype: torch.dtype, *lead: int) -> list[Tensor]:
    def values(*shape: int) -> Tensor:
        return torch.randn(*lead, *shape, dtype=dtype)

    return [value for m, k, n in sizes for value in (values(m, k), values(k, n), values(k, m), values(n, k))]


def in_all_layouts(*values: Tensor) -> list[Tensor]:
    """a b with each of them as it is and transposed."""
    return [value for place in range(0, len(values), 4) for value in in_four_layouts(*values[place : place + 4])]


def in_four_layouts(a: Tensor, b: Tensor, a_t: Tensor, b_t: Tensor) -> list[Tensor]:
    return [a @ b, a @ b_t.mT, a_t.mT @ b, a_t.mT @ b_t.mT]


def in_half_of_the_layouts(first: int) -> Callable[..., list[Tensor]]:
    """Of every size two layouts, in which each of a and b is once transposed; of the next size, and of the next `first`, the other two."""

    def products(*values: Tensor) -> list[Tensor]:
        rows = [in_four_layouts(*values[place : place + 4]) for place in range(0, len(values), 4)]
        return [row[which] for size, row in enumerate(rows) for which in ((0, 3) if (size + first) % 2 else (1, 2))]

    return products


def check(fn: Callable[..., Sequence[Tensor]], *args: Tensor) -> None:
    exact = fn(*[value.double() for value in args])
    for found, value in zip(compiled(fn, *args)(), exact, strict=True):
        assert (found.double() - value).abs().max() <= PRODUCT[args[0].dtype] * value.abs().max()


@pytest.mark.parametrize("bits", [128, 256, 512, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers(bits: int, dtype: torch.dtype, libraries: list[str]) -> None:
    """Bits of a vector register, 1 for no vectors. The processor's widest is what all other tests compile for.

    Each size is compiled in each layout for every number of bits, half of them in one dtype and half in the other.
    """
    from torch._inductor import config
    from torch._inductor.cpu_vec_isa import valid_vec_isa_list

    if bits not in (1, *[isa.bit_width() for isa in valid_vec_isa_list()]):
        pytest.skip("the processor has no vectors of this size")
    with config.patch({"cpp.simdlen": bits}):
        check(in_half_of_the_layouts(int(dtype == torch.float64)), *pairs(SIZES, dtype))
        assert num_calls(libraries) == (2 * len(SIZES) if has_vectors() else 0)


def num_calls(libraries: list[str]) -> int:
    assert libraries
    return sum(code.count(" small_matmul<") for code in libraries)


def has_vectors() -> bool:
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return bool(pick_vec_isa())


@pytest.mark.parametrize("threads", [1, 2])
def test_numbers_of_several_tasks(threads: int, libraries: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "threads_for", lambda graph: {"cpp.threads": threads})
    values = pairs([*SIZES[:4], (31, 9, 65)], torch.float32, 3)
    check(in_all_layouts, *values)
    # A factor that all tasks share, a part of each, and one product between those of all tasks.
    check(lambda a, b: [a @ b[0].expand(3, -1, -1), a[:, 1:, 2:] @ b[:, 2:, 1:], a[1] @ b[2], (a @ b).tanh()], values[4], values[5])
    code = "".join(libraries)
    assert bool(num_calls(libraries)) == has_vectors() and ("omp for\n" in code) == ("omp single\n" in code) == (threads > 1)


def test_what_stands_around_a_product(libraries: list[str]) -> None:
    x, w = torch.randn(10, 12), torch.randn(12, 12)
    check(lambda x, w: [(torch.tanh(x @ w) @ w + x).relu() @ w.T, w @ w, (x.T @ x - w) @ (x.T @ x)], x, w)
    # A factor that is computed, not read, and in another layout; a result that is changed at once, and itself needed.
    check(lambda x, w: [((x * 2).T.contiguous().T @ w.cos()), (x @ w).exp(), x @ w], x, w)
    # A factor that is a part of another tensor, or bits of one of another dtype.
    check(lambda x, w: [torch.cat([x.sin(), x.cos()], 1) @ torch.cat([w, w + 1]), torch.cat([x.sin(), x], 1)[:, 12:] @ w], x, w)
    assert num_calls(libraries) == 10 * has_vectors()
    bits = x.view(torch.int32)
    (found,) = compiled(lambda bits, w: [bits.view(torch.float32) @ w], bits, w)()
    torch.testing.assert_close(found, x @ w)


def test_kernels_without_products_are_left_alone(libraries: list[str]) -> None:
    from torch._inductor.codegen import cpp

    before = cpp.KernelGroup.finalize_kernel  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    check(lambda x: [(x * 2).sum(1)], torch.randn(5, 40))
    assert libraries and "small_matmul" not in "".join(libraries)
    assert cpp.KernelGroup.finalize_kernel is before  # pyright: ignore[reportUnknownMemberType]


def test_what_is_not_a_number_stays(libraries: list[str]) -> None:
    a, b = torch.zeros(4, 18), torch.ones(18, 9)
    b[3, 2], b[5, 8] = float("inf"), float("nan")
    (found,) = compiled(lambda a, b: [a @ b], a, b)()
    assert num_calls(libraries) == has_vectors()
    wanted = torch.zeros(4, 9)
    wanted[:, 2], wanted[:, 8] = float("nan"), float("nan")
    torch.testing.assert_close(found, wanted, equal_nan=True)
