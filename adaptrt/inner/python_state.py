"""Python values that the model, the loss and the optimiser read: a program is made for the values that they have.

While a model is traced, its Python code runs once, and whatever it reads that is no tensor becomes a constant of the program: a float
attribute, a flag, an entry of a dict in the closure of a loss. `PythonState` finds these values and notices at each call if one of them has
changed, so that the call gets a program of its own.

Which values are read is estimated from above. The code objects that run while the model is traced are recorded, and a value counts as read
if it can be reached from the model, the loss, the optimiser or a global name of that code, by attributes that this code names. Where it may
compute the name of an attribute, all attributes count that are not PyTorch's own.

Known limits: what is kept in C, such as a table of pandas' that changes in place, an open file, or the position of an iterator of
`itertools` from Python 3.14 on; attributes of objects of PyTorch's and the standard library's classes, apart from those that hold what the
user puts in; functions of PyTorch and the standard library that are replaced. Clocks and the operating system's random numbers are not
read here: `side_effects.py` judges code that asks them.
"""

from __future__ import annotations

import collections
import os
import re
import threading
import types
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from adaptrt.inner import places
from adaptrt.inner.executed import Executed
from adaptrt.inner.places import Keys, Place, unchanged_check
from adaptrt.inner.reachable import HOOKS, HOOKS_OF_ALL_MODULES, MISSING, PLAIN, TABLES, Kind, Opening, Walk, getter_names, short
from adaptrt.inner.scopes import of_module, scopes
from adaptrt.inner.side_effects import require_unread
from adaptrt.inner.user_code import is_of_user, is_users_class, outside
from adaptrt.process import lock

_MAX_ENTRIES = 256
"""Entries of a container that are watched one by one. A larger one is watched as a whole."""

_MANY_PLACES = 50_000
"""Values from which on looking at them at each call takes milliseconds."""

_Found = Iterable[tuple[Any, Any]]


