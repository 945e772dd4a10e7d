"""Lets traced code run in the caller's gradient mode.

Programs are traced with gradients enabled. A forward pass may ask `torch.is_grad_enabled()` and do something else without them, and then it
needs another program for each mode. Most never ask (`inner/executed.py` notices it), and one program serves all modes.

Known limits: questions by PyTorch's own modules do not count, since these choose kernels by it and compute the same. While a program for
inference mode is traced, `torch.is_inference_mode_enabled` is another object, in all threads; in other threads it does the same. Code that
has imported the function by name would get the wrong answer there, and is refused.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Generator

import torch

from adaptrt.graph.exchange import exchanged_attribute


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
            with exchanged_attribute(torch, "is_inference_mode_enabled", lambda: True):
                yield
