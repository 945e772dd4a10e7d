"""Draws the demo's figure: learning curve, accuracy by inner step, and latency."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from adaptrt.demo.digits import MissingDemoExtra
from adaptrt.demo.measure import Estimate, Latency

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPILED, EAGER, PALE, INK = "#0b6e99", "#c8553d", "#c9d6dc", "#333333"


class Curve(NamedTuple):
    """What was recorded while training."""

    losses: list[float]  # query loss after adaptation, one an iteration
    checkpoints: list[tuple[int, Estimate]]  # iteration, accuracy on unseen classes after adaptation


def require_matplotlib() -> None:
    """Raises at once, rather than after minutes of training, if the figure cannot be drawn.

    Raises:
      MissingDemoExtra: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDemoExtra("the demo needs matplotlib: pip install 'adaptrt[demo]'")


def draw(
    path: Path, curve: Curve, by_step: Sequence[Estimate], reference: Estimate, timing: Latency, *, trained_steps: int, label: str
) -> None:
    """Writes the figure as PNG.

    Args:
      path: where the file goes.
      curve: the record of the training.
      by_step: accuracy on unseen classes after 0, 1, ... inner steps.
      reference: accuracy of nearest neighbours.
      timing: the latency of one adaptation.
      trained_steps: number of inner steps that meta-training used.
      label: the name of the bar of compiled adaptation.

    Raises:
      MissingDemoExtra: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(13, 4.1), dpi=150, layout=ConstrainedLayoutEngine(wspace=0.04))
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 1.1, 0.9))
    _learning(left, curve)
    _steps(middle, by_step, reference, trained_steps)
    _latency(right, timing, trained_steps, label)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK, labelsize=9)
    figure.savefig(path, format="png")


def _learning(axes: Axes, curve: Curve) -> None:
    axes.set_title("Meta-training", loc="left")
    iterations = range(1, len(curve.losses) + 1)
    axes.plot(iterations, curve.losses, color=PALE, linewidth=0.8)
    axes.plot(iterations, _smooth(curve.losses), color=COMPILED, linewidth=1.8)
    axes.set(xlabel="iteration", xlim=(0, 1.02 * len(curve.losses)), ylim=(0, 1.05 * max(curve.losses)))
    axes.set_ylabel("query loss after adaptation", color=COMPILED)
    accuracy = axes.twinx()
    accuracy.spines[["top"]].set_visible(False)
    accuracy.tick_params(colors=INK, labelsize=9)
    at, values = zip(*curve.checkpoints, strict=True)
    _estimates(accuracy, at, values, EAGER)
    accuracy.set_ylabel("accuracy on unseen classes, %", color=EAGER)
    accuracy.set_ylim(min(85.0, *(100 * (v.mean - v.half_width) - 2 for v in values)), 100)


def _steps(axes: Axes, by_step: Sequence[Estimate], reference: Estimate, trained_steps: int) -> None:
    axes.set_title("Unseen classes, 5-way 5-shot", loc="left")
    axes.axhline(100 * reference.mean, color=EAGER, linewidth=1, linestyle="--")
    _estimates(axes, range(len(by_step)), by_step, COMPILED)
    for step in (0, trained_steps):
        axes.annotate(
            f"{100 * by_step[step].mean:.1f}%",
            (step, 100 * by_step[step].mean),
            xytext=(8, -4) if step == 0 else (0, -18),
            textcoords="offset points",
            ha="left" if step == 0 else "center",
            color=INK,
        )
    axes.set(xlabel="inner steps", ylabel="accuracy, %", ylim=(0, 103), xticks=range(len(by_step)))
    # The difference from the reference is too small to see on the scale from chance to perfection.
    inset = axes.inset_axes((0.4, 0.14, 0.58, 0.5))
    inset.axhline(100 * reference.mean, color=EAGER, linewidth=1, linestyle="--")
    shown = range(min(2, trained_steps), len(by_step))
    _estimates(inset, shown, [by_step[step] for step in shown], COMPILED)
    inset.set_title("dashed: nearest neighbour in pixels", loc="left", fontsize=8, color=EAGER)
    inset.set_xticks(shown)
    inset.tick_params(colors=INK, labelsize=8)
    inset.spines[["top", "right"]].set_visible(False)


def _latency(axes: Axes, timing: Latency, steps: int, label: str) -> None:
    rows = [(label, 1e3 * timing.compiled_s, COMPILED), ("eager PyTorch", 1e3 * timing.eager_s, EAGER)]
    axes.set_title(f"Adapting to one task, {steps} steps", loc="left")
    widest = 0.0
    for row, (name, times_ms, colour) in enumerate(rows):
        median, high = times_ms.median().item(), times_ms.quantile(0.95).item()
        widest = max(widest, high)
        axes.barh(row, median, height=0.45, color=colour)
        axes.plot([median, high], [row, row], color=INK, linewidth=1.2, marker="|", markersize=9)
        axes.text(high, row, f"   {median:.2f} ms", va="center", fontsize=10, color=INK)
        axes.text(0, row - 0.27, name, va="bottom", fontsize=9.5, color=INK)
    axes.set(xlabel="ms (bar: median, whisker: 95th percentile)", yticks=[], xlim=(0, widest * 1.35), ylim=(1.5, -0.6))


def _estimates(axes: Axes, at: Sequence[int], values: Sequence[Estimate], colour: str) -> None:
    means, bounds = [100 * v.mean for v in values], [100 * v.half_width for v in values]
    axes.errorbar(at, means, bounds, color=colour, marker="o", markersize=3.5, linewidth=1.4, capsize=2)


def _smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Returns the exponential moving average, with the bias correction that Adam uses for its moments."""
    smoothed: list[float] = []
    total = weight = 0.0
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed
