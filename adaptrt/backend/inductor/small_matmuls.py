"""Makes small matrix products calls of a function in the C++ code of a program.

A call of a matrix library takes a microsecond or two before it begins. If a product is written as multiplications and a sum, Inductor makes
loops of it that compute one output at a time. Here Inductor sees a product as a reduction, so that it shares a kernel with the operations
around it. Instead of the reduction's loops the kernel calls a function for these sizes and strides, which keeps a block of outputs in
registers.

The loops stay where Inductor's code generator has another form than expected, and where the processor has no vector instructions.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from adaptrt.backend.inductor.exchange import SMALL_MATMULS
from adaptrt.backend.inductor.rewrites.inline_small_matmuls import small_matmul
from adaptrt.graph.exchange import exchanged

_FUNCTION = """#include <torch/csrc/inductor/cpp_prefix.h>

// c[M, N] = a[M, K] b[K, N], with strides; c is contiguous.
template <typename T, int M, int N, int K, int64_t a_row, int64_t a_column, int64_t b_row, int64_t b_column>
void small_matmul(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ c) {
    using Vec = at::vec::Vectorized<T>;
    constexpr int L = Vec::size();
    constexpr bool is_wide = sizeof(T) * L == 64;  // AVX-512: 32 registers, and loads of less than a register are cheap
    constexpr int width = (N + L - 1) / L;         // of a row, in registers
    constexpr int columns = width < 4 ? width : 3;  // of a block, in registers
    constexpr int most_rows = ((is_wide ? 30 : 14) - columns) / columns;
    constexpr int rows = M < most_rows ? M : (M + (M - 1) / most_rows) / ((M - 1) / most_rows + 1);
    constexpr bool is_packed = b_column != 1 || (N % L != 0 && !is_wide);
    constexpr int64_t packed_row = is_packed ? width * L : b_row;
    alignas(64) T packed[is_packed ? K * width * L : 1];
    // What is beyond a row is multiplied, too, which takes long where it happens to be denormal.
    if constexpr (is_packed && N % L != 0) std::fill(packed, packed + K * width * L, T(0));
    if constexpr (is_packed && b_row == 1) {
        for (int n = 0; n < N; n += L)
            for (int k = 0; k < K; k += L)
                at::vec::transpose_mxn<T>(
                    b + n * b_column + k, b_column, packed + k * packed_row + n, packed_row, std::min(L, N - n), std::min(L, K - k));
    } else if constexpr (is_packed) {
        for (int k = 0; k < K; k++)
            for (int n = 0; n < N; n++) packed[k * packed_row + n] = b[k * b_row + n * b_column];
    }
    const T* from = is_packed ? packed : b;
    auto block = [&]<int R, int V, int last>(int m, int n) {
        Vec sums[R][V];
        #pragma GCC unroll 32
        for (int r = 0; r < R; r++)
            #pragma GCC unroll 4
            for (int v = 0; v < V; v++) sums[r][v] = Vec(0);
        for (int k = 0; k < K; k++) {
            Vec row[V];
            #pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                const T* place = from + k * packed_row + n + v * L;
                row[v] = v == V - 1 && last != L && !is_packed ? Vec::loadu(place, last) : Vec::loadu(place);
            }
            #pragma GCC unroll 32
            for (int r = 0; r < R; r++) {
                Vec factor(a[(m + r) * a_row + k * a_column]);
                #pragma GCC unroll 4
                for (int v = 0; v < V; v++) sums[r][v] = at::vec::fmadd(factor, row[v], sums[r][v]);
            }
        }
        #pragma GCC unroll 32
        for (int r = 0; r < R; r++)
            #pragma GCC unroll 4
            for (int v = 0; v < V; v++) {
                T* place = c + (m + r) * N + n + v * L;
                if (v == V - 1 && last != L) sums[r][v].store(place, last);
                else sums[r][v].store(place);
            }
    };
    auto strip = [&]<int V, int last>(int n) {
        int m = 0;
        for (; m + rows <= M; m += rows) block.template operator()<rows, V, last>(m, n);
        if constexpr (M % rows != 0) block.template operator()<M % rows, V, last>(m, n);
    };
    constexpr int whole = (width - 1) / columns * columns;  // registers of a row before the last block
    if constexpr (whole > 0)
        for (int n = 0; n < whole * L; n += columns * L) strip.template operator()<columns, L>(n);
    strip.template operator()<width - whole, N - (width - 1) * L>(whole * L);
}
"""


class _Operand(NamedTuple):
    """Where a factor lies in a buffer: its offset, and its strides by task, if there are tasks, by row and by column. In elements."""

    buffer: str
    offset: int
    strides: tuple[int, ...]


class _Product(NamedTuple):
    """num_tasks products [M, K] times [K, N]."""

    a: _Operand
    b: _Operand
    num_tasks: int
    sizes: tuple[int, int, int]
    dtype: torch.dtype


def small_matmuls_in_place_of_loops(in_one_file: bool = False) -> contextlib.AbstractContextManager[None]:
    """A block in which the operation `small_matmul` is compiled to calls of that function.

    `in_one_file`: all kernels of a program are written into one file and one namespace, which then has the function once.
    """
    _register()
    function = f"#ifndef ADAPTRT_SMALL_MATMUL\n#define ADAPTRT_SMALL_MATMUL\n{_FUNCTION}#endif\n\n" if in_one_file else _FUNCTION
    others = (_only_others, _only_others, _finalize, functools.partial(_codegen, function))
    return exchanged(SMALL_MATMULS, *[functools.partial(functools.partial, other) for other in others])


def _only_others(original: Callable[..., bool], self: Any, node1: Any, node2: Any) -> bool:
    return not any(_product_of(node) for other in (node1, node2) for node in other.get_nodes()) and original(self, node1, node2)


def _product_of(node: Any) -> _Product | None:
    return getattr(getattr(getattr(getattr(node, "node", None), "data", None), "inner_fn", None), "product", None)


def _finalize(original: Callable[..., None], self: Any, kernel: Any, nodes: list[Any]) -> None:
    """In place of `KernelGroup.finalize_kernel`, which puts the loops of `nodes` behind those of earlier ones."""
    from torch._inductor.codegen.cpp_utils import DTYPE_TO_CPP
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.utils import parallel_num_threads

    product = _product_of(nodes[0]) if len(nodes) == 1 else None
    name = nodes[0].node.get_name() if product else ""
    # By now the arguments of the kernel are named.
    if product is None or not pick_vec_isa() or self.args.inplace_buffers.get(name) is not None:
        original(self, kernel, nodes)
        return
    self.scheduled_nodes += nodes
    (m, n, k), types = product.sizes, DTYPE_TO_CPP[product.dtype]
    numbers = ", ".join(str(number) for number in (m, n, k, *product.a.strides[-2:], *product.b.strides[-2:]))
    a, b = (_place(self.args.input(operand.buffer), operand) for operand in (product.a, product.b))
    threads = parallel_num_threads()
    if threads > 1 and product.num_tasks > 1:
        self.ws.parallel(threads)
        self.loops_code.writeline("#pragma omp for")
    else:
        self.ws.single()
    self.loops_code.writeline(f"for (int64_t task = 0; task < {product.num_tasks}; task++)")
    self.loops_code.writeline(f"    small_matmul<{types}, {numbers}>({a}, {b}, {self.args.output(name)} + task * {m * n});")


def _place(pointer: str, operand: _Operand) -> str:
    stride = operand.strides[0] if len(operand.strides) == 3 else 0
    return f"{pointer} + {operand.offset} + task * {stride}"


def _codegen(function: str, original: Callable[..., str], self: Any, *args: Any, **kwargs: Any) -> str:
    code = original(self, *args, **kwargs)
    return function + code if "small_matmul<" in code else code


@functools.cache
def _register() -> None:
    from torch._inductor.lowering import register_lowering

    register_lowering(small_matmul, type_promotion_kind=None)(_lower)


def _lower(a: Any, b: Any) -> Any:
    """a [M, K] and b [K, N], or T of them: a sum over products for Inductor, or the library's product where Inductor has no such sums."""
    try:
        return _as_reduction(a, b)
    except (ImportError, AttributeError, TypeError):  # in another PyTorch
        from torch._inductor.lowering import lowerings

        operation = torch.ops.aten.mm.default if len(a.get_size()) == 2 else torch.ops.aten.bmm.default
        return lowerings[operation](a, b)


