"""The Python code that runs in a pass: what it names, asks and may write, for those who judge what a pass reads and writes."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import types
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt.graph.draws import is_alone
from adaptrt.graph.profile import profiled
from adaptrt.inner.bytecode import Facts, facts, last_names, names_in
from adaptrt.inner.user_code import is_of_library, is_of_user

_LAYERS = os.path.join(os.path.dirname(torch.__file__), "nn") + os.sep
_NO_LAYERS = ("module.py", "_named_member_accessor.py", "stateless.py")  # what calls layers, and exchanges their tensors

_SEEDING = frozenset({"manual_seed", "seed", "set_state", "graphsafe_set_state", "set_offset"})
"""Methods of a generator."""

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

    def names_one_at(self, path: str) -> bool:
        """Whether some of it, or of the code of layers, names the object that is reached by this path."""
        return not self.names.isdisjoint(last_names(path))

    def may_set(self, name: str, *, by_library: bool = False) -> bool:
        """Whether some of it may set an attribute of this name. A `functools.cached_property` sets the one that it is called by.

        Args:
          name: of the attribute.
          by_library: whether the standard library's code counts, too, which sets attributes of objects of its classes.
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
          by_library: whether the standard library's code counts, too, which changes containers of objects of its classes.
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
