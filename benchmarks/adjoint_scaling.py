"""How compile time and memory of `Replay` grow with k, the number of inner steps: both hardly should.

    python benchmarks/adjoint_scaling.py [--only compile|memory] [--name cpu-2core_2026-11-23]

Compile time: the seconds that the first meta-gradient call spends on capturing and compiling its programs (from `unroll.explain()`), for
k = 5 and k = 50. Beside it the processor time, compilers it started included, of the first call less that of a second one, which runs the
same steps and compiles nothing: on a machine that does other work, that is the steadier number. Each measurement is a process of its own
with an empty Inductor cache directory and Inductor's caches off; k = 5 and k = 50 take turns; medians.

Memory: the peak of live bytes during one meta-gradient call after a first one, for several k. Counted exactly: the profiler records every
allocation and release of PyTorch's CPU allocator, those of Inductor's kernels included (`profile_memory=True`), and the peak is the
largest running sum. The resident size (`ru_maxrss`) would also hold what malloc keeps for later, the compiler's own memory and thread
stacks, which is many times the difference that one step makes; operations' outputs (a `TorchDispatchMode`) miss what compiled kernels
allocate. Scratch memory that oneDNN takes from malloc is not seen; it is freed at the end of each operation, so it does not grow with k.
The slope is a least-squares line over k.

The bars: compile time at k = 50 at most 1.2 × that at k = 5; slope at most 1.5 × the bytes of the parameters and the optimiser's state.

Known limits: CPU only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import adaptrt
from adaptrt import tree

RESULTS = Path(__file__).parent / "results"
MAX_COMPILE_RATIO = 1.2
MAX_STEP_RATIO = 1.5

Batch = tuple[Tensor, Tensor]


def sine_mlp() -> tuple[nn.Module, Batch, Batch]:
    """1-40-40-1, 10 support and 10 query points."""
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    return model, (torch.randn(10, 1), torch.randn(10, 1)), (torch.randn(10, 1), torch.randn(10, 1))


def conv_net(width: int, num_blocks: int = 4) -> tuple[nn.Module, Batch, Batch]:
    """Blocks of convolution, BatchNorm (batch statistics), ReLU and max-pool on 28×28; 5-way 1-shot, 15 queries."""
    channels = [1, *[width] * num_blocks]
    blocks: list[nn.Module] = []
    for before, after in itertools.pairwise(channels):
        norm = nn.BatchNorm2d(after, track_running_stats=False)
        blocks += [nn.Conv2d(before, after, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(width * (28 >> num_blocks) ** 2, 5))
    return model, (torch.randn(5, 1, 28, 28), torch.arange(5)), (torch.randn(15, 1, 28, 28), torch.arange(15) % 5)


MODELS: dict[str, Callable[[], tuple[nn.Module, Batch, Batch]]] = {
    "sine MLP 1-40-40-1": sine_mlp,
    "4 × conv16-BN-ReLU-pool": lambda: conv_net(16),
    "4 × conv64-BN-ReLU-pool": lambda: conv_net(64),
}
OPTIMIZERS: dict[str, Callable[[], adaptrt.optim.Optimizer]] = {
    "sgd": lambda: adaptrt.optim.sgd(lr=0.01),
    "sgd with momentum": lambda: adaptrt.optim.sgd(lr=0.01, momentum=0.9),
    "adam": lambda: adaptrt.optim.adam(lr=0.001),
}
ADJOINTS: dict[str, Callable[[], adaptrt.Adjoint]] = {"Replay()": adaptrt.Replay, "Unrolled()": adaptrt.Unrolled}
MEMORY_STEPS = {"Replay()": (5, 20, 40), "Unrolled()": (2, 4, 6)}
LOSSES = {"sine MLP 1-40-40-1": F.mse_loss}


def build(model: str, optimizer: str, adjoint: str, backend: str, k: int) -> tuple[adaptrt.CompiledUnroll, nn.Module, Batch, Batch]:
    """An unroll with nothing compiled yet, its model, and data."""
    torch.manual_seed(0)
    module, support, query = MODELS[model]()
    loss = LOSSES.get(model, F.cross_entropy)
    unroll = adaptrt.compile_unroll(module, OPTIMIZERS[optimizer](), k, loss=loss, adjoint=ADJOINTS[adjoint](), backend=backend)
    return unroll, module, support, query


# --- one measurement, in a process of its own


def measure_compile(model: str, optimizer: str, adjoint: str, backend: str, k: int) -> dict[str, Any]:
    """Compile time of the meta-gradient, in seconds, and what was compiled."""
    unroll, _, support, query = build(model, optimizer, adjoint, backend, k)
    calls_cpu_s: list[float] = []
    for _ in range(2):
        began = os.times()
        unroll(support, query).backward()
        ended = os.times()
        calls_cpu_s.append(sum(ended[:4]) - sum(began[:4]))  # user and system, of this process and of finished children
    programs = unroll.explain().programs
    return {
        "compile_s": sum(program.capture_s + program.compile_s for program in programs),
        "compile_cpu_s": calls_cpu_s[0] - calls_cpu_s[1],
        "programs": {program.name: program.num_nodes for program in programs},
    }


def measure_memory(model: str, optimizer: str, adjoint: str, backend: str, k: int) -> dict[str, Any]:
    """Peak of live bytes during one meta-gradient call, and the bytes of parameters and optimiser state."""
    torch.set_num_threads(1)  # the same bytes, and no threads that wait for each other on a busy machine
    unroll, module, support, query = build(model, optimizer, adjoint, backend, k)
    unroll(support, query).backward()
    module.zero_grad()
    peak_bytes = peak_of(lambda: unroll(support, query).backward())
    params = dict(module.named_parameters())
    state = OPTIMIZERS[optimizer]().init(params)
    return {"peak_bytes": peak_bytes, "carry_bytes": sum(tree.Spec.of(leaf).num_bytes for leaf in tree.leaves((params, state)))}


def peak_of(run: Callable[[], object]) -> int:
    """The largest number of bytes that were allocated during `run` and live at once, in PyTorch's CPU allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    events: list[Any] = cast(Any, profiler.profiler).kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, num_bytes in changes:
        live += num_bytes
        peak = max(peak, live)
    return peak