def _as_reduction(a: Any, b: Any) -> Any:
    """As `_lower`, of operands that are brought to memory."""
    from torch._inductor import ir
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import ops

    a, b = _realized(a), _realized(b)
    *tasks, m, k = [int(length) for length in a.get_size()]
    n = int(b.get_size()[-1])
    load_a, load_b = a.make_loader(), b.make_loader()

    def inner(index: Any, reduced: Any) -> Any:
        *task, row, column = index
        return ops.mul(load_a([*task, row, *reduced]), load_b([*task, *reduced, column]))

    dtype = a.get_dtype()
    vars(inner)["product"] = _Product(_operand(a), _operand(b), tasks[0] if tasks else 1, (m, n, k), dtype)
    reduction = ir.Reduction(
        device=a.get_device(),
        dtype=dtype,
        inner_fn=inner,
        ranges=[*tasks, m, n],
        reduction_ranges=[k],
        reduction_type="sum",
        src_dtype=dtype,
        reduction_hint=ReductionHint.DEFAULT,
    )
    result = ir.TensorBox.create(reduction)
    result.realize()
    result.freeze_layout()
    return result


def _realized(x: Any) -> Any:
    from torch._inductor import ir

    x = ir.ExternKernel.realize_input(x)
    if isinstance(x, ir.ReinterpretView) and x.data.get_dtype() != x.get_dtype():  # the kernel gets a pointer to the other dtype
        x = ir.ExternKernel.copy_input(x)
    ir.as_storage_and_layout(x, freeze=True)
    return x


def _operand(x: Any) -> _Operand:
    layout = x.get_layout()
    return _Operand(x.get_name(), int(layout.offset), tuple(int(stride) for stride in layout.stride))
