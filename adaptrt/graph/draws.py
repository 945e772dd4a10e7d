"""Finds out whether a traced function draws from Python's or NumPy's global random numbers.

Such a draw would be a constant of the program, and another one in each capture. The generators belong to the process, so that other threads
may draw from them while a function is traced. That is their business: nothing is put back here.

If a generator's state is the same before and after, nobody has drawn. If it is not, the function is traced once more, and the calls of this
thread are watched:

- Python's draws end in methods of one object that are written in C, which the profiling hook sees.
- NumPy's cannot be seen by that hook. Its functions are exchanged in the module `numpy.random` for ones that tell who calls them. Where one
  of them was imported by name or is kept in an object, a draw counts as this thread's if code that it ran spells out that name.

Known limits: generators that the user has made are Python state of the user's. While a function is traced for the second time,
`numpy.random.rand` and its like are other objects in all threads; in other threads they do the same.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import random
import sys
import threading
import types
from collections.abc import Callable, Generator
from typing import Any, cast

import torch

from adaptrt.errors import UnsupportedRandomness
from adaptrt.graph.profile import profiled
from adaptrt.process import changed

_PYTHON: Any = random.random.__self__  # pyright: ignore
"""The object whose methods the functions of the module `random` are."""

_NOT_SEARCHED = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.dirname(__file__)) + os.sep, "<frozen")
"""Where code is that draws from neither: PyTorch's, ours, and Python's import."""

_MAX_DEPTH = 6

_READERS = frozenset({"getstate", "get_state", "get_bit_generator", "default_rng", "test"})
"""What draws nothing."""


def states() -> tuple[Any, Any]:
    """The states of Python's and NumPy's global generators, in a form that can be compared."""
    numpy = _numpy()
    return random.getstate(), None if numpy is None else _comparable(numpy.get_state())


def _comparable(state: Any) -> Any:
    if isinstance(state, tuple):
        return tuple([part.tobytes() if hasattr(part, "tobytes") else part for part in cast("tuple[Any, ...]", state)])
    return repr(state)


def _numpy() -> Any:
    """The module `numpy.random`, if the process uses NumPy. NumPy loads it late, and it has no state before."""
    return importlib.import_module("numpy.random") if "numpy" in sys.modules else None


@contextlib.contextmanager
def refused() -> Generator[None]:
    """Raises at the end of the block if this thread has drawn in it.

    Raises:
      UnsupportedRandomness: it has drawn from Python's or NumPy's global generator.
    """
    watch = _Watch()
    alone, before = is_alone(), states()
    with contextlib.ExitStack() as stack:
        if _numpy() is not None:
            stack.enter_context(watch.numpy())
        stack.enter_context(profiled(watch.note))
        yield
    by_somebody = [found != now for found, now in zip(before, states(), strict=True)]
    if watch.has_drawn or (any(by_somebody) and alone and is_alone()) or (by_somebody[1] and watch.may_have_drawn()):
        raise UnsupportedRandomness(
            "the model or the loss draws from Python's or NumPy's random numbers while it runs; draw with torch instead "
            "(torch.rand(())), and use torch.where for the branch"
        )


def is_alone() -> bool:
    """Whether no other thread runs Python."""
    return len(sys._current_frames()) == 1  # pyright: ignore[reportPrivateUsage]


class _Watch:
    """What the thread that made it does.

    Attributes:
      has_drawn: whether it was seen drawing.
    """

    def __init__(self) -> None:
        self.has_drawn = False
        self._thread = threading.get_ident()
        self._ran: dict[types.CodeType, dict[str, Any]] = {}
        self._enclosed: set[int] = set()  # identities of the values of free variables
        self._draws: dict[str, Any] = {}

    def note(self, frame: types.FrameType, event: str, arg: Any) -> None:
        """As for `sys.setprofile`."""
        if event == "call":
            code = frame.f_code
            if not code.co_filename.startswith(_NOT_SEARCHED):
                self._ran[code] = frame.f_globals
                self._enclosed.update(id(frame.f_locals.get(name)) for name in code.co_freevars)
        elif event == "c_call" and getattr(arg, "__self__", None) is _PYTHON and arg.__name__ not in _READERS:
            self.has_drawn = True

    @contextlib.contextmanager
    def numpy(self) -> Generator[None]:
        """Within the block the functions of `numpy.random` tell if this thread calls them."""
        own = _scope_of(_numpy())
        self._draws = {
            name: value for name, value in own.items() if callable(value) and not isinstance(value, type) and name not in _READERS
        }
        with contextlib.ExitStack() as stack:
            for scope in (own, _scope_of(sys.modules["numpy.random.mtrand"])):
                draws = {name: value for name, value in self._draws.items() if scope.get(name) is value}
                stack.enter_context(changed(functools.partial(scope.update, draws)))
                scope.update({name: self._telling(value) for name, value in draws.items()})
            yield

    def _telling(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(draw)
        def told(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self._thread:
                self.has_drawn = True
            return draw(*args, **kwargs)

        return told

    def may_have_drawn(self) -> bool:
        """Whether code that ran can get at one of NumPy's functions, or at their generator, without the module `numpy.random`.

        What holds one of them is looked at, and what holds that, until there is a name: of an attribute, or a global one.
        """
        owner = getattr(self._draws.get("rand"), "__self__", None)
        level: list[Any] = [value for value in (*self._draws.values(), owner) if value is not None]
        kept: dict[int, Any] = {}
        own: list[Any] = [kept, self._draws, _scope_of(_numpy()), _scope_of(sys.modules["numpy.random.mtrand"])]
        own.append(own)
        for _ in range(_MAX_DEPTH):
            kept |= {id(value): value for value in level}
            own.append(level)
            found: list[Any] = gc.get_referrers(*level)
            holders = [holder for holder in found if id(holder) not in kept and not any(holder is known for known in own)]
            own += [found, holders]
            level = []
            for holder in holders:
                entries = cast("dict[str, Any]", holder if isinstance(holder, dict) else getattr(holder, "__dict__", {}))
                names = {name for name, value in entries.items() if id(value) in kept}
                if names and self._names_one_of(entries, names):
                    return True
                if not names and not isinstance(holder, types.FrameType | types.CellType):
                    level.append(holder)
            if not level:
                break
        return bool(level) or not self._enclosed.isdisjoint(kept) or any("_rand" in code.co_names for code in self._ran)

    def _names_one_of(self, entries: dict[str, Any], names: set[str]) -> bool:
        """Whether code that ran spells out one of the names; for those of a Python module, whether it does and knows the module."""
        for code, scope in self._ran.items():
            if not names.isdisjoint(code.co_names):
                modules = [scope.get(name) for name in code.co_names]
                if "__builtins__" not in entries or scope is entries or any(getattr(part, "__dict__", None) is entries for part in modules):
                    return True
        return False


def _scope_of(module: Any) -> dict[str, Any]:
    return module.__dict__
