"""Opens Python objects: what can be reached from a value, in parts that can be read and written one by one.

This is the one place that knows how modules, functions, classes, containers and other objects hold values. `python_state.py` walks through
the parts that code reads, and `snapshot.py` through all of them.
"""

from __future__ import annotations

import collections
import contextvars
import enum
import functools
import operator
import threading
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from adaptrt.inner.positions import position
from adaptrt.inner.user_code import (
    IMMUTABLE,
    is_array,
    is_holder,
    is_of_user,
    is_ours,
    is_read_by_library,
    is_users_class,
    is_users_module,
    slots_of,
)

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TABLES = ("_parameters", "_buffers", "_modules")
_INTERNALS = frozenset(vars(nn.Module())) - {*HOOKS, *TABLES, "training"}
"""Attributes of modules that are PyTorch's own."""

HOOKS_OF_ALL_MODULES: dict[str, Any] = {
    f"the {name.strip('_').replace('_', ' ')} of torch.nn": table
    for name in HOOKS
    if (table := vars(nn.modules.module).get(f"_global{name}")) is not None
}
"""The tables of hooks that every module runs, by names for messages."""

PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range})
"""Classes of values that hold nothing else."""


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()
"""In the place of a value where there is none."""


def short(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, list | dict | set | collections.deque) and not all(isinstance(entry, IMMUTABLE) for entry in value):
        return f"a {type(value).__name__} of {len(value)}"
    text = shown(value) if isinstance(value, (*IMMUTABLE, _Missing, list, dict, set, tuple)) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


class Kind(enum.Enum):
    """How a holder holds its entries."""

    ATTRIBUTES = "the dict of an object's attributes"
    MODULE = "that of a module"
    LIBRARY = "that of an object of a library's, of which only what code names is looked at"
    CLASS = "the attributes of a class"
    NAMED = "attributes that are in no dict"
    DICT = "a dict"
    VIEW = "a view of a dict, through which nothing can be written"
    LIST = "a list or a deque"
    TUPLE = "a tuple, which does not change"
    SET = "a set"
    FIXED = "parts that do not change"
    CELL = "a variable of a closure"
    SCOPE = "the global names of a module"
    ARRAY = "numbers in a block of memory"
    CONTEXT = "a context variable"
    POSITION = "an iterator or a generator of random numbers"
    CACHE = "what functools.lru_cache keeps"


class Opening(NamedTuple):
    """A part of an object.

    Attributes:
      kind: how it holds what it has.
      path: of the object, in words, for messages.
      holder: what is written to.
      entries: keys and values.
      is_whole: whether all entries count as read, whatever code names.
      owner: the layer, the function or the module, if it is one. A module has no entries: whoever asks takes those that code names.
    """

    kind: Kind
    path: str
    holder: Any
    entries: Iterable[tuple[Any, Any]] = ()
    is_whole: bool = False
    owner: Any = None

    def path_of(self, key: Any) -> str:
        """Where an entry is, in words."""
        if self.kind in (Kind.FIXED, Kind.CELL, Kind.CONTEXT):
            return self.path
        return (
            f"{self.path}[{shown(key)}]"
            if self.kind in (Kind.DICT, Kind.VIEW, Kind.LIST, Kind.TUPLE, Kind.SET, Kind.ARRAY)
            else f"{self.path}.{key}"
        )


def shown(value: Any) -> str:
    """What a value says of itself, if it says anything."""
    try:
        return repr(value)
    except Exception:  # it is the user's
        return f"a {type(value).__name__}"


def _answers(value: Any) -> bool:
    """Whether one can ask a value what it is. A class may refuse every question, for example outside of a block."""
    if not isinstance(type(value).__getattribute__, types.FunctionType):
        return True
    try:
        return value.__class__ is not None
    except Exception:
        return False


