"""The user's Python code and values: which code ran, which classes and files are the user's, and which values cannot change.

Code is the user's if it is neither PyTorch's nor ours nor the standard library's, so that of other packages is, too, and so is code of
which nobody knows where it is from.
"""

from __future__ import annotations

import array
import builtins
import contextlib
import datetime
import enum
import gc
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt.graph.draws import is_alone
from adaptrt.graph.profile import profiled
from adaptrt.inner.bytecode import Facts, facts, last_names, names_in

_TORCH = os.path.dirname(torch.__file__) + os.sep
_LAYERS = os.path.join(_TORCH, "nn") + os.sep
_NO_LAYERS = ("module.py", "_named_member_accessor.py", "stateless.py")  # what calls layers, and exchanges their tensors
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep
_PACKAGES = tuple({sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib")})
_NOT_THE_USERS = (sys.stdlib_module_names - {"__main__"}) | {"torch", "adaptrt"}
"""Packages whose code is not the user's, for code that is in no file."""

_SEEDING = frozenset({"manual_seed", "seed", "set_state", "graphsafe_set_state", "set_offset"})
"""Methods of a generator."""

_NAMESPACES = frozenset({"SimpleNamespace", "Namespace"})
_HOLDERS = frozenset({"UserDict", "UserList", "UserString", "ChainMap", "Distribution", "Transform", "LRScheduler"})
"""Classes of the standard library and of PyTorch that hold what the user puts in, with those that are derived from them."""

IMMUTABLE = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, torch.dtype, torch.device, torch.Size, enum.Enum)

_SLOT = types.MemberDescriptorType
_WORD_BYTES = tuple.__itemsize__
_HEAP_TYPE = 1 << 9
"""The flag of classes that were made while Python runs."""

_CLOCKS = frozenset(
    {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time", "process_time_ns", "thread_time"}
    | {"thread_time_ns", "localtime", "gmtime", "ctime", "strftime", "clock_gettime", "clock_gettime_ns", "now", "utcnow", "today"}
    | {"urandom", "getrandom", "times", "getloadavg", "getrusage"}
)
"""Functions in C that give another value each time: clocks, and the operating system's random numbers."""


_STARTS = frozenset({"start_new_thread", "start_new", "start_joinable_thread"})
"""Functions in C that start a thread."""

_QUESTIONS = (torch.is_grad_enabled, torch.is_inference_mode_enabled)
"""Functions by which code asks for the gradient mode."""


_Listener = Callable[[types.CodeType | None, dict[str, Any]], None]


class Executed:
    """The Python code that ran in a block, apart from PyTorch's own outside of `torch.nn`.

    Attributes:
      codes: the user's code objects, each with its global names. One code object may run in several modules.
      names: what all of the code names, and the code of layers.
      getters: names of attributes that an `operator.attrgetter` within reach may read.
      sources: clocks and the like that the user's code asked, by their names.
      questions: names of the functions by which the user's code, or that of a library, asks for the gradient mode, whatever it calls them.
      counters: names of what it counts up, on which its passes do not depend.
      starts_threads: whether it starts threads, which may then write at the same time.
      seeding: where it seeds a generator of PyTorch's, or sets it to another state. After the block the generator has its state again.
    """

    def __init__(self) -> None:
        self.codes: dict[tuple[int, int], tuple[types.CodeType, dict[str, Any]]] = {}
        self.names: set[str] = set()
        self.getters: set[str] = set()
        self.sources: set[str] = set()
        self.questions: set[str] = set()
        self.seeding: list[str] = []
        self.counters: set[str] = set()
        self.starts_threads = False
        self._was_alone = is_alone()
        self._seeded: list[tuple[torch.Generator, Tensor]] = []
        self._sets: set[str] = set()
        self._layers: dict[int, types.CodeType] = {}
        self._library: dict[int, types.CodeType] = {}
        self._announce: list[_Listener] = []

    def note_builtin(self, frame: types.FrameType, called: Any) -> None:
        """Takes note of a function written in C that code calls, if it matters."""
        if called in _QUESTIONS:
            if frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", "adaptrt"):
                self.questions.add(called.__name__)
        elif called.__name__ in _STARTS:
            self.starts_threads = True
        elif called.__name__ in _CLOCKS:
            source = _source(called)
            if source is not None and _is_for_user(frame):
                self.sources.add(source)
        elif called.__name__ in _SEEDING and type(getattr(called, "__self__", None)) is torch.Generator:
            while frame.f_back is not None and not is_of_user(frame.f_code, frame.f_globals):
                frame = frame.f_back
            self.seeding.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            self._seeded.append((called.__self__, called.__self__.get_state()))  # before it is called

    def is_alone(self) -> bool:
        """Whether no other thread has run Python since this was made, so that whatever has changed was changed by this one."""
        return self._was_alone and not self.starts_threads and is_alone()

    def restore_generators(self) -> None:
        """Gives generators that were seeded the states that they had before."""
        while self._seeded:
            generator, state = self._seeded.pop()
            generator.set_state(state)

    @contextlib.contextmanager
    def announcing(self, listener: _Listener) -> Generator[None]:
        """Within the block the listener is told of the user's code that is about to run for the first time, and of imported modules."""
        self._announce.append(listener)
        try:
            yield
        finally:
            self._announce.remove(listener)

    def add(self, code: types.CodeType, scope: dict[str, Any]) -> None:
        """Notes code that is about to run."""
        if is_of_user(code, scope):
            if (id(code), id(scope)) not in self.codes:
                self.announce(code, scope)
            self.codes[id(code), id(scope)] = code, scope
        elif code.co_filename.startswith(_LAYERS) and not code.co_filename.endswith(_NO_LAYERS):
            self._layers[id(code)] = code
        else:
            if is_of_library(code):
                self._library[id(code)] = code
            return
        self.names |= facts(code).names
        self._sets |= facts(code).sets

    def announce(self, code: types.CodeType | None, scope: dict[str, Any]) -> None:
        """Tells those who listen of code that is about to run, or, without code, of a module that was imported."""
        for listener in self._announce:
            listener(code, scope)

    def facts(self) -> list[Facts]:
        """What the user's code says."""
        return [facts(code) for code, _ in self.codes.values()]

    @property
    def reads_computed(self) -> bool:
        """Whether some of it may read attributes under computed names."""
        return any(known.reads_computed for known in self.facts())

    def only_counts(self, name: str) -> bool:
        """Whether none of it reads an attribute or a variable of this name, but to add a constant to it."""
        known = [*self.facts(), *map(facts, self._layers.values())]
        return name not in self.getters and not any(name in of.reads or of.reads_computed or of.globals_by_name for of in known)

    def may_set(self, name: str, *, by_library: bool = False) -> bool:
        """Whether some of it may set an attribute of this name. A `functools.cached_property` sets the one that it is called by.

        Args:
          name: of the attribute.
          by_library: whether the standard library's code counts, too, as it does for objects of its own classes.
        """
        return (
            name in self._sets
            or (by_library and any(name in facts(code).sets for code in self._library.values()))
            or any(known.sets_computed for known in self.facts())
            or any(code.co_name == name for code, _ in self.codes.values())
        )

    def may_set_global(self, scope: Mapping[str, Any], name: str) -> bool:
        """Whether some of it may set this global name, or an attribute of this name of a module that it names."""
        own = [facts(code) for code, of in self.codes.values() if of is scope]
        return any(known.globals_by_name or name in known.sets_globals for known in own) or self.may_set(name)

    def may_set_variable(self, name: str) -> bool:
        """Whether some of it may set a variable of this name in a function around it."""
        return any(name in known.sets_variables for known in self.facts())

    def may_write_into(self, paths: Sequence[str], *, by_library: bool = False) -> bool:
        """Whether some of it may change a container which is reached by these paths.

        It may if a path ends in no name that code would use, such as that of a default, or if it writes into what a path names. It also
        may if it names the container, or what holds it among its entries, and writes into something that has come from elsewhere.

        Args:
          paths: in words, without the name of the root.
          by_library: whether the standard library's code counts, too, which names attributes of objects of its own classes.
        """
        tails = [last_names(path) for path in paths]
        if not all(tails):
            return True
        if by_library and any(set[str]().union(*tails) & facts(code).writes_into for code in self._library.values()):
            return True
        known, names, last = self.facts(), set[str]().union(*map(names_in, paths)), set[str]().union(*tails)
        return any(names & of.writes_into for of in known) or (
            any(of.writes_into_others for of in known) and any(last & (of.names | of.own_names) for of in known)
        )

    def merge(self, other: Executed) -> bool:
        """Adds code that another block ran; returns whether any of it is new."""
        new = bool(other.codes.keys() - self.codes.keys()) or not other.names <= self.names
        self.codes |= other.codes
        self.names |= other.names
        self.getters |= other.getters
        self.sources |= other.sources
        self.counters |= other.counters
        self.starts_threads |= other.starts_threads
        self._was_alone &= other._was_alone
        self._sets |= other._sets
        self._layers |= other._layers
        self._library |= other._library
        return new


@contextlib.contextmanager
def record_code(executed: Executed) -> Generator[None]:
    """Adds the code that this thread runs in the block to `executed`, also if the block raises.

    What the interpreter calls in between, for the garbage collector or to end an object's life, is no code of the pass.
    """
    seen: dict[tuple[int, int], types.CodeType] = {}
    of_interpreter = {code for callback in gc.callbacks if (code := _code_of(callback)) is not None}
    aside: types.FrameType | None = None

    def note(frame: types.FrameType, event: str, arg: Any) -> None:
        nonlocal aside
        if aside is not None:
            if event == "return" and frame is aside:
                aside = None
        elif event == "call":
            if frame.f_code in of_interpreter or frame.f_code.co_name == "__del__":
                aside = frame
                return
            key = id(frame.f_code), id(frame.f_globals)
            if key not in seen and not _is_initialised_by(frame):
                seen[key] = frame.f_code
                executed.add(frame.f_code, frame.f_globals)
        elif event == "return" and frame.f_code.co_name == "<module>" and _is_initialised_by(frame):
            if is_of_user(frame.f_code, frame.f_globals):
                executed.announce(None, frame.f_globals)
        elif event == "c_call":
            executed.note_builtin(frame, arg)

    try:
        with profiled(note):
            yield
    finally:
        executed.restore_generators()


def _is_initialised_by(frame: types.FrameType) -> bool:
    """Whether a function runs while its module is imported, which happens once: no later pass reads or writes what it does."""
    return getattr(frame.f_globals.get("__spec__"), "_initializing", False)


def _code_of(callback: Any) -> types.CodeType | None:
    """The code of a function, a method, or an object that can be called."""
    return getattr(callback, "__code__", None) or getattr(type(callback).__call__, "__code__", None)


def _source(function: Any) -> str | None:
    """The name of a clock, None for another function that is called like one."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, types.ModuleType):
        return f"{owner.__name__}.{function.__name__}"
    if isinstance(owner, type) and issubclass(owner, datetime.date):
        return f"{owner.__name__}.{function.__name__}"
    return None


def _is_for_user(frame: types.FrameType | None) -> bool:
    """Whether the user's code calls, directly or by way of the standard library."""
    while frame is not None and is_of_library(frame.f_code):
        frame = frame.f_back
    return frame is not None and is_of_user(frame.f_code, frame.f_globals)


def is_of_library(code: types.CodeType) -> bool:
    """Whether it is the standard library's."""
    place = code.co_filename
    return place.startswith(("<frozen", _STANDARD_LIBRARY)) and not place.startswith(_PACKAGES)


def is_of_user(code: types.CodeType, scope: Mapping[str, Any]) -> bool:
    """Whether a function is the user's, or that of a library the user works with."""
    place = code.co_filename
    if place.startswith("<") and not place.startswith("<frozen"):  # generated code, or that of a console
        file = scope.get("__file__")
        return is_users_file(file) if isinstance(file, str) else _package(scope.get("__name__")) not in _NOT_THE_USERS
    return is_users_file(place)


def is_users_class(kind: type) -> bool:
    """The same for a class."""
    if kind.__module__ == "builtins":  # so say classes that are made where there is no module's name
        return bool(kind.__flags__ & _HEAP_TYPE) and vars(builtins).get(kind.__name__) is not kind
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return is_users_file(file) if isinstance(file, str) else _package(kind.__module__) not in _NOT_THE_USERS


def is_holder(kind: type) -> bool:
    """Whether it is a class of the standard library or PyTorch that holds what the user puts in."""
    return is_read_by_library(kind) or any(base.__name__ in _NAMESPACES for base in kind.__mro__)


def is_read_by_library(kind: type) -> bool:
    """Whether it is such a class, and code that is not recorded reads what its objects hold."""
    return any(base.__name__ in _HOLDERS and _package(base.__module__) in _NOT_THE_USERS for base in kind.__mro__)


def is_ours(kind: type) -> bool:
    """Whether it is a class of this package's."""
    return _package(kind.__module__) == "adaptrt"


def is_users_module(module: types.ModuleType) -> bool:
    """The same as `is_of_user` for a module."""
    file = getattr(module, "__file__", None)
    return is_users_file(file) if isinstance(file, str) else _package(module.__name__) not in _NOT_THE_USERS


def _package(name: Any) -> str:
    return name.partition(".")[0] if isinstance(name, str) else ""


def is_users_file(place: str) -> bool:
    """Whether code in this file is neither PyTorch's, ours nor the standard library's."""
    if place.startswith((_TORCH, _OURS)) or place.startswith("<frozen"):
        return False
    return not place.startswith(_STANDARD_LIBRARY) or place.startswith(_PACKAGES)


def is_array(value: Any) -> bool:
    """Whether it holds numbers in a block of memory: an array of NumPy's, which is not imported for this, or of the standard library's."""
    return isinstance(value, array.array | bytearray) or any(
        base.__module__ == "numpy" and base.__name__ == "ndarray" for base in type(value).__mro__
    )


def is_number_of_numpy(kind: type) -> bool:
    """Whether it is a class of single numbers of NumPy's, which do not change."""
    return any(base.__module__ == "numpy" and base.__name__ == "generic" for base in kind.__mro__) and kind.__name__ != "object_"


def has_hidden_state(kind: type) -> bool:
    """Whether objects of a class have more than attributes and slots that Python sees, as those of classes in C have."""
    num_words = (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0) + len(slots_of(kind))
    return kind.__basicsize__ > object.__basicsize__ + num_words * _WORD_BYTES


def slots_of(kind: type) -> list[str]:
    """The names of the slots of a class, as they are in its objects."""
    return [name for base in kind.__mro__ if "__slots__" in vars(base) for name, kept in vars(base).items() if isinstance(kept, _SLOT)]


def outside() -> int:
    """The `stacklevel` by which a warning of the caller's names the line of the user's that led to it."""
    level, frame = 1, sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename.startswith((_OURS, _TORCH)) or is_of_library(frame.f_code)):
        level, frame = level + 1, frame.f_back
    return level
