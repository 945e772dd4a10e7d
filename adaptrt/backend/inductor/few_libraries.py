"""Builds the C++ kernels of a program as few libraries, where Inductor builds one for each kernel.

Half of the time that g++ takes for a kernel is spent on the precompiled header and on linking, whatever the kernel is. So the kernels of a
program are distributed over as many source files as Inductor has compile threads. Each kernel is in a namespace of its own.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any

from adaptrt.backend.inductor.exchange import FEW_LIBRARIES
from adaptrt.graph.exchange import exchanged
from adaptrt.process import after_fork, waits

_BINDINGS = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <utility>

namespace {
void* (*data_of)(PyObject*);

template <typename... T, size_t... place>
void run(void (*kernel)(T...), PyObject* const* args, std::index_sequence<place...>) {
    kernel(static_cast<T>(data_of(args[place]))...);
}

template <typename... T>
PyObject* call(void (*kernel)(T...), PyObject* const* args, Py_ssize_t num_args) {
    try {
        if (num_args != sizeof...(T)) throw std::runtime_error("the kernel takes another number of tensors");
        run(kernel, args, std::index_sequence_for<T...>{});
        Py_RETURN_NONE;
    } catch (std::exception const& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    } catch (...) {
        PyErr_SetString(PyExc_RuntimeError, "unhandled error");
    }
    return nullptr;
}

template <auto kernel>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t num_args) {
    return call(kernel, args, num_args);
}

PyMethodDef methods[] = {
    %s
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "kernel", nullptr, -1, methods};
}

PyMODINIT_FUNC PyInit_kernel() {
    const char* address = std::getenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR");
    if (address == nullptr) {
        PyErr_SetString(PyExc_RuntimeError, "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR must be set");
        return nullptr;
    }
    data_of = reinterpret_cast<decltype(data_of)>(std::strtoull(address, nullptr, 10));
    PyObject* module = PyModule_Create(&definition);
#ifdef Py_GIL_DISABLED
    if (module != nullptr) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
    return module;
}
"""
"""Inductor loads a module `kernel`, and gives the address of the function that finds a tensor's memory in the environment."""


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
            # With one thread Inductor does not wait for kernels: each has to be there at once.
            if get_compile_threads() <= 1 or not all(argtype.endswith("*") for argtype in argtypes):
                return one_each(self, argtypes, source_code)
            kernel_code_log.info("C++ kernel:\n%s", source_code)
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
        self._libraries: list[tuple[list[int], Callable[[], Any]]] = []
        self._functions: dict[int, Callable[..., None]] = {}

    def add(self, source: str) -> int:
        self._sources.append(source)
        return len(self._sources) - 1

    def start(self) -> None:
        """Begins to build."""
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        if not self._libraries:
            for share in _deal([len(source) for source in self._sources], self._num_libraries):
                source = _one_source([self._sources[place] for place in share])
                self._libraries.append((share, CppPythonBindingsCodeCache.load_async(source, submit_fn=_Task)))

    def functions(self) -> dict[int, Callable[..., None]]:
        """Each kernel as a Python function of its tensors."""
        self.start()
        if not self._functions:
            modules = [library() for _, library in self._libraries]
            self._functions = {
                place: getattr(module, f"kernel{index}")
                for (share, _), module in zip(self._libraries, modules, strict=True)
                for index, place in enumerate(share)
            }
        return self._functions


class _Task:
    """A function that runs in a thread of its own.

    In place of Inductor's pool of threads, which may never build again after a signal handler has raised while it was given work: then a
    lock of the pool's is held for ever. The lock here is taken by `with` statements only, which no handler can come into.
    """

    def __init__(self, fn: Callable[[], Any]) -> None:
        self._fn = fn
        self._running = threading.Lock()
        self._running.acquire()
        self._value: Any = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="adaptrt builder").start()

    def _run(self) -> None:
        try:
            self._value = self._fn()
        except BaseException as error:
            self._error = error
        finally:
            self._running.release()

    @waits
    def result(self) -> Any:
        """Waits until it has run, and returns what it returned or raises what it raised."""
        with self._running:
            if self._error is not None:
                raise self._error
            return self._value


@after_fork
def _forget_threads() -> None:
    """In a forked child the threads do not exist that were to build something. What is built already is loaded from the disk."""
    codecache, async_compile = sys.modules.get("torch._inductor.codecache"), sys.modules.get("torch._inductor.async_compile")
    for name in ("CppCodeCache", "CppPythonBindingsCodeCache"):
        if hasattr(codecache, name):
            getattr(codecache, name).cache.clear()
    if async_compile is not None:
        async_compile.AsyncCompile.pool.cache_clear()


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
    methods = [
        f'{{"kernel{index}", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<&source{index}::kernel{index}>)), '
        "METH_FASTCALL, nullptr},"
        for index in range(len(sources))
    ]
    return "\n".join([*includes, *parts, _BINDINGS % "\n    ".join(methods)])
