"""The Python objects that can be reached from what the user has passed in: what a pass wrote to them, and putting it back.

If no other thread runs Python, every change is the pass's. Otherwise other threads may write to the same objects meanwhile. Then a change
counts as the pass's only if code that ran may have made it: if it sets an attribute or a global name of this name, or changes a container
that is reached by a name in it (`bytecode.py`). What nobody but other threads can have written is left alone.

Known limits: what other threads put into a container that the pass itself writes into meanwhile is taken out with what the pass wrote,
unless it has tensors with values, or stands in a list into which the pass has put tensors. The same is true of what they do to an object of
the standard library's, such as an event, which the pass uses, too.
"""

from __future__ import annotations

import array
import collections
import contextlib
import copy
import dataclasses
import functools
import operator
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Generator, Mapping
from typing import Any

from torch import Tensor, nn

from adaptrt.errors import NotTraceable
from adaptrt.functional import remapped
from adaptrt.graph.capture import is_of_trace
from adaptrt.inner.bytecode import MUTATORS, facts
from adaptrt.inner.executed import Executed
from adaptrt.inner.positions import position
from adaptrt.inner.reachable import MISSING, PLAIN, TABLES, Kind, Opening, Walk, getter_names, short, shown, slot
from adaptrt.inner.restore import Named, is_longer, put
from adaptrt.inner.scopes import of_module, scopes
from adaptrt.inner.user_code import IMMUTABLE, is_array, outside, slots_of

_MANY = 200_000
"""Objects that are looked at, which takes a second or two for each program; beyond it a warning says so."""


