"""Places: where Python values are found that code reads, and a generated function that says whether they are still the same."""

from __future__ import annotations

import collections
import dataclasses
import functools
import operator
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import nn

from adaptrt.inner.reachable import MISSING, items_of
from adaptrt.inner.user_code import IMMUTABLE, has_hidden_state, is_holder, is_number_of_numpy, is_users_class

ENTRY = "{h}.get({i}) is {v}"
"""An entry of a dict; read so that a dict with defaults does not make one."""
ENTRY_OF_NONE = "{h}.get({i}, missing) is {v}"
CONTEXT = "{h}.get({i}) is {v}"
ABSENT = "{i} not in {h}"
"""No entry, so that something else is read, such as an attribute of the class or a built-in function."""
ITEM = "{h}[{i}] is {v}"
CELL = "{h}.cell_contents is {v}"
SIZE = "len({h}) == {v}"
EMPTY = "not {h}"
"""The same as a size of 0, and faster; every module has two empty tables of hooks."""
KEYS = "[*{h}] == {v}"
"""The keys of a dict in their order."""
EQUAL = "{h} == {v}"
NUMBERS = "{h}.tobytes() == {v}"
FORM = "({h}.shape, {h}.dtype.str) == {v}"
KIND_OF_ENTRY = "{h}.get({i}).__class__ is {v}"
CONTENTS = "same({h}, {v})"
OF_CLASS = "{h}.__class__ is {v}"
FORWARD = "{h}.forward is {v}"
ATTRIBUTE = "getattr({h}, {i}, missing) is {v}"
KEYS_OF_OWN = "[*{h}.__dict__] == {v}"
NEVER_CHANGES = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a value is found.

    Attributes:
      path: in words, for messages.
      holder: the object that has it.
      code: Python that compares what the holder has with the value. `{h}` stands for the holder, `{i}` for the index, `{v}` for the value.
      value: what was found, or for a tensor attribute of a module its class, as the tensor itself is read at each call.
      index: a key, a position or a name.
      makes_programs: whether another value needs another program. Otherwise it is a sign to search again.
    """

    path: str
    holder: Any
    code: str
    value: Any
    index: Any = None
    makes_programs: bool = True


class Keys:
    """Gives places keys that are equal for values that give the same program.

    What has places of its own for what is in it counts by its type and by when it was first met, because two names of one object are
    something else than two objects with equal values.
    """

    def __init__(self) -> None:
        self._met: dict[int, int] = {}

    def of_place(self, place: Place) -> Hashable:
        """The key of a place, which is asked for in the order of a walk."""
        if place.code in (CONTENTS, KEYS, KEYS_OF_OWN):
            return place.path, (frozenset if isinstance(place.holder, set) else tuple)(map(self.of, place.value))
        return place.path, self.of(place.value)

    def of(self, value: Any) -> Hashable:
        """The key of a value."""
        kind: Any = type(value)
        if kind is tuple or kind is frozenset:
            return kind, kind(map(self.of, value))
        if kind is slice:
            return kind, self.of((value.start, value.stop, value.step))
        if kind is functools.partial:
            return kind, self.of((value.func, value.args, *value.keywords, *value.keywords.values(), *vars(value), *vars(value).values()))
        if kind is types.MethodType:
            return kind, self.of(value.__func__), self.of(value.__self__)
        if kind is types.FunctionType:
            return id(value.__code__), self._when_met(value)
        found = _key_of(value)
        return (found, self._when_met(value)) if found is kind else found

    def _when_met(self, value: Any) -> int:
        return self._met.setdefault(id(value), len(self._met))


def _key_of(value: Any) -> Hashable:
    """Equal for values that give the same program, and the type of what has places of its own for what is in it."""
    kind = type(value)
    if kind in _EXACT:
        return kind, float.hex(value) if kind is float else value
    if kind is complex:
        return kind, float.hex(value.real), float.hex(value.imag)
    if isinstance(value, nn.Module):  # its tensors are constants of the program
        return id(value)
    if isinstance(value, IMMUTABLE):
        for plain, read in _READ_PLAIN:
            if isinstance(value, plain):
                return kind, _key_of(read(value))
        return kind, id(value) if kind.__hash__ is None else value
    if isinstance(value, list | tuple | dict | set | frozenset | collections.deque):
        return kind
    if is_number_of_numpy(kind):
        return kind, value.dtype.str, value.tobytes()
    if is_users_class(kind) or is_holder(kind):
        return id(value) if has_hidden_state(kind) else kind
    return id(value)


_EXACT = frozenset({bool, int, float, str, bytes, type(None)})
_READ_PLAIN: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (int, int.__index__),
    (float, float.__float__),
    (str, str.__str__),
    (bytes, bytes.__bytes__),
)
"""What a value of a derived class is as a plain one, whatever the class says."""


def unchanged_check(places: Sequence[Place]) -> Callable[[], bool]:
    """Generates a function that says whether all places still hold the values that were found."""
    constants: dict[str, Any] = {"same": same_contents, "missing": MISSING, "__name__": __name__}
    holders: dict[int, str] = {}
    lines: list[str] = []
    for index, place in enumerate(places):
        if place.code == NEVER_CHANGES:
            continue
        holder = holders.setdefault(id(place.holder), f"h{len(holders)}")
        constants[holder] = place.holder
        constants[f"v{index}"], constants[f"i{index}"] = place.value, place.index
        code = ENTRY_OF_NONE if place.code == ENTRY and place.value is None else place.code
        lines.append(code.format(h=holder, i=f"i{index}", v=f"v{index}"))
    condition = "\n      and ".join(["True", *lines])
    source = f"def check():\n  try: return ({condition})\n  except Exception: return False\n"
    exec(compile(source, "<watched values>", "exec"), constants)
    return constants["check"]


def has_own_rules(holder: Any) -> bool:
    """Whether a class that is derived from one of the standard library's may decide how its objects are read."""
    return type(holder) not in (dict, collections.OrderedDict, collections.defaultdict, list, collections.deque)


def contents_of(holder: Any) -> list[Any]:
    """The entries of a container, whatever a derived class makes of them, in an order that stays as long as it does not change."""
    if isinstance(holder, dict):
        return [*dict.__iter__(holder), *dict.values(holder)]
    return items_of(holder)


def same_contents(holder: Any, entries: list[Any]) -> bool:
    """Whether a container holds these very entries. Equal ones do not do: 1, 1.0 and True are equal, and tensors are not compared."""
    found = holder if type(holder) is list else contents_of(holder)
    return len(found) == len(entries) and all(map(operator.is_, found, entries))