def slope(points: Sequence[tuple[int, int]]) -> float:
    """Of the least-squares line through (k, bytes)."""
    mean_k, mean_bytes = statistics.fmean(k for k, _ in points), statistics.fmean(value for _, value in points)
    return sum((k - mean_k) * (value - mean_bytes) for k, value in points) / sum((k - mean_k) ** 2 for k, _ in points)


# --- all measurements


COLD = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}


def in_a_process(measurement: str, environment: dict[str, str], **arguments: Any) -> dict[str, Any]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--measure", json.dumps({"measurement": measurement, **arguments})]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{measurement} {arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compile_rows(models: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Compile time at k = 5 and k = 50, by turns."""
    rows: list[dict[str, Any]] = []
    for model in models:
        found: dict[str, list[dict[str, Any]]] = {"5": [], "50": []}  # by k, as JSON spells it
        for _ in range(repeats):
            for k, measured in found.items():
                cell = {"model": model, "optimizer": "sgd with momentum", "adjoint": "Replay()", "backend": "inductor", "k": int(k)}
                with tempfile.TemporaryDirectory() as cache:
                    measured.append(in_a_process("compile", {**COLD, "TORCHINDUCTOR_CACHE_DIR": cache}, **cell))
                print(f"  compile {model} k={k}: {measured[-1]['compile_s']:.1f} s", flush=True)
        row: dict[str, Any] = {"model": model, "runs": found}
        for name in ("compile_s", "compile_cpu_s"):
            medians = {k: statistics.median(one[name] for one in measured) for k, measured in found.items()}
            row |= {f"median_{name}": medians, f"ratio_{name}": medians["50"] / medians["5"]}
        rows.append(row)
    return rows


