"""Tasks a second of meta-training in one process and in two, and what share of the time the two spend in communication.

    python benchmarks/distributed.py [--cases "sine, 32 tasks"] [--rounds 7] [--name cpu-2core_2026-11-30]

Two processes of one thread each meet over gloo on this machine. A meta-iteration is forward, backward and a step of Adam for a fixed number
of tasks; `DistributedDataParallel` around `unroll.module()` gives each of two processes half of them. By turns both do so together, and one
of them does so alone with all tasks, with one thread and with two, while the other waits. First the averaged gradients are compared with
the eager loop's in float64. Afterwards, in iterations of their own, a communication hook measures the time in all-reduce; how much of it is
sending, and not waiting for the other process, is measured in a loop. With `--name` table, JSON and figure are written to
`benchmarks/results/distributed_NAME.*`.

Known limits: CPU only, and both processes on one machine, where they share memory bandwidth and the last cache.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

if __name__ == "__main__":  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))
import adaptrt
from benchmarks.adjoint_scaling import RESULTS
from benchmarks.suite.contest import TOLERANCE_IN_FLOAT64, error
from benchmarks.suite.contestants import loop
from benchmarks.suite.report import machine
from benchmarks.suite.workloads import WORKLOADS, Batch, Workload

COMMAND = "python benchmarks/distributed.py"
WORLD = 2
TURN_S = 2.0
TIMEOUT_S = 1200
CONTESTANTS = {"1 process": 1, "1 process, 2 threads": 2, "2 processes": 1}
"""Threads of a process. A program runs on as many as there were when it was compiled."""


class Case(NamedTuple):
    """Attributes: the key of a workload, and the tasks of an iteration."""

    workload: str
    num_tasks: int

    def problem(self) -> Workload:
        return WORKLOADS[self.workload]._replace(num_tasks=self.num_tasks)


CASES = {
    "sine, 32 tasks": Case("sine-tasks", 32),
    "sine, 512 tasks": Case("sine-tasks", 512),
    "conv4 5-shot, 8 tasks": Case("conv4-5shot", 8),
}


class Trainer:
    """Meta-iterations on some of a workload's tasks.

    Args:
      problem: the workload.
      tasks: which.
      backend: of the unroll.
      dtype: of model and data.
    """

    def __init__(self, problem: Workload, tasks: slice, backend: str, dtype: torch.dtype = torch.float32) -> None:
        model = problem.model(dtype)
        kind: Any = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[problem.optimizer]
        inner = kind(model.parameters(), **problem.numbers)
        unroll = adaptrt.compile_unroll(model, inner, problem.k, loss=problem.loss, backend=backend).vmap()
        self.support, self.query = (_some(batch, tasks) for batch in problem.batches(dtype))
        unroll.warmup(self.support, self.query)
        self.meta_loss: Any = unroll.module()
        self.outer = torch.optim.Adam(model.parameters(), lr=1e-6)  # so that the numbers stay what they are

    def gradients(self) -> list[Tensor]:
        self.outer.zero_grad()
        self.meta_loss(self.support, self.query).backward()
        return [value.grad.clone() for value in self.meta_loss.parameters()]

    def iterate(self) -> None:
        self.outer.zero_grad()
        self.meta_loss(self.support, self.query).backward()
        self.outer.step()

    def seconds(self, count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            self.iterate()
        return time.perf_counter() - began


def _some(batch: Batch, tasks: slice) -> Batch:
    return batch[0][tasks].contiguous(), batch[1][tasks].contiguous()


def gate(problem: Workload, found: Callable[[torch.dtype], list[Tensor]], checks: bool) -> dict[str, float]:
    """Compares averaged gradients with the eager loop's in float64. Returns errors; of a process that does not check, none.

    Args:
      problem: the workload.
      found: returns the gradients in a dtype; all processes call it.
      checks: whether this process compares.
    Raises:
      RuntimeError: in float64 they differ.
    """
    in_float64, in_float32 = found(torch.float64), found(torch.float32)
    if not checks:
        return {}
    exact = loop(problem, torch.float64)["meta"]()
    difference = error(in_float64, exact)
    if not difference <= TOLERANCE_IN_FLOAT64:
        raise RuntimeError(f"{problem.name}: in float64 the averaged gradients are off by {difference:.1e}; nothing was timed")
    eager = error(loop(problem)["meta"](), exact)  # a ReLU that rounding turns makes both large
    return {"error": error(in_float32, exact), "error_in_float64": difference, "eager_error": eager}


def of_all(value: float) -> list[float]:
    """Returns the value of every process."""
    values: list[Any] = [None] * WORLD
    dist.all_gather_object(values, value)
    return values


class Communication:
    """Measures all-reduce, as a communication hook of `DistributedDataParallel`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_elements: list[int] = []

    def hook(self, bucket: Any) -> Future[Tensor]:
        buffer: Tensor = bucket.buffer()
        began = time.perf_counter()
        dist.all_reduce(buffer.div_(WORLD))
        self.seconds += time.perf_counter() - began
        self.num_elements.append(buffer.numel())
        done: Future[Tensor] = Future()
        done.set_result(buffer)
        return done


