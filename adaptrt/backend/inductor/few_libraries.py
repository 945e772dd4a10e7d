"""Builds the C++ kernels of a program as few libraries, where Inductor builds one for each kernel.

Half of the time that g++ takes for a kernel is spent on the precompiled header and on linking, whatever the kernel is. So the kernels of a
program are distributed over as many source files as Inductor has compile threads. Each kernel is in a namespace of its own.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any

from adaptrt.backend.inductor.exchange import FEW_LIBRARIES
from adaptrt.backend.inductor.library import ENTRIES, Library, build_caller, entry, open_later
from adaptrt.graph.exchange import exchanged
from adaptrt.process import after_fork


@contextlib.contextmanager
def few_libraries(waits: list[Callable[[], None]] | None = None) -> Generator[None]:
    """Within the block, kernels that get nothing but tensors share libraries.

    Args:
      waits: if given, programs are returned before their kernels are built, and for each a function is added here that waits for them.
    """
    programs: weakref.WeakKeyDictionary[Any, _Kernels] = weakref.WeakKeyDictionary()

    def cpp_pybinding(one_each: Callable[..., Any]) -> Callable[..., Any]:
        from torch._inductor.async_compile import get_compile_threads, kernel_code_log
        from torch._inductor.codecache import LambdaFuture

        def add(self: Any, argtypes: list[str], source_code: str) -> Any:
            if not all(argtype.endswith("*") for argtype in argtypes):
                return one_each(self, argtypes, source_code)
            kernel_code_log.info("C++ kernel:\n%s", source_code)
            if get_compile_threads() <= 1:  # then Inductor does not wait for kernels: each has to be there at once
                alone = _Kernels(1)
                alone.add(source_code)
                return alone.functions()[0]
            kernels = programs.setdefault(self, _Kernels(get_compile_threads()))
            place = kernels.add(source_code)
            return LambdaFuture(lambda: kernels.functions()[place])

        return add

    def wait(wait_now: Callable[..., None]) -> Callable[..., None]:
        def later(self: Any, scope: dict[str, Any]) -> None:
            if waits is None:
                wait_now(self, scope)
                return
            if self in programs:
                programs[self].start()
            waits.append(functools.partial(wait_now, self, scope))

        return later

    with exchanged(FEW_LIBRARIES, cpp_pybinding, wait):
        yield


class _Kernels:
    """The kernels of one program. First all are added, then all are built.

    Args:
      num_libraries: how many are built at once.
    """

    def __init__(self, num_libraries: int) -> None:
        self._num_libraries = num_libraries
        self._sources: list[str] = []
        self._libraries: list[tuple[list[int], Callable[[], Library]]] = []
        self._functions: dict[int, Callable[..., None]] = {}

    def add(self, source: str) -> int:
        self._sources.append(source)
        return len(self._sources) - 1

    def start(self) -> None:
        """Begins to build."""
        if not self._libraries:
            build_caller()
            for share in _deal([len(source) for source in self._sources], self._num_libraries):
                source = _one_source([self._sources[place] for place in share])
                self._libraries.append((share, open_later(source)))

    def functions(self) -> dict[int, Callable[..., None]]:
        """Each kernel as a Python function of its tensors."""
        self.start()
        if not self._functions:
            opened = [library() for _, library in self._libraries]
            self._functions = {
                place: library.kernel(index)
                for (share, _), library in zip(self._libraries, opened, strict=True)
                for index, place in enumerate(share)
            }
        return self._functions


@after_fork
def _forget_threads() -> None:
    """In a forked child the threads do not exist that were to build something. What is built already is loaded from the disk."""
    codecache, async_compile = sys.modules.get("torch._inductor.codecache"), sys.modules.get("torch._inductor.async_compile")
    for name in ("CppCodeCache", "CppPythonBindingsCodeCache"):
        if hasattr(codecache, name):
            getattr(codecache, name).cache.clear()
    if async_compile is not None:
        async_compile.AsyncCompile.pool.cache_clear()
    bundler = sys.modules.get("torch._inductor.triton_bundler")
    if bundler is not None and hasattr(bundler.TritonBundler, "end_compile"):
        bundler.TritonBundler.end_compile()  # of a compilation that is under way in another thread; the next would not begin


def _deal(sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Places in at most `num_shares` shares of about the same total size."""
    num_shares = min(num_shares, len(sizes))
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals = [0] * num_shares
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        smallest = totals.index(min(totals))
        shares[smallest].append(place)
        totals[smallest] += sizes[place]
    return [sorted(share) for share in shares]


def _one_source(sources: Sequence[str]) -> str:
    """A library of kernels that are all called `kernel`, as `kernel0`, `kernel1` and so on."""
    includes: dict[str, None] = {}
    parts: list[str] = []
    for index, source in enumerate(sources):
        lines = source.splitlines()
        includes |= dict.fromkeys(line for line in lines if line.startswith("#include"))
        code = "\n".join(line for line in lines if not line.startswith("#include"))
        parts.append(f"#define kernel kernel{index}\nnamespace source{index} {{\n{code}\n}}\n#undef kernel\n")
    entries = [entry(index, f"source{index}::kernel{index}") for index in range(len(sources))]
    return "\n".join([*includes, *parts, ENTRIES, *entries])
