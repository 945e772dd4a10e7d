"""What each rewrite gains on this machine: the same computation compiled with it and without it.

    python benchmarks/rewrites.py [--rewrites "channel sums" ...] [--workloads conv4-5shot ...] [--threads N] [--name HARDWARE_DATE]

A rewrite is a change of graphs or of generated code that leaves the numbers as they are and makes a program faster on some processor. Each
is measured on the part of a model that it was made for; with `--workloads` on whole adaptations and meta-gradients of the suite as well,
which compile for minutes. Both programs are compared with eager operations before they are timed. Then they are called by turns in one
process; times are medians, and the gain is the median of the ratios of neighbouring calls, so that 1.00 is no difference. Some rewrites
are left out on some kinds of processors (`adaptrt/backend/inductor/processor.py`): here they are applied all the same, and the table says
whether they are applied by default. With `--name` it is written to `benchmarks/results/rewrites_NAME.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

if __name__ == "__main__":  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))
from adaptrt import tree
from adaptrt.adjoint import auto
from adaptrt.backend import Inductor
from adaptrt.backend.inductor import compile as inductor
from adaptrt.backend.inductor import processor, small_matmuls
from adaptrt.backend.inductor.rewrites import channel_sums, convolutions_as_products, inline_small_matmuls, products_by_onednn
from adaptrt.backend.inductor.rewrites.compute_once import compute_once
from adaptrt.backend.inductor.rewrites.one_channel_last import one_channel_last
from adaptrt.graph import capture as captures
from adaptrt.graph.capture import capture
from adaptrt.graph.passes.base import Pass
from adaptrt.graph.passes.convolution_gradients import convolution_gradients
from adaptrt.graph.passes.gelu_by_sigmoid import GeluBySigmoid
from adaptrt.graph.passes.merge_sums import merge_sums
from adaptrt.graph.passes.pool_as_maxima import PoolAsMaxima
from adaptrt.runtime import program_set
from benchmarks import parts
from benchmarks.suite.contest import QUANTITIES, by_turns, error
from benchmarks.suite.contestants import Call, loop, ours
from benchmarks.suite.report import RESULTS, machine, shown_time, table
from benchmarks.suite.workloads import WORKLOADS

SECONDS = 2.0
"""For the calls of one row."""
TOLERANCE = 1e-4
"""How far a program in float32 may be from eager operations, relative to the largest element of each result."""
MAX_ERROR_OF_WORKLOAD = 2e-2
"""The same for whole adaptations of deep networks, in which rounding turns a ReLU now and then."""

Context = Callable[[], contextlib.AbstractContextManager[Any]]


class Rewrite(NamedTuple):
    """How one rewrite is switched.

    Attributes:
      off: a context in which programs are compiled without it.
      on: a context in which they are compiled with it, whatever the processor.
      is_default: whether it is applied on this processor when nobody asks.
    """

    off: Context
    on: Context = contextlib.nullcontext
    is_default: Callable[[], bool] = lambda: True


def patched(owner: Any, name: str, value: Any) -> Context:
    return lambda: mock.patch.object(owner, name, value)


def without(owner: Any, name: str, left_out: Pass) -> Context:
    """The tuple of passes `owner.name` without one of them."""
    return lambda: mock.patch.object(owner, name, tuple(part for part in getattr(owner, name) if part is not left_out))


REWRITES: dict[str, Rewrite] = {
    "channel sums": Rewrite(patched(channel_sums, "RULES", {})),
    "merge sums": Rewrite(without(captures, "STANDARD", merge_sums)),
    "convolutions as products": Rewrite(patched(convolutions_as_products, "RULES", {})),
    "convolution gradients": Rewrite(without(captures, "STANDARD", convolution_gradients)),
    "one channel last": Rewrite(without(inductor, "PASSES", one_channel_last)),
    "pooling as maxima": Rewrite(patched(PoolAsMaxima, "functions", ())),
    "small products inlined": Rewrite(patched(inline_small_matmuls, "RULES", {})),
    "small products by a function": Rewrite(patched(small_matmuls, "_product_of", lambda node: None)),
    "products by oneDNN": Rewrite(
        patched(products_by_onednn, "mkl_is_slow", lambda: False),
        patched(products_by_onednn, "mkl_is_slow", lambda: True),
        processor.mkl_is_slow,
    ),
    "GELU by a sigmoid": Rewrite(patched(GeluBySigmoid, "functions", ())),
    "computed once": Rewrite(without(inductor, "PASSES", compute_once)),
    "kernels recorded": Rewrite(patched(inductor, "record", lambda *args: None)),
    "one thread for small operations": Rewrite(patched(inductor, "threads_for", lambda graph: {})),
    "tasks one by one": Rewrite(patched(auto, "MIN_FLOPS_OF_A_TASK", sys.maxsize)),
    "what steps share computed once": Rewrite(patched(program_set, "hoist", lambda graph, same: None)),
}
"""The last two concern whole unrolls: they have no row without `--workloads`."""


class Row(NamedTuple):
    """What was found for one rewrite on one computation; times are of neighbouring calls."""

    rewrite: str
    what: str
    with_s: Sequence[float]
    without_s: Sequence[float]
    error: float

    def gain(self) -> float:
        """How many times longer it takes without the rewrite."""
        return statistics.median(a / b for a, b in zip(self.without_s, self.with_s, strict=True))

    def cells(self) -> list[str]:
        times = [shown_time(statistics.median(times_s)) for times_s in (self.without_s, self.with_s)]
        default = "yes" if REWRITES[self.rewrite].is_default() else "no"
        return [self.rewrite, self.what, *times, f"{self.gain():.2f}", f"{self.error:.0e}", default]


def timed(rewrite: str, what: str, calls: Mapping[str, Callable[[], Any]], worst: float) -> Row:
    """Times the calls "with" and "without"."""
    once = max(max(times) for times in by_turns(calls, 2, 2).values())
    count = max(10, min(1000, int(SECONDS / len(calls) / once)))
    times = by_turns(calls, count, max(1, count // 10))
    return Row(rewrite, what, times["with"], times["without"], worst)


def checked(found: Sequence[Any], expected: Sequence[Tensor], tolerance: float, what: str) -> float:
    """The error.

    Raises:
      RuntimeError: it is above the tolerance.
    """
    worst = error(found, expected)
    if not worst <= tolerance:
        raise RuntimeError(f"{what}: the program is off by {worst:.1e}; nothing was timed")
    return worst


def on_a_part(rewrite: str, part: parts.Part) -> Row:
    """Compiles a part of a model both ways."""
    values = part.values()
    leaves, _ = tree.flatten(tuple(values))
    calls: dict[str, Callable[[], Any]] = {}
    worst = 0.0
    expected = [value.double() for value in _leaves(capture(part.fn, *values).run(*values))]
    for name, context in (("with", REWRITES[rewrite].on), ("without", REWRITES[rewrite].off)):
        # Inductor's cache on disk does not know what is changed in Inductor.
        with fresh_cache(), context():
            graph = capture(part.fn, *values, for_fusion=True)
            run, inputs = Inductor().compile(graph), [*leaves, *graph.constants]
        calls[name] = lambda run=run, inputs=inputs: run(list(inputs))
        worst = max(worst, checked(calls[name](), expected, TOLERANCE, f"{part.what}, {name} {rewrite}"))
    return timed(rewrite, part.what, calls, worst)


def _leaves(value: Any) -> list[Tensor]:
    return tree.flatten(value)[0]


def on_a_workload(rewrite: str, name: str, programs: Mapping[str, Mapping[str, Call]]) -> list[Row]:
    """Adaptation and meta-gradient of a workload of the suite.

    Args:
      programs: the calls by quantity, compiled with the rewrite and without it.
    """
    expected = loop(WORKLOADS[name], torch.float64)
    rows: list[Row] = []
    for quantity in ("adapt", "meta"):
        calls = {which: calls[quantity] for which, calls in programs.items()}
        worst = max(checked(call(), expected[quantity](), MAX_ERROR_OF_WORKLOAD, f"{name}, {quantity}") for call in calls.values())
        rows.append(timed(rewrite, f"{name}, {quantity}", calls, worst))
    return rows


def compiled(name: str, context: Context) -> dict[str, Call]:
    with fresh_cache(), context():
        calls = ours(WORKLOADS[name], torch.float32)
        for quantity in QUANTITIES:
            calls[quantity]()
    return calls


def markdown(rows: Sequence[Row], command: str) -> str:
    head = ["rewrite", "measured on", "without", "with", "gain", "error", "applied by default here"]
    return (
        f"# What each rewrite gains\n\nMade by `{command}`: {machine()}, float32. Medians of calls by turns in one process; the gain is "
        f"the median of the ratios of neighbouring calls. Both programs were compared with eager operations first.\n\n"
        f"{table(head, [row.cells() for row in rows])}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewrites", nargs="+", choices=list(REWRITES), default=list(REWRITES))
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=[])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", help="HARDWARE_DATE: write results/rewrites_NAME.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for rewrite in options.rewrites:
        for part in parts.PARTS.get(rewrite, ()):
            rows.append(on_a_part(rewrite, part))
            print(" | ".join(rows[-1].cells()), flush=True)
    for name in options.workloads:
        default = functools.cache(lambda name=name: compiled(name, contextlib.nullcontext))
        for rewrite in options.rewrites:
            switch = REWRITES[rewrite]
            with_it = default() if switch.is_default() else compiled(name, switch.on)
            without_it = compiled(name, switch.off) if switch.is_default() else default()
            found = on_a_workload(rewrite, name, {"with": with_it, "without": without_it})
            rows += found
            print("\n".join(" | ".join(row.cells()) for row in found), flush=True)
    text = markdown(rows, shlex.join(["python", "benchmarks/rewrites.py", *sys.argv[1:]]))
    print(text)
    if options.name:
        (RESULTS / f"rewrites_{options.name}.md").write_text(text)


if __name__ == "__main__":
    main()
