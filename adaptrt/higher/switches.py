"""Settings of the whole process that a handle changes while it runs, so that its gradient has a derivative.

Known limits: other threads see the changed settings, too.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

import torch


def differentiable_twice(is_recurrent: bool) -> AbstractContextManager[object]:
    """Returns a context in which attention, and recurrent networks if there are any, have a derivative of their gradient."""
    if not is_recurrent:
        return _MATH_ATTENTION
    stack = ExitStack()
    stack.enter_context(_MATH_ATTENTION)
    stack.enter_context(_NO_CUDNN)
    return stack


class _Switches:
    """A context in which settings of the process have certain values.

    If several threads are in it, the first one that enters makes the settings, and the last one that leaves restores them. PyTorch's own
    context managers take four times as long, and a handle enters one at every call.

    Args:
      rows: for each setting the function that reads it, the function that sets it, and the value wanted.
    """

    def __init__(self, *rows: tuple[Callable[[], bool], Callable[[bool], object], bool]) -> None:
        self._rows = rows
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[bool] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = [read() for read, _, _ in self._rows]
                for _, put, wanted in self._rows:
                    put(wanted)
            self._inside += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for (_, put, _), before in zip(self._rows, self._before, strict=True):
                    put(before)


_MATH_ATTENTION = _Switches(
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp, True),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, False),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp, False),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp, False),
)
_NO_CUDNN = _Switches((lambda: torch.backends.cudnn.enabled, functools.partial(setattr, torch.backends.cudnn, "enabled"), False))
"""cuDNN's recurrent kernels have no second derivative. `torch.backends.cudnn.flags` would also write the setting of TF32."""
