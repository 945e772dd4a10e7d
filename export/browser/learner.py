"""The network, the tasks on which it is meta-trained, and the meta-training."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import adaptrt
from adaptrt import optim
from export.browser.strokes import SIZE, rasterise, redrawn
from export.browser.symbols import Symbol, training_symbols

MAX_SYMBOLS = 5
MIN_SYMBOLS = 2
MAX_EXAMPLES = 5
MIN_EXAMPLES = 3
ROWS = MAX_SYMBOLS * MAX_EXAMPLES
"""Rows of every batch: an exported program has fixed shapes, so smaller tasks are padded."""
STEPS = 4
TASKS = 4
WIDTHS = 32, 64, 64
ADAPTED = "features.6.*", "features.7.*", "head.*"
"""What the steps change: the last convolution, its norm and the linear layer."""
OUTER_LR, RATE_LR = 2e-3, 3e-2
FIRST_RATES = {"head": 2.0, "features": 0.1}
"""The rates of the inner steps before they are learned."""
ABSENT = -30.0
"""The logit of a symbol that the task does not have."""
SHARE_ALIKE = 0.4
"""Of symbols that are like the one before them in a task."""
SAME = 0.35
"""Symbols are the same if their mean images are this near to each other, in parts of the variance of their drawings."""
NUM_SYMBOLS, NUM_DRAWINGS = 6000, 12

Inputs = tuple[Tensor, Tensor]
Batch = tuple[Inputs, Tensor, Tensor]  # (images, which symbols the task has), labels, weights


class Recogniser(nn.Module):
    """Three convolutions with stride 2 and a linear layer, which starts from zero: before the first step all symbols are equally likely."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((1, *WIDTHS[:-1]), WIDTHS, strict=True):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten())
        size = WIDTHS[-1] * math.ceil(SIZE / 8) ** 2
        self.scale = size**-0.5
        self.head = nn.Linear(size, MAX_SYMBOLS)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, used: Tensor) -> Tensor:
        """Logits [N, MAX_SYMBOLS].

        Args:
          images: [N, 1, SIZE, SIZE], 0 (paper) to 1 (ink).
          used: [MAX_SYMBOLS], 1 for the symbols that the task has, 0 for the others.
        """
        logits = self.head(self.scale * self.features(4 * images - 1))
        return torch.where(used > 0, logits, ABSENT)


def build(seed: int) -> tuple[Recogniser, dict[str, Tensor], optim.Optimizer]:
    """Returns the network, the learned rates of what adapts by its names, [STEPS] each, and the inner optimiser."""
    torch.manual_seed(seed)
    model = Recogniser()
    adapted = [name for name, _ in model.named_parameters() if any(fnmatch(name, pattern) for pattern in ADAPTED)]
    rates = {name: torch.full((STEPS,), FIRST_RATES[name.partition(".")[0]], requires_grad=True) for name in adapted}
    return model, rates, optim.sgd(lr=optim.per_step(rates))


def compiled(model: nn.Module, optimizer: optim.Optimizer, backend: str) -> adaptrt.CompiledUnroll:
    loss = nn.CrossEntropyLoss(reduction="none")
    return adaptrt.compile_unroll(model, optimizer, STEPS, loss=loss, params=list(ADAPTED), examples="weighted", backend=backend)


# --- drawings and tasks


class Choice(NamedTuple):
    """A symbol of a task: its number, and that of the `view` in which it is seen."""

    symbol: int
    view: int


