"""Opens libraries of compiled kernels, and closes them when nothing calls their kernels any more.

Python never closes an extension module. So a library of kernels is none: it has functions that take addresses, and one extension module,
which is built once and stays, makes Python functions of them. Each of these keeps its library open.
"""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import importlib.machinery
import importlib.util
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adaptrt.backend.inductor.cpp import Compiler, key_of
from adaptrt.backend.inductor.store import Store
from adaptrt.backend.inductor.task import Task

ENTRIES = """
#include <cstddef>
#include <utility>

namespace {
template <typename... T, size_t... place>
void run(void (*kernel)(T...), void* const* data, std::index_sequence<place...>) {
    kernel(static_cast<T>(data[place])...);
}

template <typename... T>
void call(void (*kernel)(T...), void* const* data) {
    run(kernel, data, std::index_sequence_for<T...>{});
}

template <typename... T>
constexpr size_t count(void (*)(T...)) {
    return sizeof...(T);
}
}
"""
"""C++ that is the same for all libraries."""


def entry(index: int, kernel: str) -> str:
    """C++ that makes a function of pointers the entry `index` of a library."""
    return (
        f'extern "C" {{ void entry{index}(void* const* data) {{ call(&{kernel}, data); }} size_t num_args{index} = count(&{kernel}); }}\n'
    )


_CALLER = """
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <exception>
#include <stdexcept>
#include <vector>

namespace {
struct Kernel {
    void (*entry)(void* const*);
    Py_ssize_t num_args;
    PyObject* library;
};

const char* const KERNEL = "adaptrt.kernel";
void* (*data_of)(PyObject*);

PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t num_args) {
    auto kernel = static_cast<Kernel*>(PyCapsule_GetPointer(self, KERNEL));
    if (kernel == nullptr) return nullptr;
    try {
        if (num_args != kernel->num_args) throw std::runtime_error("the kernel takes another number of tensors");
        void* few[32];
        std::vector<void*> many;
        void** data = few;
        if (num_args > 32) {
            many.resize(num_args);
            data = many.data();
        }
        for (Py_ssize_t place = 0; place < num_args; ++place) data[place] = data_of(args[place]);
        kernel->entry(data);
        Py_RETURN_NONE;
    } catch (std::exception const& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    } catch (...) {
        PyErr_SetString(PyExc_RuntimeError, "unhandled error");
    }
    return nullptr;
}

PyMethodDef kernel_method = {"kernel", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)), METH_FASTCALL, nullptr};

void forget(PyObject* capsule) {
    auto kernel = static_cast<Kernel*>(PyCapsule_GetPointer(capsule, KERNEL));
    Py_DECREF(kernel->library);
    delete kernel;
}

PyObject* bind(PyObject*, PyObject* args) {
    unsigned long long find_data, entry;
    Py_ssize_t num_args;
    PyObject* library;
    if (!PyArg_ParseTuple(args, "KKnO", &find_data, &entry, &num_args, &library)) return nullptr;
    data_of = reinterpret_cast<decltype(data_of)>(find_data);
    auto kernel = new Kernel{reinterpret_cast<void (*)(void* const*)>(entry), num_args, library};
    PyObject* capsule = PyCapsule_New(kernel, KERNEL, &forget);
    if (capsule == nullptr) {
        delete kernel;
        return nullptr;
    }
    Py_INCREF(library);
    PyObject* function = PyCFunction_New(&kernel_method, capsule);
    Py_DECREF(capsule);
    return function;
}

PyMethodDef methods[] = {{"bind", bind, METH_VARARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "adaptrt_caller", nullptr, -1, methods};
}

PyMODINIT_FUNC PyInit_adaptrt_caller() {
    PyObject* module = PyModule_Create(&definition);
#ifdef Py_GIL_DISABLED
    if (module != nullptr) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
    return module;
}
"""
"""Inductor's runtime has a function that finds a tensor's memory, and raises for anything else."""


class Library:
    """An open library.

    Args:
      path: of the file.
    """

    def __init__(self, path: Path) -> None:
        handle = _ctypes.dlopen(os.fspath(path), os.RTLD_NOW | os.RTLD_LOCAL)
        self._handle = handle
        weakref.finalize(self, _ctypes.dlclose, handle).atexit = False

    def kernel(self, index: int) -> Callable[..., None]:
        """The entry `index` as a Python function of its tensors, which keeps the library open."""
        entry = _ctypes.dlsym(self._handle, f"entry{index}")
        num_args = ctypes.c_size_t.from_address(_ctypes.dlsym(self._handle, f"num_args{index}")).value
        guards: Any = torch._C._dynamo.guards  # type: ignore[attr-defined]
        return _caller().bind(guards._torchinductor_pyobject_tensor_data_ptr, entry, num_args, self)


_open: weakref.WeakValueDictionary[str, Library] = weakref.WeakValueDictionary()


def open_later(source: str) -> Callable[[], Library]:
    """Begins to build a library of C++ with entries, if it is not on disk. Returns a function that waits for it and opens it."""
    key = key_of(source)
    present = _open.get(key)
    if present is not None:
        return lambda: present
    built = _begin(key, source)

    def finish() -> Library:
        library = _open.get(key)
        if library is None:
            library = _open[key] = _opened(built(), key, source)
        return library

    return finish


def _begin(key: str, source: str) -> Callable[[], Path]:
    """Returns a function that waits for an entry in the folder of programs. If it is missing, a thread builds it meanwhile."""
    store = _store()
    entry = store.find(key)
    if entry is not None:
        return lambda: entry
    compiler = Compiler()  # here, where Inductor's settings are those of this program
    return Task(functools.partial(store.get_or_build, key, functools.partial(compiler.build, source))).result


def _opened(entry: Path, key: str, source: str) -> Library:
    """Opens the library of an entry. If the system cannot load it, or it was removed in the meantime, it is built once more."""
    try:
        return Library(entry / "library.so")
    except OSError as error:
        _store().discard(key, f"cannot be loaded ({error})")
    return Library(_begin(key, source)() / "library.so")


def _store() -> Store:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Store(Path(cache_dir()) / "adaptrt")


def any_built() -> bool:
    """Whether the folder of programs holds any."""
    try:
        return _store().holds_any()
    except OSError:
        return False


def build_caller() -> None:
    """Begins to build the module that calls kernels, if it is not on disk or in memory."""
    if not _caller.cache_info().currsize:
        _begin(_key_of_caller(), _CALLER)


def _key_of_caller() -> str:
    return f"caller-{key_of(_CALLER)}"  # it is no program


@functools.cache
def _caller() -> Any:
    path = _begin(_key_of_caller(), _CALLER)() / "library.so"
    name = "adaptrt_caller"
    spec = importlib.util.spec_from_file_location(name, path, loader=importlib.machinery.ExtensionFileLoader(name, os.fspath(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
