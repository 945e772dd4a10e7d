"""Finds how far an index moves when a loop variable does, without computer algebra where it can be read off.

Before it vectorises a kernel, Inductor asks for this distance for every index in the kernel and every variable. For each answer SymPy
simplifies the whole index twice, which is a third of the Python time of compiling a convolutional network. But almost every index is a sum
of variables times numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import sympy

from adaptrt.backend.inductor.exchange import INDEX_STRIDES
from adaptrt.graph.exchange import exchanged

_Stride = Callable[[Any, Any, int | None], Any]


def quick_strides() -> contextlib.AbstractContextManager[None]:
    """A block in which Inductor's code generator for C++ asks `StridesOf` first."""
    return exchanged(INDEX_STRIDES, StridesOf)


class StridesOf:
    """Strides of indices, each found once.

    Args:
      by_algebra: gives the difference between an index at `var + 1` and at `var`, where `vec_length` consecutive values of `var` begin at a
        multiple of it.
    """

    def __init__(self, by_algebra: _Stride) -> None:
        self._by_algebra = by_algebra
        self._found: dict[tuple[Any, Any, int | None], Any] = {}

    def __call__(self, index: Any, var: Any, vec_length: int | None = None) -> Any:
        key = index, var, vec_length
        if key not in self._found:
            self._found[key] = self._stride(*key)
        return self._found[key]

    def _stride(self, index: Any, var: Any, vec_length: int | None) -> Any:
        stride, rest = sympy.S.Zero, []
        for term in sympy.Add.make_args(sympy.sympify(index)):
            factor, what = term.as_coeff_Mul()
            if what == var:
                stride += factor
            elif term.has(var):
                rest.append(term)
        # Terms without the variable cancel in the difference, and the rest is a difference of its own.
        return stride + self._by_algebra(sympy.Add(*rest), var, vec_length) if rest else stride