@dataclasses.dataclass(frozen=True, slots=True)
class Write:
    """A value that a pass has replaced; an entry that is not there before or afterwards counts as `MISSING`."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path} ({short(self.before)} before, {short(self.after)} after)"


class Snapshot:
    """The Python objects that can be reached from what the user has passed in, with their contents.

    Args:
      roots: by names for messages.
      executed: the code that runs between the snapshot and what is asked of it.
    """

    def __init__(self, roots: Mapping[str, Any], executed: Executed) -> None:
        self._executed = executed
        self._holders: dict[tuple[Kind, int], tuple[Kind, str, Any, Any]] = {}
        self._paths: dict[int, list[str]] = {}
        self._written: set[int] = set()  # containers that code can write into by a method that it has at hand
        self._of_library: dict[int, str] = {}  # paths of objects of a library's, by the identity of containers that are their attributes
        self._modules: list[dict[str, Any]] = []  # the global names of modules that are held elsewhere than in global names
        self._without_values: list[dict[str, Any]] = []  # those of modules that made tensors of the trace when they were imported
        self._walk = Walk(self._visit)
        self._walk.go(roots.items(), [opening for code, scope in executed.codes.values() for opening in scopes(code, scope)])
        if len(self._holders) > _MANY:
            warnings.warn(
                f"more than {_MANY} Python objects can be reached from the model, the loss and the optimiser. Only those nearest to them "
                "are looked at, so that what a pass writes to the others is not noticed. Keep large tables of objects out of reach",
                stacklevel=outside(),
            )

    def enter(self, code: types.CodeType | None, scope: dict[str, Any]) -> None:
        """Takes the global names of a function that is about to run for the first time, or of a module that was imported."""
        if code is None:
            if any(is_of_trace(found) for value in list(scope.values()) for found in _tensors(value)):
                self._without_values.append(scope)
            self._modules.append(scope)
            self._walk.go(openings=[of_module(scope, self._executed.names)])
        else:
            held = [of_module(module, facts(code).names) for module in self._modules]
            self._walk.go(openings=[*scopes(code, scope), *held])

    def writes(self) -> list[Write]:
        """What has changed since.

        Raises:
          NotTraceable: a module was imported that has made tensors, which are of the trace and have no values.
        """
        for scope in self._without_values:
            raise NotTraceable(
                f"a pass of the model, the loss or the optimiser is the first to import the module {scope.get('__name__')}, which makes "
                "tensors when it is imported. Import it before, for example where the model is defined"
            )
        return [write for path, _, before, after in self._changes(may_own_values=True) for write in _differences(path, before, after)]

    def restore(self) -> None:
        """Puts everything back. A tensor with values in a container stays, as another thread may have computed it."""
        for scope in self._without_values:
            sys.modules.pop(scope["__name__"], None)
        for _, holder, before, after in self._changes(may_own_values=False):
            if _differences("", before, after):
                put(holder, before, after)

    def _visit(self, opening: Opening) -> list[tuple[Any, Any]]:
        kind, holder = opening.kind, opening.holder
        if len(self._holders) > _MANY or (kind is Kind.LIBRARY and type(opening.owner).__module__.startswith("logging")):
            return []
        entries = [
            (key, value) for key, value in opening.entries if type(value) not in PLAIN and not (kind is Kind.MODULE and key in TABLES)
        ]
        for key, value in entries:
            if isinstance(value, list | dict | set | collections.deque) or is_array(value):
                self._paths.setdefault(id(value), []).extend([opening.path_of(key), *([opening.path] if opening.is_whole else [])])
            elif isinstance(value, types.BuiltinMethodType) and value.__name__ in MUTATORS:
                self._written.add(id(value.__self__))
            self._executed.getters |= getter_names(value)
        if kind is Kind.LIBRARY:  # what a queue, an event or a dict of weak references holds, and nothing further
            entries = [(key, value) for key, value in entries if type(value) in (list, dict, set, collections.deque)]
            self._of_library |= {id(value): opening.path for _, value in entries}
        if kind is Kind.SCOPE:
            if opening.owner is not None:
                self._modules.append(holder)
                entries = list(of_module(holder, self._executed.names).entries)
            entries = [(key, value) for key, value in entries if not isinstance(value, types.ModuleType)]
        if kind not in (Kind.FIXED, Kind.TUPLE, Kind.VIEW):
            self._holders.setdefault((kind, id(holder)), (kind, opening.path, holder, _content(kind, holder)))
        return entries

    def _changes(self, may_own_values: bool) -> list[tuple[str, Any, Any, Any]]:
        """Path, holder, and content before and after of what the pass may have changed.

        Args:
          may_own_values: whether tensors with values count, which a pass can have put somewhere, but not computed.
        """
        found: list[tuple[str, Any, Any, Any]] = []
        is_all_own = self._executed.is_alone()
        for kind, path, holder, before in self._holders.values():
            after = _content(kind, holder)
            if _may_differ(before, after):
                if not is_all_own:
                    before, after = self._own(kind, holder, path, before, after, may_own_values)
                elif isinstance(before, dict):
                    changed = [key for key in {**before, **after} if before.get(key, MISSING) is not after.get(key, MISSING)]
                    before, after = ({key: content[key] for key in changed if key in content} for content in (before, after))
                found.append((path, Named(holder) if kind is Kind.NAMED else holder, before, after))
        return found

    def _own(self, kind: Kind, holder: Any, path: str, before: Any, after: Any, may_own_values: bool) -> tuple[Any, Any]:
        """Both contents without what only other threads can have changed."""
        if kind in (Kind.DICT, Kind.LIST, Kind.SET, Kind.ARRAY):
            return self._own_entries(holder, path, before, after, may_own_values)
        if kind is Kind.CELL:
            return before, after if self._executed.may_set_variable(path.rpartition(".")[2]) else before
        if kind is Kind.SCOPE:
            may_set = functools.partial(self._executed.may_set_global, holder)
        elif kind in (Kind.ATTRIBUTES, Kind.LIBRARY, Kind.MODULE, Kind.CLASS, Kind.NAMED):
            by_library = kind is Kind.LIBRARY and self._executed.names_one_at(path)
            may_set = functools.partial(self._executed.may_set, by_library=by_library)
        else:
            return before, after
        changed = [key for key in {**before, **after} if before.get(key, MISSING) is not after.get(key, MISSING)]
        changed = [key for key in changed if may_set(str(key)) or any(map(is_of_trace, _tensors(after.get(key, MISSING))))]
        return tuple({key: content[key] for key in changed if key in content} for content in (before, after))  # type: ignore[return-value]

    def _own_entries(self, holder: Any, path: str, before: Any, after: Any, may_own_values: bool) -> tuple[Any, Any]:
        paths = [found.partition(".")[2] for found in (path, *self._paths.get(id(holder), ()))]
        owner = self._of_library.get(id(holder))
        by_library = owner is not None and self._executed.names_one_at(owner)
        may_write = id(holder) in self._written or self._executed.may_write_into(paths, by_library=by_library)

        def is_own(entry: Any) -> bool:
            tensors = _tensors(entry)
            return any(map(is_of_trace, tensors)) or (may_write and (may_own_values or not tensors))

        if isinstance(before, dict):
            changed = [key for key in {**before, **after} if before.get(key, MISSING) is not after.get(key, MISSING)]
            changed = [key for key in changed if is_own(after.get(key, MISSING))]
            return tuple({key: content[key] for key in changed if key in content} for content in (before, after))  # type: ignore[return-value]
        if isinstance(before, set):
            return before, (before & after if may_write else before) | set(filter(is_own, after - before))
        if isinstance(before, list) and is_longer(before, after):
            added = after[len(before) :]
            of_trace = [entry for entry in added if any(map(is_of_trace, _tensors(entry)))]
            return before, [*before, *(of_trace if of_trace and not may_own_values else filter(is_own, added))]
        return before, after if may_write else before


def _tensors(value: Any, depth: int = 0) -> list[Tensor]:
    """The tensors in an entry of a container."""
    if isinstance(value, Tensor):
        return [value]
    if depth < 4 and isinstance(value, list | tuple | dict | set | frozenset | collections.deque):
        parts = list(dict.values(value)) if isinstance(value, dict) else list(value)
        return [found for part in parts for found in _tensors(part, depth + 1)]
    own = getattr(value, "__dict__", None) if depth < 4 and not isinstance(value, type | types.ModuleType | nn.Module) else None
    return [found for part in list(own.values()) for found in _tensors(part, depth + 1)] if isinstance(own, dict) else []


def _may_differ(before: Any, after: Any) -> bool:
    """Whether it is worth looking closely."""
    if isinstance(before, dict):
        return len(before) != len(after) or any(after.get(key, MISSING) is not value for key, value in before.items())
    if isinstance(before, list):
        return len(before) != len(after) or not all(map(operator.is_, before, after))
    return True


def _content(kind: Kind, holder: Any) -> Any:
    """A shallow copy of what it holds."""
    match kind:
        case Kind.CELL:
            return holder.cell_contents if holder != types.CellType() else MISSING
        case Kind.NAMED:
            return _named(holder)
        case Kind.ARRAY:
            return copy.copy(holder)
        case Kind.CLASS:
            return dict(vars(holder))
        case Kind.POSITION:
            return (position(holder),)
        case Kind.CACHE:
            return holder.cache_info().misses
        case Kind.CONTEXT:
            return holder.get(MISSING)
        case Kind.SET:
            return set(holder)
        case Kind.LIST:
            return list(holder)
        case _:  # a dict, of which a subclass may make another object at each look-up
            return dict(dict.items(holder))


def _named(holder: Any) -> dict[str, Any]:
    if isinstance(holder, threading.local):
        return dict(vars(holder))
    names = slots_of(type(holder)) if not isinstance(holder, types.FunctionType) else ("__code__", "__defaults__", "__kwdefaults__")
    found = {name: slot(holder, name) for name in names}
    return {name: value for name, value in found.items() if value is not MISSING}


def _differences(path: str, before: Any, after: Any) -> list[Write]:
    """What is another object in the contents of one holder."""
    if isinstance(before, dict):
        if len(before) == len(after) and all(after.get(key, MISSING) is value for key, value in before.items()):
            return []
        keys = [key for key in {**before, **after} if not is_same(before.get(key, MISSING), after.get(key, MISSING), {})]
        is_named = all(isinstance(key, str) and key.isidentifier() for key in keys)
        return [
            Write(f"{path}.{key}" if is_named else f"{path}[{shown(key)}]", before.get(key, MISSING), after.get(key, MISSING))
            for key in keys
        ]
    return [] if is_same(before, after, {}) else [Write(path, before, after)]


def is_same(before: Any, after: Any, parts: Mapping[int, Any], settled: bool = False) -> bool:
    """Whether a value is what it was before.

    Args:
      before, after: the values.
      parts: the modules that stand for those in `before`, by the identity of these.
      settled: accept one tensor in place of another, and one object in place of another whose attributes are the same.
    """
    if before is after:
        return True
    if isinstance(before, nn.Module):
        return parts.get(id(before), before) is after
    if isinstance(before, bytearray | array.array):
        return type(before) is type(after) and before == after
    if is_array(before):
        return is_array(after) and before.dtype == after.dtype and before.shape == after.shape and before.tobytes() == after.tobytes()
    if isinstance(before, Tensor):
        return settled and isinstance(after, Tensor)
    if type(before) is not type(after):
        return False
    if isinstance(before, IMMUTABLE):
        before = remapped(before, parts) if type(before) is int else before  # the identity of a module, perhaps
        return before == after or repr(before) == repr(after)
    if isinstance(before, weakref.ref):
        return settled or before() is after()
    if isinstance(before, types.MethodType):
        return before.__func__ is after.__func__ and is_same(before.__self__, after.__self__, parts, settled)
    if isinstance(before, dict):
        keys = {key: remapped(key, parts) if parts and type(key) is not str else key for key in before}
        return set(keys.values()) == after.keys() and all(is_same(before[key], after[now], parts, settled) for key, now in keys.items())
    if isinstance(before, list | tuple | collections.deque):
        return len(before) == len(after) and all(is_same(old, new, parts, settled) for old, new in zip(before, after, strict=True))
    if isinstance(before, set | frozenset):
        same = {id(parts.get(id(entry), entry)) for entry in before} == set(map(id, after))
        return same or {remapped(entry, parts) for entry in before} == after
    return settled and hasattr(before, "__dict__") and is_same(vars(before), vars(after), parts, settled)


@contextlib.contextmanager
def undone(roots: Mapping[str, Any], executed: Executed) -> Generator[Snapshot]:
    """Undoes what the block writes to objects that can be reached from `roots` or from code that is recorded as `executed`."""
    before = Snapshot(roots, executed)
    try:
        with executed.announcing(before.enter):
            yield before
    finally:
        before.restore()
