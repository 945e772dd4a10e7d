"""What the serving benchmarks share: models with their data, arrivals, percentiles, the check of numbers, and reports."""

from __future__ import annotations

import argparse
import asyncio
import random
import selectors
import shlex
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt import CompiledUnroll, compile_unroll, optim
from adaptrt.demo.learner import INNER_LR, build_model
from adaptrt.serve import Engine
from benchmarks.suite.report import machine, table

TENANTS = 16
K = 5
KEEP = "not_worse"
SINE_LR = 0.01

Batch = tuple[Tensor, Tensor]
Found = TypeVar("Found")


class Case(NamedTuple):
    """A model, what it adapts to, and what it predicts for.

    Attributes:
      title: what reports call it.
      model: in `eval()`.
      loss: of support data.
      lr: of SGD.
      unroll: compiled.
      supports: support data; a tenant has one of these.
      inputs: of a prediction.
    """

    title: str
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    lr: float
    unroll: CompiledUnroll
    supports: list[Batch]
    inputs: Tensor


def sine(num_supports: int = TENANTS, backend: str = "auto") -> Case:
    """MAML's sine network, and ten points for each tenant."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)).eval()
    unroll = compile_unroll(model, optim.sgd(lr=SINE_LR), K, loss=F.mse_loss, backend=backend)
    supports = [(torch.randn(10, 1), torch.randn(10, 1)) for _ in range(num_supports)]
    return Case(f"sine MLP 1-40-40-1, SGD, k = {K}", model, F.mse_loss, SINE_LR, unroll, supports, torch.randn(10, 1))


def demo(num_supports: int = TENANTS, backend: str = "auto") -> Case:
    """The demo's network of three convolutions, and five images of five classes for each tenant."""
    torch.manual_seed(0)
    model = build_model(seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=INNER_LR)
    unroll = compile_unroll(model, optimizer, K, loss=F.cross_entropy, backend=backend)
    supports = [(torch.randn(25, 1, 8, 8), torch.arange(25) % 5) for _ in range(num_supports)]
    title = f"the demo's conv net, SGD, k = {K}, 25 images"
    return Case(title, model, F.cross_entropy, INNER_LR, unroll, supports, torch.randn(50, 1, 8, 8))


CASES = {"sine": sine, "demo": demo}


async def require_right_numbers(case: Case, engine: Engine, num_tenants: int = TENANTS) -> None:
    """Raises unless tenants that adapt twice, at once, get what the unroll alone computes for each.

    Each case draws its data from one seed. Programs of different numbers of lanes round differently; where two numbers under a max-pool are
    equal but for that, the gradient goes to another of them, and with other seeds a tenant's outputs may differ by 0.01.
    """
    supports = case.supports[:num_tenants]
    for _ in range(2):
        await asyncio.gather(*[engine.adapt(f"right {index}", support) for index, support in enumerate(supports)])
    for index, support in enumerate(supports):
        with torch.inference_mode():
            alone = case.unroll.adapt(support, keep=KEEP)
            expected = case.unroll.adapt(support, start=alone, keep=KEEP)(case.inputs)
        torch.testing.assert_close(await engine.predict(f"right {index}", case.inputs), expected, rtol=1e-3, atol=1e-4)


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns a percentile; of no values, NaN.

    >>> percentile([3.0, 1.0, 2.0], 50), percentile(range(1, 101), 99)
    (2.0, 100)
    """
    return sorted(values)[min(len(values) - 1, int(percent / 100 * len(values)))] if values else float("nan")


def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """Returns the seconds at which requests of a Poisson process arrive, in order."""
    drawn = random.Random(seed)
    times: list[float] = []
    now = drawn.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += drawn.expovariate(rate)
    return times


def run(call: Coroutine[Any, Any, Found]) -> Found:
    """Runs a coroutine on an event loop that wakes up on time: by `select`, as the usual loop's `epoll` sleeps whole milliseconds."""
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(call)


class Beginning:
    """Runs a coroutine that awaits futures, from this moment on, and calls `done` with its result or error.

    A task would begin at the event loop's next turn, and cost more than the engine takes to refuse a request. Python 3.12 has
    `asyncio.eager_task_factory` for this.
    """

    __slots__ = ("_coroutine", "_done")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], done: Callable[[Any, BaseException | None], None]) -> None:
        self._coroutine = coroutine
        self._done = done
        self._go_on(None)

    def _go_on(self, future: Any) -> None:
        try:
            waits_for = self._coroutine.send(None)
        except StopIteration as stop:
            self._done(stop.value, None)
        except Exception as error:
            self._done(None, error)
        else:
            waits_for._asyncio_future_blocking = False  # as a task does, by which the future knows that it was taken over
            waits_for.add_done_callback(self._go_on)


class Bar(NamedTuple):
    """What is required, what was found, and whether it is reached."""

    what: str
    required: str
    found: str
    is_reached: bool


def bars(rows: Sequence[Bar]) -> str:
    """Returns a table of bars.

    >>> print(bars([Bar("goodput", "0.90", "0.80", False)]))
    | bar | required | found |  |
    |---|---|---|---|
    | goodput | 0.90 | 0.80 | **missed** |
    """
    return table(["bar", "required", "found", ""], [[*row[:3], "reached" if row.is_reached else "**missed**"] for row in rows])


def report(title: str, parts: Sequence[str], details: str = "") -> str:
    """Returns a report in Markdown: what made it and where, and the parts.

    Args:
      title: of the report.
      parts: paragraphs and tables.
      details: what else was set.
    """
    module = "" if (spec := getattr(sys.modules["__main__"], "__spec__", None)) is None else f"-m {spec.name} "
    command = f"python {module}{shlex.join(sys.argv[1:])}".strip()
    return "\n\n".join([f"# {title}", f"Made by `{command}`: {machine()}{details}.", *parts]) + "\n"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser of what all serving benchmarks are told."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", choices=tuple(CASES), help="one of the models")
    made.add_argument("--backend", default="auto", choices=("auto", "inductor", "eager"))
    made.add_argument("--out", type=Path, help="a file in Markdown that gets the report, too")
    return made


def chosen_cases(only: str | None) -> list[Callable[..., Case]]:
    """Returns the models that were asked for."""
    return [make for name, make in CASES.items() if only in (None, name)]


def publish(text: str, out: Path | None) -> None:
    """Prints a report, and writes it to a file."""
    print(text)
    if out is not None:
        out.write_text(text, encoding="utf-8")
