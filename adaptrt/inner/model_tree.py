"""Notices when the layers of a model are not those that it had when its unroll was made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from adaptrt.errors import ModelChanged

_TABLES = ("_modules", "_parameters", "_buffers")


class ModelTree:
    """The modules of a model and the names of their parameters and buffers.

    Values of parameters and buffers may change, also by assignment: they are read at every call.

    Args:
      roots: the modules, by names for messages.
    """

    def __init__(self, roots: Mapping[str, nn.Module]) -> None:
        self._known: list[tuple[str, nn.Module, dict[str, nn.Module | None], dict[str, set[str]]]] = []
        self._unset: list[tuple[str, nn.Module, str, str]] = []
        self._tied: list[tuple[str, nn.Module, str, str, nn.Module, str]] = []
        constants: dict[str, Any] = {}
        conditions = ["True"]
        places: dict[int, tuple[tuple[str, str], tuple[str, nn.Module, str]]] = {}  # where each parameter is for the first time
        for root, model in roots.items():
            for name, part in model.named_modules(prefix=root):
                held = f"m{len(self._known)}"
                constants[held] = part
                self._known.append((name, part, dict(part._modules), {table: set(getattr(part, table)) for table in _TABLES}))
                conditions += [f"len({held}.{table}) == {len(getattr(part, table))}" for table in _TABLES]
                unset = [(table, key) for table in _TABLES for key, value in getattr(part, table).items() if value is None]
                self._unset += [(name, part, table, key) for table, key in unset]
                conditions += [f"{held}.{table}[{key!r}] is None" for table, key in unset if table != "_modules"]
                for key, value in part._parameters.items():
                    if value is not None:
                        first, of = places.setdefault(id(value), ((held, key), (name, part, key)))
                        if first != (held, key):
                            self._tied.append((f"{name}.{key}", part, key, *of))
                            conditions.append(f"{held}._parameters[{key!r}] is {first[0]}._parameters[{first[1]!r}]")
                for index, (child, value) in enumerate(part._modules.items()):
                    constants[f"{held}_{index}"] = value
                    conditions.append(f"{held}._modules[{child!r}] is {held}_{index}")
        condition = "\n and ".join(conditions)
        exec(compile(f"def check():\n try: return ({condition})\n except KeyError: return False\n", "<layers>", "exec"), constants)
        self._is_unchanged: Callable[[], bool] = constants["check"]

    def require_unchanged(self) -> None:
        """Checks that no layer, parameter or buffer was added, removed or replaced by another.

        Raises:
          ModelChanged: one was; names it.
        """
        if not self._is_unchanged():
            raise ModelChanged(f"{self._difference()} after compile_unroll; make a new unroll for the model as it is now")

    def _difference(self) -> str:
        for path, part, table, key in self._unset:
            if getattr(part, table).get(key) is not None:
                return f"'{path}.{key}', which was None, was set to a {type(getattr(part, table)[key]).__name__}"
        for path, part, key, other, of, name in self._tied:
            if part._parameters.get(key) is not of._parameters.get(name):
                return f"the parameters '{path}' and '{other}.{name}', which were one tensor, were made two"
        for path, part, children, names in self._known:
            for child, value in children.items():
                now = part._modules.get(child)
                if now is not value and now is not None:
                    return f"the layer '{path}.{child}' was replaced by a {type(now).__name__}"
            for table, kind in (("_modules", "layer"), ("_parameters", "parameter"), ("_buffers", "buffer")):
                now = set(getattr(part, table))
                for name in sorted(now ^ names[table]):
                    return f"the {kind} '{path}.{name}' was {'added' if name in now else 'removed'}"
        return "the model was changed"
