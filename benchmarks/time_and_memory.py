"""Time of a meta-gradient against the memory it takes, for k = 1 to 200 inner steps: `Replay`, `Stash` and `"auto"` beside `higher`.

    python benchmarks/time_and_memory.py [--workloads conv4-5shot transformer] [--lines "Stash()" higher] [--name cpu-2core_2026-11-26]

Every line is a process of its own, which may take 16 GB of address space (`RLIMIT_AS`); where that is not enough the line ends. Its
meta-gradient is compared with the eager loop's in float64 at k = 5 first. Time: the median of `CALLS` calls after a first one. Memory: the
peak of live bytes in PyTorch's allocator during one more call, as in `adjoint_scaling.py`. With `--name` table, JSON and figure are written
to `benchmarks/results/time-and-memory_NAME.*` after every line; lines that stand there already and are not asked for stay.

Known limits: CPU only; lines are not timed by turns, since each has its own process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))
from adaptrt import Adjoint, Replay, Stash
from benchmarks.adjoint_scaling import RESULTS, peak_of
from benchmarks.suite.contest import TOLERANCE, TOLERANCE_IN_FLOAT64, by_turns, error
from benchmarks.suite.contestants import ENTRANTS, Call, higher_original, loop, ours
from benchmarks.suite.report import machine
from benchmarks.suite.workloads import WORKLOADS

COMMAND = "python benchmarks/time_and_memory.py"
STEPS = (1, 5, 20, 50, 100, 200)
CALLS = 2
MAX_BYTES = 16_000_000_000
GATE_K, TIMES_EAGER = 5, 20.0

LINES: dict[str, Callable[[int], Adjoint | str] | None] = {
    "Replay()": lambda k: Replay(),
    "Replay(every=√k)": lambda k: Replay(every=max(1, round(math.sqrt(k)))),
    "Stash()": lambda k: Stash(),
    "auto": lambda k: "auto",
    "higher": None,
}


def meta_gradient(workload: str, line: str, k: int, dtype: torch.dtype = torch.float32) -> Call:
    """The call that is measured."""
    asked, adjoint = WORKLOADS[workload]._replace(k=k), LINES[line]
    calls = higher_original(asked, dtype) if adjoint is None else ours(asked, dtype, adjoint=adjoint(k))
    return calls["meta"]


def gate(workload: str, line: str) -> float:
    """The error against the eager loop in float64.

    Raises:
      RuntimeError: it is too large.
    """
    asked = WORKLOADS[workload]._replace(k=GATE_K)
    exact = loop(asked, torch.float64)["meta"]()
    eager = error(loop(asked)["meta"](), exact)
    if LINES[line] is None:
        exact = ENTRANTS["higher"].oracle(asked)["meta"]()  # its Adam is another
    found = error(meta_gradient(workload, line, GATE_K)(), exact)
    if not found <= max(TOLERANCE, TIMES_EAGER * eager):
        # As in the suite: where rounding has turned some ReLU, the same must be computed in float64.
        in_float64 = error(meta_gradient(workload, line, GATE_K, torch.float64)(), exact)
        if not in_float64 <= TOLERANCE_IN_FLOAT64:
            raise RuntimeError(f"{workload}, {line}: error {found:.1e}, the eager loop's is {eager:.1e}; in float64 {in_float64:.1e}")
    return found


def measure(workload: str, line: str, steps: Sequence[int]) -> None:
    """Prints a JSON row for each k; stops where the memory does not suffice."""
    found = gate(workload, line)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    for k in steps:
        row: dict[str, Any] = {"workload": workload, "line": line, "k": k, "error": found}
        try:
            call = meta_gradient(workload, line, k)
            call()
            times = by_turns({line: call}, CALLS, 0)[line]
            row |= {"time_s": statistics.median(times), "peak_bytes": peak_of(call)}
        except (MemoryError, RuntimeError) as problem:
            if not isinstance(problem, MemoryError) and "allocate memory" not in str(problem):
                raise
            row["out_of_memory"] = True
        print(json.dumps(row), flush=True)
        if "out_of_memory" in row:
            return


def rows_of(workload: str, line: str, steps: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of a line, from a process of its own."""
    command = [sys.executable, __file__, "--measure", workload, line, *map(str, steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [json.loads(text) for text in done.stdout.splitlines() if text.startswith("{")]
    if done.returncode != 0:
        # Where memory runs out for good, the system kills.
        if len(rows) < len(steps) and ("allocate memory" in done.stderr or done.returncode == -signal.SIGKILL):
            return [*rows, {"workload": workload, "line": line, "k": steps[len(rows)], "out_of_memory": True}]
        raise RuntimeError(f"{workload}, {line} failed:\n{done.stderr}")
    return rows


def markdown(rows: Sequence[dict[str, Any]], command: str) -> str:
    """One table for each workload."""
    worst = max(row["error"] for row in rows if "error" in row)
    lines = ["# Time and memory of a meta-gradient", "", f"Made by `{command}`: {machine()}, float32.", ""]
    lines += [f"Largest error against the eager loop in float64, at k = {GATE_K}: {worst:.1e}.", ""]
    for workload in dict.fromkeys(row["workload"] for row in rows):
        lines += [
            f"## {WORKLOADS[workload].title}",
            "",
            "| | " + " | ".join(f"k = {k}" for k in STEPS) + " |",
            "|---" * (len(STEPS) + 1) + "|",
        ]
        for line in LINES:
            own = {row["k"]: row for row in rows if row["workload"] == workload and row["line"] == line}
            if own:
                lines.append(f"| {line} | " + " | ".join(_cell(own.get(k)) for k in STEPS) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "out_of_memory" in row:
        return f"over {MAX_BYTES / 1e9:.0f} GB"
    return f"{1e3 * row['time_s']:.0f} ms, {row['peak_bytes'] / 1e6:.0f} MB"


def figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time over memory, a line for each adjoint, a point for each k."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    canvas, axes = plt.subplots(1, len(workloads), figsize=(6 * len(workloads), 4.5), squeeze=False)
    for axis, workload in zip(axes[0], workloads, strict=True):
        for number, line in enumerate(LINES):
            own = [row for row in rows if row["workload"] == workload and row["line"] == line and "time_s" in row]
            if not own:
                continue
            color = f"C{number}"  # the same in every panel
            axis.plot([row["peak_bytes"] / 1e6 for row in own], [row["time_s"] for row in own], marker="o", label=line, color=color)
            last = own[-1]
            place = (last["peak_bytes"] / 1e6, last["time_s"])
            axis.annotate(f"k={last['k']}", place, xytext=(4, 4), textcoords="offset points", color=color, fontsize=8)
        axis.set(xscale="log", yscale="log", xlabel="peak memory, MB", ylabel="time of a meta-gradient, s", title=WORKLOADS[workload].title)
        axis.grid(alpha=0.3)
        axis.legend()
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)


def save(rows: Sequence[dict[str, Any]], base: Path) -> None:
    """Table, JSON and figure."""
    base.with_suffix(".md").write_text(f"{markdown(rows, COMMAND)}\n![time over memory]({base.name}.png)\n")
    base.with_suffix(".json").write_text(json.dumps(list(rows), indent=1) + "\n")
    figure(rows, base.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=["conv4-5shot", "transformer"], choices=list(WORKLOADS))
    parser.add_argument("--lines", nargs="+", default=list(LINES), choices=list(LINES))
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    parser.add_argument("--name")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        workload, line, *steps = options.measure
        measure(workload, line, list(map(int, steps)))
        return
    base = RESULTS / f"time-and-memory_{options.name}"
    kept: list[dict[str, Any]] = json.loads(base.with_suffix(".json").read_text()) if base.with_suffix(".json").exists() else []
    for workload, line in itertools.product(options.workloads, options.lines):
        found = rows_of(workload, line, options.steps)
        kept = [row for row in kept if (row["workload"], row["line"]) != (workload, line)] + found
        print(json.dumps(found), flush=True)
        if options.name:
            save(kept, base)
    print(markdown(kept, COMMAND))


if __name__ == "__main__":
    main()
