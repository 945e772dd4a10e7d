"""Tables and a plot of what the suite measured.

    python -m benchmarks.suite.report RESULTS.json [MORE.json ...] [--name HARDWARE_DATE]

Prints Markdown: for every workload the median times and ratios, then the bars and whether they are reached. With `--name` it is written to
`benchmarks/results/suite_NAME.md`, beside the plot.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adaptrt.backend.inductor import processor
from benchmarks.suite.contest import QUANTITIES
from benchmarks.suite.contestants import ENTRANTS
from benchmarks.suite.workloads import WORKLOADS

RESULTS = Path(__file__).parents[1] / "results"
OURS = "adaptrt"
TITLES = {"adapt": "adapt", "predict": "adapt + predict", "meta": "adapt + meta-gradient"}


class Bar(NamedTuple):
    """At least so many times faster than a contestant."""

    workload: str
    quantity: str
    contestant: str
    ratio: float


BARS = {
    "cpu": [
        Bar("sine", "adapt", "eager loop", 25),
        Bar("sine", "adapt", "JAX jit + optax", 1.5),
        Bar("sine", "meta", "higher", 20),
        Bar("sine", "meta", "torch.compile(torch.func)", 4),
        Bar("sine", "meta", "JAX jit + optax", 1.2),
        Bar("sine-tasks", "adapt", "torch.func", 10),
        Bar("sine-tasks", "adapt", "JAX jit + optax", 1),
        Bar("sine-tasks", "meta", "torch.func", 10),
        Bar("sine-tasks", "meta", "JAX jit + optax", 1),
        Bar("conv4-5shot", "adapt", "eager loop", 1.8),
        Bar("conv4-5shot", "meta", "higher", 2.2),
        Bar("conv4-5shot", "meta", "JAX jit + optax", 2.5),
        Bar("transformer", "adapt", "eager loop", 1.5),
        Bar("transformer", "meta", "higher", 2),
        Bar("transformer", "meta", "JAX jit + optax", 1),
        Bar("head-only", "adapt", "eager loop", 3.5),
        Bar("head-only", "meta", "higher", 3),
    ],
    "cuda": [
        Bar("sine", "meta", "higher", 50),
        Bar("sine", "meta", "JAX jit + optax", 1.5),
        Bar("conv4-5shot", "meta", "higher", 15),
        Bar("conv4-5shot", "meta", "JAX jit + optax", 1.5),
        Bar("conv4-tasks", "meta", "JAX jit + optax", 1.2),
    ],
}

Row = Mapping[str, Any]
"""One entry of "benchmarks" in pytest-benchmark's JSON."""


def by_key(rows: Sequence[Row]) -> dict[tuple[str, str, str], Row]:
    """The rows on latency by workload, quantity and contestant."""
    infos = [(row["extra_info"], row) for row in rows]
    return {(info["workload"], info["quantity"], info["contestant"]): row for info, row in infos if "contestant" in info}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    return "\n".join(f"| {' | '.join(row)} |" if row else "|" + "---|" * len(head) for row in (head, [], *rows))


def latency_table(workload: str, rows: Mapping[tuple[str, str, str], Row]) -> str:
    """A row for each contestant: median time, times longer than adaptrt, error, and seconds of the first call of the meta-gradient."""
    lines: list[list[str]] = []
    for name in ENTRANTS:
        cells = [name]
        for quantity in QUANTITIES:
            row, ours = rows.get((workload, quantity, name)), rows.get((workload, quantity, OURS))
            longer = "" if ours is None or name == OURS or row is None else f"{ours['extra_info']['times_longer'][name]:.2f}"
            cells += ["" if row is None else shown_time(row["stats"]["median"]), longer]
        last = rows.get((workload, "meta", name))
        if any((workload, quantity, name) in rows for quantity in QUANTITIES):
            found = [rows[key]["extra_info"]["error"] for key in rows if key[0] == workload and key[2] == name]
            lines.append([*cells, f"{max(found):.0e}", "" if last is None else f"{last['extra_info']['first_call_s']:.1f} s"])
    head = ["", *[cell for quantity in QUANTITIES for cell in (TITLES[quantity], "×")], "largest error", "first call"]
    return table(head, lines)


def machine() -> str:
    """The processor by its name, and what else a reader needs to know to compare times.

    A virtual machine may call it less than it is; then only the maker is known.
    """
    name = processor.capabilities().get("cpu_name") or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def shown_time(seconds: float) -> str:
    """Seconds in the unit in which they are easily read."""
    return f"{1e6 * seconds:.0f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.2f} ms" if seconds < 0.1 else f"{1e3 * seconds:.0f} ms"


def bars_table(rows: Mapping[tuple[str, str, str], Row], kind: str = "cpu") -> str:
    """Every bar whose contestants were measured."""
    lines: list[list[str]] = []
    for bar in BARS[kind]:
        ours = rows.get((bar.workload, bar.quantity, OURS))
        if ours is None or bar.contestant not in ours["extra_info"]["times_longer"]:
            continue
        found = ours["extra_info"]["times_longer"][bar.contestant]
        verdict = "reached" if found >= bar.ratio else "**missed**"
        lines.append([bar.workload, TITLES[bar.quantity], bar.contestant, f"{bar.ratio:g}", f"{found:.2f}", verdict])
    return table(["workload", "", "faster than", "bar", "measured", ""], lines)


