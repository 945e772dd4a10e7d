"""The methods of a handle besides `forward`: their attention has a second derivative, and what they cannot do is refused by name.

A call of a module runs on its twin, within the block of `FastWeights.differentiable_twice`. Any other method or property of the model's own
class runs on the handle's module itself, and may compute attention without calling a module. So the class of each module of a handle has
these methods once more, each within such a block.

The functions of a handle's modules that are wrapped:

- methods, properties, static methods and class methods of the model's own class and its bases;
- methods that were set on an instance, its own `forward` included;
- a generator that one of these returns: each of its steps is a block, because the caller's code runs in between.

Those of `nn.Module` and of `torch.nn.modules` are not wrapped, because none of them but `forward` computes attention except by calls of
modules. Nor are special methods such as `__len__`, and what runs later than the call: coroutines, and the body of a context manager.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from adaptrt.errors import NotALeaf
from adaptrt.higher.fast_weights import FastWeights

_OF_PYTORCH = "torch.nn.modules."
_FUNCTIONS = (types.FunctionType, staticmethod, classmethod, functools.partialmethod)


def methods_for(kind: Any, base: Any) -> dict[str, Any]:
    """Returns what the class of a handle's module gets in place of the methods of its original.

    Args:
      kind: the original's class.
      base: the class of the handle's module that comes before it. What `base` has is left out, but `forward`, which shows the signature of
        the original's. Generation by libraries depends on it: they pass a mask only where `forward` takes one.
    """
    forward = functools.update_wrapper(_copy(base.forward), kind.forward)
    if kind.__module__.startswith(_OF_PYTORCH):
        return {"forward": forward}
    own: set[str] = set()
    entries: dict[str, Any] = {}
    for owner in reversed(kind.__mro__):  # so that what overrides comes later
        entries.update(vars(owner))
        if not owner.__module__.startswith(_OF_PYTORCH):
            own.update(vars(owner))
    found: dict[str, Any] = {"forward": forward}
    for name in own - _names_of(base):
        value = entries[name]
        if type(value) is property:
            found[name] = _wrapped(value)
        elif isinstance(value, _FUNCTIONS) and not name.startswith("__"):
            found[name] = _Later(name, value)
    return found


@functools.cache
def _names_of(base: type) -> frozenset[str]:
    return frozenset(dir(base))


def _copy(function: Any) -> Any:
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def wrap_own_methods(part: nn.Module) -> None:
    """Wraps the methods that were set on a module of a handle itself, and not by its class."""
    own = vars(part)
    for name, value in own.items():
        if type(value) is types.MethodType and isinstance(value.__self__, nn.Module) and isinstance(value.__func__, types.FunctionType):
            own[name] = types.MethodType(_wrapped(value.__func__), value.__self__)


@contextmanager
def flags_refused() -> Iterator[None]:
    """Names the error of code in the block that sets `requires_grad` of a computed fast weight.

    Raises:
      NotALeaf: there is such code.
    """
    try:
        yield
    except RuntimeError as error:
        _refuse_flags(error)
        raise


def _refuse_flags(error: RuntimeError) -> None:
    if not isinstance(error, NotALeaf) and "requires_grad flags of leaf variables" in str(error):
        raise NotALeaf(
            "requires_grad of a computed tensor was to be set. The weights of a patched module are computed, by inner steps or by "
            "copy_initial_weights=False. Add adapters and parameters, and freeze or unfreeze weights, on the original, and patch it then; "
            "this patched module may be left half changed. To hold one weight fixed from here on, assign it detached: "
            "fmodel.layer.weight = fmodel.layer.weight.detach()"
        ) from error


class _Later:
    """An entry of a class that is wrapped when it is first asked for.

    Classes of libraries have hundreds of entries, and programs make a handle for each task.

    Args:
      name: its name.
      value: it as it stands in the original's class.
    """

    __slots__ = ("_name", "_value")

    def __init__(self, name: str, value: Any) -> None:
        self._name, self._value = name, value

    def __get__(self, part: Any, owner: type) -> Any:
        made = _wrapped(self._value)
        for kind in owner.__mro__:
            if vars(kind).get(self._name) is self:
                setattr(kind, self._name, made)
        return made.__get__(part, owner)


def _wrapped(value: Any) -> Any:
    """Returns a property, a function or another kind of method that runs within the block."""
    if type(value) is property:
        get = None if value.fget is None else _method(value.fget)
        return property(get, value.fset, value.fdel, value.__doc__)
    return _method(value) if isinstance(value, types.FunctionType) else _Bound(value)


def _method(function: Any) -> Any:
    @functools.wraps(function)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        fast = vars(self).get("_adaptrt_fast")  # a twin, and a slice of a handle, have none
        return function(self, *args, **kwargs) if fast is None else _run(fast, function, self, *args, **kwargs)

    return run


class _Bound:
    """A static method, a class method or a partial method, which runs within the block where a module of a handle is asked for it.

    Args:
      inner: it as it stands in the original's class.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __get__(self, part: Any, owner: type | None = None) -> Any:
        bound = self._inner.__get__(part, owner)
        fast = None if part is None else vars(part).get("_adaptrt_fast")
        if fast is None or not isinstance(bound, types.FunctionType | types.MethodType | functools.partial):  # such as a class
            return bound
        return functools.update_wrapper(functools.partial(_run, fast, bound), bound)


def _run(fast: FastWeights, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Calls a function within the block. If it returns a generator, the generator's steps are within it, too."""
    result = _within(fast, function, *args, **kwargs)
    return _step_by_step(fast, result) if type(result) is types.GeneratorType else result


def _within(fast: FastWeights, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    try:
        with fast.differentiable_twice():
            return function(*args, **kwargs)
    except RuntimeError as error:
        _refuse_flags(error)
        raise


def _step_by_step(fast: FastWeights, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """Does what `generator` does, with each of its steps within the block."""
    step: Callable[[], Any] = functools.partial(next, generator)
    while True:
        try:
            value = _within(fast, step)
        except StopIteration as end:
            return end.value
        try:
            given = yield value
        except GeneratorExit:
            generator.close()
            raise
        except BaseException as error:  # which the generator may catch
            step = functools.partial(generator.throw, error)
        else:
            step = functools.partial(generator.send, given)