class Drawings:
    """Drawings of many symbols, from which tasks are made.

    Args:
      images: [C, D, SIZE, SIZE] uint8; C = symbols, of which each two that follow one another are relatives; D = drawings of each.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images
        # The mean image of each symbol, and how far its drawings are from it.
        mean = images.float().mean(1)  # [C, SIZE, SIZE]
        self.spread = (images.float() - mean[:, None]).square().mean((1, 2, 3))  # [C]
        self.mean = mean

    def _differ(self, first: Choice, second: Choice) -> bool:
        """Whether two symbols are not the same by construction, as a circle and a circle that is turned are."""
        if first.symbol // 2 != second.symbol // 2:
            return True
        apart = (view(self.mean[first.symbol], first.view) - view(self.mean[second.symbol], second.view)).square().mean()
        return bool(apart > SAME * self.spread[[first.symbol, second.symbol]].mean())

    def task(self, generator: torch.Generator) -> tuple[Batch, Batch]:
        """Makes a task: symbols, how they are turned or mirrored, how many examples each has, and which of them are to be recognised."""

        def whole(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        # The larger of two numbers: more symbols are harder, so they are to be more frequent.
        ways = max(whole(MIN_SYMBOLS, MAX_SYMBOLS + 1), whole(MIN_SYMBOLS, MAX_SYMBOLS + 1))
        chosen: list[Choice] = []
        while len(chosen) < ways:
            one = Choice(whole(0, len(self.images)), whole(0, 8))
            # Visitors draw symbols that are like one another, as left and right arrows are: the same turned, or a relative.
            if chosen and torch.rand((), generator=generator) < SHARE_ALIKE:
                turned = whole(0, 2) == 0
                one = chosen[-1]._replace(view=one.view) if turned else Choice(chosen[-1].symbol ^ 1, chosen[-1].view)
            if all(self._differ(one, other) for other in chosen):
                chosen.append(one)
        used = (torch.arange(MAX_SYMBOLS) < ways).float()
        support, query = torch.zeros(2, ROWS, 1, SIZE, SIZE)
        targets, weights = torch.zeros(2, ROWS, dtype=torch.int64), torch.zeros(2, ROWS)
        counts = [whole(MIN_EXAMPLES, MAX_EXAMPLES + 1) for _ in range(ways)]
        begin = 0
        for label, (one, count) in enumerate(zip(chosen, counts, strict=True)):
            order = torch.randperm(self.images.shape[1], generator=generator)
            images = view(self.images[one.symbol, order[: count + MAX_EXAMPLES]], one.view).float()[:, None] / 255
            given, asked = slice(begin, begin + count), slice(label * MAX_EXAMPLES, (label + 1) * MAX_EXAMPLES)
            support[given], query[asked] = images[:count], images[count:]
            targets[0, given] = targets[1, asked] = label
            weights[0, given], weights[1, asked] = 1 / count, 1
            begin += count
        return ((support, used), targets[0], weights[0]), ((query, used), targets[1], weights[1])


def view(images: Tensor, number: int) -> Tensor:
    """One of the eight ways to turn and mirror images: a number from 0 to 7."""
    turned = torch.rot90(images, number % 4, (-2, -1))
    return turned.flip(-1) if number >= 4 else turned


def _drawn(symbols: Sequence[Symbol], count: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    drawn = [[rasterise(redrawn(symbol, generator)) for _ in range(count)] for symbol in symbols]
    return np.round(255 * np.array(drawn)).astype(np.uint8)


def draw(num_symbols: int, seed: int, num_drawings: int = NUM_DRAWINGS) -> Drawings:
    """Draws training symbols, an even number of them, on all processors."""
    symbols = training_symbols(num_symbols + num_symbols % 2, np.random.default_rng(seed))
    pieces = [symbols[begin : begin + 100] for begin in range(0, len(symbols), 100)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = list(pool.map(_drawn, pieces, [num_drawings] * len(pieces), range(seed + 1, seed + 1 + len(pieces))))
    return Drawings(torch.from_numpy(np.concatenate(found)))


# --- meta-training


class Progress(NamedTuple):
    """Where meta-training is: its iteration, the part of it that is done, and loss and accuracy on the queries of its tasks, averaged."""

    iteration: int
    done: float
    loss: float
    accuracy: float


def meta_train(
    model: Recogniser,
    rates: dict[str, Tensor],
    unroll: adaptrt.CompiledUnroll,
    drawings: Drawings,
    *,
    seed: int,
    deadline: float,
    num_iterations: int,
) -> Iterator[Progress]:
    """Trains features and rates in place; the head stays at zero. Yields after every iteration.

    Args:
      deadline: the `time.monotonic()`, in seconds, at which training stops.
      num_iterations: how many iterations there are at most.
    """
    generator = torch.Generator().manual_seed(seed)
    head = {id(value) for value in model.head.parameters()}
    groups = [
        {"params": [value for value in model.parameters() if id(value) not in head], "lr": OUTER_LR},
        {"params": list(rates.values()), "lr": RATE_LR},
    ]
    outer = torch.optim.Adam(groups)
    first = [group["lr"] for group in outer.param_groups]
    began, done = time.monotonic(), 0.0
    loss, accuracy = math.log(MAX_SYMBOLS), 0.0
    for iteration in range(1, num_iterations + 1):
        for group, lr in zip(outer.param_groups, first, strict=True):
            group["lr"] = lr * (1 + math.cos(math.pi * done)) / 2
        outer.zero_grad()
        for _ in range(TASKS):
            support, query = drawings.task(generator)
            result = unroll.evaluate(support, query)
            (result.loss / TASKS).backward()
            right = ((result.outputs.detach().argmax(1) == query[1]) * query[2]).sum() / query[2].sum()
            loss, accuracy = 0.99 * loss + 0.01 * float(result.loss.detach()), 0.99 * accuracy + 0.01 * float(right)
        nn.utils.clip_grad_norm_([value for group in groups for value in group["params"]], 5.0)
        outer.step()
        done = min(max(iteration / num_iterations, (time.monotonic() - began) / max(deadline - began, 1e-9)), 1.0)
        yield Progress(iteration, done, loss, accuracy)
        if done == 1.0:
            return
