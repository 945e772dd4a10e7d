"""Runs the demo from beginning to end, as `adaptrt demo` does."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from adaptrt.demo import digits as protocol
from adaptrt.demo import figure, learner, measure
from adaptrt.demo.digits import Digits, Episodes
from adaptrt.errors import CompilerUnavailable
from adaptrt.runtime.unroll import CompiledUnroll

NUM_ITERATIONS = 700
NUM_ITERATIONS_EAGER = 400
NUM_CHECKPOINTS = 10
NUM_WATCHED = 40
EVALUATED_STEPS = 10
# 8×8 images are too small to be shared between threads. If another process uses the other core, two threads wait for each other at every
# operation: a meta-gradient took 273 ms instead of 32, measured beside a running test suite.
NUM_THREADS = 1
# Seconds that are reserved at the end of the time limit for accuracy, latency and the figure. A short run reserves half of what is left.
MEASURING_S = 40.0


def run(*, minutes: float, out: Path, seed: int, backend: str, num_episodes: int, console: Console | None = None) -> None:
    """Compiles, meta-trains, evaluates on unseen classes, measures latency and writes the figure.

    It runs on one thread, and restores the number of threads at the end.

    Args:
      minutes: wall-clock limit for the whole run. Training gets the time that compiling and measuring leave.
      out: path of the figure.
      seed: seed of the model and of every task.
      backend: "auto", "eager" or "inductor".
      num_episodes: number of unseen tasks to evaluate on.
      console: where to print; standard output by default.

    Raises:
      MissingDemoExtra: scikit-learn or matplotlib is not installed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    try:
        _run(minutes, out, seed, backend, num_episodes, console or Console(highlight=False))
    finally:
        torch.set_num_threads(threads)


def _run(minutes: float, out: Path, seed: int, backend: str, num_episodes: int, console: Console) -> None:
    started = time.monotonic()
    figure.require_matplotlib()
    digits = protocol.load()
    console.print(
        f"[bold]adaptrt demo[/bold]  {learner.WAYS}-way {learner.SHOTS}-shot handwriting: "
        f"meta-trained on {len(protocol.TRAINING_CLASSES)} classes, tested on {len(protocol.UNSEEN_CLASSES)} that it never saw.\n"
        f"torch {torch.__version__}, {NUM_THREADS} thread."
    )
    # The learning curve and the final result use different unseen tasks.
    watched = _unseen(digits, seed + 1, NUM_WATCHED)
    episodes = _unseen(digits, seed + 2, num_episodes)

    model = learner.build_model(seed)
    with _warning_once(console):
        unroll = learner.build_unroll(model, steps=learner.INNER_STEPS, backend=backend)
        step = learner.build_unroll(model, steps=1, backend=backend)
    compiles = unroll.explain().backend != "eager"
    if compiles:
        with console.status("compiling, about a minute"):
            support, query = episodes.tasks()[0]
            unroll.warmup(support, query)
            with torch.inference_mode():
                step.adapt(support)(query[0])
        console.print(f"compiled in {time.monotonic() - started:.0f} s")

    limit = started + 60 * minutes
    deadline = limit - min(MEASURING_S, (limit - time.monotonic()) / 2)
    num_iterations = NUM_ITERATIONS if compiles else NUM_ITERATIONS_EAGER
    curve = _train(console, model, unroll, digits, watched, seed=seed, num_iterations=num_iterations, deadline=deadline)

    with console.status("measuring"):
        accuracies = measure.accuracy_by_step(model, step, episodes, num_steps=EVALUATED_STEPS)
        by_step = [measure.estimate(values) for values in accuracies]
        reference = measure.estimate(measure.nearest_neighbour(episodes))
        timing = measure.latency(model, unroll, episodes.tasks()[0], steps=learner.INNER_STEPS)
    label = "adaptrt, compiled" if compiles else "adaptrt, eager backend"
    console.print(_accuracy_table(by_step, reference, accuracies.shape[1]))
    console.print(_latency_table(timing, label))
    figure.draw(out, curve, by_step, reference, timing, trained_steps=learner.INNER_STEPS, label=label)
    console.print(f"figure: {out}\ndone in {time.monotonic() - started:.0f} s")


def _unseen(digits: Digits, seed: int, num_episodes: int) -> Episodes:
    generator = torch.Generator().manual_seed(seed)
    return digits.draw(
        protocol.UNSEEN_CLASSES, generator, tasks=num_episodes, ways=learner.WAYS, shots=learner.SHOTS, queries=learner.QUERIES
    )


@contextlib.contextmanager
def _warning_once(console: Console) -> Iterator[None]:
    """Prints that a compiler is missing in one line of the demo's own, instead of a warning with a line of source."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", CompilerUnavailable)
        yield
    for warning in caught[:1]:
        console.print(f"[yellow]warning:[/yellow] {warning.message} The demo trains for fewer iterations.")


def _train(
    console: Console,
    model: nn.Module,
    unroll: CompiledUnroll,
    digits: Digits,
    watched: Episodes,
    *,
    seed: int,
    num_iterations: int,
    deadline: float,
) -> figure.Curve:
    curve = figure.Curve([], [(0, measure.estimate(measure.accuracy(unroll, watched)))])
    columns = (
        TextColumn("meta-training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        shown = bar.add_task("", total=num_iterations)
        accuracy, next_checkpoint = "", 1 / NUM_CHECKPOINTS
        for progress in learner.meta_train(model, unroll, digits, seed=seed, num_iterations=num_iterations, deadline=deadline):
            curve.losses.append(progress.loss)
            if progress.done >= next_checkpoint:
                value = measure.estimate(measure.accuracy(unroll, watched))
                curve.checkpoints.append((progress.iteration, value))
                accuracy, next_checkpoint = f"  unseen classes {100 * value.mean:.1f}%", next_checkpoint + 1 / NUM_CHECKPOINTS
            loss = sum(curve.losses[-20:]) / len(curve.losses[-20:])
            bar.update(shown, completed=progress.iteration, description=f"query loss {loss:.3f}{accuracy}")
        if len(curve.losses) < num_iterations:
            bar.update(shown, total=len(curve.losses))
    return curve


def _accuracy_table(by_step: list[measure.Estimate], reference: measure.Estimate, num_episodes: int) -> Table:
    table = Table(title=f"Accuracy on unseen classes: {num_episodes} episodes, 95% confidence", title_justify="left")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_row("before adaptation", str(by_step[0]))
    table.add_row(f"after {learner.INNER_STEPS} steps", f"[bold]{by_step[learner.INNER_STEPS]}[/bold]")
    table.add_row(f"after {EVALUATED_STEPS} steps", str(by_step[EVALUATED_STEPS]))
    table.add_row("nearest neighbour in pixels, for reference", str(reference))
    return table


def _latency_table(timing: measure.Latency, label: str) -> Table:
    table = Table(
        title=f"Adapting to one task: {learner.INNER_STEPS} steps, {NUM_THREADS} thread",
        title_justify="left",
    )
    for heading in ("", "median", "95th percentile"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, times_s in ((label, timing.compiled_s), ("eager PyTorch", timing.eager_s)):
        median_ms, high_ms = 1e3 * times_s.median().item(), 1e3 * times_s.quantile(0.95).item()
        table.add_row(name, f"{median_ms:.2f} ms", f"{high_ms:.2f} ms")
    table.caption = (
        f"{timing.ratio:.1f} × faster, medians of {len(timing.eager_s)} interleaved calls;\nadapted logits agree to {timing.error:.0e}"
    )
    return table
