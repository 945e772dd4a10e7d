"""The Python objects that can be reached from what the user has passed in: what a pass wrote to them, and putting it back."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import operator
import random
import types
import weakref
from collections.abc import Generator, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from adaptrt.inner.user_code import IMMUTABLE, OPAQUE, Executed, is_array, is_of_user, is_users_class, slots_of

_MAX_OBJECTS = 20_000
"""Objects that are searched for state, those nearest to the model first."""

TABLES = frozenset({"_parameters", "_buffers", "_modules"})


@dataclasses.dataclass(frozen=True, slots=True)
class Write:
    """A value that a pass has replaced; an entry that is not there before or afterwards counts as `MISSING`."""

    path: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.path} ({_short(self.before)} before, {_short(self.after)} after)"


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, list | dict | set | collections.deque) and not all(isinstance(entry, IMMUTABLE) for entry in value):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value) if isinstance(value, (*IMMUTABLE, _Missing, list, dict, set, tuple)) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


class Snapshot:
    """The Python objects that can be reached from what the user has passed in, with their contents.

    Args:
      roots: by names for messages.
      executed: the code that runs between the snapshot and what is asked of it.
    """

    def __init__(self, roots: Mapping[str, Any], executed: Executed) -> None:
        self._executed = executed
        self._contents: list[tuple[str, Any, Any]] = []
        self._attributes: set[int] = set()
        self._scopes: set[int] = set()
        self._caches: list[tuple[Any, int]] = []
        self._seen: set[int] = set()
        left = collections.deque(roots.items())
        while left and len(self._seen) < _MAX_OBJECTS:
            path, value = left.popleft()
            if isinstance(value, type):
                left.extend(self._class(value))
            elif not isinstance(value, OPAQUE) and id(value) not in self._seen:
                self._seen.add(id(value))
                left.extend(self._visit(path, value))

    def writes(self) -> list[Write]:
        """What has changed since."""
        found: list[Write] = []
        for path, holder, before in self._contents:
            after = _content(holder)
            if self._may_differ(before, after):
                found += _differences(path, *self._own(holder, before, after))
        found += [
            Write(f"the cache of {cache.__name__}", misses, cache.cache_info().misses)
            for cache, misses in self._caches
            if cache.cache_info().misses != misses
        ]
        return found

    def restore(self) -> None:
        """Puts everything back."""
        for _, holder, before in self._contents:
            after = _content(holder)
            if self._may_differ(before, after):
                before, after = self._own(holder, before, after)
                if _differences("", before, after):
                    _put(holder, before, after)
        for cache, misses in self._caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()

    @staticmethod
    def _may_differ(before: Any, after: Any) -> bool:
        """Whether it is worth looking closely."""
        if not isinstance(before, dict):
            return True
        return len(before) != len(after) or any(after.get(key, MISSING) is not value for key, value in before.items())

    def _own(self, holder: Any, before: Any, after: Any) -> tuple[Any, Any]:
        """Both contents without the attributes and global names that no code that ran sets."""
        if id(holder) in self._attributes:
            may_set = self._executed.may_set
        elif id(holder) in self._scopes:
            may_set = functools.partial(self._executed.may_set_global, holder)
        else:
            return before, after
        changed = [key for key in {**before, **after} if before.get(key, MISSING) is not after.get(key, MISSING) and may_set(str(key))]
        return tuple({key: content[key] for key in changed if key in content} for content in (before, after))  # type: ignore[return-value]

    def _visit(self, path: str, value: Any) -> Iterable[tuple[str, Any]]:
        if isinstance(value, nn.Module):
            return self._module(path, value)
        if isinstance(value, functools.partial):
            return [(path, part) for part in (value.func, *value.args, *value.keywords.values())]
        if isinstance(value, types.MethodType):
            return [(path, value.__self__), (path, value.__func__)]
        if isinstance(value, types.FunctionType):
            return self._function(path, value)
        if isinstance(value, functools._lru_cache_wrapper):
            self._caches.append((value, value.cache_info().misses))
            return [(path, value.__wrapped__)]
        if isinstance(value, dict):
            self._keep(path, value)
            return [(f"{path}[{key!r}]", entry) for key, entry in dict.items(value)]
        if isinstance(value, list | tuple | set | frozenset | collections.deque):
            if not isinstance(value, tuple | frozenset):
                self._keep(path, value)
            return [(f"{path}[{index}]", entry) for index, entry in enumerate(value)]
        if is_array(value) or _position(value) is not None:
            self._keep(path, value)
            return []
        return self._object(path, value)

    def _keep(self, path: str, holder: Any) -> None:
        self._contents.append((path, holder, _content(holder)))

    def _module(self, path: str, module: nn.Module) -> list[tuple[str, Any]]:
        own = vars(module)
        self._attributes.add(id(own))
        self._keep(path, own)
        found = [(f"{path}.{name}", value) for name, value in own.items() if name not in TABLES]
        found += [(f"{path}.{name}", child) for name, child in module._modules.items() if child is not None]
        return [*found, *self._class(type(module))]

    def _function(self, path: str, function: types.FunctionType) -> list[tuple[str, Any]]:
        if not is_of_user(function.__code__, function.__globals__):
            return []
        found: list[tuple[str, Any]] = [(path, part) for part in (function.__defaults__, function.__kwdefaults__) if part]
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            path = f"{function.__name__}.<closure>.{name}"
            self._keep(path, cell)
            found.append((path, _content(cell)))
        scope = function.__globals__
        if id(scope) not in self._seen:
            self._seen.add(id(scope))
            self._scopes.add(id(scope))
            self._keep(scope.get("__name__", "?"), scope)
        names = dict.fromkeys(name for code in _codes(function.__code__) for name in code.co_names)
        return [*found, *[(f"{scope.get('__name__', '?')}.{name}", scope[name]) for name in names if name in scope]]

    def _object(self, path: str, value: Any) -> list[tuple[str, Any]]:
        if not is_users_class(type(value)):
            return []
        own = getattr(value, "__dict__", None)
        found: list[tuple[str, Any]] = []
        if isinstance(own, dict):
            self._attributes.add(id(own))
            self._keep(path, own)
            found = [(f"{path}.{name}", entry) for name, entry in own.items()]
        if slots_of(value):
            self._keep(path, _Slots(value))
            found += [(f"{path}.{name}", getattr(value, name)) for name in slots_of(value)]
        return [*found, *self._class(type(value))]

    def _class(self, kind: type) -> list[tuple[str, Any]]:
        """Functions and data of the user's classes."""
        found: list[tuple[str, Any]] = []
        for base in kind.__mro__:
            if is_users_class(base) and id(base) not in self._seen:
                self._seen.add(id(base))
                self._attributes.add(id(base))
                self._keep(base.__name__, base)
                for name, entry in vars(base).items():
                    entry = getattr(entry, "__func__", getattr(entry, "fget", entry))  # of a class or static method, of a property
                    found.append((f"{base.__name__}.{name}", entry))
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Slots:
    """The attributes of an object of a class with `__slots__`."""

    owner: Any


