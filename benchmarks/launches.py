"""How steady an unroll's calls are, and on a GPU how many graph launches one is and what memory it takes.

    python benchmarks/launches.py [--device cuda] [--workloads sine conv4-5shot ...] [--calls 1000] [--name gpu-h100_2026-11-26]

For each workload of the suite, adaptation and meta-gradient: p50 and p99 over the calls, each waited for; the profiler's count of
`cudaGraphLaunch` in one call; the memory that PyTorch's allocator holds for the process, the graphs' own included. Workloads whose calls
take long are called less often, for so many seconds. TF32 is off. The numbers are compared with the eager loop in float64 first, as in the
suite. The bars: p99 at most 1.05 times p50, and exactly one graph launch. With `--name` the table is written to
`benchmarks/results/launches_NAME.md`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

if __name__ == "__main__":  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.suite.contest import by_turns, check, without_tf32
from benchmarks.suite.contestants import ENTRANTS, first_calls
from benchmarks.suite.report import RESULTS, machine, table
from benchmarks.suite.workloads import WORKLOADS

MAX_SPREAD = 1.05
MAX_SECONDS = 10.0
"""For the calls of one row."""
QUANTITIES = ("adapt", "meta")


class Row(NamedTuple):
    """One call of one workload; launches and bytes are of a GPU only."""

    workload: str
    quantity: str
    error: float
    p50_s: float
    p99_s: float
    calls: int
    launches: int | None
    held_bytes: int | None

    def missed(self) -> list[str]:
        """Bars that are not reached, in words."""
        found: list[str] = []
        if self.p99_s > MAX_SPREAD * self.p50_s:
            found.append(f"{self.workload}, {self.quantity}: p99 is {self.p99_s / self.p50_s:.2f} times p50, the bar {MAX_SPREAD}")
        if self.launches is not None and self.launches != 1:
            found.append(f"{self.workload}, {self.quantity}: {self.launches} graph launches, the bar 1")
        return found


def measure(name: str, device: str, calls: int) -> list[Row]:
    """The rows of one workload."""
    workload = WORKLOADS[name]._replace(device=device)
    ours = first_calls(ENTRANTS["adaptrt"].make(workload, torch.float32))
    errors = check(workload, {"adaptrt": ours}, QUANTITIES)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    rows: list[Row] = []
    for quantity in QUANTITIES:
        call = ours.calls[quantity]
        (once,) = by_turns({name: call}, 1, 2, wait)[name]
        count = max(20, min(calls, int(MAX_SECONDS / once)))
        times = by_turns({name: call}, count, max(1, count // 10), wait)[name]
        launches, held = on_the_gpu(call) if device == "cuda" else (None, None)
        rows.append(Row(name, quantity, errors[quantity]["adaptrt"], percentile(times, 50), percentile(times, 99), count, launches, held))
    return rows


def percentile(times: Sequence[float], percent: float) -> float:
    """The smallest of these times that so many percent of them do not exceed."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * int(percent) // 100) - 1))]


def on_the_gpu(call: Callable[[], Any]) -> tuple[int, int]:
    """Graph launches of one call, and the bytes that the allocator holds after another; a peak of what is allocated would not count what
    lies within a graph's own pool."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    launches = sum(event.count for event in profiler.key_averages() if event.key == "cudaGraphLaunch")
    torch.cuda.empty_cache()
    call()
    torch.cuda.synchronize()
    return launches, torch.cuda.memory_reserved()


def markdown(rows: Sequence[Row], command: str, device: str) -> str:
    """The table, and the bars that are missed."""
    place = f"{torch.cuda.get_device_name()}, torch {torch.__version__}" if device == "cuda" else machine()
    lines = [
        [
            row.workload,
            row.quantity,
            f"{1e6 * row.p50_s:.0f} µs",
            f"{1e6 * row.p99_s:.0f} µs",
            f"{row.p99_s / row.p50_s:.2f}",
            str(row.calls),
            "" if row.launches is None else str(row.launches),
            "" if row.held_bytes is None else f"{row.held_bytes / 1e6:.1f} MB",
            f"{row.error:.0e}",
        ]
        for row in rows
    ]
    head = ["workload", "", "p50", "p99", "p99 / p50", "calls", "graph launches", "memory held", "error"]
    missed = [text for row in rows for text in row.missed()]
    bars = "\n".join(f"- **missed**: {text}" for text in missed) or "All bars are reached."
    return f"# Launches and latency\n\nMade by `{command}`: {place}, float32.\n\n{table(head, lines)}\n\n{bars}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=["sine", "sine-tasks", "conv4-5shot", "transformer"])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--name")
    options = parser.parse_args()
    if options.device == "cuda":
        without_tf32()
    command = f"python benchmarks/launches.py --device {options.device} --workloads {' '.join(options.workloads)} --calls {options.calls}"
    rows: list[Row] = []
    for name in options.workloads:
        rows += measure(name, options.device, options.calls)
        text = markdown(rows, command, options.device)
        print(text, flush=True)  # now, lest a later workload is the end of it
        if options.name:
            (RESULTS / f"launches_{options.name}.md").write_text(text)


if __name__ == "__main__":
    main()
