"""Python values that the model, the loss and the optimiser read: a program is made for the values that they have.

While a model is traced, its Python code runs once, and whatever it reads that is no tensor becomes a constant of the program: a float
attribute, a flag, an entry of a dict in the closure of a loss. `PythonState` finds these values and notices at each call if one of them has
changed, so that the call gets a program of its own.

Which values are read is estimated from above. The code objects that run while the model is traced are recorded, and a value counts as read
if it can be reached from the model, the loss, the optimiser or a global name of that code, by attributes that this code names.

Known limits: an attribute whose name is computed counts as read only on modules of the model. State behind C code, such as an iterator or
an open file, is not seen; nor are attributes of functions, methods that are replaced in a class, what
PyTorch's decorators (`torch.enable_grad()`, `vmap`) close over, environment and context variables.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from adaptrt.inner.user_code import IMMUTABLE, OPAQUE, Executed, is_array, is_of_user, is_users_class, is_users_file, slots_of
from adaptrt.process import lock

_APART = frozenset({"_parameters", "_buffers", "_modules", "training", "_forward_hooks", "_forward_pre_hooks"})
"""Attributes of a module that are read in other ways."""

_MAX_DEPTH = 12


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a value is found.

    Attributes:
      path: in words, for messages.
      holder: the object that has it.
      code: Python that compares what the holder has with the value, which is written behind it. `{}` stands for the holder, and `{index}`
        for the index.
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

    @property
    def key(self) -> Hashable:
        """Equal for values that give the same program. What is searched counts by its type, as its contents have places of their own."""
        value = self.value
        if isinstance(value, IMMUTABLE):
            return self.path, type(value), repr(value) if isinstance(value, float | complex) else value
        if isinstance(value, types.FunctionType):
            return self.path, id(value.__code__)
        if isinstance(value, frozenset):
            return self.path, value
        if isinstance(value, list | tuple | dict | set | collections.deque) or is_users_class(type(value)):
            return self.path, type(value)
        return self.path, id(value)


class _Search:
    """Collects the places of all values that can be reached and count as read."""

    def __init__(self, executed: Executed) -> None:
        self.places: list[Place] = []
        self._names = executed.names
        self._is_dynamic = executed.is_dynamic
        self._seen: set[int] = set()
        self._of_modules: set[tuple[int, str]] = set()
        self._of_classes: set[tuple[int, str]] = set()

    def root(self, path: str, value: Any) -> None:
        """Searches what the user has passed in."""
        self._inside(path, value, 0)

    def globals_of(self, executed: Executed) -> None:
        """Searches the global names of code that ran."""
        for code, scope in executed.scopes.items():
            for name in code.co_names:
                if name not in scope:
                    continue
                value = scope[name]
                if isinstance(value, types.ModuleType):
                    self._python_module(value, code.co_names)
                elif isinstance(value, type):
                    self._class(value, 0)
                elif not isinstance(value, types.BuiltinFunctionType):
                    self._found(f"{scope.get('__name__', '?')}.{name}", scope, _ITEM, value, 0, name)

    def _python_module(self, module: types.ModuleType, names: Sequence[str]) -> None:
        place = getattr(module, "__file__", None) or ""
        if not place or not is_users_file(place):
            return
        own = vars(module)
        for name in names:
            if name not in own or (id(own), name) in self._of_modules:
                continue
            self._of_modules.add((id(own), name))
            if isinstance(own[name], types.ModuleType):
                self._python_module(own[name], names)
            elif isinstance(own[name], type):
                self._class(own[name], 0)
            else:
                self._found(f"{module.__name__}.{name}", own, _ITEM, own[name], 0, name)

    def _found(self, path: str, holder: Any, code: str, value: Any, depth: int, index: Any = None) -> None:
        """Notes a value, and searches inside it."""
        self.places.append(Place(path, holder, code, value, index))
        if depth < _MAX_DEPTH:
            self._inside(path, value, depth)

    def _inside(self, path: str, value: Any, depth: int) -> None:
        if isinstance(value, type):
            self._class(value, depth)
        if isinstance(value, OPAQUE) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            self._module(path, value, depth)
        elif isinstance(value, types.FunctionType):
            self._function(path, value, depth)
        elif isinstance(value, types.MethodType):
            self._inside(path, value.__self__, depth)
            self._inside(path, value.__func__, depth)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._inside(path, part, depth)
        elif isinstance(value, dict):
            self._size(path, value)
            for key, entry in list(dict.items(value)):
                self._found(f"{path}[{key!r}]", value, _ITEM, entry, depth + 1, key)
        elif isinstance(value, list | tuple | collections.deque):
            if not isinstance(value, tuple):
                self._size(path, value)
            for index, entry in enumerate(value):
                self._found(f"{path}[{index}]", value, "{}[{index}] is", entry, depth + 1, index)
        elif isinstance(value, set):
            self.places.append(Place(path, value, "{} ==", frozenset(value)))
        elif is_array(value):
            self.places.append(Place(path, value, "{}.tobytes() ==", value.tobytes()))
        else:
            self._object(path, value, depth)

    def _size(self, path: str, value: Any) -> None:
        self.places.append(Place(f"the length of {path}", value, "len({}) ==", len(value)))

    def _attributes(self, path: str, own: dict[str, Any]) -> None:
        """Notes how many attributes there are, as one that is added may hide another of the class."""
        self.places.append(Place(f"the attributes of {path}", own, "len({}) ==", len(own), makes_programs=False))

    def _module(self, path: str, module: nn.Module, depth: int) -> None:
        own = vars(module)
        self._attributes(path, own)
        for name, value in list(own.items()):
            if name in _APART or not (name == "forward" or name in self._names or (self._is_dynamic and not name.startswith("_"))):
                continue
            if isinstance(value, Tensor):
                self.places.append(Place(f"{path}.{name}", own, "{}.get({index}).__class__ is", type(value), name))
            else:
                self._found(f"{path}.{name}", own, _ITEM, value, depth + 1, name)
        for table in ("_forward_hooks", "_forward_pre_hooks"):
            if table in own:
                self._inside(f"{path}.{table}", own[table], depth + 1)
        self._class(type(module), depth)
        for name, child in module._modules.items():
            if child is not None:
                self._inside(f"{path}.{name}", child, depth)

    def _function(self, path: str, function: types.FunctionType, depth: int) -> None:
        if not is_of_user(function.__code__, function.__globals__):
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if cell != types.CellType():
                self._found(f"{function.__name__}.<closure>.{name}", cell, "{}.cell_contents is", cell.cell_contents, depth + 1)
        for part in (function.__defaults__, function.__kwdefaults__):
            if part:
                self._inside(f"the defaults of {path}", part, depth + 1)

    def _object(self, path: str, value: Any, depth: int) -> None:
        """An object of a class of the user's: the attributes that are named."""
        kind = type(value)
        if not is_users_class(kind):
            return
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            self._attributes(path, own)
            for name in [name for name in own if name in self._names]:
                self._found(f"{path}.{name}", own, _ITEM, own[name], depth + 1, name)
        for name in slots_of(value):
            if name in self._names:
                self._found(f"{path}.{name}", value, f"{{}}.{name} is", getattr(value, name), depth + 1)
        self._class(kind, depth)

    def _class(self, kind: type, depth: int) -> None:
        """Data among the attributes of the user's classes."""
        for base in kind.__mro__:
            if not is_users_class(base):
                continue
            for name, value in list(vars(base).items()):
                is_read = name in self._names and not name.startswith("__") and (id(base), name) not in self._of_classes
                if is_read and not callable(value) and not hasattr(value, "__get__"):
                    self._of_classes.add((id(base), name))
                    self._found(f"{base.__name__}.{name}", vars(base), _ITEM, value, depth + 1, name)


