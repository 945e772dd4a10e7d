"""Describes private parts of PyTorch that the library uses or exchanges, and exchanges functions for the time of one block.

An `Entry` is one purpose: the functions that are exchanged for it, the other private names that it needs, and what happens otherwise. In a
later PyTorch one of these names may be missing, or take other arguments than expected. Then the entry does not hold: nothing is exchanged
for it, and PyTorch does what it does by itself. Nothing fails. The table of all entries is in `backend/inductor/exchange.py`.

Known limits: a function that has kept its name and its arguments, and does something else, is not noticed here. Where that makes compiling
fail, the program is compiled again with nothing exchanged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Generator
from typing import Any, cast

import torch

from adaptrt.errors import UnknownPyTorch
from adaptrt.process import changed


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A private name of PyTorch's.

    Attributes:
      module: where it is, such as "torch._inductor.codegen.cpp".
      attribute: its name there, such as "KernelGroup.codegen_group".
      parameters: the names of all parameters that the function takes, in order; None if they do not matter.
      keywords: what it has to take by name.
    """

    module: str
    attribute: str
    parameters: tuple[str, ...] | None = None
    keywords: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"

    def owner(self) -> tuple[Any, str]:
        """The module or class that has it, and its name there.

        Raises:
          ImportError, AttributeError: there is none.
        """
        *path, name = self.attribute.split(".")
        return functools.reduce(getattr, path, _module(self.module)), name

    def fault(self) -> str | None:
        """What is wrong with it in this PyTorch, or None."""
        try:
            found = getattr(*self.owner())
        except (ImportError, AttributeError):
            return f"there is no {self}"
        if self.parameters is None and not self.keywords:
            return None
        try:
            signature = inspect.signature(found).parameters
        except (TypeError, ValueError):
            return f"the parameters of {self} are not known"
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values())
        if self.parameters in (None, tuple(signature)) and (takes_any or set(self.keywords) <= set(signature)):
            return None
        return f"{self} takes ({', '.join(signature)})"


def _module(name: str) -> Any:
    """The module; `torch._C._dynamo.guards` and its like are attributes that cannot be imported."""
    if name in sys.modules:
        return sys.modules[name]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)  # importing Inductor gives some about Inductor
            return importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, attribute = name.rpartition(".")
        return getattr(_module(parent), attribute) if parent else importlib.import_module(name)


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """Private parts of PyTorch that serve one purpose.

    Attributes:
      name: what `explain()` calls it.
      purpose: what it is for.
      otherwise: what happens where it does not hold.
      exchanged: functions that are replaced for the time of a block.
      needed: other names that are used.
      versions: of PyTorch, in which it was looked at and holds.
      warns: whether a warning says so where it does not hold, since more than time is lost.
    """

    name: str
    purpose: str
    otherwise: str
    exchanged: tuple[Target, ...] = ()
    needed: tuple[Target, ...] = ()
    versions: str = "2.11 to 2.14"
    warns: bool = False

    def fault(self) -> str | None:
        """Why it does not hold in this PyTorch; None if it does."""
        if self.exchanged and _given_up is not None:
            return _given_up
        return next((fault for target in (*self.exchanged, *self.needed) if (fault := target.fault()) is not None), None)

    @property
    def holds(self) -> bool:
        """Whether all of it is there as expected. If not, and that is worth a warning, there is one, once a process."""
        fault = self.fault()
        if fault is not None and self.warns and fault is not _given_up:
            warn_once(self.name, f"{fault} in PyTorch {torch.__version__}, so {self.otherwise}")
        return fault is None


_given_up: str | None = None
_warned: set[str] = set()


def give_up(reason: str) -> None:
    """Says that what is exchanged breaks PyTorch's compiler: from now on nothing is, and a warning says so."""
    global _given_up
    _given_up = f"{reason} in PyTorch {torch.__version__}"
    warn_once(
        "all",
        f"{_given_up}; from now on PyTorch's compiler runs unchanged: compiling and compiled "
        "programs take longer, and what other threads draw at random while one compiles may be drawn again",
    )


