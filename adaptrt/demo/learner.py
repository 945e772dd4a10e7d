"""Defines the model and its meta-training: MAML (Finn et al. 2017) with compiled meta-gradients, over batches of tasks.

Known limits: BatchNorm normalises by the statistics of the current batch, as in Finn et al. 2017, so the queries of an episode are
classified together ("transductive"). `measure.nearest_neighbour` gives the accuracy that is reached without meta-training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt.demo.digits import TRAINING_CLASSES, Digits, Episodes
from adaptrt.runtime.compile import compile_unroll
from adaptrt.runtime.unroll import CompiledUnroll

WAYS = 5
SHOTS = 5
QUERIES = 10  # a class
TASKS = 4  # a meta-batch
INNER_STEPS = 5
INNER_LR = 0.1
OUTER_LR = 2e-3


class Progress(NamedTuple):
    """One iteration of meta-training."""

    iteration: int  # from 1
    done: float  # share of the training that is over, in (0, 1], by iterations or by time, whichever is further
    loss: float  # query loss after adaptation, mean over this iteration's tasks


def build_model(seed: int, width: int = 32) -> nn.Sequential:
    """Builds a network of three convolutions for 1×8×8 images, with 20 thousand parameters."""

    def block(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width, track_running_stats=False), nn.SiLU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = [*block(1), nn.MaxPool2d(2), *block(width), nn.MaxPool2d(2), *block(width)]
        return nn.Sequential(*features, nn.Flatten(), nn.Linear(width * 4, WAYS))


def build_unroll(model: nn.Module, *, steps: int, backend: str) -> CompiledUnroll:
    """Compiles `steps` steps of SGD on the cross-entropy of the support set."""
    return compile_unroll(model, torch.optim.SGD(model.parameters(), lr=INNER_LR), k=steps, loss=F.cross_entropy, backend=backend)


def training_batch(digits: Digits, generator: torch.Generator) -> Episodes:
    """Draws a meta-batch of training tasks, each turned and mirrored as a whole.

    That gives eight times as many tasks from the same 14 classes. Support and query are turned together, so classes that differ within a
    task still do.
    """
    episodes = digits.draw(TRAINING_CLASSES, generator, tasks=TASKS, ways=WAYS, shots=SHOTS, queries=QUERIES)
    symmetries = torch.randint(0, 8, (TASKS,), generator=generator).tolist()

    def move(images: Tensor) -> Tensor:
        return torch.stack([_dihedral(task, symmetry) for task, symmetry in zip(images, symmetries, strict=True)])

    return episodes._replace(x_support=move(episodes.x_support), x_query=move(episodes.x_query))


def meta_train(
    model: nn.Module, unroll: CompiledUnroll, digits: Digits, *, seed: int, num_iterations: int, deadline: float
) -> Iterator[Progress]:
    """Trains the model's initial parameters in place, one meta-batch an iteration.

    Adam on the mean query loss after adaptation; its learning rate falls to zero along a cosine.

    Args:
      model: the model that `unroll` was compiled from.
      unroll: the program of one task.
      digits: where the tasks are drawn from.
      seed: seed of the tasks.
      num_iterations: the largest number of iterations.
      deadline: the `time.monotonic()`, in seconds, at which training stops.
    """
    generator = torch.Generator().manual_seed(seed)
    outer = torch.optim.Adam(model.parameters(), lr=OUTER_LR)
    started = time.monotonic()
    done = 0.0
    for iteration in range(1, num_iterations + 1):
        for group in outer.param_groups:
            group["lr"] = OUTER_LR * (1 + math.cos(math.pi * done)) / 2
        outer.zero_grad()
        total = 0.0
        # One task after another: with `vmap()` each task has filters of its own, which makes grouped convolutions, and these take more than
        # twice as long on a CPU (2 cores, 8 tasks: 552 ms against 215 ms).
        for support, query in training_batch(digits, generator).tasks():
            loss = unroll(support, query) / TASKS
            loss.backward()
            total += loss.item()
        outer.step()
        elapsed = (time.monotonic() - started) / max(deadline - started, 1e-9)
        done = min(max(iteration / num_iterations, elapsed), 1.0)
        yield Progress(iteration, done, total)
        if done == 1.0:
            return


def _dihedral(images: Tensor, symmetry: int) -> Tensor:
    turned = torch.rot90(images, symmetry % 4, (-2, -1))
    return turned.flip(-1) if symmetry >= 4 else turned