def compile_table(rows: Sequence[Row]) -> str:
    """Seconds until the first result, in a process of its own."""
    infos = [(row["extra_info"], row["stats"]["median"]) for row in rows if row["extra_info"].get("cache")]
    return table(
        ["workload", "adjoint", "caches", "until the first meta-gradient"],
        [[info["workload"], info["adjoint"], info["cache"], f"{seconds:.1f} s"] for info, seconds in infos],
    )


def tasks_table(rows: Sequence[Row]) -> str:
    """Tasks a second against the number of tasks in a call."""
    infos = [(row["extra_info"], row["stats"]["median"]) for row in rows if "num_tasks" in row["extra_info"]]
    lines = [[info["entrant"], str(info["num_tasks"]), f"{info['num_tasks'] / seconds:,.0f}"] for info, seconds in infos]
    return table(["contestant", "tasks in a call", "meta-gradients of tasks a second"], lines)


def adjoints_table(rows: Sequence[Row]) -> str:
    """Times of the meta-gradient by adjoint, and how many times as long as the best one the choice of "auto" takes."""
    found = {(row["extra_info"]["workload"], row["extra_info"]["adjoint_of"]): row for row in rows if "adjoint_of" in row["extra_info"]}
    names = list(dict.fromkeys(name for _, name in found))
    lines: list[list[str]] = []
    for workload in dict.fromkeys(workload for workload, _ in found):
        own = [found.get((workload, name)) for name in names]
        best = min(row["extra_info"]["times_longer"] for row in own if row is not None)
        lines.append([workload, *["" if row is None else shown_time(row["stats"]["median"]) for row in own], f"{1 / best:.2f}"])
    return table(["workload", *names, "auto, times the best"], lines)


def report(data: Mapping[str, Any], command: str) -> str:
    """All of it as Markdown."""
    rows, machine = data["benchmarks"], data["machine_info"]
    keyed = by_key(rows)
    parts = [
        "# The benchmark suite",
        f"Command: `{command}`. {machine['device']}, {machine['cpu'].get('count')} cores, torch {machine['torch']}, {machine['threads']} "
        f"threads, {machine['precision']}. Median times by turns in one process; × is how many times longer a contestant takes than "
        "adaptrt, the median over neighbouring calls. Errors are relative to an eager loop in float64 and were looked at before anything "
        "was timed. First call: of the meta-gradient, compilation included where caches on disk do not spare it.",
    ]
    for workload in WORKLOADS:
        if any(key[0] == workload for key in keyed):
            w = WORKLOADS[workload]
            parts += [f"## {workload}", f"{w.title}; {w.k} steps of {w.optimizer.upper()}.", latency_table(workload, keyed)]
    if keyed:
        parts += ["## Bars", bars_table(keyed, machine["kind"])]
    if any("adjoint_of" in row["extra_info"] for row in rows):
        parts += ["## Adjoints", "The meta-gradient; the last column is the median over neighbouring calls.", adjoints_table(rows)]
    if any(row["extra_info"].get("cache") for row in rows):
        parts += ["## Compilation", compile_table(rows)]
    if any("num_tasks" in row["extra_info"] for row in rows):
        parts += ["## Throughput of tasks", tasks_table(rows)]
    return "\n\n".join(parts) + "\n"


def plot(data: Mapping[str, Any], path: Path) -> None:
    """How many times longer each contestant takes than adaptrt, by workload, for adaptation and meta-gradient."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keyed = by_key(data["benchmarks"])
    names = [name for name in ENTRANTS if name != OURS]
    figure, axes = plt.subplots(2, 1, figsize=(10, 8), sharex=True, layout="constrained")
    for axis, quantity in zip(axes, ("adapt", "meta"), strict=True):
        present = [workload for workload in WORKLOADS if (workload, quantity, OURS) in keyed]
        for index, name in enumerate(names):
            ratios = [keyed[workload, quantity, OURS]["extra_info"]["times_longer"].get(name, float("nan")) for workload in present]
            at = [place + 0.8 * (index / len(names) - 0.5) + 0.4 / len(names) for place in range(len(present))]
            axis.bar(at, ratios, 0.8 / len(names), label=name)
        axis.axhline(1.0, color="black", linewidth=1)
        axis.set_yscale("log")
        axis.set_ylabel("times adaptrt's time")
        axis.set_title(TITLES[quantity])
        axis.set_xticks(range(len(present)), present)
    axes[0].legend(fontsize="small", ncols=4)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what `pytest --benchmark-json` wrote, on one machine")
    parser.add_argument("--name", help="HARDWARE_DATE of the report to write")
    parser.add_argument("--command", default="make bench", help="what made the results")
    arguments = parser.parse_args()
    parts = [json.loads(path.read_text()) for path in arguments.results]
    data = {**parts[0], "benchmarks": [row for part in parts for row in part["benchmarks"]]}
    text = report(data, arguments.command)
    print(text)
    if arguments.name:
        (RESULTS / f"suite_{arguments.name}.md").write_text(text)
    figure = arguments.results[0].with_suffix(".png")
    try:
        plot(data, figure)
    except ModuleNotFoundError as error:
        print(f"no plot: {error}")
    else:
        if arguments.name:
            shutil.copy(figure, RESULTS / f"suite_{arguments.name}.png")


if __name__ == "__main__":
    main()