def memory_rows(cells: Sequence[tuple[str, str, str, str]]) -> list[dict[str, Any]]:
    """Peak bytes against k."""
    rows: list[dict[str, Any]] = []
    for model, optimizer, adjoint, backend in cells:
        peaks: list[tuple[int, int]] = []
        carry_bytes = 0
        with tempfile.TemporaryDirectory() as cache:  # kernels of one k serve the next: how they came about changes no byte
            for k in MEMORY_STEPS[adjoint]:
                cell = {"model": model, "optimizer": optimizer, "adjoint": adjoint, "backend": backend, "k": k}
                one = in_a_process("memory", {"TORCHINDUCTOR_CACHE_DIR": cache}, **cell)
                peaks.append((k, one["peak_bytes"]))
                carry_bytes = one["carry_bytes"]
        row = {"model": model, "optimizer": optimizer, "adjoint": adjoint, "backend": backend, "peaks": peaks, "carry_bytes": carry_bytes}
        row |= {"slope_bytes": slope(peaks), "ratio": slope(peaks) / carry_bytes}
        rows.append(row)
        print(f"  memory {model}, {optimizer}, {adjoint}, {backend}: {row['ratio']:.2f} × carry a step", flush=True)
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The result as a report."""
    lines = [
        "# Replay: compile time and memory against k",
        "",
        "What is measured, and how, is in the header of `benchmarks/adjoint_scaling.py`.",
        "",
        f"## Compile time of the meta-gradient (Replay, inductor, SGD with momentum; bar: ratio ≤ {MAX_COMPILE_RATIO})",
        "",
        result["made"]["compile"],
        "",
        "| model | time | k=5 | k=50 | ratio | all runs (k=5; k=50) |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["compile"]:
        for name, label in (("compile_s", "elapsed"), ("compile_cpu_s", "processor")):
            runs = "; ".join(", ".join(f"{one[name]:.1f}" for one in row["runs"][k]) for k in ("5", "50"))
            medians = row[f"median_{name}"]
            lines.append(
                f"| {row['model']} | {label} | {medians['5']:.1f} s | {medians['50']:.1f} s | **{row[f'ratio_{name}']:.2f}** | {runs} s |"
            )
    for row in result["compile"]:
        sizes = [", ".join(f"{name} {count}" for name, count in row["runs"][k][0]["programs"].items()) for k in ("5", "50")]
        lines += ["", f"Operations as captured, {row['model']}: k=5: {sizes[0]}; k=50: {sizes[1]}."]
    lines += [
        "",
        f"## Peak memory of one meta-gradient call (5-way 1-shot, 28×28; bar for Replay: ratio ≤ {MAX_STEP_RATIO})",
        "",
        result["made"]["memory"],
        "Growth is the slope over k; the ratio is to the bytes of the parameters and the optimiser's state.",
        "",
        "| model | optimiser | adjoint | backend | params + state | peak by k | growth a step | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["memory"]:
        peaks = ", ".join(f"{k}: {value / 2**20:.2f}" for k, value in row["peaks"])
        lines.append(
            f"| {row['model']} | {row['optimizer']} | {row['adjoint']} | {row['backend']} | {row['carry_bytes'] / 2**10:.1f} KiB "
            f"| {peaks} MiB | {row['slope_bytes'] / 2**10:.1f} KiB | **{row['ratio']:.2f}** |"
        )
    return "\n".join(lines) + "\n"


def missed(result: dict[str, Any]) -> list[str]:
    """The bars that were missed, in words."""
    found = [
        f"compile time of {row['model']}: {row['ratio_compile_s']:.2f}"
        for row in result["compile"]
        if row["ratio_compile_s"] > MAX_COMPILE_RATIO
    ]
    return found + [
        f"memory of {row['model']}, {row['optimizer']}, {row['backend']}: {row['ratio']:.2f}"
        for row in result["memory"]
        if row["adjoint"] == "Replay()" and row["ratio"] > MAX_STEP_RATIO
    ]


def main() -> None:
    """Measures, prints the report and writes it next to this file."""
    parser = argparse.ArgumentParser(description="Compile time and memory of Replay against k.")
    parser.add_argument("--only", choices=("compile", "memory"), help="one part; the other is kept as the files of that name have it")
    parser.add_argument("--name", default="cpu", help="hardware and date in the names of the files written")
    parser.add_argument("--repeats", type=int, default=3, help="of each compile time")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS)[:2], help="whose compile time to measure")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        arguments = json.loads(options.measure)
        measurement = {"compile": measure_compile, "memory": measure_memory}[arguments.pop("measurement")]
        print(json.dumps(measurement(**arguments)))
        return
    conv = "4 × conv16-BN-ReLU-pool"
    cells = [(conv, optimizer, "Replay()", backend) for backend in ("eager", "inductor") for optimizer in ("sgd with momentum", "adam")]
    cells.append((conv, "sgd with momentum", "Unrolled()", "eager"))
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "compile": lambda: compile_rows(options.models, options.repeats),
        "memory": lambda: memory_rows(cells),
    }
    RESULTS.mkdir(exist_ok=True)
    record = RESULTS / f"adjoint-scaling_{options.name}.json"
    result: dict[str, Any] = {"made": dict.fromkeys(parts, "Not measured."), **dict.fromkeys(parts, ())}
    if options.only and record.exists():
        result = json.loads(record.read_text())
    for part, measure in parts.items():
        if options.only in (None, part):
            result[part] = measure()
            result["made"][part] = made_by(" ".join(["python", "benchmarks/adjoint_scaling.py", *map(shlex.quote, sys.argv[1:])]))
            record.write_text(json.dumps(result, indent=1) + "\n")
            record.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))
    for bar in missed(result):
        print(f"BAR MISSED: {bar}")


def made_by(command: str) -> str:
    """What a reader needs to know to repeat a measurement."""
    machine = f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads (memory: one)"
    return f"Made by `{command}`: {machine}; torch {torch.__version__}, float32."


if __name__ == "__main__":
    main()
