"""Records what an Inductor program does on the CPU, and runs that again without Inductor's Python.

For a small model the Python code that Inductor generates around its kernels costs more than the kernels: it allocates every buffer at
every call. Here that code runs once with placeholders for tensors, which shows all that it does. If it allocates, makes views and calls
kernels, and nothing else, a function is generated that calls the same kernels in the same order, on intermediate buffers that it keeps.
Calls of the matrix library count as kernels. Results are fresh at every call.

A program that does anything else (a convolution, an ATen operation) runs as Inductor made it. So does one with large intermediates: there
the kernels are what takes time, and keeping the buffers would cost memory between calls.

Known limits: the form of Inductor's generated code is private to it. Whatever is not recognised is left alone: other functions, functions
that take other arguments, and code that raises when it gets placeholders.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import dataclasses
import dis
import functools
import itertools
import logging
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from adaptrt.backend.base import Runner
from adaptrt.backend.inductor.exchange import RECORDED

_LOG = logging.getLogger(__name__)

MAX_KEPT_BYTES = 16 * 1024 * 1024
"""Of intermediate buffers, for each thread that runs the program at the same time."""

_MAX_CLONED_BYTES = 16 * 1024
"""Up to here a result is copied out of a kept buffer if kernels need several views of it, which would have to be made at every call."""


_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))

_LIBRARY = ("mm", "bmm", "addmm", "baddbmm")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Memory:
    """An input, if it has an index, or a buffer of `size` elements."""

    index: int | None
    size: int
    dtype: torch.dtype | None

    @property
    def num_bytes(self) -> int:
        return self.size * self.dtype.itemsize if self.dtype else 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Value:
    """A tensor: where in which memory, and its form; an input as it came has none."""

    memory: _Memory
    offset: int
    shape: tuple[int, ...] | None
    strides: tuple[int, ...] | None

    @property
    def fills(self) -> bool:
        """Whether it takes up all of its memory."""
        form = self.shape is not None and self.strides is not None
        return form and self.offset == 0 and _extent(self.shape, self.strides) == self.memory.size  # type: ignore[arg-type]


def _extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    return 1 + sum(stride * (length - 1) for length, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0


class _Call(NamedTuple):
    """One call of a kernel. A kernel of Inductor's gets where its tensors begin, and nothing else; one of a library whole tensors."""

    kernel: Callable[..., Any]
    args: tuple[_Value, ...]
    numbers: dict[str, float]
    out: _Value | None

    @property
    def of_library(self) -> bool:
        return self.out is not None

    @property
    def values(self) -> tuple[_Value, ...]:
        return self.args if self.out is None else (*self.args, self.out)


class _Recording(NamedTuple):
    """Every kernel call in order, and the values returned."""

    calls: list[_Call]
    results: tuple[_Value, ...]


def record(call: Any, num_inputs: int) -> Runner | None:
    """A function that does what `call` does, or None if that cannot be known or is not worth it.

    Args:
      call: the function in Inductor's generated module that takes a list of inputs.
      num_inputs: the length of that list.
    """
    try:
        recording = _record(call, num_inputs) if RECORDED.holds else None
        return None if recording is None else _generate(recording, num_inputs)
    except Exception:  # generated code of another form may do anything with placeholders
        _LOG.debug("the generated code of a program is not known, so it runs as it is", exc_info=True)
        return None


