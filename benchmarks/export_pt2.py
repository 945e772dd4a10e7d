"""What a call of an exported pt2 package costs beside the compiled unroll that it was exported from. Numbers are compared first.

python -m benchmarks.export_pt2 [--only sine] [--rounds 300] [--out FILE]
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import adaptrt
from adaptrt import tree
from adaptrt.export.formats import FORMATS
from benchmarks.export_onnx import CASES, Case, unroll_of
from benchmarks.states import times

TOLERANCE = 1e-4
"""Relative error of outputs between two ways to compile the same program, in float32."""


def program_alone(exported: adaptrt.Exported, name: str, data: list[Any]) -> Callable[[], object]:
    """Returns a call of a program without anything around it, as a host in C++ makes it."""
    entry = next(each for each in exported.manifest.programs if each.name == name)
    run = FORMATS[exported.format].open(exported.manifest, entry, exported.folder / entry.files[exported.format])
    leaves = iter([leaf for part in data for leaf in tree.leaves(part)])
    weights = exported.weights
    values = [weights[each.weight] if each.weight is not None else next(leaves) for each in entry.inputs]
    return lambda: run(list(values))


def measure(case: Case, rounds: int) -> list[str]:
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
        if not exported.manifest.programs[0].noise:
            calls["the program adapt alone"] = program_alone(exported, "adapt", [support])
            calls["the program adapt_predict alone"] = program_alone(exported, "adapt_predict", [support, inputs])
        seconds = times(calls, rounds)
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
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    lines = [f"pt2 packages, PyTorch {torch.__version__}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"]
    for name in arguments.only:
        lines += measure(CASES[name], arguments.rounds)
    text = "\n".join(lines)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
