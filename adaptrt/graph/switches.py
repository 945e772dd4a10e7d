"""Holds process-wide switches of PyTorch at the values that tracing needs, and gives them back to the user afterwards.

Some of PyTorch's switches choose kernels that have no second derivative, or that cannot be traced: fused attention, cuDNN, oneDNN, and
the transformer layer's inference kernel. They belong to the process, so that a block which holds one changes it for every thread. Each
switch has one owner here, a `Switch`, which counts the blocks of each thread that hold it, whatever they are for. The first block in
changes the switch, and the last block out gives it back, in whatever order the blocks end.

What the user sets meanwhile wins. While a function is captured (`Switches.held`), the functions by which users read and set a switch are
others for all threads that do not hold it themselves (`Access`). Such a thread reads what the user has set, and what it sets is the value
that the switch gets afterwards. A value that was set in another way stands afterwards, too, if it differs from the one at which the switch
is held.

What remains process-wide while a function is captured:

- The switches below have the values below, in all threads. Operations give the same results with them; some are slower.
- Garbage in cycles is not collected (`graph/collector.py`).
- Hooks on the calls of all modules, where operations are recorded together with their modules. They do nothing in other threads.
- PyTorch's tracing state. One thread captures or compiles at a time, and the others that want to wait.

Everything else that a capture sets belongs to its thread: gradient and inference mode, autocast and its cache, the engine's threads, and
the modes that record operations. The functions of PyTorch's that are exchanged while a program is compiled are exchanged for one thread,
too (`graph/exchange.py`).

Known limits: a switch looks untouched if the user sets it to the value at which it is held, and not by a function of `Access`, or during
one of the short blocks that `higher` enters for each call of a module.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch

from adaptrt.process import after_fork, changed, lock

Value = TypeVar("Value")

_LOCK = lock()
"""Held while a switch is looked at or changed. A signal handler of the same thread may come in between, so blocks that are entered and left
at any point of `hold` and `release` leave both right."""

_switches: weakref.WeakSet[Switch[Any]] = weakref.WeakSet()


class Access(NamedTuple):
    """Where the functions are by which users read and set a switch."""

    owner: Any
    reader: str
    setter: str


class Switch(Generic[Value]):
    """One setting of the process, and how many blocks hold it.

    Args:
      read: returns the setting.
      put: changes it.
      wanted: the value at which blocks hold it.
      accesses: how users read and set it.
    """

    __slots__ = ("__weakref__", "_before", "_blocks", "_exchanges", "_holders", "_put", "_read", "_wanted")

    def __init__(self, read: Callable[[], Value], put: Callable[[Value], object], wanted: Value, accesses: Sequence[Access] = ()) -> None:
        self._read, self._put, self._wanted = read, put, wanted
        self._holders: dict[int, int] = {}
        self._blocks: dict[object, int] = {}
        self._before = wanted
        self._exchanges: list[tuple[Any, str, Any, Any]] = []
        for owner, reader, setter in accesses:
            for name, other in ((reader, self._reads), (setter, self._sets)):
                original = getattr(owner, name)
                self._exchanges.append((owner, name, original, functools.partial(other, original)))
        _switches.add(self)

    @property
    def users(self) -> Value:
        """The value that the setting has outside of all blocks."""
        with _LOCK:
            found = self._read()
            return self._before if self._holders and found == self._wanted else found

    def holds(self, thread: int) -> int:
        """Returns how many blocks of a thread hold it."""
        return self._holders.get(thread, 0)

    def hold(self, thread: int) -> None:
        """Enters a block. To be called under the lock, as `release` is."""
        is_first = not self._holders
        found = self._read()
        self._holders[thread] = self._holders.get(thread, 0) + 1
        if is_first or found != self._wanted:  # in the second case the user has set it in the meantime
            self._before = found
        if found != self._wanted:
            self._put(self._wanted)

    def release(self, thread: int, left: int) -> None:
        """Leaves all blocks of a thread but `left` ones. Nothing changes if it is called again, or had not entered more."""
        before = self._before
        if left > 0:
            self._holders[thread] = left
            return
        self._holders.pop(thread, None)
        if self._holders:
            return
        if before != self._wanted and self._read() == self._wanted:
            self._put(before)
        self._before = self._wanted

    def exchange(self, block: object) -> None:
        """Gives threads that do not hold it other functions by which they read and set it, until all such blocks are over."""
        self._blocks[block] = threading.get_ident()
        for owner, name, _, other in self._exchanges:
            setattr(owner, name, other)

    def exchange_no_more(self, block: object) -> None:
        """Ends a block of `exchange`, if there is one."""
        self._blocks.pop(block, None)
        if not self._blocks:
            for owner, name, original, other in self._exchanges:
                if getattr(owner, name) is other:
                    setattr(owner, name, original)

    def forget_other_threads(self) -> None:
        """In a forked child: the blocks of all threads but this one are over."""
        for thread in list(self._holders):
            if thread != threading.get_ident():
                self.release(thread, 0)
        for block, thread in list(self._blocks.items()):
            if thread != threading.get_ident():
                self.exchange_no_more(block)

    @contextlib.contextmanager
    def lifted(self) -> Generator[None]:
        """Within the block it has the user's value although blocks hold it."""
        with _LOCK:
            if self._holders and self._read() == self._wanted:
                self._put(self._before)
        try:
            yield
        finally:
            with _LOCK:
                found = self._read()
                if self._holders and found != self._wanted:
                    self._before = found
                    self._put(self._wanted)

    def _reads(self, original: Callable[[], Value]) -> Value:
        return original() if threading.get_ident() in self._holders else self.users

    def _sets(self, original: Callable[[Value], object], value: Value) -> None:
        with _LOCK:
            if isinstance(value, type(self._wanted)) and self._holders and threading.get_ident() not in self._holders:
                self._before = value
            else:
                original(value)


