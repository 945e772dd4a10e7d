"""Notices when the layers of a model are not those that it had when its unroll was made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from adaptrt.errors import ModelChanged
from adaptrt.functional import canonical_names
from adaptrt.tree import Spec

_TABLES = ("_modules", "_parameters", "_buffers")


class ModelTree:
    """The modules of a model and the names of their parameters and buffers.

    Values of parameters and buffers may change, also by assignment: they are read at every call.

    Args:
      roots: the modules, by names for messages.
    """

    def __init__(self, roots: Mapping[str, nn.Module]) -> None:
        self._roots = dict(roots)
        self._specs = {path: Spec.of(value) for path, value in _named(roots)}
        self._first = canonical_names(_named(roots))
        self._known: list[tuple[str, nn.Module, dict[str, nn.Module | None], dict[str, list[str]]]] = []
        self._unset: list[tuple[str, nn.Module, str, str]] = []
        self._tied: list[tuple[str, nn.Module, str, str, nn.Module, str]] = []
        constants: dict[str, Any] = {}
        conditions = ["True"]
        places: dict[int, tuple[tuple[str, str], tuple[str, nn.Module, str]]] = {}  # where each parameter is for the first time
        for root, model in roots.items():
            for name, part in model.named_modules(prefix=root):
                held = f"m{len(self._known)}"
                constants[held] = part
                self._known.append((name, part, dict(part._modules), {table: [*getattr(part, table)] for table in _TABLES}))
                conditions += [_has_keys(f"{held}.{table}", [*getattr(part, table)]) for table in _TABLES]
                unset = [(table, key) for table in _TABLES for key, value in getattr(part, table).items() if value is None]
                self._unset += [(name, part, table, key) for table, key in unset]
                conditions += [f"{held}.{table}[{key!r}] is None" for table, key in unset if table != "_modules"]
                kept = [(table, key) for table in _TABLES[1:] for key, value in getattr(part, table).items() if value is not None]
                conditions += [f"{held}.{table}[{key!r}] is not None" for table, key in kept]
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

    def require_same_tensors(self) -> None:
        """Checks that no two tensors were made one, which `require_unchanged` does not see.

        Raises:
          ModelChanged: two were; names them.
        """
        for path, other in canonical_names(_named(self._roots)).items():
            if path != other and self._first.get(path) != self._first.get(other):
                raise ModelChanged(
                    f"'{other}' and '{path}', which were two tensors, were made one after compile_unroll; make a new unroll for the model "
                    "as it is now"
                )

    def changed_specs(self) -> str:
        """Says in words which parameter or buffer has another shape, dtype or device than at first; empty if none has."""
        for path, value in _named(self._roots):
            known, spec = self._specs.get(path), Spec.of(value)
            if known is not None and known != spec:
                return f"'{path}' was {known} when compile_unroll was called, and is {spec} now."
        return ""

    def _difference(self) -> str:
        for path, part, table, key in self._unset:
            if getattr(part, table).get(key) is not None:
                return f"'{path}.{key}', which was None, was set to a {type(getattr(part, table)[key]).__name__}"
        for path, part, key, other, of, name in self._tied:
            if part._parameters.get(key) is not of._parameters.get(name):
                return f"the parameters '{path}' and '{other}.{name}', which were one tensor, were made two"
        unset = {(path, table, key) for path, _, table, key in self._unset}
        for path, part, children, names in self._known:
            for child, value in children.items():
                now = part._modules.get(child)
                if now is not value and child in part._modules:
                    return f"the layer '{path}.{child}' was replaced by {'None' if now is None else f'a {type(now).__name__}'}"
            for table, kind in (("_modules", "layer"), ("_parameters", "parameter"), ("_buffers", "buffer")):
                now = [*getattr(part, table)]
                for name in sorted({*now} ^ {*names[table]}):
                    return f"the {kind} '{path}.{name}' was {'added' if name in now else 'removed'}"
                if now != names[table]:
                    return f"the {kind}s of '{path}' were put in another order, {', '.join(now)},"
                for name in names[table]:
                    if table != "_modules" and getattr(part, table)[name] is None and (path, table, name) not in unset:
                        return f"the {kind} '{path}.{name}' was set to None"
        return "the model was changed"


def _has_keys(table: str, keys: list[str]) -> str:
    """A condition that a table has these keys in this order. That of a single one is looked at by its entry."""
    return f"[*{table}] == {keys!r}" if len(keys) > 1 else f"len({table}) == {len(keys)}"


def _named(roots: Mapping[str, nn.Module]) -> list[tuple[str, Tensor]]:
    """Returns each parameter and buffer with its path; a tensor with several names has each of them."""
    return [
        named
        for root, model in roots.items()
        for named in (
            *model.named_parameters(prefix=root, remove_duplicate=False),
            *model.named_buffers(prefix=root, remove_duplicate=False),
        )
        if not isinstance(named[1], nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer)
    ]