class Walk:
    """Visits all parts that can be reached, those nearest to the roots first, and each object once.

    Args:
      visit: called for each part; returns the entries behind which the walk goes on.
    """

    def __init__(self, visit: Callable[[Opening], Iterable[tuple[Any, Any]]]) -> None:
        self._visit = visit
        self._seen: dict[int, Any] = {}  # the objects, too, so that no other one gets the identity of one that is known

    def go(self, roots: Iterable[tuple[str, Any]] = (), openings: Iterable[Opening] = ()) -> None:
        """Goes on from values, with their names for messages, and then from parts."""
        left = collections.deque(roots)
        self._empty(left)
        for opening in openings:
            self._open(opening, left)
            self._empty(left)

    def _empty(self, left: collections.deque[tuple[str, Any]]) -> None:
        while left:
            path, value = left.popleft()
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                for opening in opened(path, value):
                    self._open(opening, left)

    def _open(self, opening: Opening, left: collections.deque[tuple[str, Any]]) -> None:
        opening = opening._replace(entries=[(key, entry) for key, entry in opening.entries if _answers(entry)])
        left.extend([(opening.path_of(key), entry) for key, entry in self._visit(opening) if type(entry) not in PLAIN])


def opened(path: str, value: Any) -> list[Opening]:
    """The parts of a value; none if it is compared as a whole."""
    if isinstance(value, type):
        return _class(value)
    if isinstance(value, types.ModuleType):
        return [Opening(Kind.SCOPE, value.__name__, vars(value), owner=value)] if is_users_module(value) else []
    if isinstance(value, nn.Module):
        children = [(name, child) for name, child in value._modules.items() if child is not None]
        own = vars(value)
        entries = [(name, entry) for name, entry in list(own.items()) if name not in _INTERNALS]
        return [
            Opening(Kind.MODULE, path, own, entries, owner=value),
            *[_parts(f"{path}.{name}", [child]) for name, child in children],
            *_of_class(value),
        ]
    if isinstance(value, types.FunctionType):
        return _function(path, value)
    if isinstance(value, types.MethodType):
        return [_parts(path, [value.__self__, value.__func__])]
    if isinstance(value, types.BuiltinMethodType | types.MethodWrapperType):
        return [_parts(path, [value.__self__])]
    if isinstance(value, staticmethod | classmethod):
        return [_parts(path, [value.__func__])]
    if isinstance(value, property):
        return [_parts(path, [value.fget, value.fset, value.fdel])]
    if isinstance(value, functools.cached_property | functools.partialmethod):
        return [_parts(path, [value.func, *getattr(value, "args", ()), *getattr(value, "keywords", {}).values()])]
    if isinstance(value, functools._lru_cache_wrapper):
        return [Opening(Kind.CACHE, path, value), _parts(path, [value.__wrapped__])]
    if isinstance(value, functools.partial):
        own = Opening(Kind.ATTRIBUTES, path, vars(value), list(vars(value).items()))
        return [_parts(path, [value.func, *value.args]), Opening(Kind.DICT, path, value.keywords, list(value.keywords.items())), own]
    if isinstance(value, Tensor):
        return [Opening(Kind.ATTRIBUTES, path, vars(value), list(vars(value).items()))] if vars(value) else []
    return [*_content(path, value), *_object(path, value)]


def _content(path: str, value: Any) -> list[Opening]:
    """What a container of the standard library, or one derived from it, has in it."""
    if isinstance(value, dict):  # of which a subclass may make another object at each look-up
        return [Opening(Kind.DICT, path, value, list(dict.items(value)))]
    for kind, of in _SEQUENCES:
        if isinstance(value, of):
            return [Opening(kind, path, value, list(enumerate(items_of(value))))]
    if isinstance(value, _VIEWS):
        return [_parts(path, [value.mapping])]
    if isinstance(value, weakref.ref):
        return [_parts(path, [value()])]
    if isinstance(value, types.MappingProxyType):
        return [Opening(Kind.VIEW, path, value, list(value.items()))]
    if isinstance(value, contextvars.ContextVar):
        return [Opening(Kind.CONTEXT, path, value, [(MISSING, value.get(MISSING))])]
    if is_array(value):
        has_objects = getattr(getattr(value, "dtype", None), "hasobject", False)
        return [Opening(Kind.ARRAY, path, value, list(enumerate(value.ravel().tolist())) if has_objects else ())]
    return [Opening(Kind.POSITION, path, value)] if position(value) is not None else []


_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
_SEQUENCES: tuple[tuple[Kind, Any], ...] = (
    (Kind.LIST, list),
    (Kind.LIST, collections.deque),
    (Kind.TUPLE, tuple),
    (Kind.SET, set),
    (Kind.TUPLE, frozenset),
)


def items_of(value: Any) -> list[Any]:
    """The items of a container that is no dict, whatever a derived class makes of them."""
    return list(next(of for _, of in _SEQUENCES if isinstance(value, of)).__iter__(value))


