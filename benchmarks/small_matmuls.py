"""Up to where our own code for products is as fast as a matrix library: the limit of `backend/inductor/rewrites/inline_small_matmuls.py`.

    python benchmarks/small_matmuls.py

Times a chain of products with what a layer does between them, compiled by Inductor with the pass and without, over sizes; by turns in one
process on one thread, medians. A row is a product [M, K] x [K, N], or T of them at once, with the second factor as it is and transposed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

if __name__ == "__main__":  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))
from adaptrt.backend import Inductor
from adaptrt.backend.base import Runner
from adaptrt.backend.inductor.rewrites import inline_small_matmuls as limit
from adaptrt.graph.capture import capture
from benchmarks.suite.contest import by_turns

LENGTH = 4
CALLS = 280
SIZES = [
    (10, 16),
    (10, 32),
    (10, 40),
    (16, 40),
    (32, 32),
    (10, 64),
    (16, 64),
    (25, 64),
    (64, 64),
    (10, 128),
    (32, 128),
    (64, 128),
    (128, 128),
    (512, 128),
]


def chain(x: Tensor, *weights: Tensor) -> Tensor:
    for weight in weights:
        x = torch.relu(x @ weight) + x
    return x


def chain_of_transposed(x: Tensor, *weights: Tensor) -> Tensor:
    return chain(x, *[weight.mT for weight in weights])


def medians_s(fn: Callable[..., Tensor], tasks: int | None, m: int, k: int) -> list[float]:
    """Seconds of one call with the library and with our code."""
    lead = () if tasks is None else (tasks,)
    values = [torch.randn(*lead, m, k), *[torch.randn(*lead, k, k) / k**0.5 for _ in range(LENGTH)]]
    before, runs = limit.MAX_EACH, list[Runner]()
    try:
        for limit.MAX_EACH in (-1, 1 << 40):
            runs.append(Inductor().compile(capture(fn, *values)))
    finally:
        limit.MAX_EACH = before
    torch.testing.assert_close(runs[0](list(values))[0], runs[1](list(values))[0], rtol=1e-4, atol=1e-4)
    library, ours = runs
    times = by_turns({"library": lambda: library(list(values)), "ours": lambda: ours(list(values))}, CALLS, 20)
    return [statistics.median(column) for column in times.values()]


def main() -> None:
    torch.set_num_threads(1)
    print("| T | M × K × N | products | library | ours | × | transposed: library | ours | × |\n|---|---|---|---|---|---|---|---|---|")
    for tasks in (None, 32):
        for m, k in SIZES:
            cells = [str(tasks or "—"), f"{m} × {k} × {k}", str(m * k * k)]
            for fn in (chain, chain_of_transposed):
                library, ours = medians_s(fn, tasks, m, k)
                cells += [f"{1e6 * library:.0f} µs", f"{1e6 * ours:.0f} µs", f"{library / ours:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
