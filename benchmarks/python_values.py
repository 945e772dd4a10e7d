"""What it costs to watch the Python values that a model reads: the first call, a call, and the comparison in it.

python benchmarks/python_values.py
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt import compile_unroll, optim
from adaptrt.inner.places import contents_of, same_contents

COUNT = 100_000
KEPT: dict[str, Callable[[], Any]] = {
    "one number": lambda: [2.0],
    "a list of numbers": lambda: [2.0, *map(float, range(COUNT))],
    "a list of strings": lambda: [2.0, *map(str, range(COUNT))],
    "a dict of numbers": lambda: {number: 2.0 + number for number in range(COUNT)},
    "a tenth as many tensors": lambda: [2.0, *[torch.zeros(()) for _ in range(COUNT // 10)]],
    "a tenth as many lists": lambda: [2.0, *[[float(number)] for number in range(COUNT // 10)]],
}


class Scaled(nn.Module):
    """Reads one entry of a container."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.kept[0]


def main() -> None:
    """Prints a table in Markdown."""
    data = torch.randn(10, 1), torch.randn(10, 1)
    print("| what the model keeps | first call | a call | the comparison |\n|---|---|---|---|")
    for what, make in KEPT.items():
        kept = make()
        unroll = compile_unroll(Scaled(kept), optim.sgd(lr=0.01), 2, loss=F.mse_loss, backend="eager")
        start = time.perf_counter()
        with torch.no_grad():
            unroll.adapt(data)
            first = time.perf_counter() - start
            call = min(timeit.repeat(lambda unroll=unroll: unroll.adapt(data), number=1, repeat=20))
        entries = contents_of(kept)
        compared = min(timeit.repeat(lambda kept=kept, entries=entries: same_contents(kept, entries), number=1, repeat=20))
        print(f"| {what} | {first * 1e3:.0f} ms | {call * 1e3:.2f} ms | {compared * 1e3:.2f} ms |")


if __name__ == "__main__":
    main()