def _object(path: str, value: Any) -> list[Opening]:
    """The attributes of an object, and of one of the user's its class."""
    kind = type(value)
    if is_ours(kind):
        return []
    if isinstance(value, threading.local):  # each thread has a dict of its own
        return [Opening(Kind.NAMED, path, value, list(vars(value).items())), *_of_class(value)]
    own = _dict_of(value)
    attributes = list(own.items()) if isinstance(own, dict) else []
    if not is_users_class(kind) and not is_holder(kind):
        return [Opening(Kind.LIBRARY, path, own, attributes, owner=value)] if attributes else []
    found = [Opening(Kind.ATTRIBUTES, path, own, attributes, is_read_by_library(kind))] if isinstance(own, dict) else []
    slots = [(name, slot(value, name)) for name in slots_of(kind)]
    found.append(Opening(Kind.NAMED, path, value, [*slots, ("__class__", kind)], is_read_by_library(kind)))
    return [*found, *_of_class(value)]


def _dict_of(value: Any) -> Any:
    """The dict of an object's attributes, whatever its class says about it."""
    kept = [vars(base).get("__dict__") for base in type(value).__mro__]
    real = next((found for found in kept if isinstance(found, types.GetSetDescriptorType)), None)
    try:
        return getattr(value, "__dict__", None) if real is None else real.__get__(value)
    except Exception:
        return None


def slot(value: Any, name: str) -> Any:
    """An attribute that is in no dict, whatever the class makes of it."""
    try:
        return object.__getattribute__(value, name)
    except AttributeError:
        return MISSING


def _of_class(value: Any) -> list[Opening]:
    return [_parts(type(value).__name__, [type(value)])]


def _class(kind: type) -> list[Opening]:
    bases = _parts(kind.__name__, [*kind.__bases__, type(kind)])
    if not is_users_class(kind):
        return [bases]
    return [Opening(Kind.CLASS, kind.__name__, kind, list(vars(kind).items())), bases]


def _function(path: str, function: types.FunctionType) -> list[Opening]:
    """What a function holds. Of a wrapper that is not the user's it is what it wraps."""
    attributes = Opening(Kind.ATTRIBUTES, path, vars(function), list(vars(function).items()), owner=function)
    cells = [(name, cell) for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True) if cell != _EMPTY]
    if not is_of_user(function.__code__, function.__globals__):
        wrapped = [value for _, cell in cells for value in _with_state(cell.cell_contents)]
        return [*([attributes] if wrapped or attributes.entries else []), _parts(path, wrapped)]
    own = [(name, getattr(function, name)) for name in ("__code__", "__defaults__", "__kwdefaults__")]
    closure = [
        Opening(Kind.CELL, f"{function.__name__}.<closure>.{name}", cell, [(name, cell.cell_contents)], owner=function)
        for name, cell in cells
    ]
    return [attributes, Opening(Kind.NAMED, path, function, own, owner=function), *closure]


def _with_state(value: Any, depth: int = 0) -> list[Any]:
    """What may hold state of the user's among what a function that is not the user's has been given."""
    if isinstance(value, types.FunctionType):
        if is_of_user(value.__code__, value.__globals__):
            return [value]
        inner = [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY]
        return [value] if depth < _DEEP and any(_with_state(part, depth + 1) for part in inner) else []
    if isinstance(value, types.MethodType | functools.partial | functools._lru_cache_wrapper | nn.Module) or is_users_class(type(value)):
        return [value]
    if depth < _DEEP and isinstance(value, tuple | list | dict):
        parts = list(dict.values(value)) if isinstance(value, dict) else list(value)
        return [found for part in parts for found in _with_state(part, depth + 1)]
    return []


_DEEP = 8
_EMPTY = types.CellType()


def _parts(path: str, values: Iterable[Any]) -> Opening:
    return Opening(Kind.FIXED, path, None, [(None, value) for value in values])


def getter_names(value: Any) -> set[str]:
    """The attributes that a function of `operator.attrgetter` reads, or the method that one of `methodcaller` calls."""
    if not isinstance(value, operator.attrgetter | operator.methodcaller):
        return set()
    made_of: Any = value.__reduce__()
    return {name for part in made_of[1] if isinstance(part, str) for name in part.split(".")}
