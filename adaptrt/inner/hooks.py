"""Refuses hooks that recognise a module of the model by its identity.

A program is traced on copies of the modules (`functional.py`), and hooks are called with these. A hook that compares the module that it
is given with one that it holds, or looks it up in a table of its own, does not recognise the copy, and takes another branch than in an
eager call. Nothing else would show that.

So a hook is refused whose code both uses its module as a value, other than to ask for its attributes, its type or its name, and holds a
module of the model: in a closure, a global name, a default, an attribute of the object whose method it is, or a container in one of
these.

Known limit: what functions do that a hook calls is not looked at.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterable
from typing import Any

from torch import nn

from adaptrt.errors import NotTraceable
from adaptrt.inner.reachable import HOOKS, HOOKS_OF_ALL_MODULES
from adaptrt.inner.user_code import is_of_user

_ASK = frozenset({"isinstance", "issubclass", "type", "getattr", "hasattr", "setattr", "callable", "repr", "str", "print"})
"""Functions to which a hook may give its module, which are not asked which module it is."""


def refuse_hooks(model: nn.Module) -> None:
    """Raises if a hook of the model's modules, or one for all modules, recognises a module of the model.

    Raises:
      NotTraceable: it does; names the hook's line and the module that it holds.
    """
    parts = {id(part): name for name, part in model.named_modules()}
    of_parts = [hook for part in model.modules() for table in HOOKS for hook in list(vars(part).get(table, {}).values())]
    for hook in (*of_parts, *[hook for table in HOOKS_OF_ALL_MODULES.values() for hook in list(table.values())]):
        function, given = _function(hook)
        if function is None or not is_of_user(function.__code__, function.__globals__) or not _uses_module(function.__code__, given):
            continue
        for name, value in _held(function, hook):
            part = _part(value, parts)
            if part is not None:
                code = function.__code__
                raise NotTraceable(
                    f"the hook {function.__name__} ({code.co_filename}:{code.co_firstlineno}) holds "
                    f"{f'module {part!r}' if part else 'the model'} in '{name}' and compares the module that it is given, or looks it "
                    "up. A program runs on copies of the modules, which it would not recognise. Register it on the modules that it is "
                    "meant for, or compare types, attributes or names"
                )


def _function(hook: Any) -> tuple[types.FunctionType | None, int]:
    """The Python function of a hook, and how many arguments it is given before the module."""
    given = 0
    while isinstance(hook, functools.partial):
        given += len(hook.args)
        hook = hook.func
    if isinstance(hook, types.MethodType):
        return (hook.__func__, given + 1) if isinstance(hook.__func__, types.FunctionType) else (None, 0)
    if isinstance(hook, types.FunctionType):
        return hook, given
    call: Any = type(hook).__call__
    return (call, given + 1) if isinstance(call, types.FunctionType) else (None, 0)


def _uses_module(code: types.CodeType, given: int) -> bool:
    """Whether code uses the argument with this number as a value."""
    if given >= code.co_argcount:
        return False
    module = code.co_varnames[given]
    steps = [
        step for step in dis.get_instructions(code) if step.opname not in ("PRECALL", "PUSH_NULL", "COPY_FREE_VARS", "RESUME", "CACHE")
    ]
    for before, step, after in zip([None, *steps[:-1]], steps, [*steps[1:], None], strict=True):
        if step.argval != module or step.opname not in ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE", "LOAD_FAST_BORROW"):
            continue
        is_asked = before is not None and before.opname in ("LOAD_GLOBAL", "LOAD_NAME") and before.argval in _ASK
        is_opened = after is not None and after.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "FORMAT_VALUE")
        if not is_asked and not is_opened:
            return True
    return False


def _held(function: types.FunctionType, hook: Any) -> Iterable[tuple[str, Any]]:
    """What a hook's code has at hand besides its arguments, by name."""
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if cell != types.CellType():
            yield name, cell.cell_contents
    for name in code.co_names:
        if name in function.__globals__:
            yield name, function.__globals__[name]
    yield from zip(code.co_varnames[code.co_argcount - len(function.__defaults__ or ()) :], function.__defaults__ or (), strict=False)
    yield from (function.__kwdefaults__ or {}).items()
    while isinstance(hook, functools.partial):
        yield from (("its arguments", value) for value in (*hook.args, *hook.keywords.values()))
        hook = hook.func
    owner = hook.__self__ if isinstance(hook, types.MethodType) else hook
    if not isinstance(owner, types.FunctionType | nn.Module):
        yield from ((name, value) for name, value in getattr(owner, "__dict__", {}).items() if name in code.co_names)


def _part(value: Any, parts: dict[int, str], depth: int = 0) -> str | None:
    """The name of a module of the model that a value is, or has in it, also by its `id`."""
    if isinstance(value, nn.Module):
        return parts.get(id(value))
    if type(value) is int:
        return parts.get(value)
    if depth < 2 and isinstance(value, dict | list | tuple | set | frozenset):
        entries = (*value.keys(), *value.values()) if isinstance(value, dict) else value
        return next((found for entry in list(entries) if (found := _part(entry, parts, depth + 1)) is not None), None)
    return None
