"""The README's table: latency of adaptation and of its meta-gradient for a sine MLP, adaptrt next to two eager loops.

    python benchmarks/quick_table.py

MLP 1-40-40-1, 10 support and 10 query points, k = 5 steps of SGD, float32. Every contestant's adapted parameters and meta-gradient are
first compared with the eager loop run in float64; only then is anything timed. All are timed by turns in one process on one thread (kernels
this small lose more to a team of threads than they gain); medians. The two rows on scaling are read from the newest report of
`benchmarks/adjoint_scaling.py`.

`higher` 0.2.1 is measured if it is installed (extra "bench").
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt

NUM_STEPS = 5
LR = 0.01
CALLS = 300
WARM_UP = 20
TOLERANCE = 1e-5

Batch = tuple[Tensor, Tensor]


class Contestant(NamedTuple):
    """One implementation.

    Attributes:
      name: in the table.
      adapt: () -> adapted parameters, nothing recorded for a meta-gradient.
      meta: () -> gradients of the query loss after adaptation in the model's parameters.
      compile_s: seconds that the first call of each took.
    """

    name: str
    adapt: Callable[[], list[Tensor]]
    meta: Callable[[], list[Tensor]]
    compile_s: float = 0.0


def build_model() -> nn.Sequential:
    """The regressor of Finn et al. 2017."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def eager_loop(model: nn.Module, support: Batch, query: Batch) -> Contestant:
    """The loop that one writes by hand."""

    def run(create_graph: bool) -> dict[str, Tensor]:
        params: dict[str, Tensor] = dict(model.named_parameters())
        for _ in range(NUM_STEPS):
            loss = F.mse_loss(torch.func.functional_call(model, params, (support[0],)), support[1])
            gradients = torch.autograd.grad(loss, list(params.values()), create_graph=create_graph)
            params = {name: value - LR * gradient for (name, value), gradient in zip(params.items(), gradients, strict=True)}
            if not create_graph:
                params = {name: value.detach().requires_grad_() for name, value in params.items()}
        return params

    def meta() -> list[Tensor]:
        loss = F.mse_loss(torch.func.functional_call(model, run(True), (query[0],)), query[1])
        return list(torch.autograd.grad(loss, list(model.parameters())))

    return Contestant("plain eager loop", lambda: [value.detach() for value in run(False).values()], meta)


def higher_loop(model: nn.Module, support: Batch, query: Batch) -> Contestant:
    """`higher`, as its documentation does it."""
    higher: Any = importlib.import_module("higher")
    inner = torch.optim.SGD(model.parameters(), lr=LR)

    def adapt() -> list[Tensor]:
        with higher.innerloop_ctx(model, inner, track_higher_grads=False) as (fast, differentiable):
            for _ in range(NUM_STEPS):
                differentiable.step(F.mse_loss(fast(support[0]), support[1]))
            return [value.detach() for value in fast.parameters()]

    def meta() -> list[Tensor]:
        with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fast, differentiable):
            for _ in range(NUM_STEPS):
                differentiable.step(F.mse_loss(fast(support[0]), support[1]))
            return list(torch.autograd.grad(F.mse_loss(fast(query[0]), query[1]), list(model.parameters())))

    return Contestant("higher 0.2.1", adapt, meta)


def adaptrt_loop(model: nn.Module, support: Batch, query: Batch, backend: str) -> Contestant:
    """adaptrt as in the README, compiled already when it is returned."""
    unroll = adaptrt.compile_unroll(model, torch.optim.SGD(model.parameters(), lr=LR), k=NUM_STEPS, loss=F.mse_loss, backend=backend)

    def adapt() -> list[Tensor]:
        with torch.no_grad():
            return list(unroll.adapt(support).params.values())

    def meta() -> list[Tensor]:
        return list(torch.autograd.grad(unroll(support, query), list(model.parameters())))

    started = time.perf_counter()
    adapt()
    meta()
    return Contestant(f"adaptrt, {backend} backend", adapt, meta, time.perf_counter() - started)


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference in a tensor relative to the tensor's largest element, over all tensors."""
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def contestants(support: Batch, query: Batch) -> list[Contestant]:
    """Every implementation on a model of its own with equal weights."""
    found = [eager_loop(build_model(), support, query)]
    if importlib.util.find_spec("higher"):
        found.append(higher_loop(build_model(), support, query))
    return found + [adaptrt_loop(build_model(), support, query, backend) for backend in ("eager", "inductor")]


def gate(rivals: list[Contestant], support: Batch, query: Batch) -> list[tuple[float, float]]:
    """Errors of adapted parameters and of meta-gradients against the eager loop in float64.

    Raises:
      RuntimeError: one is above `TOLERANCE`.
    """
    oracle = eager_loop(build_model().double(), *((x.double(), y.double()) for x, y in (support, query)))
    params, gradients = oracle.adapt(), oracle.meta()
    errors = [(error(rival.adapt(), params), error(rival.meta(), gradients)) for rival in rivals]
    for rival, pair in zip(rivals, errors, strict=True):
        if not max(pair) <= TOLERANCE:
            raise RuntimeError(f"{rival.name} differs from the eager loop in float64 by {max(pair):.1e}; nothing was timed")
    return errors


def medians_s(calls: list[Callable[[], object]]) -> list[float]:
    """Median seconds of each, called by turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(CALLS + WARM_UP):
        for call, into in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            into.append(time.perf_counter() - started)
    return [statistics.median(one[WARM_UP:]) for one in times]


def scaling_rows() -> list[str]:
    """Compile time and memory against k, from the newest committed report."""
    reports = sorted((Path(__file__).parent / "results").glob("adjoint-scaling_*.json"))
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
    generator = torch.Generator().manual_seed(1)
    support, query = ((x, torch.sin(x)) for x in (10 * torch.rand(10, 1, generator=generator) - 5 for _ in range(2)))
    rivals = contestants(support, query)
    errors = gate(rivals, support, query)
    adapt = medians_s([rival.adapt for rival in rivals])
    meta = medians_s([rival.meta for rival in rivals])
    print(
        f"torch {torch.__version__}, CPU, 1 thread, float32, k={NUM_STEPS}, SGD, 10 support and 10 query points, medians of {CALLS} calls"
    )
    print("| | adapt | × eager loop | adapt + meta-gradient | × eager loop | compile | largest error |")
    print("|---|---|---|---|---|---|---|")
    for rival, adapt_s, meta_s, pair in zip(rivals, adapt, meta, errors, strict=True):
        made = f"{rival.compile_s:.0f} s" if rival.compile_s else "—"
        print(
            f"| {rival.name} | {1e3 * adapt_s:.2f} ms | {adapt[0] / adapt_s:.1f} | {1e3 * meta_s:.2f} ms | {meta[0] / meta_s:.1f} "
            f"| {made} | {max(pair):.0e} |"
        )
    print("\n".join(scaling_rows()))


if __name__ == "__main__":
    main()
