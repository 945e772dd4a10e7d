"""Sine regression as in Finn et al. 2017 (section 5.1), with compiled meta-gradients beside the same algorithm in plain PyTorch.

    python examples/sine.py [--iterations 1000] [--backend inductor] [--seed 0]

Two models start from the same weights and see the same tasks. One is trained with `adaptrt`, the other with `torch.func`; their learning
curves are compared, both are timed by turns, and the trained model is adapted to tasks that it has never seen.

How equal can the two be? Both compute the same numbers in different orders, so they differ by float32 rounding from the first iteration
on. Training amplifies a difference, because Adam divides a small gradient by its own size, and because a ReLU switches. So the curves
agree to a few roundings at first, and then drift apart as any two float32 runs do. `CHECKED_ITERATIONS` and `TOLERANCE` say how long and
how closely they must agree. A third run, in plain PyTorch and float64, shows how far float32 itself has drifted from the exact curve by
then and at the end.

Known limits: tasks are drawn with PyTorch's generator, not with the one of the paper's code, so the numbers are not those of the paper.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt

INNER_LR = 0.01
OUTER_LR = 1e-3
TASKS = 25  # a meta-batch
SHOTS = 10  # support points a task, and as many query points in training
EVALUATED_STEPS = (0, 1, 5, 10)

CHECKED_ITERATIONS = 50
TOLERANCE = 1e-5
"""The largest allowed relative difference of the two float32 losses in the first `CHECKED_ITERATIONS` iterations. Six seeds gave up to
2e-7, which is rounding. The first ReLU that switches adds 1e-6 to 1e-4, which was seen from iteration 100 on."""


class Points(NamedTuple):
    """Points on each task's curve. T = tasks, P = points."""

    x: Tensor  # [T, P, 1]
    y: Tensor  # [T, P, 1]


class Tasks(NamedTuple):
    """A batch of tasks."""

    support: Points
    query: Points


MetaLoss = Callable[[Tasks], Tensor]