def _codes(code: types.CodeType) -> list[types.CodeType]:
    """A function's code, and that of the functions in it."""
    inner = [entry for constant in code.co_consts if isinstance(constant, types.CodeType) for entry in _codes(constant)]
    return [code, *inner]


def _content(holder: Any) -> Any:
    """A shallow copy of what it holds."""
    if isinstance(holder, types.CellType):
        return holder.cell_contents if holder != types.CellType() else MISSING
    if isinstance(holder, _Slots):
        return {name: getattr(holder.owner, name) for name in slots_of(holder.owner)}
    if is_array(holder):
        return holder.copy()
    if isinstance(holder, type):
        return dict(vars(holder))
    position = _position(holder)
    if position is not None:
        return position
    if isinstance(holder, dict):  # of which a subclass may make another object at each look-up
        return dict(dict.items(holder))
    return list(holder) if isinstance(holder, list | collections.deque) else set(holder)


def _position(value: Any) -> Any:
    """Where an iterator or a generator of random numbers is; None for everything else."""
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        if frame is None:
            return "ended"
        values = [(name, entry if isinstance(entry, IMMUTABLE) else id(entry)) for name, entry in frame.f_locals.items()]
        return frame.f_lasti, tuple(values)
    if hasattr(type(value), "__next__") and not hasattr(value, "__dict__"):
        return repr(value), operator.length_hint(value, -1)
    return None