class _Search:
    """Collects the places of all values that can be reached and count as read.

    Args:
      roots: what the user has passed in.
      executed: the code that ran.
      methods: names under which classes have functions that ran; those of this search are added. What is put there later has not run yet.
    """

    def __init__(self, roots: Mapping[str, Any], executed: Executed, methods: set[str]) -> None:
        self.places: list[Place] = []
        self._methods = methods
        self._names = set(executed.names)
        self._ran = {id(code) for code, _ in executed.codes.values()}
        self._is_computed = executed.reads_computed
        self._is_followed = {id(part) for value in roots.values() if isinstance(value, nn.Module) for part in value.modules()}
        openings = [opening for code, scope in executed.codes.values() for opening in scopes(code, scope)]
        num_names = 0
        while num_names != len(self._names):  # an `operator.attrgetter` names attributes that no code names
            num_names = len(self._names)
            self.places, self._known, self._forwards = [], set[tuple[int, Any]](), set[type]()
            Walk(self._visit).go(roots.items(), openings)
        if executed.names & {"environ", "getenv", "environb"}:
            data = getattr(os.environ, "_data", dict(os.environ))  # decoding all strings would take 50 microseconds
            self.places.append(Place("the environment", data, places.CONTENTS, places.contents_of(data)))

    def _visit(self, opening: Opening) -> _Found:
        owner, is_attributes = opening.owner, opening.kind is Kind.ATTRIBUTES
        if isinstance(owner, types.FunctionType) and not (self._runs(owner) or (is_attributes and opening.entries)):
            return ()  # a function that does not run reads nothing; others may read its attributes
        match opening.kind:
            case Kind.MODULE:
                return self._module(opening)
            case Kind.ATTRIBUTES:
                return self._attributes(opening)
            case Kind.LIBRARY:
                return [self._found(opening, places.ENTRY, name, value) for name, value in opening.entries if name in self._names]
            case Kind.CLASS:
                return self._class(opening)
            case Kind.NAMED:
                return self._named(opening)
            case Kind.SCOPE:
                return self._scope(opening)
            case Kind.DICT | Kind.LIST | Kind.SET:
                return self._container(opening)
            case Kind.VIEW:
                self.places.append(_keys_of(opening.path, opening.holder))
                return [self._found(opening, places.ENTRY, key, value) for key, value in opening.entries]
            case Kind.TUPLE:
                return [self._found(opening, places.NEVER_CHANGES, key, value) for key, value in opening.entries]
            case Kind.CELL:
                return [self._found(opening, places.CELL, key, value) for key, value in opening.entries]
            case Kind.CONTEXT:
                return [self._found(opening, places.CONTEXT, key, value) for key, value in opening.entries]
            case Kind.ARRAY:
                is_bytes = isinstance(opening.holder, bytearray)
                value = bytes(opening.holder) if is_bytes else opening.holder.tobytes()
                self.places.append(Place(opening.path, opening.holder, places.EQUAL if is_bytes else places.NUMBERS, value))
                if hasattr(opening.holder, "dtype"):
                    form = opening.holder.shape, opening.holder.dtype.str
                    self.places.append(Place(f"the shape of {opening.path}", opening.holder, places.FORM, form))
                return opening.entries
            case Kind.FIXED:
                for _, value in opening.entries:
                    self._names |= getter_names(value)
                return opening.entries
            case _:
                return ()

    def _runs(self, function: types.FunctionType) -> bool:
        return id(function.__code__) in self._ran or not is_of_user(function.__code__, function.__globals__)

    def _found(self, opening: Opening, code: str, key: Any, value: Any) -> tuple[Any, Any]:
        self.places.append(Place(opening.path_of(key), opening.holder, code, value, key))
        self._names |= getter_names(value)
        return key, value

    def _is_read(self, name: Any) -> bool:
        return name in self._names or (self._is_computed and isinstance(name, str) and not name.startswith("__"))

    def _names_of_attributes(self, path: str, own: Any) -> None:
        """Another attribute may hide one of the class."""
        self.places.append(Place(f"the attributes of {path}", own, places.KEYS, [*own], makes_programs=False))

    def _module(self, opening: Opening) -> _Found:
        """Attributes of a module. Its mode, parameters and buffers are read elsewhere if it is a part of the model or the loss."""
        kind, is_followed = type(opening.owner), id(opening.owner) in self._is_followed
        if is_users_class(kind):
            self._names_of_attributes(opening.path, opening.holder)
        elif "forward" not in opening.holder:
            self.places.append(Place(f"{opening.path}.forward", opening.holder, places.ABSENT, MISSING, "forward"))
        self.places.append(Place(f"the class of {opening.path}", opening.owner, places.OF_CLASS, kind))
        if kind not in self._forwards:
            self._forwards.add(kind)
            self.places.append(Place(f"{kind.__name__}.forward", kind, places.FORWARD, kind.forward))
        found: list[tuple[Any, Any]] = []
        for name, value in opening.entries:
            if name in HOOKS or (name in TABLES and not is_followed):
                found.append((name, value))
            elif name in TABLES or (name == "training" and is_followed):
                continue
            elif isinstance(value, Tensor) and self._is_read(name):
                self.places.append(Place(opening.path_of(name), opening.holder, places.KIND_OF_ENTRY, type(value), name))
            elif name in ("forward", "training") or self._is_read(name):
                found.append(self._found(opening, places.ENTRY, name, value))
        return found

    def _attributes(self, opening: Opening) -> _Found:
        self._names_of_attributes(opening.path, opening.holder)
        return [
            self._found(opening, places.ENTRY, name, value)
            for name, value in opening.entries
            if opening.is_whole or name == "__wrapped__" or self._is_read(name)
        ]

    def _named(self, opening: Opening) -> _Found:
        if isinstance(opening.holder, threading.local):
            own = [*vars(opening.holder)]
            self.places.append(Place(f"the attributes of {opening.path}", opening.holder, places.KEYS_OF_OWN, own, None, False))
        always = opening.is_whole or isinstance(opening.holder, types.FunctionType)
        return [
            self._found(opening, places.OF_CLASS if name == "__class__" else places.ATTRIBUTE, name, value)
            for name, value in opening.entries
            if always or name == "__class__" or self._is_read(name)
        ]

    def _class(self, opening: Opening) -> _Found:
        """Data among the attributes of a class, and functions that ran or are behind a wrapper."""
        own = vars(opening.holder)
        opening = opening._replace(holder=own)
        self._names_of_attributes(opening.path, own)
        return [self._found(opening, places.ENTRY, name, value) for name, value in opening.entries if self._is_read_of_class(name, value)]

    def _is_read_of_class(self, name: str, value: Any) -> bool:
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(function, types.FunctionType) and is_of_user(function.__code__, function.__globals__):
            if self._runs(function):
                self._methods.add(name)
            return name in self._methods
        return self._is_read(name) and not name.startswith("__")

    def _scope(self, opening: Opening) -> _Found:
        """Global names, each of which several code objects may use. Modules among them are opened by the code that names them."""
        if opening.owner is not None:
            names = {name for name, value in opening.holder.items() if self._is_read_of_module(name, value)}
            return self._scope(of_module(opening.holder, names))
        new = [(name, value) for name, value in opening.entries if (id(opening.holder), name) not in self._known]
        self._known |= {(id(opening.holder), name) for name, _ in new}
        found = [self._found(opening, places.ABSENT if value is MISSING else places.ENTRY, name, value) for name, value in new]
        return [(name, value) for name, value in found if not isinstance(value, types.ModuleType)]

    def _is_read_of_module(self, name: str, value: Any) -> bool:
        return name in self._names or (self._is_read(name) and not isinstance(value, types.ModuleType | types.FunctionType | type))

    def _container(self, opening: Opening) -> _Found:
        """A container that is large, or a class of its own, has one place, which compares all entries."""
        holder = opening.holder
        entries = list(opening.entries)
        if opening.kind is Kind.SET or len(entries) > _MAX_ENTRIES or places.has_own_rules(holder):
            self.places.append(Place(f"the contents of {opening.path}", holder, places.CONTENTS, places.contents_of(holder)))
            others = [(key, value) for key, value in entries if type(value) not in PLAIN]
            for _, value in others:
                self._names |= getter_names(value)
            return others
        if opening.kind is Kind.DICT:
            self.places.append(_keys_of(opening.path, holder))
        else:
            self.places.append(Place(f"the length of {opening.path}", holder, places.SIZE if entries else places.EMPTY, len(entries)))
        return [self._found(opening, places.ENTRY if opening.kind is Kind.DICT else places.ITEM, key, value) for key, value in entries]