def draw_tasks(generator: torch.Generator, num_tasks: int, num_query: int = SHOTS) -> Tasks:
    """Curves y = A sin(x - b) with A in [0.1, 5] and b in [0, pi], at points x in [-5, 5]; all uniform."""
    amplitude = 0.1 + 4.9 * torch.rand(num_tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(num_tasks, 1, 1, generator=generator)
    x = 10 * torch.rand(num_tasks, SHOTS + num_query, 1, generator=generator) - 5
    y = amplitude * torch.sin(x - phase)
    return Tasks(Points(x[:, :SHOTS], y[:, :SHOTS]), Points(x[:, SHOTS:], y[:, SHOTS:]))


def build_model(seed: int) -> nn.Sequential:
    """Builds a network of two hidden layers of 40, with 1,761 parameters. Leaves the global random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def build_unroll(model: nn.Module, backend: str) -> adaptrt.CompiledUnroll:
    """Compiles one step of SGD on the mean squared error of the support points, over a batch of tasks."""
    inner = torch.optim.SGD(model.parameters(), lr=INNER_LR)
    return adaptrt.compile_unroll(model, inner, k=1, loss=F.mse_loss, backend=backend).vmap()


def build() -> tuple[adaptrt.CompiledUnroll, Points, Points]:
    """The factory for `adaptrt inspect examples.sine:build`."""
    tasks = draw_tasks(torch.Generator().manual_seed(0), TASKS)
    return build_unroll(build_model(0), "auto"), tasks.support, tasks.query


def compiled_meta_loss(model: nn.Module, backend: str) -> MetaLoss:
    """Computes MAML's meta-loss with adaptrt."""
    unroll = build_unroll(model, backend)
    return lambda tasks: unroll(tasks.support, tasks.query)


def eager_meta_loss(model: nn.Module) -> MetaLoss:
    """Computes MAML's meta-loss in plain PyTorch, by a gradient step inside the loss that is mapped over tasks."""

    def support_loss(params: Mapping[str, Tensor], points: Points) -> Tensor:
        return F.mse_loss(torch.func.functional_call(model, dict(params), (points.x,)), points.y)

    def task_loss(params: Mapping[str, Tensor], support: Points, query: Points) -> Tensor:
        gradients = torch.func.grad(support_loss)(params, support)
        return support_loss({name: value - INNER_LR * gradients[name] for name, value in params.items()}, query)

    def meta_loss(tasks: Tasks) -> Tensor:
        params = dict(model.named_parameters())
        return torch.func.vmap(task_loss, in_dims=(None, 0, 0))(params, tasks.support, tasks.query).mean()

    return meta_loss


class Curve(NamedTuple):
    """One run: the meta-loss of every iteration, and the seconds it took, gradient and Adam's step included."""

    losses: list[float]
    seconds: list[float]

    def time_s(self) -> float:
        """Median seconds of an iteration, without the first ones, which compile."""
        return statistics.median(self.seconds[min(5, len(self.seconds) - 1) :])


class Run:
    """Meta-training of one model: Adam on a meta-loss."""

    def __init__(self, model: nn.Module, meta_loss: MetaLoss) -> None:
        self.model = model
        self.curve = Curve([], [])
        self._meta_loss = meta_loss
        self._outer = torch.optim.Adam(model.parameters(), lr=OUTER_LR)

    def iterate(self, tasks: Tasks) -> None:
        """One meta-iteration."""
        started = time.perf_counter()
        self._outer.zero_grad()
        loss = self._meta_loss(tasks)
        loss.backward()
        self._outer.step()
        self.curve.seconds.append(time.perf_counter() - started)
        self.curve.losses.append(loss.item())


class Comparison(NamedTuple):
    """The same training three times."""

    compiled: Run
    eager: Run
    exact: Run  # plain PyTorch in float64


def follow(iterations: int, backend: str, seed: int) -> Comparison:
    """Trains compiled, eager and eager in float64, from equal weights on equal tasks, one iteration of each by turns."""
    compiled, eager, exact = build_model(seed), build_model(seed), build_model(seed).double()
    runs = Comparison(
        Run(compiled, compiled_meta_loss(compiled, backend)), Run(eager, eager_meta_loss(eager)), Run(exact, eager_meta_loss(exact))
    )
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(iterations):
        tasks = draw_tasks(generator, TASKS)
        runs.compiled.iterate(tasks)
        runs.eager.iterate(tasks)
        runs.exact.iterate(Tasks(*(Points(points.x.double(), points.y.double()) for points in tasks)))
    return runs


def largest_difference(losses: Sequence[float], reference: Sequence[float], iterations: int) -> float:
    """The largest relative difference of two learning curves in their first iterations."""
    pairs = zip(losses[:iterations], reference[:iterations], strict=True)
    return max(abs(loss - expected) / abs(expected) for loss, expected in pairs)


def post_adaptation_errors(model: nn.Module, backend: str, seed: int, num_tasks: int = 600) -> dict[str, list[Tensor]]:
    """Each unseen task's mean squared error on 100 query points after 0, 1, 5, 10 steps, before and after meta-training.

    Returns:
      "not trained" and "meta-trained": for each number of steps a tensor [num_tasks].
    """
    tasks = draw_tasks(torch.Generator().manual_seed(seed + 2), num_tasks, num_query=100)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    step = build_unroll(model, backend)
    found: dict[str, list[Tensor]] = {}
    for label, state in (("not trained", build_model(seed).state_dict()), ("meta-trained", trained)):
        model.load_state_dict(state)  # an unroll reads the parameters at every call, so nothing is compiled again
        found[label] = _errors_by_step(model, step, tasks)
    return found


def _errors_by_step(model: nn.Module, step: adaptrt.CompiledUnroll, tasks: Tasks) -> list[Tensor]:
    def error(output: Tensor) -> Tensor:
        return (output - tasks.query.y).square().mean((1, 2))

    errors: list[Tensor] = []
    adapted: adaptrt.Adapted | None = None
    with torch.no_grad():
        for num_steps in range(max(EVALUATED_STEPS) + 1):
            if num_steps > 0:
                adapted = step.adapt(tasks.support, start=adapted)
            if num_steps in EVALUATED_STEPS:
                errors.append(error(model(tasks.query.x) if adapted is None else adapted(tasks.query.x)))
    return errors


def report(runs: Comparison) -> list[str]:
    """Describes learning curves, their differences and times in words."""
    compiled, eager, exact = (run.curve for run in runs)
    total = len(compiled.losses)
    lines = ["iteration  compiled    eager       (mean meta-loss since the line before)"]
    marks = sorted({max(1, total * part // 10) for part in range(1, 11)})
    for begin, end in zip([0, *marks], marks, strict=False):
        lines.append(f"{end:9d}  {statistics.fmean(compiled.losses[begin:end]):.7f}   {statistics.fmean(eager.losses[begin:end]):.7f}")
    lines.append("largest relative difference of the loss  compiled from eager  eager float32 from float64")
    for first in sorted({min(count, total) for count in (CHECKED_ITERATIONS, 200, total)}):
        ours = largest_difference(compiled.losses, eager.losses, first)
        float32 = largest_difference(eager.losses, exact.losses, first)
        lines.append(f"  in the first {first:5d} iterations            {ours:.1e}              {float32:.1e}")
    ratio = eager.time_s() / compiled.time_s()
    lines.append(
        f"median time of a meta-iteration: compiled {1e3 * compiled.time_s():.2f} ms, "
        f"eager (torch.func.vmap) {1e3 * eager.time_s():.2f} ms, ratio {ratio:.1f}; the first compiled one took {compiled.seconds[0]:.1f} s"
    )
    return lines


def check(runs: Comparison) -> None:
    """Raises unless the compiled run followed the eager one.

    Raises:
      RuntimeError: losses of the first iterations differ by more than `TOLERANCE`.
    """
    difference = largest_difference(runs.compiled.curve.losses, runs.eager.curve.losses, CHECKED_ITERATIONS)
    if not difference <= TOLERANCE:
        raise RuntimeError(f"losses of the first {CHECKED_ITERATIONS} iterations differ by {difference:.1e}, more than {TOLERANCE:.0e}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example and prints what it found."""
    parser = argparse.ArgumentParser(description="Sine regression: compiled meta-gradients against plain PyTorch.")
    parser.add_argument("--iterations", type=int, default=1000, help="meta-iterations, at least 1")
    parser.add_argument("--backend", choices=("auto", "inductor", "eager"), default="auto", help="what runs adaptrt's programs")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the tasks")
    options: Any = parser.parse_args(arguments)
    if options.iterations < 1:
        parser.error(f"--iterations must be at least 1, got {options.iterations}")
    torch.set_num_threads(1)  # for kernels this small, sharing work between threads costs more than it gains
    print(f"torch {torch.__version__}, 1 thread, float32, backend {options.backend}")
    runs = follow(options.iterations, options.backend, options.seed)
    print("\n".join(report(runs)))
    check(runs)
    errors = post_adaptation_errors(runs.compiled.model, options.backend, options.seed)
    num_tasks = len(errors["meta-trained"][0])
    print(f"mean squared error on {num_tasks} unseen tasks, with the half-width of its 95% confidence interval")
    print("steps         " + "".join(f"{steps:>16d}" for steps in EVALUATED_STEPS))
    for label, by_step in errors.items():
        cells = [f"{e.mean().item():.3f} ± {1.96 * e.std().item() / math.sqrt(num_tasks):.3f}" for e in by_step]
        print(f"{label:<14}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
