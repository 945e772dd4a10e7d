"""Long lives and damaged caches: the checks that take too long for the tests.

    python -m benchmarks.torture_long_lives

Each check is a function that returns a row of a table: what was done, what was found, and whether that is good. Memory is what only this
process has and has written to. Each check runs in a process of its own, with an empty cache of programs.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import adaptrt
from tests.test_damaged_cache import DAMAGES, right
from tests.zygote import Zygote, mean_of_squares


class Row(NamedTuple):
    """One line of the table."""

    done: str
    found: str
    is_good: bool


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


def _grown(work: Callable[[int], object], warm: int, total: int) -> float:
    """How many KB each of the calls takes that come after the first `warm`."""
    for index in range(warm):
        work(index)
    before = memory_kb()
    for index in range(warm, total):
        work(index)
    return (memory_kb() - before) / (total - warm)


def unrolls_that_are_dropped(total: int = 900) -> Row:
    """Makes and drops unrolls. The first 600 fill what is kept of traces."""
    kb = _grown(lambda index: _call(_unroll("eager"), 5), total * 2 // 3, total)
    return Row(f"{total} unrolls made, called and dropped, eager", f"{kb:.1f} KB each after {total * 2 // 3}", kb < 10)


def shapes(total: int = 5000) -> Row:
    """Calls one unroll with data of ever new shapes."""
    unroll = _unroll("eager")
    kb = _grown(lambda index: _call(unroll, index + 1), total // 3, total)
    return Row(f"{total} shapes through a cache of 16, eager", f"{kb:.1f} KB each after {total // 3}", kb < 10)


def compiled_shapes(total: int = 100) -> Row:
    """Does the same with programs that are compiled."""
    unroll = _unroll("inductor", cache_size=4)
    kb = _grown(lambda index: _call(unroll, index + 1), total // 2, total)
    return Row(
        f"{total} shapes through a cache of 4, compiled", f"{kb:.1f} KB each after {total // 2}, {mapped_libraries()} libraries", kb < 100
    )


def kills(total: int = 20) -> Row:
    """Kills processes at random moments of their first compilation, one to three on a cache, and then looks at what another makes of it."""
    zygote, good = Zygote(), 0
    for _ in range(total):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            environment = {"TORCHINDUCTOR_CACHE_DIR": folder}
            for _ in range(random.randint(1, 3)):
                zygote.run(sizes=[5], environment=environment, kill_after_s=random.uniform(0.05, 4.0))
            good += _is_right(zygote.run(sizes=[5], environment=environment))
    zygote.close()
    return Row(f"{total} caches on which processes were killed while they compiled", f"{good} next ones right", good == total)


def _is_right(answer: dict[str, Any]) -> bool:
    """Whether a process of the tests has found the right numbers, and nothing has crashed."""
    numbers = answer.get("numbers")
    return numbers is not None and torch.allclose(
        torch.tensor(numbers[0], dtype=torch.float64), torch.tensor(right(5), dtype=torch.float64), rtol=1e-10, atol=1e-12
    )


def damages(total: int = 60) -> Row:
    """Damages random files of a cache in random ways: any file, not only those that are known to matter."""
    zygote, good = Zygote(), 0
    ways = list(dict.fromkeys(way for of_one in DAMAGES.values() for way in of_one))
    with tempfile.TemporaryDirectory() as folder:
        environment = {"TORCHINDUCTOR_CACHE_DIR": folder}
        zygote.run(sizes=[5], environment=environment)
        for _ in range(total):
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            for path in random.sample(files, min(len(files), random.randint(1, 4))):
                random.choice(ways)(path)
            good += _is_right(zygote.run(sizes=[5], environment=environment))
    zygote.close()
    return Row(f"{total} times 1 to 4 files of a cache damaged", f"{good} times right", good == total)


CHECKS: tuple[Callable[[], Row], ...] = (unrolls_that_are_dropped, shapes, compiled_shapes, kills, damages)


def _in_a_process(check: Callable[[], Row]) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        receive, send = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(target=_send, args=(check, send))
        process.start()
        send.close()
        try:
            row: Row = receive.recv()
        except EOFError:
            process.join()
            row = Row(check.__name__, f"ended with {process.exitcode}", False)
        process.join()
        return row


def _send(check: Callable[[], Row], send: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    send.send(check())


def main() -> int:
    """Prints the table."""
    print("| done | found | good |\n|---|---|---|", flush=True)
    chosen = [check for check in CHECKS if not sys.argv[1:] or check.__name__ in sys.argv[1:]]
    rows: list[Row] = []
    for check in chosen:
        rows.append(_in_a_process(check))
        print(f"| {rows[-1].done} | {rows[-1].found} | {'yes' if rows[-1].is_good else 'NO'} |", flush=True)
    return not all(row.is_good for row in rows)


if __name__ == "__main__":
    sys.exit(main())
