"""When handlers of signals are called while something is captured, and what is left of them afterwards. One process runs all of it."""

from __future__ import annotations

import signal
import sys

import pytest

from tests.processes import INTERRUPTED, run_script

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no such signals here")

BEFORE = """
from adaptrt import process

happened = []

def of_library(source):
    '''A function that counts as PyTorch's.'''
    scope = {"happened": happened, "signal": signal}
    exec(compile(source, os.path.join(os.path.dirname(torch.__file__), "made_up.py"), "exec"), scope)
    return process.leaving_nothing(scope["fn"])

def stops(fn):
    try:
        fn()
    except Stop:
        happened.append("stopped")

def note(number, frame):
    happened.append(signal.Signals(number).name)
"""


def run(script: str) -> None:
    run_script(INTERRUPTED + BEFORE + script, timeout_s=60)


def test_a_handler_that_raises_keeps_no_other_from_being_called() -> None:
    run("""
signal.signal(signal.SIGALRM, handler)
signal.signal(signal.SIGTERM, note)
raise_two = '''
def fn():
    signal.raise_signal(signal.SIGALRM)
    signal.raise_signal(signal.SIGTERM)
    happened.append("went on")
'''
stops(of_library(raise_two))
assert happened == ["went on", "SIGTERM", "stopped"], happened

# Nor where undoing fails for good.
happened.clear()

def fails():
    raise Stop

inner = of_library("def fn(change):\\n    change.__enter__()\\n    signal.raise_signal(signal.SIGTERM)")
stops(lambda: inner(process.changed(fails)))
assert happened == ["SIGTERM", "stopped"], happened
""")


def test_a_signal_does_not_wait_for_ever() -> None:
    """It is sent once more after a while; and code that waits through the standard library is the caller's."""
    run("""
process._AGAIN_S = 0.2
signal.signal(signal.SIGALRM, handler)
never = of_library("def fn():\\n    signal.raise_signal(signal.SIGALRM)\\n    while True:\\n        pass")
stops(never)
assert happened == ["stopped"], happened

blocked = of_library("def fn(lock):\\n    signal.raise_signal(signal.SIGALRM)\\n    lock.acquire()")
held = threading.Lock()
held.acquire()
stops(lambda: blocked(held))
assert happened == ["stopped"] * 2, happened

process._AGAIN_S = 1000.0
signal.setitimer(signal.ITIMER_REAL, 0.1)
stops(process.leaving_nothing(lambda: threading.Event().wait()))
assert happened == ["stopped"] * 3, happened
process._AGAIN_S = 0.2

# What was handled in the meantime is not handled again.
happened.clear()
signal.signal(signal.SIGTERM, note)
once = of_library("def fn():\\n    signal.raise_signal(signal.SIGTERM)")
once()
process.leaving_nothing(lambda: time.sleep(0.5))()
assert happened == ["SIGTERM"], happened
""")


@pytest.mark.skipif(sys.platform != "linux", reason="the test knows the structure on Linux only")
def test_what_c_code_has_told_the_system_stays() -> None:
    run("""
import ctypes

library = ctypes.CDLL(None)

def action(number):
    kept = ctypes.create_string_buffer(256)
    assert library.sigaction(int(number), None, kept) == 0
    return kept.raw[:16] + kept.raw[136:140]  # handler, mask and flags; the C library leaves the bytes between undefined

signal.signal(signal.SIGTERM, note)
signal.siginterrupt(signal.SIGTERM, False)
in_c = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: happened.append("in C"))
library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
library.signal(int(signal.SIGINT), ctypes.cast(in_c, ctypes.c_void_p))
numbers = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
before = [action(number) for number in numbers], [signal.getsignal(number) for number in numbers]
during = of_library("def fn(action, numbers):\\n    signal.raise_signal(signal.SIGINT)\\n    return [action(number) for number in numbers]")
assert during(action, numbers) == before[0]
assert ([action(number) for number in numbers], [signal.getsignal(number) for number in numbers]) == before
signal.raise_signal(signal.SIGTERM)
signal.raise_signal(signal.SIGINT)
assert happened == ["in C", "SIGTERM", "in C"], happened
""")


def test_where_threading_was_first_imported_in_a_thread_that_may_set_no_handlers() -> None:
    run("""
seen = []

def first():
    threading.main_thread = threading.current_thread
    try:
        seen.append(process.leaving_nothing(lambda: 3)())
    except ValueError as error:
        seen.append(error)

main_thread = threading.main_thread
thread = threading.Thread(target=first)
thread.start()
thread.join()
threading.main_thread = main_thread
assert seen == [3] and process._deferring is None and not process._open, seen

def raises(number, frame):
    raise ValueError("of the user")

signal.signal(signal.SIGALRM, raises)
try:
    of_library("def fn():\\n    signal.raise_signal(signal.SIGALRM)")()
except ValueError:
    happened.append("raised")
assert happened == ["raised"]
""")
