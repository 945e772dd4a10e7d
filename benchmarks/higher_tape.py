"""The eager tape of `adaptrt.higher` beside that of the original: the same program under both, time and peak memory.

    python benchmarks/higher_tape.py [--name cpu-2core_2026-11-23]

An inner loop of k = 5 steps, a query loss and its backward pass into the model's parameters, written once and run under either package.
Their losses and meta-gradients are compared in float64 first. Then they are timed by turns in one process on one thread; the ratio is the
median of the ratios of neighbouring calls. Peak memory is the largest number of live bytes in PyTorch's CPU allocator during one call
(`adjoint_scaling.peak_of`).

The bar: ratios of at most 1.0.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt.higher

if __name__ == "__main__":  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.adjoint_scaling import Batch, conv_net, peak_of, sine_mlp
from benchmarks.suite.report import RESULTS, machine, table

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import higher  # pyright: ignore[reportMissingTypeStubs]

NUM_STEPS = 5
TOLERANCE = 1e-10
WARM_UP = 5


def conv_net_without_bias() -> tuple[nn.Module, Batch, Batch]:
    """Before BatchNorm the gradient of a bias is rounding alone, of which Adam's first steps make whole steps."""
    model, support, query = conv_net(16)
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            part.register_parameter("bias", None)
    return model, support, query


class Workload(NamedTuple):
    make: Callable[[], tuple[nn.Module, Batch, Batch]]
    loss: Callable[[Tensor, Tensor], Tensor]
    calls: int


WORKLOADS = {
    "sine MLP 1-40-40-1": Workload(sine_mlp, F.mse_loss, 300),
    "4 × conv16-BN-ReLU-pool, 28×28": Workload(conv_net_without_bias, F.cross_entropy, 60),
}
# eps is tiny because the original adds it before the bias correction, as PyTorch once did.
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01),
    "SGD, momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.001, eps=1e-30),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.001, eps=0.01),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01, eps=0.01),
}


def run(package: Any, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], optimizer: str, support: Batch, query: Batch) -> Tensor:
    """The program: the query loss, its gradients left in the model's parameters."""
    opt = OPTIMIZERS[optimizer](model.parameters())
    with package.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(NUM_STEPS):
            diffopt.step(loss(fmodel(support[0]), support[1]))
        value = loss(fmodel(query[0]), query[1])
        value.backward()
    return value


def difference(workload: Workload, optimizer: str) -> float:
    """Largest difference of loss and meta-gradients in float64, relative to the largest element.

    With float64 as default dtype: under another the original's Adagrad has that one's accuracy.
    """

    found: list[list[Tensor]] = []
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    for package in (higher, adaptrt.higher):
        torch.manual_seed(0)
        model, support, query = workload.make()
        value = run(package, model, workload.loss, optimizer, support, query)
        found.append([value.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
    torch.set_default_dtype(before)
    scale = max(float(value.abs().max()) for value in found[0])
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True)) / scale


def measure(name: str, optimizer: str) -> list[str]:
    """One row of the table.

    Raises:
      RuntimeError: the two do not compute the same.
    """
    workload = WORKLOADS[name]
    error = difference(workload, optimizer)
    if not error <= TOLERANCE:
        raise RuntimeError(f"{name}, {optimizer}: the packages differ by {error:.1e}; nothing was timed")
    torch.manual_seed(0)
    model, support, query = workload.make()

    def call(package: Any) -> float:
        started = time.perf_counter()
        run(package, model, workload.loss, optimizer, support, query)
        return time.perf_counter() - started

    times: list[tuple[float, float]] = []
    for i in range(workload.calls + WARM_UP):
        first, second = (higher, adaptrt.higher) if i % 2 else (adaptrt.higher, higher)
        a, b = call(first), call(second)
        times.append((a, b) if i % 2 else (b, a))
    times = times[WARM_UP:]
    theirs, ours = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(mine / other for other, mine in times)
    peaks = [peak_of(lambda package=package: call(package)) for package in (higher, adaptrt.higher)]
    memory = peaks[1] / peaks[0]
    if ratio > 1 or memory > 1:
        print(f"BAR MISSED: {name}, {optimizer}: time {ratio:.3f}, memory {memory:.3f}")
    cells = f"{theirs:.2f} ms", f"{ours:.2f} ms", f"{ratio:.2f}", f"{peaks[0] / 2**20:.2f} MiB", f"{peaks[1] / 2**20:.2f} MiB"
    return [name, optimizer, *cells, f"{memory:.2f}", f"{error:.0e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="HARDWARE_DATE: write results/higher-tape_NAME.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    head = [
        "model",
        "optimiser",
        "`higher`",
        "`adaptrt.higher`",
        "time ×",
        "peak, `higher`",
        "peak, `adaptrt.higher`",
        "memory ×",
        "difference",
    ]
    rows: list[list[str]] = []
    for name in WORKLOADS:
        for optimizer in OPTIMIZERS:
            rows.append(measure(name, optimizer))
            print(" | ".join(rows[-1]), flush=True)
    report = f"""# The eager tape, `adaptrt.higher` beside `higher` 0.2.1

Command: `{shlex.join(["python", "benchmarks/higher_tape.py", *sys.argv[1:]])}`. {machine()}, float32,
k = {NUM_STEPS} steps, query loss and its backward pass. Medians, by turns in one process; × is the median of the ratios of
neighbouring calls, ours over theirs; the bar is 1.0. Difference: of loss and meta-gradients in float64, checked before anything is timed.

"""
    report += table(head, rows) + "\n"
    if arguments.name:
        (RESULTS / f"higher-tape_{arguments.name}.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