class Switches:
    """A block that holds several switches. It can be entered any number of times, by any number of threads.

    A `contextlib` context manager, such as `held` gives, takes several times as long to enter, which counts where each call of a module
    enters one.
    """

    __slots__ = ("_switches",)

    def __init__(self, *switches: Switch[Any]) -> None:
        self._switches = switches

    def __enter__(self) -> None:
        thread = threading.get_ident()
        with _LOCK:
            num_held = 0
            try:
                for switch in self._switches:
                    num_held += 1
                    switch.hold(thread)
            except BaseException:
                for switch in self._switches[:num_held]:
                    switch.release(thread, max(0, switch.holds(thread) - 1))
                raise

    def __exit__(self, *raised: object) -> None:
        thread = threading.get_ident()
        with _LOCK:
            for switch in self._switches:
                switch.release(thread, switch.holds(thread) - 1)

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        """A long block that holds them, during which other threads read and set them as if it did not.

        It is written down as a change of the process (`adaptrt/process.py`).
        """
        thread, block = threading.get_ident(), object()
        before = [(switch, switch.holds(thread)) for switch in self._switches]

        def undo() -> None:
            with _LOCK:
                for switch, count in before:
                    switch.exchange_no_more(block)
                    switch.release(thread, count)

        with changed(undo, of_thread=True), self:
            with _LOCK:
                for switch in self._switches:
                    switch.exchange(block)
            yield


@after_fork
def _forget_other_threads() -> None:
    for switch in _switches:
        switch.forget_other_threads()


def _library(name: str, module: Any) -> Switch[bool]:
    """The switch of a library of kernels, which blocks hold off.

    PyTorch's context managers for these also write TF32 settings. That warns on some machines, and PyTorch refuses it where the setting was
    made in the newer of its two ways. The public attribute, which some programs freeze, is used where PyTorch has no such C functions.
    """
    reader, setter = f"_get_{name}_enabled", f"_set_{name}_enabled"
    if not (hasattr(torch._C, reader) and hasattr(torch._C, setter)):
        return Switch(functools.partial(getattr, module, "enabled"), functools.partial(setattr, module, "enabled"), False)
    accesses = [Access(torch._C, reader, setter)]
    attribute: Any = cast(Any, type(module)).__dict__.get("enabled")  # which has functions of its own
    if hasattr(attribute, "getter") and hasattr(attribute, "setter"):
        accesses.append(Access(attribute, "getter", "setter"))
    return Switch(getattr(torch._C, reader), getattr(torch._C, setter), False, accesses)


CUDNN = _library("cudnn", torch.backends.cudnn)
"""Its recurrent kernels have no second derivative."""

ONEDNN = _library("mkldnn", torch.backends.mkldnn)
"""Its operations are chosen while a model runs, and backends choose later and better."""

FAST_PATH = Switch(
    torch.backends.mha.get_fastpath_enabled,
    torch.backends.mha.set_fastpath_enabled,
    False,
    [Access(torch.backends.mha, "get_fastpath_enabled", "set_fastpath_enabled")],
)
"""The transformer layer's inference kernel ignores dropout and has no gradient."""

_ATTENTION = {"math": True, "flash": False, "mem_efficient": False, "cudnn": False, "overrideable": False}
"""For each kernel of attention whether it has a second derivative."""

_ATTENTION_KERNELS = [
    Switch(getattr(torch._C, reader), getattr(torch._C, setter), wanted, [Access(torch._C, reader, setter)])
    for name, wanted in _ATTENTION.items()
    for reader, setter in [(f"_get_{name}_sdp_enabled", f"_set_sdp_use_{name}")]
    if hasattr(torch._C, reader) and hasattr(torch._C, setter)
]

MATH_ATTENTION = Switches(*_ATTENTION_KERNELS)
"""Attention is computed from products and a softmax."""

MATH_ATTENTION_NO_CUDNN = Switches(*_ATTENTION_KERNELS, CUDNN)
"""The same, and cuDNN is not used."""

TRACEABLE = Switches(CUDNN, ONEDNN, FAST_PATH)
"""Operations are those that the functions in a model call, with gradients that can be differentiated."""
