"""The user's Python code and values: which code, classes and files are the user's, and which values cannot change.

Code is the user's if it is neither PyTorch's nor ours nor the standard library's, so that of other packages is, too, and so is code of
which nobody knows where it is from.
"""

from __future__ import annotations

import array
import builtins
import enum
import os
import sys
import sysconfig
import types
from collections.abc import Mapping
from typing import Any

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep
_PACKAGES = tuple({sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib")})
_NOT_THE_USERS = (sys.stdlib_module_names - {"__main__"}) | {"torch", "adaptrt"}
"""Packages whose code is not the user's, for code that is in no file."""

_NAMESPACES = frozenset({"SimpleNamespace", "Namespace"})
_HOLDERS = frozenset({"UserDict", "UserList", "UserString", "ChainMap", "Distribution", "Transform", "LRScheduler"})
"""Classes of the standard library and of PyTorch that hold what the user puts in, with those that are derived from them."""

IMMUTABLE = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, torch.dtype, torch.device, torch.Size, enum.Enum)

_SLOT = types.MemberDescriptorType
_WORD_BYTES = tuple.__itemsize__
_HEAP_TYPE = 1 << 9
"""The flag of classes that were made while Python runs."""


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
