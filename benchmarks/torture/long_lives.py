"""Long lives and damaged caches.

Memory is what only this process has and has written to. Each check runs in a process of its own, with an empty cache of programs.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import adaptrt
from benchmarks.torture.check import Check
from tests.test_damaged_cache import DAMAGES, right
from tests.zygote import Zygote, mean_of_squares


def memory_kb() -> int:
    """What this process has written to, and shares with no other."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))


def mapped_libraries() -> int:
    """The libraries of kernels that are in this process."""
    return len({line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("library.so")})


def _unroll(backend: str, cache_size: int = 16) -> adaptrt.CompiledUnroll:
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    sgd = adaptrt.optim.sgd(lr=0.1)
    return adaptrt.compile_unroll(model, sgd, 2, loss=mean_of_squares, adjoint=adaptrt.Unrolled(), backend=backend, cache_size=cache_size)


def _call(unroll: adaptrt.CompiledUnroll, size: int) -> None:
    unroll((torch.randn(size, 2), torch.randn(size, 1)), (torch.randn(3, 2), torch.randn(3, 1))).backward()


def _grown(work: Callable[[int], object], total: int, share_s: float, limit_kb: float) -> str:
    """Calls `work` with the numbers below `total` as long as there is time; how much memory the calls take of the last third."""
    warm, ends_s, number, before = total * 2 // 3, time.monotonic() + share_s, 0, 0
    while number < total and time.monotonic() < ends_s:
        if number == warm:
            before = memory_kb()
        work(number)
        number += 1
    if number <= warm:
        return f"{number} in the time that there was, too few to judge"
    kb = (memory_kb() - before) / (number - warm)
    if kb > limit_kb:
        raise AssertionError(f"{kb:.1f} KB each after {warm} of {number}, more than {limit_kb}")
    return f"{number}, {kb:.1f} KB each after {warm}"


def unrolls_that_are_dropped(share_s: float) -> str:
    """Makes and drops unrolls. Most of them fill what is kept of traces."""
    return _grown(lambda index: _call(_unroll("eager"), 5), 900, share_s, 10)


def shapes(share_s: float) -> str:
    """Calls one unroll with data of ever new shapes."""
    unroll = _unroll("eager")
    return _grown(lambda index: _call(unroll, index + 1), 5000, share_s, 10)


def compiled_shapes(share_s: float) -> str:
    """Does the same with programs that are compiled."""
    unroll = _unroll("inductor", cache_size=4)
    found = _grown(lambda index: _call(unroll, index + 1), 60, share_s, 100)
    return f"{found}, {mapped_libraries()} libraries mapped"


def _is_right(answer: dict[str, Any]) -> bool:
    """Whether a process of the tests has found the right numbers, and nothing has crashed."""
    numbers = answer.get("numbers")
    return numbers is not None and torch.allclose(
        torch.tensor(numbers[0], dtype=torch.float64), torch.tensor(right(5), dtype=torch.float64), rtol=1e-10, atol=1e-12
    )


def damages(share_s: float) -> str:
    """Damages random files of a cache in random ways: any file, not only those that are known to matter."""
    zygote, number, ends_s = Zygote(), 0, time.monotonic() + share_s
    ways = list(dict.fromkeys(way for of_one in DAMAGES.values() for way in of_one))
    with tempfile.TemporaryDirectory() as folder:
        environment = {"TORCHINDUCTOR_CACHE_DIR": folder}
        zygote.run(sizes=[5], environment=environment)
        while time.monotonic() < ends_s:
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            for path in random.sample(files, min(len(files), random.randint(1, 4))):
                random.choice(ways)(path)
            if not _is_right(zygote.run(sizes=[5], environment=environment)):
                raise AssertionError(f"wrong numbers, or none, the time {number + 1}")
            number += 1
    zygote.close()
    return f"{number} times right"


def _in_a_process(check: Callable[[float], str]) -> Callable[[float], str]:
    def run(share_s: float) -> str:
        with tempfile.TemporaryDirectory() as folder:
            receive, send = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("spawn").Process(target=_send, args=(check, share_s, send, folder))
            process.start()
            send.close()
            try:
                is_good, found = receive.recv()
            except EOFError:
                is_good, found = False, "the process ended"
            process.join()
        if not is_good:
            raise RuntimeError(f"{found} (status {process.exitcode})")
        return found

    return run


def _send(check: Callable[[float], str], share_s: float, send: multiprocessing.connection.Connection, folder: str) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        send.send((True, check(share_s)))
    except Exception as error:
        send.send((False, f"{type(error).__name__}: {error}"))


CHECKS = (
    Check("unrolls", "unrolls are made, called and dropped, eager", _in_a_process(unrolls_that_are_dropped)),
    Check("shapes", "new shapes through a cache of 16, eager", _in_a_process(shapes)),
    Check("compiled-shapes", "new shapes through a cache of 4, compiled", _in_a_process(compiled_shapes)),
    Check("damages", "1 to 4 files of a cache are damaged at random", _in_a_process(damages)),
)
