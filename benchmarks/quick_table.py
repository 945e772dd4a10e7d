"""The README's table: latency of adaptation and of its meta-gradient for a sine MLP, adaptrt next to two eager loops.

    python benchmarks/quick_table.py

The suite's workload "sine": MLP 1-40-40-1, 10 support and 10 query points, k = 5 steps of SGD, float32. Every contestant's adapted
parameters and meta-gradient are first compared with the eager loop run in float64; only then is anything timed. All are timed by turns in
one process on one thread (kernels this small lose more to a team of threads than they gain); medians. The two rows on scaling are read from
the newest report of `benchmarks/adjoint_scaling.py`.

`higher` 0.2.1 is measured if it is installed (extra "bench").
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import torch

if __name__ == "__main__":  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.suite.contest import contest
from benchmarks.suite.report import RESULTS, machine, shown_time, table
from benchmarks.suite.workloads import WORKLOADS

CONTESTANTS = ("eager loop", "higher", "adaptrt, eager backend", "adaptrt")
QUANTITIES = ("adapt", "meta")


def scaling_rows() -> list[str]:
    """Compile time and memory against k, from the newest committed report."""
    reports = sorted(RESULTS.glob("adjoint-scaling_*.json"))
    if not reports:
        return []
    result = json.loads(reports[-1].read_text())
    compiled = [f"{row['ratio_compile_s']:.2f} ({row['model']})" for row in result["compile"]]
    replay = [row for row in result["memory"] if row["adjoint"] == "Replay()"]
    memory = ", ".join(f"{row['ratio']:.2f} ({row['optimizer']}, {row['backend']})" for row in replay)
    return [
        f"From {reports[-1].with_suffix('.md').name}:",
        f"compile time of Replay at k=50 over that at k=5: {', '.join(compiled)}",
        f"growth of peak memory a step, in copies of parameters and optimiser state: {memory}",
    ]


def main() -> None:
    """Checks, times, prints."""
    torch.set_num_threads(1)
    workload = WORKLOADS["sine"]
    found = contest(workload, CONTESTANTS, QUANTITIES)
    rows: list[list[str]] = []
    for name in found["adapt"]:
        cells = [name]
        for quantity in QUANTITIES:
            own, eager = (statistics.median(found[quantity][key].times_s) for key in (name, "eager loop"))
            cells += [shown_time(own), f"{eager / own:.1f}"]
        compile_s = sum(found[quantity][name].compile_s for quantity in QUANTITIES)
        errors = [found[quantity][name].error for quantity in QUANTITIES]
        rows.append([*cells, f"{compile_s:.1f} s", f"{max(errors):.0e}"])
    print(f"{machine()}; {workload.title}, k = {workload.k}, float32, medians of {workload.calls} calls\n")
    head = ["", "adapt", "× eager loop", "adapt + meta-gradient", "× eager loop", "first calls", "largest error"]
    print(table(head, rows))
    print("\n".join(scaling_rows()))


if __name__ == "__main__":
    main()