@contextlib.contextmanager
def nothing_exchanged() -> Generator[None]:
    """Within the block no entry with exchanged functions holds. To be entered under the lock `COMPILING`."""
    global _given_up
    before = _given_up

    def undo() -> None:
        global _given_up
        _given_up = before

    with changed(undo):
        _given_up = before or "nothing is exchanged at present"
        yield


def warn_once(name: str, text: str) -> None:
    """Warns of `text`, unless there was a warning of this name in this process."""
    if name not in _warned:
        _warned.add(name)
        warnings.warn(text, UnknownPyTorch, stacklevel=2)


@contextlib.contextmanager
def exchanged(entry: Entry, *makers: Callable[[Any], Callable[..., Any]]) -> Generator[None]:
    """Within the block this thread gets other functions for those of an entry, and all other threads what they were.

    To be entered under the lock `COMPILING`: blocks of two threads must not overlap. Where the entry does not hold the block is an ordinary
    one.

    Args:
      makers: for each of `entry.exchanged` a function that takes the original and returns what is called instead.
    """
    with contextlib.ExitStack() as stack:
        if entry.holds:
            for target, maker in zip(entry.exchanged, makers, strict=True):
                owner, name = target.owner()
                stack.enter_context(exchanged_attribute(owner, name, maker(getattr(owner, name))))
        yield


@contextlib.contextmanager
def exchanged_attribute(owner: Any, name: str, other: Callable[..., Any]) -> Generator[None]:
    """Within the block this thread gets `other` for a function, public or not. To be entered under the lock `COMPILING`.

    Subclasses that call a class method of the owner's get the original.
    """
    original: Callable[..., Any] = getattr(owner, name)
    before: Any = owner.__dict__.get(name, _INHERITED)
    thread: int | None = threading.get_ident()

    @functools.wraps(original)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (other if threading.get_ident() == thread else original)(*args, **kwargs)

    def undo() -> None:
        nonlocal thread
        if before is not _INHERITED:
            setattr(owner, name, before)
        elif name in vars(owner):
            delattr(owner, name)
        thread = None  # whoever has imported `either` in the meantime keeps it

    found = inspect.getattr_static(owner, name) if isinstance(owner, type) else None
    with changed(undo):
        setattr(owner, name, _as_was(found, owner, either))
        yield


_INHERITED = object()


def _as_was(found: object, owner: type, either: Callable[..., Any]) -> Any:
    """What to put in a class for `either` to be called as `found` was: as a class method of the owner, as a static method, or as it is."""
    if isinstance(found, staticmethod):
        return staticmethod(either)
    if not isinstance(found, classmethod):
        return either
    method = cast("classmethod[Any, Any, Any]", found)

    @functools.wraps(method.__func__)
    def call(cls: type, *args: Any, **kwargs: Any) -> Any:
        return (either if cls is owner else method.__get__(None, cls))(*args, **kwargs)

    return cast(Any, classmethod)(call)


FX_TRACING = Entry(
    "compiled modules run uncompiled",
    "A function that torch.compile made runs as it was before while a capture runs, instead of computing what would not be recorded.",
    "a model that holds what torch.compile made may be captured wrongly",
    needed=(
        Target("torch.fx._symbolic_trace", "_set_is_fx_tracing", ("value",)),
        Target("torch.fx._symbolic_trace", "_get_is_fx_tracing", ()),
    ),
    versions="2.14",
    warns=False,
)
"""Older versions have a flag of the process's (`FX_TRACING_OF_OLD`); there is a warning where there is neither."""

FX_TRACING_OF_OLD = dataclasses.replace(
    FX_TRACING,
    needed=(Target("torch.fx._symbolic_trace", "_is_fx_tracing_flag"),),
    versions="2.11 to 2.13",
    warns=True,
)

FLAGS_OF_MODES = Entry(
    "flags of dispatch modes",
    "What the process remembers about dispatch modes is put back after a signal or a fork in a capture (`tracing_state.py`).",
    "after a signal or a fork at such a moment torch.compile may compile nothing any more",
    needed=(
        Target("torch.utils._python_dispatch", "set_is_in_mode_without_ignore_compile_internals"),
        Target("torch.utils._python_dispatch", "_is_in_any_mode_without_ignore_compile_internals"),
    ),
)
