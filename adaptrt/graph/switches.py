"""Holds process-wide switches of PyTorch at the values that tracing needs, and gives them back to the user afterwards.

Some of PyTorch's switches choose kernels that have no second derivative, or that cannot be traced: fused attention, cuDNN, oneDNN, and
the transformer layer's inference kernel. They belong to the process, so that a block which holds one changes it for every thread. Each
switch has one owner here, a `Switch`, which counts the blocks that hold it, whichever thread they are in and whatever they are for. The
first block in changes the switch, and the last block out gives it back, in whatever order the blocks end.

If the user sets a switch while it is held, the value that the user set is the one that stands afterwards. Blocks that are entered later set
the switch again, because they depend on it.

What remains process-wide while a function is captured:

- The switches below have the values below, in all threads. Operations give the same results with them; some are slower.
- Garbage in cycles is not collected (`graph/collector.py`).
- Hooks on the calls of all modules, where operations are recorded together with their modules. They do nothing in other threads.
- PyTorch's tracing state. One thread captures or compiles at a time, and the others that want to wait.

Everything else that a capture sets belongs to its thread: gradient and inference mode, autocast and its cache, the engine's threads, and
the modes that record operations. The functions of PyTorch's that are exchanged while a program is compiled are exchanged for one thread,
too (`graph/exchange.py`).

Known limits:

- A switch that the user sets to the value at which it is held looks like one that nobody has touched.
- A context manager of PyTorch's that is entered while a switch is held, and left afterwards, restores the value that it found.
- A process that is forked while another thread is within a block keeps the switches as that block has set them.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

_LOCK = threading.RLock()
"""Held while a switch is looked at or changed. A signal handler of the same thread may come in between, so blocks that are entered and left
at any point of `hold` and `release` leave both right."""


class Switch:
    """One flag of the process, and how many blocks hold it.

    Args:
      read: returns the flag.
      put: sets the flag.
      wanted: the value at which blocks hold it.
    """

    __slots__ = ("_before", "_holders", "_put", "_read", "_wanted")

    def __init__(self, read: Callable[[], bool], put: Callable[[bool], object], wanted: bool) -> None:
        self._read, self._put, self._wanted = read, put, wanted
        self._holders = 0
        self._before = wanted

    @property
    def users(self) -> bool:
        """The value that the flag has outside of all blocks."""
        with _LOCK:
            found = self._read()
            return self._before if self._holders and found == self._wanted else found

    def hold(self) -> None:
        """Enters a block. To be called under the lock, as `release` is."""
        found = self._read()
        self._holders += 1
        if self._holders == 1 or found != self._wanted:  # in the second case the user has set it in the meantime
            self._before = found
        if found != self._wanted:
            self._put(self._wanted)

    def release(self) -> None:
        """Leaves a block."""
        before = self._before
        self._holders -= 1
        if not self._holders and before != self._wanted and self._read() == self._wanted:
            self._put(before)


class Switches:
    """A block that holds several switches. It can be entered any number of times, by any number of threads, and is not bound to a thread.

    A `contextlib` context manager takes several times as long to enter, which counts where each call of a module enters one.
    """

    __slots__ = ("_switches",)

    def __init__(self, *switches: Switch) -> None:
        self._switches = switches

    def __enter__(self) -> None:
        with _LOCK:
            held: list[Switch] = []
            try:
                for switch in self._switches:
                    held.append(switch)
                    switch.hold()
            except BaseException:
                for switch in held:
                    switch.release()
                raise

    def __exit__(self, *raised: object) -> None:
        with _LOCK:
            for switch in self._switches:
                switch.release()


def _library(name: str, module: Any) -> Switch:
    """The switch of a library of kernels, which blocks hold off.

    PyTorch's context managers for these also write TF32 settings. That warns on some machines, and PyTorch refuses it where the setting was
    made in the newer of its two ways. The public attribute, which some programs freeze, is used where PyTorch has no such C functions.
    """
    read, put = getattr(torch._C, f"_get_{name}_enabled", None), getattr(torch._C, f"_set_{name}_enabled", None)
    if read is None or put is None:
        read, put = functools.partial(getattr, module, "enabled"), functools.partial(setattr, module, "enabled")
    return Switch(read, put, False)


CUDNN = _library("cudnn", torch.backends.cudnn)
"""Its recurrent kernels have no second derivative."""

ONEDNN = _library("mkldnn", torch.backends.mkldnn)
"""Its operations are chosen while a model runs, and backends choose later and better."""

FAST_PATH = Switch(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False)
"""The transformer layer's inference kernel ignores dropout and has no gradient."""

_ATTENTION = {"math": True, "flash": False, "mem_efficient": False, "cudnn": False, "overrideable": False}
"""For each kernel of attention whether it has a second derivative."""

_ATTENTION_KERNELS = [
    Switch(getattr(torch._C, f"_get_{name}_sdp_enabled"), getattr(torch._C, f"_set_sdp_use_{name}"), wanted)
    for name, wanted in _ATTENTION.items()
    if hasattr(torch._C, f"_get_{name}_sdp_enabled") and hasattr(torch._C, f"_set_sdp_use_{name}")
]

MATH_ATTENTION = Switches(*_ATTENTION_KERNELS)
"""Attention is computed from products and a softmax."""

MATH_ATTENTION_NO_CUDNN = Switches(*_ATTENTION_KERNELS, CUDNN)
"""The same, and cuDNN is not used."""

TRACEABLE = Switches(CUDNN, ONEDNN, FAST_PATH)
"""Operations are those that the functions in a model call, with gradients that can be differentiated."""
