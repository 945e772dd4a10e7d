"""Calls a module with other parameters and buffers, without changing the module.

The call runs on a *shadow*: a copy of all module objects in the module tree that shares their tensors. So tracing may replace parameters,
and forward passes may set attributes, while other threads use the module itself.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import copy
import functools
import types
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptrt.errors import NotTraceable, UnsupportedParameter
from adaptrt.parts import prepare


def call_module(
    module: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    """Calls a shadow of `module` with these parameters and buffers.

    Args:
      module: the module to call. Neither it nor its tensors are changed.
      params: parameters by name. A tensor that the module knows by several names is given by the first.
      buffers: buffers by name, likewise. They are not written to.
      args, kwargs: arguments of the call.
    Returns:
      What the module returned, and the buffers as the call left them.
    Raises:
      UnsupportedParameter: it writes to a buffer that shares memory with another one.
    """
    owned = {name: value.clone() for name, value in buffers.items()}
    token = _written.set([])
    try:
        output, values = _call(module, params, owned, args, kwargs)
        noted = {id(value) for value in _written.get()}
    finally:
        _written.reset(token)
    after = {name: values[name] for name in buffers}
    _refuse_shared(module, [name for name, value in after.items() if value is not owned[name] or value._version or id(value) in noted])
    return output, after


_written: contextvars.ContextVar[list[Tensor]] = contextvars.ContextVar("written")


def note_write(*values: Tensor) -> None:
    """Says that these tensors are written to by an operation that does not count as one, so that their version stays what it was."""
    _written.get([]).extend(values)


def _refuse_shared(module: nn.Module, written: Sequence[str]) -> None:
    """Raises if a buffer that was written shares memory with another one: in a program each buffer has memory of its own.

    Raises:
      UnsupportedParameter: there is such a buffer.
    """
    named = dict(module.named_buffers())
    for name in written:
        memory = _memory(named[name])
        for other, value in named.items():
            if other != name and memory and _memory(value) == memory:
                raise UnsupportedParameter(
                    f"buffers '{other}' and '{name}' share memory, and {type(module).__name__} writes to '{name}', which would not "
                    "change the other in a program; make them one buffer, or clone one"
                )


def _memory(buffer: Tensor) -> int:
    return 0 if buffer.device.type == "meta" or buffer.layout is not torch.strided else buffer.untyped_storage().data_ptr()


def call_stateless(module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...]) -> Any:
    """Calls a shadow of `module` with these parameters and buffers, given by name, and returns its output.

    Raises:
      NotTraceable: the module writes to a buffer, and the new value would be lost.
    """
    owned = {name: tensors[name].clone() for name, _ in module.named_buffers()}
    output, values = _call(module, tensors, owned, args, {})
    for name, value in owned.items():
        if values[name] is not value or value._version:
            raise NotTraceable(
                f"{type(module).__name__} writes to its buffer '{name}', which would be lost. Return it as part of its state"
            )
    return output


def _call(
    module: nn.Module, params: Mapping[str, Tensor], owned: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    """Returns the output of a shadow and all its tensors by name, as the call left them. `owned` are the buffers that it may write to."""
    values = {name: params[first] for name, first in canonical_names(module.named_parameters(remove_duplicate=False)).items()}
    values |= {name: owned[first] for name, first in canonical_names(module.named_buffers(remove_duplicate=False)).items()}
    # All aliases are in `values` already. With tie_weights, functional_call would not write a buffer that forward assigned anew into them.
    calls = _calls.get(None)
    base = module if calls is None else calls.base_of(module)
    twin = shadow(base)
    for part in twin.modules():
        prepare(part)
    output = torch.func.functional_call(twin, values, args, dict(kwargs), tie_weights=False)
    if calls is not None:
        calls.note(module, base, twin)
    return output, values


class Calls:
    """The calls of modules in a block.

    Attributes:
      made: for each the module of which a shadow was called, and the shadow as the call left it.
      follow: whether each call of a module goes on from the attributes that the call before has left, as it would without shadows.
    """

    def __init__(self, follow: bool) -> None:
        self.made: list[tuple[nn.Module, nn.Module]] = []
        self.follow = follow
        self._latest: dict[int, nn.Module] = {}

    def base_of(self, module: nn.Module) -> nn.Module:
        """The module of which a call makes a shadow."""
        return self._latest.get(id(module), module) if self.follow else module

    def note(self, module: nn.Module, base: nn.Module, twin: nn.Module) -> None:
        """Notes a call."""
        self.made.append((base, twin))
        self._latest[id(module)] = twin


_calls: contextvars.ContextVar[Calls] = contextvars.ContextVar("calls")


@contextlib.contextmanager
def watch_calls(follow: bool = False) -> Generator[Calls]:
    """Notes the calls of modules in the block, so that what they do to attributes can be looked at."""
    calls = Calls(follow)
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def canonical_names(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Returns for every name the first name of the same tensor.

    >>> shared = torch.zeros(2)
    >>> canonical_names([("encoder.weight", shared), ("bias", torch.ones(1)), ("decoder.weight", shared)])
    {'encoder.weight': 'encoder.weight', 'bias': 'bias', 'decoder.weight': 'encoder.weight'}
    """
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in named}