def _keys_of(path: str, holder: Any) -> Place:
    """The keys of a dict, in the order in which code goes through them. That of a single one is looked at by its entry."""
    if len(holder) < 2:
        return Place(f"the length of {path}", holder, places.SIZE if len(holder) else places.EMPTY, len(holder))
    return Place(f"the keys of {path}", holder, places.KEYS, [*holder])


_MAX_NUMBERS = 64

MAX_VALUES = 8
"""Different sets of values that are met before a warning says that each makes programs of its own."""


class PythonState:
    """The Python values that are constants of programs.

    Args:
      roots: what the user passed in, by names for messages.
    """

    def __init__(self, roots: Mapping[str, Any]) -> None:
        self._roots = {**roots, **HOOKS_OF_ALL_MODULES}
        self._executed = Executed()
        self._methods: set[str] = set()
        self._lock = lock()
        self._next = 1
        self._places: list[Place] = []
        # The values of each number, too, so that no other object gets the identity of one that is known.
        self._numbers: dict[Hashable, tuple[int, list[Any]]] = {}
        # Read at once, as other threads may meet other values meanwhile.
        self._present: tuple[Callable[[], bool], int] = (lambda: True), 0
        self._has_warned = False
        self._has_warned_of_size = False

    def number(self) -> int:
        """The number of the present values; equal numbers mean equal values, as far as code that has run so far reads them."""
        is_unchanged, number = self._present
        if is_unchanged():
            return number
        with self._lock:
            return self._renew()

    def add(self, executed: Executed) -> None:
        """Takes note of code that has run on the present values.

        Raises:
          NotTraceable: it reads what other code counts up, or the reverse.
        """
        with self._lock:
            require_unread(self._executed.counters, executed)
            require_unread(executed.counters, self._executed)
            if self._executed.merge(executed):
                self._places = _Search(self._roots, self._executed, self._methods).places
                self._numbers.clear()
                number = self._present[1]
                self._remember(self._key(), number)
                self._present = unchanged_check(self._places), number
                self._warn_of_size()

    def _remember(self, key: Hashable, number: int) -> None:
        self._numbers[key] = number, [place.value for place in self._places]
        if len(self._numbers) > _MAX_NUMBERS:
            del self._numbers[next(iter(self._numbers))]

    def _key(self) -> Hashable:
        return tuple([key for _, key in _keys(self._places)])

    def _renew(self) -> int:
        before = self._places
        self._places = _Search(self._roots, self._executed, self._methods).places
        key = self._key()
        if key in self._numbers:
            number = self._numbers[key][0]
        else:
            number, self._next = self._next, self._next + 1
            self._remember(key, number)
            if self._next > MAX_VALUES and not self._has_warned:
                self._has_warned = True
                self._warn(before)
        self._present = unchanged_check(self._places), number
        return number

    def _warn(self, before: Sequence[Place]) -> None:
        known = {key for _, key in _keys(before)}
        changed = [f"{place.path} (now {short(place.value)})" for place, key in _keys(self._places) if key not in known]
        warnings.warn(
            f"{self._next} different values of {', '.join(changed[:3]) or 'Python state'} were met, and programs are compiled for "
            "each. Make it a buffer or a plain tensor attribute, which programs take as an input",
            stacklevel=outside(),
        )

    def _warn_of_size(self) -> None:
        if len(self._places) > _MANY_PLACES and not self._has_warned_of_size:
            self._has_warned_of_size = True
            paths = [re.sub("^the (length|keys) of ", "", place.path) for place in self._places]
            ((most, _),) = collections.Counter([re.split(r"\[", path)[0] for path in paths]).most_common(1)
            warnings.warn(
                f"{len(self._places)} Python values are read by the model, the loss or the optimiser, most of them in {most}, "
                "and each call compares them all. Keep large tables of objects in tensors, or out of reach of code that runs",
                stacklevel=outside(),
            )


def _keys(found: Sequence[Place]) -> list[tuple[Place, Hashable]]:
    """The places that make programs, with their keys."""
    keys = Keys()
    return [(place, keys.of_place(place)) for place in found if place.makes_programs]