def all_reduce_s(num_elements: int, count: int = 50) -> float:
    """Median seconds of an all-reduce that both processes enter at once."""
    buffer, times = torch.zeros(num_elements), list[float]()
    for _ in range(count):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(buffer)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(rank: int, name: str, rounds: int, turn_s: float, backend: str) -> dict[str, Any]:
    """Returns the row of a case."""
    problem = CASES[name].problem()
    half = slice(rank, None, WORLD)

    def wrapped(dtype: torch.dtype = torch.float32) -> Trainer:
        trainer = Trainer(problem, half, backend, dtype)
        trainer.meta_loss = DistributedDataParallel(trainer.meta_loss)
        return trainer

    together = wrapped()
    found = gate(problem, lambda dtype: (together if dtype == torch.float32 else wrapped(dtype)).gradients(), checks=rank == 0)
    trainers: dict[str, Trainer | None] = {"2 processes": together}
    for contestant in ("1 process", "1 process, 2 threads"):
        torch.set_num_threads(CONTESTANTS[contestant])
        trainers[contestant] = Trainer(problem, slice(None), backend) if rank == 0 else None

    times: dict[str, list[float]] = {contestant: [] for contestant in CONTESTANTS}
    counts: dict[str, int] = {}
    for number in range(-1, rounds):  # the first turn, of one iteration after another one, says how many to make
        for contestant in CONTESTANTS:
            torch.set_num_threads(CONTESTANTS[contestant])
            dist.barrier()
            trainer = trainers[contestant]
            if number < 0:
                if trainer is not None:
                    trainer.iterate()
                one_s = trainer.seconds(1) if trainer is not None else 0.0
                counts[contestant] = max(1, math.ceil(turn_s / max(of_all(one_s))))
            elif trainer is not None:
                times[contestant].append(trainer.seconds(counts[contestant]) / counts[contestant])
            dist.barrier()
    torch.set_num_threads(1)

    communication: Any = Communication()
    together.meta_loss.register_comm_hook(communication, lambda state, bucket: state.hook(bucket))  # it looks at annotations
    together.iterate()
    communication.seconds, communication.num_elements = 0.0, []
    dist.barrier()
    count = counts["2 processes"]
    shared_s = together.seconds(count)
    in_all_reduce = statistics.fmean(of_all(communication.seconds / shared_s))
    one = sum(all_reduce_s(numel) for numel in communication.num_elements[: len(communication.num_elements) // count])
    return {
        "case": name,
        **found,
        "k": problem.k,
        "bytes": 4 * sum(value.numel() for value in together.outer.param_groups[0]["params"]),
        "num_tasks": problem.num_tasks,
        "times_s": times,
        "iteration_s": shared_s / count,
        "all_reduce_share": in_all_reduce,
        "sending_share": min(in_all_reduce, one * count / shared_s),
    }


def work(rank: int, folder: str, names: Sequence[str], rounds: int, turn_s: float, backend: str) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD, timeout=timeout)
    for name in names:
        row = measure(rank, name, rounds, turn_s, backend)
        if rank == 0:
            print(json.dumps(row), flush=True)
            with Path(folder, "rows.jsonl").open("a", encoding="utf-8") as rows:
                rows.write(json.dumps(row) + "\n")
    dist.barrier()
    time.sleep(0.2)  # gloo's threads may abort a process that ends at once: https://github.com/pytorch/pytorch/issues/190489
    dist.destroy_process_group()


def rows_of(names: Sequence[str], rounds: int, turn_s: float = TURN_S, backend: str = "auto") -> list[dict[str, Any]]:
    """Measures cases in two processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, args=(folder, names, rounds, turn_s, backend), nprocs=WORLD)
        return [json.loads(line) for line in Path(folder, "rows.jsonl").read_text(encoding="utf-8").splitlines()]


# --- the report


def tasks_a_second(row: dict[str, Any], contestant: str) -> float:
    return row["num_tasks"] / statistics.median(row["times_s"][contestant])


def ratio(row: dict[str, Any], contestant: str) -> float:
    """How many times as fast as one process with one thread: the median over neighbouring turns."""
    return statistics.median(one / other for one, other in zip(row["times_s"]["1 process"], row["times_s"][contestant], strict=True))


def shares(row: dict[str, Any]) -> tuple[float, float, float]:
    """Of an iteration of two processes: computing, waiting for the other one, and sending."""
    return 1 - row["all_reduce_share"], row["all_reduce_share"] - row["sending_share"], row["sending_share"]


def markdown(rows: Sequence[dict[str, Any]], command: str) -> str:
    lines = [
        "# Meta-training in one process and in two",
        "",
        f"Made by `{command}`: {machine()}, float32.",
        "",
        "Errors of the averaged gradients against the eager loop in float64:",
        "",
        "| tasks of an iteration | two processes, float64 | two processes, float32 | eager loop, float32 |",
        "|---|---|---|---|",
        *[f"| {row['case']} | {row['error_in_float64']:.0e} | {row['error']:.0e} | {row['eager_error']:.0e} |" for row in rows],
        "",
        "Tasks a second, and how many times as many as one process with one thread does:",
        "",
        "| tasks of an iteration | " + " | ".join(CONTESTANTS) + " |",
        "|---" * (1 + len(CONTESTANTS)) + "|",
    ]
    for row in rows:
        speeds = {contestant: tasks_a_second(row, contestant) for contestant in CONTESTANTS}
        cells = [f"{speed:,.{0 if speed > 100 else 1}f} ({ratio(row, contestant):.2f} ×)" for contestant, speed in speeds.items()]
        lines.append(f"| {row['case']}, k = {row['k']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Where two processes spend an iteration. Sending is an all-reduce that both enter at once; what it takes more is waiting.",
        "",
        "| tasks of an iteration | iteration | gradients | computing | waiting for the other | sending |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{100 * share:.1f}%" for share in shares(row)]
        lines.append(f"| {row['case']} | {1e3 * row['iteration_s']:.1f} ms | {row['bytes'] / 1e3:.0f} kB | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Above tasks a second, below the shares of an iteration."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(2, len(rows), figsize=(3.6 * len(rows), 5), squeeze=False, height_ratios=(4, 1))
    for (above, below), row in zip(axes.T, rows, strict=True):
        speeds = [tasks_a_second(row, contestant) for contestant in CONTESTANTS]
        bars = above.bar([name.replace(", ", ",\n") for name in CONTESTANTS], speeds, color=["C7", "C8", "C0"])
        above.bar_label(bars, [f"{ratio(row, contestant):.2f} ×" for contestant in CONTESTANTS], padding=2)
        above.set(title=f"{row['case']}, k = {row['k']}", ylim=(0, 1.15 * max(speeds)))
        begin = 0.0
        for label, share, color in zip(("computing", "waiting", "sending"), shares(row), ("C0", "C1", "C3"), strict=True):
            below.barh(["2 processes"], [100 * share], left=100 * begin, color=color, label=label)
            begin += share
        below.set(xlim=(0, 100), yticks=[], xlabel=f"% of an iteration of {1e3 * row['iteration_s']:.3g} ms, 2 processes")
    axes[0][0].set_ylabel("tasks a second")
    canvas.tight_layout()
    canvas.legend(*axes[1][0].get_legend_handles_labels(), loc="lower center", ncols=3, bbox_to_anchor=(0.5, -0.06), frameon=False)
    canvas.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(canvas)


def save(rows: Sequence[dict[str, Any]], base: Path, command: str) -> None:
    """Table, JSON and figure."""
    text = f"{markdown(rows, command)}\n![tasks a second and shares of time]({base.name}.png)\n"
    base.with_suffix(".md").write_text(text, encoding="utf-8")
    base.with_suffix(".json").write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")
    figure(rows, base.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=float, default=TURN_S, help="seconds of a turn")
    parser.add_argument("--backend", default="auto", choices=("auto", "inductor", "eager"))
    parser.add_argument("--name")
    options = parser.parse_args()
    rows = rows_of(options.cases, options.rounds, options.turn, options.backend)
    torch.set_num_threads(1)
    print(markdown(rows, COMMAND))
    if options.name:
        save(rows, RESULTS / f"distributed_{options.name}", f"{COMMAND} --name {options.name}")


if __name__ == "__main__":
    main()