def _record(call: Any, num_inputs: int) -> _Recording | None:
    function = getattr(call, "__func__", call)
    if not isinstance(function, types.FunctionType) or function.__closure__:
        return None
    calls: list[_Call] = []
    stand_ins: dict[str, Any] = {
        "torch": torch,
        "assert_size_stride": _nothing,
        "assert_size_stride_grouped": _nothing,  # 2.14
        "empty_strided_cpu": _allocated,
        "reinterpret_tensor": _view,
        "extern_kernels": types.SimpleNamespace(
            **{name: _library_recorder(getattr(function.__globals__.get("extern_kernels"), name, None), calls) for name in _LIBRARY}
        ),
    }
    instructions = list(dis.get_instructions(function))
    # A branch might depend on what placeholders are, and what is raised for them be caught.
    if function.__code__.co_exceptiontable or any(instruction.opcode in _JUMPS for instruction in instructions):
        return None
    names = {instruction.argval for instruction in instructions if instruction.opname == "LOAD_GLOBAL"}
    for name in names - set(stand_ins):
        kernel = function.__globals__.get(name)
        if not (name.startswith("cpp_") and callable(kernel)):
            return None
        stand_ins[name] = _recorder(kernel, calls)
    # What is looked up on an object: a dtype, a kernel of the library, or the method that empties the list of inputs.
    attributes = set(function.__code__.co_names) - names
    if any(name not in ("clear", *_LIBRARY) and not isinstance(getattr(torch, name, None), torch.dtype) for name in attributes):
        return None
    inputs = [_Value(_Memory(index, 0, None), 0, None, None) for index in range(num_inputs)]
    first = (None,) if hasattr(call, "__self__") else ()
    results = types.FunctionType(function.__code__, stand_ins)(*first, inputs)
    recording = _Recording(calls, tuple(results))
    return recording if _is_known(recording) else None


def _is_known(recording: _Recording) -> bool:
    """Whether it consists of tensors and numbers of the forms that `_generate` expects."""
    values = [*recording.results, *itertools.chain(*(call.values for call in recording.calls))]
    numbers = itertools.chain(*(call.numbers.values() for call in recording.calls))
    return all(isinstance(value, _Value) and _has_known_form(value) for value in values) and all(type(x) in (int, float) for x in numbers)


def _has_known_form(value: _Value) -> bool:
    """Whether its form is one of numbers, and lies within its memory."""
    if value.shape is None or value.strides is None:
        return value.shape is value.strides and type(value.offset) is int
    if not all(type(number) is int for number in (*value.shape, *value.strides, value.offset, value.memory.size)):
        return False
    end = value.offset + _extent(value.shape, value.strides)
    return value.memory.index is not None or (value.offset >= 0 and end <= value.memory.size)


def _nothing(*args: Any) -> None:  # for checks: `Program` has made them
    del args