_ITEM = "{}.get({index}) is"
"""An entry of a dict; read so that a dict with defaults does not make one."""


def unchanged_check(places: Sequence[Place]) -> Callable[[], bool]:
    """Generates a function that says whether all places still hold the values that were found."""
    constants: dict[str, Any] = {}
    holders: dict[int, str] = {}
    lines: list[str] = []
    for index, place in enumerate(places):
        holder = holders.setdefault(id(place.holder), f"h{len(holders)}")
        constants[holder] = place.holder
        constants[f"v{index}"], constants[f"i{index}"] = place.value, place.index
        lines.append(f"{place.code.format(holder, index=f'i{index}')} v{index}")
    condition = "\n      and ".join(["True", *lines])
    source = f"def check():\n  try: return ({condition})\n  except (LookupError, AttributeError, ValueError): return False\n"
    exec(compile(source, "<watched values>", "exec"), constants)
    return constants["check"]


_MAX_NUMBERS = 64

MAX_VALUES = 8
"""Different sets of values that are met before a warning says that each makes programs of its own."""


class PythonState:
    """The Python values that are constants of programs.

    Args:
      roots: what the user passed in, by names for messages.
    """

    def __init__(self, roots: Mapping[str, Any]) -> None:
        self._roots = dict(roots)
        self._executed = Executed()
        self._lock = lock()
        self._number = 0
        self._next = 1
        self._places: list[Place] = []
        # The values of each number, too, so that no other object gets the identity of one that is known.
        self._numbers: dict[Hashable, tuple[int, list[Any]]] = {}
        self._is_unchanged: Callable[[], bool] = lambda: True
        self._has_warned = False

    def number(self) -> int:
        """The number of the present values; equal numbers mean equal values, as far as code that has run so far reads them."""
        if not self._is_unchanged():
            with self._lock:
                self._renew()
        return self._number

    def add(self, executed: Executed) -> None:
        """Takes note of code that has run on the present values."""
        with self._lock:
            if self._executed.merge(executed):
                self._places = self._search()
                self._numbers.clear()
                self._remember(self._number)
                self._is_unchanged = unchanged_check(self._places)

    def _search(self) -> list[Place]:
        search = _Search(self._executed)
        for path, value in self._roots.items():
            search.root(path, value)
        search.globals_of(self._executed)
        return search.places

    def _remember(self, number: int) -> None:
        self._numbers[self._key()] = number, [place.value for place in self._places]
        if len(self._numbers) > _MAX_NUMBERS:
            del self._numbers[next(iter(self._numbers))]

    def _key(self) -> Hashable:
        return tuple([place.key for place in self._places if place.makes_programs])

    def _renew(self) -> None:
        before = {place.path: place for place in self._places}
        self._places = self._search()
        key = self._key()
        if key in self._numbers:
            self._number = self._numbers[key][0]
        else:
            self._number, self._next = self._next, self._next + 1
            self._remember(self._number)
            if self._next > MAX_VALUES and not self._has_warned:
                self._has_warned = True
                self._warn(before)
        self._is_unchanged = unchanged_check(self._places)

    def _warn(self, before: Mapping[str, Place]) -> None:
        changed = [
            f"{place.path} (now {place.value!r})"
            for place in self._places
            if place.path not in before or before[place.path].key != place.key
        ]
        warnings.warn(
            f"{self._next} different values of {', '.join(changed[:3]) or 'Python state'} were met, and programs are compiled for "
            "each. Make it a buffer or a plain tensor attribute, which programs take as an input",
            stacklevel=6,
        )
