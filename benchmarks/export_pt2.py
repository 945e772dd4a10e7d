"""What an exported pt2 package costs in Python and in C++ beside the compiled unroll that it was exported from. Numbers are compared first.

    python -m benchmarks.export_pt2 [--only sine] [--rounds 300] [--name HARDWARE_DATE]

A call in Python and one in C++ are of the whole `exported.adapt_predict` or `Export::run`, checks included; C++ and Python run by turns, in
processes of their own. "From nothing" is a new C++ process: opening the folder, with all hashes, up to the first result. The operating
system has the files in memory already.
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import adaptrt
from adaptrt import tree
from adaptrt.export.formats import FORMATS
from benchmarks.export_onnx import CASES, Case, unroll_of
from benchmarks.states import times
from benchmarks.suite.report import RESULTS, machine
from tests.test_export_cpp import SOURCE, compiled

TOLERANCE = 1e-4
"""Relative error of outputs between two ways to compile the same program, in float32."""
TURNS = 5
"""How often Python and C++ take turns."""


def program_alone(exported: adaptrt.Exported, name: str, data: list[Any]) -> Callable[[], object]:
    """Returns a call of a program without anything around it, as a host in C++ makes it."""
    entry = next(each for each in exported.manifest.programs if each.name == name)
    run = FORMATS[exported.format].open(exported.manifest, entry, exported.folder / entry.files[exported.format])
    leaves = iter([leaf for part in data for leaf in tree.leaves(part)])
    weights = exported.weights
    values = [weights[each.weight] if each.weight is not None else next(leaves) for each in entry.inputs]
    return lambda: run(list(values))


class Runner:
    """The C++ runner on one export's `adapt_predict`."""

    def __init__(self, program: Path, exported: adaptrt.Exported, data: list[Any], scratch: Path) -> None:
        entry = next(each for each in exported.manifest.programs if each.name == "adapt_predict")
        leaves = [leaf for part in data for leaf in tree.leaves(part)]
        names = [each.name for each in entry.inputs if each.weight is None]
        save_file(dict(zip(names, leaves, strict=True)), scratch / "data.safetensors")
        self._result = scratch / "result.safetensors"
        self._command = [program, exported.folder, "adapt_predict", scratch / "data.safetensors", self._result, "--format", "pt2"]

    def first(self) -> float:
        """Seconds from opening the folder to the first result in a new process."""
        return self._run("load to first result", 0)

    def call(self, count: int) -> float:
        """Median seconds of so many calls in a new process."""
        return self._run("median", count)

    def outputs(self) -> torch.Tensor:
        """The model's outputs that the last process wrote."""
        return load_file(self._result)["result.0"]

    def _run(self, what: str, count: int) -> float:
        text = subprocess.run([*self._command, "--repeat", str(count)], capture_output=True, text=True, check=True).stdout
        found = re.search(rf"{what} ([0-9.e+-]+) ms", text)
        assert found is not None, text
        return float(found[1]) / 1e3


def measure(case: Case, rounds: int, program: Path) -> list[str]:
    """Compares the numbers of one model, and returns the rows of its table."""
    model = case.model()
    support, (inputs, _) = case.data()
    unroll = unroll_of(case, model, "auto")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        began = time.perf_counter()
        exported = adaptrt.load(unroll.export(f"{folder}/net", support, inputs, formats="pt2"))
        export_s = time.perf_counter() - began
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        right = unroll.adapt(support, generator=generators[0])(inputs, generator=generators[0])
        found = exported.adapt_predict(support, inputs, generator=generators[1]).outputs
        error = ((found - right).abs().max() / right.abs().max()).item()
        if not error <= TOLERANCE:
            raise RuntimeError(f"{case.title}: the package is off by {error:.1e} from the unroll")
        calls: dict[str, Callable[[], object]] = {
            "unroll.adapt": lambda: unroll.adapt(support),
            "exported.adapt": lambda: exported.adapt(support),
            "unroll.adapt and a prediction": lambda: unroll.adapt(support)(inputs),
            "exported.adapt_predict": lambda: exported.adapt_predict(support, inputs),
        }
        of_cpp: dict[str, list[float]] = {}
        runner = None
        if not exported.manifest.programs[0].noise:
            calls["the program adapt alone"] = program_alone(exported, "adapt", [support])
            calls["the program adapt_predict alone"] = program_alone(exported, "adapt_predict", [support, inputs])
            runner = Runner(program, exported, [support, inputs], Path(folder))
            of_cpp = {"C++, from nothing, adapt_predict": [runner.first()], "C++, adapt_predict": []}
            error_cpp = ((runner.outputs() - right).abs().max() / right.abs().max()).item()
            if not error_cpp <= TOLERANCE:
                raise RuntimeError(f"{case.title}: the package in C++ is off by {error_cpp:.1e} from the unroll")
        parts: list[dict[str, float]] = []
        for _ in range(TURNS):
            parts.append(times(calls, rounds // TURNS))
            if runner is not None:
                of_cpp["C++, from nothing, adapt_predict"] += [runner.first() for _ in range(4)]
                of_cpp["C++, adapt_predict"].append(runner.call(rounds // TURNS))
        seconds = {name: statistics.median([part[name] for part in parts]) for name in calls}
        seconds |= {name: statistics.median(values) for name, values in of_cpp.items()}
    rows = [
        f"\n{case.title}: exported in {export_s:.0f} s, relative error {error:.0e}\n",
        "| call | microseconds | times the unroll's |",
        "|---|---|---|",
    ]
    for name, value in seconds.items():
        base = seconds["unroll.adapt and a prediction" if "predict" in name else "unroll.adapt"]
        rows.append(f"| {name} | {value * 1e6:,.1f} | {value / base:.2f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=["sine", "conv4-momentum", "lstm"])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--name")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    lines = [machine()]
    with tempfile.TemporaryDirectory() as build:
        program = compiled(SOURCE / "run_adapt.cpp", Path(build) / "run_adapt", "-O3")
        for name in arguments.only:
            lines += measure(CASES[name], arguments.rounds, program)
    text = "\n".join(lines)
    print(text)
    if arguments.name:
        command = "python -m benchmarks.export_pt2 " + shlex.join(sys.argv[1:])
        (RESULTS / f"export-pt2_{arguments.name}.md").write_text(f"# Adaptations as pt2 packages\n\n    {command}\n\n{text}\n")


if __name__ == "__main__":
    main()