def _allocated(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> _Value:
    return _Value(_Memory(None, _extent(shape, strides), dtype), 0, shape, strides)


def _view(of: _Value, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> _Value:
    return _Value(of.memory, of.offset + offset, shape, strides)


def _recorder(kernel: Callable[..., Any], calls: list[_Call]) -> Callable[..., None]:
    return lambda *args: calls.append(_Call(kernel, args, {}, None))


def _library_recorder(kernel: Callable[..., Any] | None, calls: list[_Call]) -> Callable[..., None]:
    def call(*args: _Value, out: _Value, **numbers: float) -> None:
        assert kernel is not None
        calls.append(_Call(kernel, args, numbers, out))

    return call


def _generate(recording: _Recording, num_inputs: int) -> Runner | None:
    """The recorded calls as one function of straight-line code; None if it would keep too much memory."""
    offsets: dict[_Memory, dict[int, None]] = {}  # where in each memory something begins
    forms: dict[_Memory, dict[_Value, None]] = {}  # the tensors in it that a library is given
    for call in recording.calls:
        for value in call.values:
            offsets.setdefault(value.memory, {})[value.offset] = None
            if call.of_library:
                forms.setdefault(value.memory, {})[value] = None
    returned: dict[_Memory, list[_Value]] = {}
    for value in recording.results:
        returned.setdefault(value.memory, []).append(value)
    # The results that are all of their memory, which then is allocated in that form.
    whole = {memory: values[0] for memory, values in returned.items() if len(values) == 1 and values[0].fills}
    cloned = {memory for memory in whole if len(offsets.get(memory, ())) > 1 and memory.num_bytes <= _MAX_CLONED_BYTES}
    kept = [memory for memory in offsets if memory.index is None and (memory not in returned or memory in cloned)]
    fresh = [memory for memory in returned if memory.index is None and memory not in cloned]
    if sum(memory.num_bytes for memory in kept) > MAX_KEPT_BYTES:
        return None

    names: dict[tuple[_Memory, int], str] = {}
    tensors: dict[_Value, str] = {}
    count = itertools.count()
    guards: Any = torch._C._dynamo.guards  # type: ignore[attr-defined]
    constants: dict[str, Any] = {"empty": guards._empty_strided_cpu, "view": guards._reinterpret_tensor, "free": []}

    def allocate(memories: Sequence[_Memory], prefix: str) -> list[str]:
        """Code that makes what calls need of these memories."""
        lines: list[str] = []
        for memory in memories:
            form = whole.get(memory)
            shape, strides = (form.shape, form.strides) if form else ((memory.size,), (1,))
            root = names[memory, 0] = f"{prefix}{next(count)}"
            constants[str(memory.dtype).replace(".", "_")] = memory.dtype
            lines.append(f"{root} = empty({shape}, {strides}, {str(memory.dtype).replace('.', '_')})")
            for offset in offsets.get(memory, ()):
                if offset:
                    name = names[memory, offset] = f"{prefix}{next(count)}"
                    lines.append(f"{name} = view({root}, ({memory.size - offset},), (1,), {offset})")
            for value in forms.get(memory, ()):
                tensors[value] = root
                if value != form:
                    tensors[value] = f"{prefix}{next(count)}"
                    lines.append(f"{tensors[value]} = view({root}, {value.shape}, {value.strides}, {value.offset})")
        return lines

    def result(value: _Value) -> str:
        root = f"a{value.memory.index}" if value.memory.index is not None else names[value.memory, 0]
        if value.memory in cloned:
            return f"{root}.clone()"
        return root if value.memory in whole or value.shape is None else f"view({root}, {value.shape}, {value.strides}, {value.offset})"

    make = allocate(kept, "w")
    workspace = _tuple(list(dict.fromkeys([*names.values(), *tensors.values()])))
    lines = allocate(fresh, "o")
    for memory, places in offsets.items():
        if memory.index is not None:
            root = f"a{memory.index}"
            names |= {(memory, offset): f"view({root}, (), (), {offset})" if offset else root for offset in places}
            for value in forms.get(memory, ()):
                tensors[value] = root if value.shape is None else f"view({root}, {value.shape}, {value.strides}, {value.offset})"
    for number, call in enumerate(recording.calls):
        constants[f"kernel{number}"] = call.kernel
        arguments = [tensors[value] if call.of_library else names[value.memory, value.offset] for value in call.args]
        arguments += [f"{name}={number!r}" for name, number in call.numbers.items()]
        if call.out is not None:
            arguments.append(f"out={tensors[call.out]}")
        lines.append(f"kernel{number}({', '.join(arguments)})")
    run = [
        f"{_tuple([f'a{index}' for index in range(num_inputs)])} = values" if num_inputs else "",
        # A list's pop and append are atomic: each call in progress has buffers of its own.
        "try: workspace = free.pop()",
        "except IndexError: workspace = make()",
        f"{workspace} = workspace" if kept else "",
        *lines,
        f"results = {_tuple([result(value) for value in recording.results])}",
        "free.append(workspace)",
        "return results",
    ]
    # A library refuses to write to an inference tensor outside of inference mode.
    constants["ordinary"] = functools.partial(torch.inference_mode, False)
    body = ["with ordinary():", *[f"  {line}" for line in make or ["pass"]], f"return {workspace}"]
    return _defined("run", "values", run, constants | {"make": _defined("make", "", body, constants)})


def _tuple(names: Sequence[str]) -> str:
    return f"({', '.join(names)}{',' if names else ''})"


def _defined(name: str, argument: str, lines: Sequence[str], constants: dict[str, Any]) -> Callable[..., Any]:
    """The function with these lines. It is not one of its own globals: it has to be freed, with its kernels, as soon as it is dropped."""
    code = f"def {name}({argument}):\n" + "".join(f"    {line}\n" for line in lines if line)
    names = dict(constants)
    exec(compile(code, "<recorded program>", "exec"), names)
    return names.pop(name)
