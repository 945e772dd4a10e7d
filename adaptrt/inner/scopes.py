"""The global names that code uses: those of its own module, of modules that it names or imports, and the environment."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Set
from typing import Any

from adaptrt.inner.bytecode import facts
from adaptrt.inner.reachable import MISSING, Kind, Opening
from adaptrt.inner.user_code import is_users_module


def imported(code: types.CodeType, scope: dict[str, Any]) -> list[types.ModuleType]:
    """The user's modules that code imports, as far as they have been imported already."""
    known = facts(code)
    paths = set(known.names) if known.names & {"import_module", "__import__", "modules"} else set[str]()
    for level, name in known.imports:
        package = str(scope.get("__package__") or scope.get("__name__", "")).split(".")
        above = package[: max(len(package) - level + 1, 0)] if level else []
        path = [*above, *(name.split(".") if name else [])]
        paths |= {".".join(path[:end]) for end in range(1, len(path) + 1)}
    found = [sys.modules.get(path) for path in sorted(paths)]
    return [module for module in found if isinstance(module, types.ModuleType) and is_users_module(module)]


def of_module(scope: dict[str, Any], names: Set[str]) -> Opening:
    """Those of the global names of a module that code names."""
    entries = [(name, scope[name]) for name in sorted(names & scope.keys())]
    return Opening(Kind.SCOPE, str(scope.get("__name__", "?")), scope, entries)


def scopes(code: types.CodeType, scope: dict[str, Any]) -> list[Opening]:
    """The global names that code uses, and those of the user's modules that it names, too."""
    known = facts(code)
    names = known.names if known.reads_computed else frozenset(code.co_names)
    if known.globals_by_name:
        names |= {name for name, value in list(scope.items()) if not isinstance(value, types.ModuleType | types.FunctionType | type)}
    found: dict[int, Opening] = {}

    def add(scope: dict[str, Any], path: str) -> None:
        if id(scope) in found:
            return
        entries = [(name, scope[name]) for name in sorted(names & scope.keys())]
        found[id(scope)] = Opening(Kind.SCOPE, path, scope, entries)
        for _, value in entries:
            if isinstance(value, types.ModuleType) and is_users_module(value):
                add(vars(value), value.__name__)

    path = str(scope.get("__name__", "?"))
    add(scope, path)
    for module in imported(code, scope):
        add(vars(module), module.__name__)
    absent = sorted(known.globals - scope.keys())  # built-in functions, most of them
    found[id(MISSING)] = Opening(Kind.SCOPE, path, scope, [(name, MISSING) for name in absent])
    if known.names & {"environ", "environb", "putenv"}:
        data = getattr(os.environ, "_data", {})
        found[id(data)] = Opening(Kind.DICT, "os.environ", data, list(data.items()))
    return list(found.values())