def shadow(module: nn.Module) -> nn.Module:
    """Copies the module objects of a module tree and the containers that hold them. Everything else, such as tensors, is shared.

    A module that is used in several places has one copy. Methods that are bound to a module of the tree (an instance's own `forward`,
    hooks) are bound to the copy of that module.
    """
    copies: dict[int, nn.Module] = {id(part): object.__new__(type(part)) for part in module.modules()}
    for part in module.modules():
        copies[id(part)].__dict__.update({name: remapped(value, copies) for name, value in vars(part).items()})
    return copies[id(module)]


def _uncompiled(value: Any) -> Any:
    """Returns what a function was made from by `torch.compile` or `torch.compiler.disable`, or the function itself."""
    while isinstance(value, types.FunctionType) and str(value.__globals__.get("__name__")).startswith("torch._dynamo."):
        inner = vars(value).get("_torchdynamo_orig_callable", vars(value).get("__wrapped__"))
        if inner is None:
            break
        value = inner
    return value


def remapped(value: Any, parts: Mapping[int, nn.Module]) -> Any:
    """Replaces the modules in `value`, keys of dicts among them, by those in `parts`, which are found by id.

    A number that is the `id` of such a module becomes that of the module in its place: it is the address of a living object, so no other
    number is like it. Containers and partial functions are copied, and methods are bound anew. What `torch.compile` made of a method, or
    excluded from compiling, is replaced by the method.
    """
    if isinstance(value, nn.Module):
        return parts.get(id(value), value)
    if type(value) is int:
        return id(parts[value]) if value in parts else value
    if isinstance(value, types.MethodType) and id(value.__self__) in parts:
        return types.MethodType(value.__func__, parts[id(value.__self__)])
    if isinstance(value, types.FunctionType):
        method = _uncompiled(value)
        return remapped(method, parts) if method is not value and refers(method, parts) else value
    if type(value) is functools.partial and refers(value, parts):
        return functools.partial(remapped(value.func, parts), *remapped(value.args, parts), **remapped(value.keywords, parts))
    if isinstance(value, tuple):
        held = [remapped(entry, parts) for entry in value]
        return type(value)(*held) if hasattr(value, "_fields") else tuple(held) if type(value) is tuple else value
    if isinstance(value, dict):
        # Modules keep a dozen ordered dicts each, on which copy.copy takes ten times as long.
        twin = value.copy() if type(value) in (dict, collections.OrderedDict) else copy.copy(value)
        for key, entry in twin.items():
            twin[key] = remapped(entry, parts)
        if any(type(key) is not str and refers(key, parts) for key in twin):
            entries = [(remapped(key, parts), entry) for key, entry in twin.items()]  # in their order
            twin.clear()
            twin.update(entries)
        return twin
    if isinstance(value, list | set | frozenset | collections.deque):
        held = [remapped(entry, parts) for entry in value]
        if type(value) in (list, set, frozenset):
            return type(value)(held)
        twin = copy.copy(value)
        if isinstance(twin, list):
            twin[:] = held
        elif isinstance(twin, collections.deque):
            twin.clear()
            twin.extend(held)
        return twin
    return value


def refers(value: Any, parts: Mapping[int, nn.Module]) -> bool:
    """Whether `remapped` would replace anything in `value`."""
    if isinstance(value, nn.Module):
        return id(value) in parts
    if type(value) is int:
        return value in parts
    if isinstance(value, types.MethodType):
        return id(value.__self__) in parts
    if isinstance(value, types.FunctionType):
        method = _uncompiled(value)
        return method is not value and refers(method, parts)
    if type(value) is functools.partial:
        return refers((value.func, value.args, value.keywords), parts)
    if isinstance(value, dict):
        return any(refers(part, parts) for entry in value.items() for part in entry)
    if isinstance(value, list | tuple | set | frozenset | collections.deque):
        return any(refers(entry, parts) for entry in value)
    return False
