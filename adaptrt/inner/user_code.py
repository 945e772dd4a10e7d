"""The user's Python code and values: which code ran, which classes and files are the user's, and which values cannot change.

Code is the user's if it is neither PyTorch's nor ours nor the standard library's, so that of other packages is, too.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import os
import sys
import sysconfig
import types
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from adaptrt.graph.profile import profiled

_TORCH = os.path.dirname(torch.__file__) + os.sep
_LAYERS = os.path.join(_TORCH, "nn") + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep
_PACKAGES = tuple({sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib")})

_DYNAMIC = frozenset({"getattr", "__dict__", "vars"})
"""Names in code that may read attributes under names which it does not spell out."""

_SETTERS = frozenset({"setattr", "delattr", "__setattr__", "__dict__", "vars"})
"""The same of code that sets them."""

_SEEDING = frozenset({"manual_seed", "seed", "set_state", "graphsafe_set_state", "set_offset"})
"""Methods of a generator."""

_HOLDERS = frozenset({("types", "SimpleNamespace"), ("argparse", "Namespace")})

IMMUTABLE = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, torch.dtype, torch.device, torch.Size, enum.Enum)

OPAQUE = (*IMMUTABLE, Tensor, type, types.ModuleType, types.BuiltinFunctionType)
"""What is compared as a whole."""


_QUESTIONS = (torch.is_grad_enabled, torch.is_inference_mode_enabled)
"""Functions by which code asks for the gradient mode."""


class Executed:
    """The Python code that ran in a block, apart from PyTorch's own outside of `torch.nn`.

    Attributes:
      scopes: the global names of each function that is the user's.
      names: all names in that code, and in the code of layers.
      questions: names of the functions by which the user's code, or that of a library, asks for the gradient mode, whatever it calls them.
      seeding: where it seeds a generator of PyTorch's, or sets it to another state. After the block the generator has its state again.
    """

    def __init__(self) -> None:
        self.scopes: dict[types.CodeType, dict[str, Any]] = {}
        self.names: set[str] = set()
        self.questions: set[str] = set()
        self.seeding: list[str] = []
        self._seeded: list[tuple[torch.Generator, Tensor]] = []

    def note_builtin(self, frame: types.FrameType, called: Any) -> None:
        """Takes note of a function written in C that code calls, if it matters."""
        if called in _QUESTIONS:
            if frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", "adaptrt"):
                self.questions.add(called.__name__)
        elif type(getattr(called, "__self__", None)) is torch.Generator and called.__name__ in _SEEDING:
            while frame.f_back is not None and not is_of_user(frame.f_code, frame.f_globals):
                frame = frame.f_back
            self.seeding.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            self._seeded.append((called.__self__, called.__self__.get_state()))  # before it is called

    def restore_generators(self) -> None:
        """Gives generators that were seeded the states that they had before."""
        while self._seeded:
            generator, state = self._seeded.pop()
            generator.set_state(state)

    @property
    def is_dynamic(self) -> bool:
        """Whether some of it may read attributes under computed names."""
        return any(_DYNAMIC & set(code.co_names) for code in self.scopes)

    def may_set(self, name: str) -> bool:
        """Whether some of it may set an attribute of this name."""
        return name in self.names or any(_SETTERS & set(code.co_names) for code in self.scopes)

    def may_set_global(self, scope: Mapping[str, Any], name: str) -> bool:
        """Whether some of it may set this global name."""
        codes = [code for code, own in self.scopes.items() if own is scope]
        return any("globals" in code.co_names for code in codes) or any(
            instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") and instruction.argval == name
            for code in codes
            if name in code.co_names
            for instruction in dis.get_instructions(code)
        )

    def merge(self, other: Executed) -> bool:
        """Adds code that another block ran; returns whether any of it is new."""
        new = other.scopes.keys() - self.scopes.keys()
        self.scopes |= other.scopes
        grew = not other.names <= self.names
        self.names |= other.names
        return grew or bool(new)


@contextlib.contextmanager
def record_code(executed: Executed) -> Generator[None]:
    """Adds the code that this thread runs in the block to `executed`, also if the block raises."""
    frames: dict[types.CodeType, dict[str, Any]] = {}

    def note(frame: types.FrameType, event: str, arg: Any) -> None:
        if event == "call":
            frames[frame.f_code] = frame.f_globals
        elif event == "c_call":
            executed.note_builtin(frame, arg)

    try:
        with profiled(note):
            yield
    finally:
        executed.restore_generators()
        for code, scope in frames.items():
            if is_of_user(code, scope):
                executed.scopes[code] = scope
            elif not code.co_filename.startswith(_LAYERS) or code.co_filename.endswith("module.py"):
                continue
            executed.names.update(code.co_names, [value for value in code.co_consts if isinstance(value, str) and value.isidentifier()])


def is_of_user(code: types.CodeType, scope: Mapping[str, Any]) -> bool:
    """Whether a function is the user's, or that of a library the user works with."""
    place = code.co_filename
    if place.startswith("<"):  # generated code, or that of a console
        place = scope.get("__file__") or (place if scope.get("__name__") == "__main__" else _TORCH)
    return is_users_file(place)


def is_users_class(kind: type) -> bool:
    """The same for a class; and whether it is one of the standard library's that hold what the user puts in."""
    if (kind.__module__, kind.__qualname__) in _HOLDERS:
        return True
    module = sys.modules.get(kind.__module__)
    return module is not None and is_users_file(
        getattr(module, "__file__", None) or ("<main>" if kind.__module__ == "__main__" else _TORCH)
    )


def is_users_file(place: str) -> bool:
    """Whether code in this file is neither PyTorch's, ours nor the standard library's."""
    if place.startswith((_TORCH, _OURS)) or place.startswith("<frozen"):
        return False
    return not place.startswith(_STANDARD_LIBRARY) or place.startswith(_PACKAGES)


def is_array(value: Any) -> bool:
    """Whether it is an array of NumPy's, which is not imported for this."""
    return type(value).__module__ == "numpy" and hasattr(value, "tobytes")


def slots_of(value: Any) -> list[str]:
    """The attributes that an object of a class with `__slots__` has."""
    names = [name for base in type(value).__mro__ for name in _as_names(vars(base).get("__slots__", ()))]
    return [name for name in names if not name.startswith("__") and hasattr(value, name)]


def _as_names(slots: Any) -> list[str]:
    return [slots] if isinstance(slots, str) else list(slots)
