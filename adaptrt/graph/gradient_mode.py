"""Lets traced code run in the caller's gradient mode, and notices whether it asks for that mode.

Programs are traced with gradients enabled. A forward pass may ask `torch.is_grad_enabled()` and do something else without them, and then it
needs another program for each mode. Most never ask, and one program serves all modes.

Known limits: questions by PyTorch's own modules do not count, since these choose kernels by it and compute the same. A function that user's
code has imported by name (`from torch import is_grad_enabled`) gives the right answer and is not noticed. While a model is probed,
`torch.is_grad_enabled` and `torch.is_inference_mode_enabled` are other objects, in all threads; in other threads they do the same.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import sys
import threading
from collections.abc import Callable, Generator

import torch

from adaptrt.process import changed


class GradientMode(enum.Enum):
    """The modes of a call."""

    GRAD = "gradients enabled"
    NO_GRAD = "no_grad"
    INFERENCE = "inference mode"

    @staticmethod
    def current() -> GradientMode:
        """Returns the mode of this thread."""
        if torch.is_grad_enabled():
            return GradientMode.GRAD
        return GradientMode.INFERENCE if torch.is_inference_mode_enabled() else GradientMode.NO_GRAD

    @contextlib.contextmanager
    def within(self) -> Generator[None]:
        """In the block, traced code finds this mode. Inference mode itself cannot be traced: there, only the answer is given."""
        if self is GradientMode.GRAD:
            yield
            return
        with torch.no_grad():
            if self is GradientMode.NO_GRAD:
                yield
                return
            with _exchanged("is_inference_mode_enabled", lambda original: lambda: True):
                yield


@contextlib.contextmanager
def questions() -> Generator[list[str]]:
    """Collects the names of the functions by which code in the block asks for the mode. To be entered under the lock `COMPILING`."""
    found: list[str] = []

    def noticing(original: Callable[[], bool]) -> Callable[[], bool]:
        def asked() -> bool:
            caller = sys._getframe(2).f_globals.get("__name__", "")  # pyright: ignore[reportPrivateUsage]
            if caller.partition(".")[0] not in ("torch", "adaptrt"):
                found.append(original.__name__)
            return original()

        return asked

    with _exchanged("is_grad_enabled", noticing), _exchanged("is_inference_mode_enabled", noticing):
        yield found


@contextlib.contextmanager
def _exchanged(name: str, maker: Callable[[Callable[[], bool]], Callable[[], bool]]) -> Generator[None]:
    """In the block this thread gets another function for one of torch's."""
    original: Callable[[], bool] = getattr(torch, name)
    other, thread = maker(original), threading.get_ident()

    @functools.wraps(original)
    def either() -> bool:
        return other() if threading.get_ident() == thread else original()

    def undo() -> None:
        nonlocal other
        setattr(torch, name, original)
        other = original  # whoever has imported `either` in the meantime keeps it

    with changed(undo):
        setattr(torch, name, either)
        yield
