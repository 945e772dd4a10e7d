"""Process-wide switches are held while blocks need them, whichever threads these are in, and then are the user's again."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptrt.graph.capture import capture
from adaptrt.graph.switches import CUDNN, MATH_ATTENTION, MATH_ATTENTION_NO_CUDNN, TRACEABLE, Switch, Switches

READERS: dict[str, Callable[[], bool]] = {
    "cudnn": lambda: torch.backends.cudnn.enabled,
    "onednn": torch._C._get_mkldnn_enabled,
    "fast path": torch.backends.mha.get_fastpath_enabled,
    "math": torch.backends.cuda.math_sdp_enabled,
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "memory efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "attention by cudnn": torch.backends.cuda.cudnn_sdp_enabled,
}
REAL_CUDNN: Callable[[], bool] = torch._C._get_cudnn_enabled  # pyright: ignore[reportAttributeAccessIssue]
"""The function that other threads than those which hold the switch do not find under that name meanwhile."""
HELD = {name: name == "math" for name in READERS}


def state() -> dict[str, bool]:
    return {name: read() for name, read in READERS.items()}


class Flag:
    """Stands for a setting of the process's."""

    def __init__(self, value: bool) -> None:
        self.value = value
        self.num_written = 0

    def put(self, value: bool) -> None:
        self.value = value
        self.num_written += 1

    def held(self) -> Switches:
        """At False."""
        return Switches(Switch(lambda: self.value, self.put, False))


@pytest.fixture(autouse=True)
def unchanged() -> Generator[None]:
    before = state()
    yield
    assert state() == before


class InThread:
    """A thread that is within a block of `switches` between `enter` and `leave`."""

    def __init__(self, switches: Switches) -> None:
        self._inside, self._leaves = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(switches,))

    def _run(self, switches: Switches) -> None:
        with switches:
            self._inside.set()
            assert self._leaves.wait(60)

    def enter(self) -> None:
        self._thread.start()
        assert self._inside.wait(60)

    def leave(self) -> None:
        self._leaves.set()
        self._thread.join()


@pytest.mark.parametrize("order", ["first in, first out", "first in, last out"])
@pytest.mark.parametrize("before", [True, False])
def test_blocks_of_two_threads_overlap(order: str, before: bool) -> None:
    flag = Flag(before)
    switches = flag.held()
    first, second = InThread(switches), InThread(switches)
    first.enter()
    second.enter()
    leaving = [first, second] if order == "first in, first out" else [second, first]
    leaving[0].leave()
    assert flag.value is False, "the other one still needs it"
    leaving[1].leave()
    assert flag.value is before
    assert flag.num_written == 2 * before


def test_blocks_for_different_purposes_count_together() -> None:
    """A capture begins while a handle of `higher` runs, and goes on after it."""
    wanted = state()
    handle, captures = InThread(MATH_ATTENTION_NO_CUDNN), InThread(TRACEABLE)
    handle.enter()
    captures.enter()
    handle.leave()
    assert not REAL_CUDNN() and CUDNN.users == wanted["cudnn"]
    captures.leave()
    assert state() == wanted


def test_every_switch_is_held() -> None:
    before = state()
    with TRACEABLE, MATH_ATTENTION:
        assert state() == HELD
        with TRACEABLE, MATH_ATTENTION:
            assert state() == HELD
        assert state() == HELD
    assert state() == before


def test_what_the_user_sets_in_between_stands() -> None:
    flag = Flag(False)
    switches = flag.held()
    with switches:
        flag.value = True
    assert flag.value, "it was changed, and not by us"
    flag = Flag(False)
    switches = flag.held()
    with switches:
        flag.value = True
        with switches:
            assert not flag.value, "who enters later needs it, too"
        assert not flag.value
    assert flag.value


def test_exceptions_in_a_block_and_on_entering_one() -> None:
    flag, other = Flag(True), Flag(True)
    with pytest.raises(KeyError), flag.held():
        raise KeyError

    def refuses(value: bool) -> None:
        if not value:
            raise RuntimeError("frozen")
        other.put(value)

    first, second = Switch(lambda: flag.value, flag.put, False), Switch(lambda: other.value, refuses, False)
    with pytest.raises(RuntimeError, match="frozen"), Switches(first, second):
        pytest.fail("not entered")
    assert flag.value and other.value
    with Switches(first):  # the count is right, too
        assert not flag.value
    assert flag.value


def test_a_block_within_every_step_of_another() -> None:
    """As of a signal handler: it comes between any two steps, and is over before the next."""
    value, busy = True, False
    switches: Switches

    def interrupt() -> None:
        nonlocal busy
        if not busy:
            busy = True
            with switches:
                assert not value
            busy = False

    def read() -> bool:
        interrupt()
        found = value
        interrupt()
        return found

    def put(wanted: bool) -> None:
        nonlocal value
        interrupt()
        value = wanted
        interrupt()

    switches = Switches(Switch(read, put, False))
    for _ in range(2):
        with switches:
            interrupt()
            assert not value
        assert value


def test_many_threads() -> None:
    flag = Flag(True)
    switches = flag.held()
    wrong: list[bool] = []

    def work() -> None:
        for _ in range(2000):
            with switches:
                if flag.value:
                    wrong.append(True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and flag.value


def test_captures_in_threads_leave_everything_as_it_was() -> None:
    before = state()
    seen: list[dict[str, bool]] = []

    def fn(x: Tensor) -> Tensor:
        seen.append(state())
        return x.sin()

    def fails(x: Tensor) -> Tensor:
        raise KeyError("on purpose")

    def work(number: int, errors: list[Any]) -> None:
        for _ in range(5):
            try:
                capture(fails if number % 2 else fn, torch.zeros(2))
            except KeyError:
                errors.append(number)

    errors: list[int] = []
    with MATH_ATTENTION_NO_CUDNN:
        thread = InThread(MATH_ATTENTION)
        thread.enter()
        work(0, errors)
        work(1, errors)
    thread.leave()
    assert errors == [1] * 5 and seen == [HELD] * 5
    assert state() == before


def test_what_belongs_to_a_thread() -> None:
    """What the module says of other settings that a capture changes: other threads do not see them."""
    found: dict[str, bool] = {}

    def look() -> None:
        found["cache"] = torch.is_autocast_cache_enabled()
        found["engine"] = torch._C._is_multithreading_enabled()  # pyright: ignore[reportAttributeAccessIssue]
        found["gradients"] = torch.is_grad_enabled()

    def fn(x: Tensor) -> Tensor:
        assert not torch.is_autocast_cache_enabled() and torch.is_grad_enabled()
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return x.sin()

    with torch.no_grad():
        capture(fn, torch.zeros(2))
    assert found == {"cache": True, "engine": True, "gradients": True}
