"""Signals, forks, kills and other threads."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Callable

from benchmarks.torture.check import Check
from tests.processes import INTERRUPTED, run_script, start

_LOOP = """
share_s = float(os.environ["SHARE_S"])
ends_s = time.monotonic() + share_s


def is_over():
    return time.monotonic() > ends_s
"""

_INTERRUPTIONS = """
import random
model, unroll = make(BACKEND)
check(model, unroll, 3)
draws = random.Random(0)
totals = {counts: interrupted(lambda: work(50), -1, counts) for counts in (enters_or_leaves, anything)}
before, number = state(), 0
while not is_over():
    for counts, total in totals.items():
        at = draws.randrange(1, total + 1)
        interrupted(lambda: work(100 + number), at, counts)
        assert state() == before, (number, at)
        work(100 + number)
        number += 1
    if number % 10 == 0:
        check(model, unroll, 10_000 + number)
check(model, unroll, 99)
print(f"{number} handlers raised, worst case: right numbers, nothing left changed")
"""


def _script(body: str, **replaced: str) -> Callable[[float], str]:
    """A check that is one script. It prints what it found last."""

    def run(share_s: float) -> str:
        script = INTERRUPTED + _LOOP + body
        for name, value in replaced.items():
            script = script.replace(name, value)
        return run_script(script, share_s + 300, SHARE_S=str(share_s)).strip().splitlines()[-1]

    return run


def _kills(share_s: float) -> str:
    """Kills processes that compile at random moments; the next one uses what they have left."""
    script = "model, unroll = make('inductor')\ncheck(model, unroll, 4)\n"
    draws, number, ends_s = random.Random(0), 0, time.monotonic() + share_s
    cache = tempfile.mkdtemp()
    try:
        while time.monotonic() < ends_s:
            process = start(script, {"TORCHINDUCTOR_CACHE_DIR": cache})
            time.sleep(draws.uniform(2.0, 12.0))
            process.kill()
            process.communicate()
            number += 1
            if number % 3 == 0:
                run_script(script, 200, TORCHINDUCTOR_CACHE_DIR=cache)
                shutil.rmtree(cache)
        run_script(script, 200, TORCHINDUCTOR_CACHE_DIR=cache)
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    return f"{number} processes killed, right numbers from every cache"


_FORKS = """
number, over = 0, False

def captures():
    while not over:
        use(data_size())

def data_size(sizes=iter(range(100, 1_000_000))):
    return next(sizes)

model, unroll = make("eager")
check(model, unroll, 3)
thread = threading.Thread(target=captures)
thread.start()
try:
    while not is_over():
        assert in_child(lambda: check(model, unroll, 7 + number), 60) == 0
        number += 1
finally:
    over = True
    thread.join()
check(model, unroll, 5)
print(f"{number} children of a process that captures, right numbers from all")
"""

_DRAWS = """
import random, numpy
over, drawn = False, {"random": [], "numpy": []}

def draws(name, draw):
    while not over:
        drawn[name].append(draw())
        time.sleep(0)

model, unroll = make("eager")
threads = [threading.Thread(target=draws, args=item) for item in (("random", random.random), ("numpy", numpy.random.rand))]
for thread in threads:
    thread.start()
number = 0
try:
    while not is_over():
        use(100 + number)
        number += 1
finally:
    over = True
    for thread in threads:
        thread.join()
repeats = {name: len(values) - len(set(values)) for name, values in drawn.items()}
assert not any(repeats.values()), repeats
check(model, unroll, 4)
print(f"{number} shapes captured beside {sum(map(len, drawn.values()))} draws, no repeats")
"""

_LATENCY = """
model, unroll = make("inductor")
small, sizes = data(4), iter(range(50, 10_000))
with torch.inference_mode():
    unroll.adapt(small)

def measured(seconds):
    times, ends = [], time.monotonic() + seconds
    with torch.inference_mode():
        while time.monotonic() < ends:
            began = time.perf_counter()
            unroll.adapt(small)
            times.append(time.perf_counter() - began)
    times.sort()
    return [1e6 * times[int(len(times) * part)] for part in (0.5, 0.99, 0.999)] + [1e6 * times[-1]]

def compiles():
    _, other = make("inductor")
    while not over:
        with torch.no_grad():
            other.adapt(data(next(sizes)))

over = False
alone = measured(min(20, share_s / 3))
thread = threading.Thread(target=compiles)
thread.start()
beside = measured(share_s * 2 / 3)
over = True
thread.join()
check(model, unroll, 4)
show = lambda times: " / ".join(f"{value:.0f}" for value in times)
print(f"p50, p99, p99.9, maximum in us: alone {show(alone)}, beside a compiling thread {show(beside)}: p99.9 {beside[2] / alone[2]:.1f} x")
"""


CHECKS = (
    Check("signals-capture", "handlers raise anywhere in captures", _script(_INTERRUPTIONS, BACKEND="'eager'", work="use")),
    Check("signals-compile", "handlers raise anywhere in compilations", _script(_INTERRUPTIONS, BACKEND="'inductor'", work="use")),
    Check(
        "signals-call",
        "handlers raise anywhere in repeated calls",
        _script("calls = lambda size: [use(4) for _ in range(5)]\n" + _INTERRUPTIONS, BACKEND="'eager'", work="calls"),
    ),
    Check("kill", "processes are killed while they compile", _kills),
    Check("fork", "the process is forked while a thread captures", _script(_FORKS)),
    Check("draws", "other threads draw at random while one captures", _script(_DRAWS)),
    Check("latency", "calls while another thread compiles", _script(_LATENCY)),
)