def _put(holder: Any, content: Any, present: Any) -> None:
    """Puts a content in the place of the present one; never empties a dict, which other threads may read."""
    if isinstance(holder, types.CellType):
        if content is not MISSING:
            holder.cell_contents = content
        return
    if isinstance(holder, _Slots):
        for name, value in content.items():
            setattr(holder.owner, name, value)
        return
    if is_array(holder):
        holder[...] = content
        return
    if isinstance(holder, random.Random):
        holder.setstate(content)
        return
    if isinstance(holder, type):
        for name in present.keys() - content.keys():
            delattr(holder, name)
        for name, value in content.items():
            setattr(holder, name, value)
        return
    if _position(holder) is not None:  # there is no way back
        return
    if isinstance(holder, dict):
        _put_entries(holder, content, present)
    elif isinstance(holder, list):
        holder[:] = content
    else:
        holder.clear()
        (holder.extend if isinstance(holder, collections.deque) else holder.update)(content)


def _put_entries(holder: dict[Any, Any], content: dict[Any, Any], present: dict[Any, Any]) -> None:
    """Puts back what is another object. Everything else stays, as another thread may use the dict meanwhile."""
    kind: Any = collections.OrderedDict if isinstance(holder, collections.OrderedDict) else dict  # whatever a subclass does with entries
    for key, value in content.items():
        if dict.get(holder, key, MISSING) is not value:
            kind.__setitem__(holder, key, value)
    for key in present.keys() - content.keys():
        if dict.__contains__(holder, key):
            kind.__delitem__(holder, key)


def _differences(path: str, before: Any, after: Any) -> list[Write]:
    """What is another object in the contents of one holder."""
    if isinstance(before, dict):
        if len(before) == len(after) and all(after.get(key, MISSING) is value for key, value in before.items()):
            return []
        keys = [key for key in {**before, **after} if not is_same(before.get(key, MISSING), after.get(key, MISSING), {})]
        name = "{}.{}" if all(isinstance(key, str) and key.isidentifier() for key in keys) else "{}[{!r}]"
        return [Write(name.format(path, key), before.get(key, MISSING), after.get(key, MISSING)) for key in keys]
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
    if is_array(before):
        return is_array(after) and before.dtype == after.dtype and before.shape == after.shape and before.tobytes() == after.tobytes()
    if isinstance(before, Tensor):
        return settled and isinstance(after, Tensor)
    if type(before) is not type(after):
        return False
    if isinstance(before, IMMUTABLE):
        return before == after or repr(before) == repr(after)
    if isinstance(before, weakref.ref):
        return settled or before() is after()
    if isinstance(before, types.MethodType):
        return before.__func__ is after.__func__ and is_same(before.__self__, after.__self__, parts, settled)
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(is_same(value, after[key], parts, settled) for key, value in before.items())
    if isinstance(before, list | tuple | collections.deque):
        return len(before) == len(after) and all(is_same(old, new, parts, settled) for old, new in zip(before, after, strict=True))
    if isinstance(before, set | frozenset):
        return {id(parts.get(id(entry), entry)) for entry in before} == set(map(id, after)) or (not parts and before == after)
    return settled and hasattr(before, "__dict__") and is_same(vars(before), vars(after), parts, settled)


@contextlib.contextmanager
def undone(roots: Mapping[str, Any], executed: Executed) -> Generator[Snapshot]:
    """Undoes what the block writes to objects that can be reached from `roots`. `executed`: the code that runs in it."""
    before = Snapshot(roots, executed)
    try:
        yield before
    finally:
        before.restore()
