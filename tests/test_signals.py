"""Signal handlers that raise, at any moment of captures, compilations and calls: the process stays usable and its numbers right."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.processes import INTERRUPTED, run_script, start

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no such signals here")


def test_at_any_moment() -> None:
    """Of captures and of calls, and while programs are rehearsed: those that ran without values afterwards would give any number."""
    script = """
from adaptrt.backend import base
from adaptrt.runtime import calls

model, unroll = make("eager")
check(model, unroll, 3)
at_random_moments(use, enters_or_leaves, 5)
at_random_moments(use, anything, 5)
use(4)
at_random_moments(lambda size: [use(4) for _ in range(3)], anything, 40)

def fails():
    base._rehearsal.is_on = True
    raise Stop

try:
    calls._rehearse(lambda: fails(), ())
except Stop:
    pass
assert not base.rehearsing()
"""
    run_script(INTERRUPTED + script)


def test_signals_of_the_system() -> None:
    """Alarms at seeded times, whose handler raises wherever the interpreter happens to be, or when the capture is over."""
    script = """
import random
signal.signal(signal.SIGALRM, handler)
model, unroll = make("eager")
check(model, unroll, 3)
before, draws, num_stopped = state(), random.Random(0), 0
for index in range(6):
    signal.setitimer(signal.ITIMER_REAL, draws.uniform(0.001, 0.6))
    try:
        while True:
            use(10 + index)
    except Stop:
        num_stopped += 1
    assert state() == before
    if index % 4 == 0:
        check(model, unroll, 100 + index)
assert num_stopped == 6
"""
    run_script(INTERRUPTED + script)


def test_a_handler_is_called_at_once_in_the_users_code_and_later_in_that_of_libraries() -> None:
    script = """
from adaptrt import process

happened = []

def here():
    signal.raise_signal(signal.SIGINT)
    happened.append("never")

model, unroll = make("eager", here)
try:
    unroll.adapt(data(4))
except KeyboardInterrupt:
    happened.append("stopped")
assert happened == ["stopped"]

signal.signal(signal.SIGUSR1, lambda number, frame: happened.append("handled"))
before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGINT)
source = '''
def raises(raise_signal, number, happened):
    raise_signal(number)
    raise_signal(number)
    happened.append("went on")
'''
library = {}
exec(compile(source, os.path.join(os.path.dirname(torch.__file__), "made_up.py"), "exec"), library)
inner = process.leaving_nothing(lambda: library["raises"](signal.raise_signal, signal.SIGUSR1, happened))

def outer():
    inner()
    happened.append("inner over")

process.leaving_nothing(outer)()
assert happened == ["stopped", "went on", "handled", "inner over"], happened
assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGINT)) == before
check(model, unroll, 4)
"""
    run_script(script)


@pytest.mark.slow
def test_compilations(tmp_path: Path) -> None:
    """A signal comes while kernels are being built: the wait ends at once, the next call is right, and so is one of other data."""
    script = """
from adaptrt.backend.inductor import cpp

run, building, leaves = cpp._run, threading.Event(), threading.Event()

def slow(*args):
    building.set()
    assert leaves.wait(100)
    return run(*args)

def stops():
    assert building.wait(100)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)

cpp._run = slow
model, unroll = make("inductor")
thread = threading.Thread(target=stops)
thread.start()
try:
    with torch.no_grad():
        unroll.adapt(data(4))
except KeyboardInterrupt:
    assert not leaves.is_set()
else:
    raise AssertionError("it was not stopped")
leaves.set()
thread.join()
before = state()
check(model, unroll, 4)
assert state() == before
"""
    run_script(script, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))


@pytest.mark.slow
def test_a_killed_process_leaves_a_cache_that_is_usable(tmp_path: Path) -> None:
    script = """
model, unroll = make("inductor")
check(model, unroll, 4)
"""
    process = start(script, {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    deadline = time.monotonic() + 100
    while not any(tmp_path.rglob("source.cpp")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert any(tmp_path.rglob("source.cpp"))
    run_script(script, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
