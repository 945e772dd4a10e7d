"""Measures how well and how fast a trained model adapts: its accuracy after each step, and compiled against eager latency."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from adaptrt.demo.digits import Batch, Episodes, Task
from adaptrt.demo.learner import INNER_LR
from adaptrt.errors import AdaptrtError
from adaptrt.runtime.unroll import CompiledUnroll

Params = dict[str, Tensor]


class ResultsDiffer(AdaptrtError, AssertionError):
    """Compiled and eager adaptation do not agree, so their latencies mean nothing."""


class Estimate(NamedTuple):
    """A mean and the half-width of its 95% confidence interval."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f}% ± {100 * self.half_width:.1f}"


class Latency(NamedTuple):
    """Seconds of each call, compiled and eager. Calls alternate, so the i-th of both were measured at about the same time."""

    compiled_s: Tensor
    eager_s: Tensor
    error: float  # largest difference of adapted logits between the two, relative to the largest logit

    @property
    def ratio(self) -> float:
        """The eager median divided by the compiled median."""
        return (self.eager_s.median() / self.compiled_s.median()).item()


def estimate(values: Tensor) -> Estimate:
    """Estimates the mean over episodes, with an interval of ± 1.96 standard errors."""
    return Estimate(values.mean().item(), 1.96 * values.std().item() / math.sqrt(len(values)))


def accuracy(unroll: CompiledUnroll, episodes: Episodes) -> Tensor:
    """Returns the query accuracy of every episode after adaptation, [episodes]."""
    with torch.inference_mode():
        return torch.stack([_accuracy(unroll.adapt(support)(x_query), y_query) for support, (x_query, y_query) in episodes.tasks()])


def accuracy_by_step(model: nn.Module, step: CompiledUnroll, episodes: Episodes, *, num_steps: int) -> Tensor:
    """Returns the query accuracy of every episode after 0, 1, ..., num_steps inner steps, [num_steps + 1, episodes].

    Args:
      model: the model that `step` was compiled from.
      step: an unroll of one step. `start=` goes on from where the step before it stopped.
      episodes: the tasks.
      num_steps: at least 1.
    """

    def one(support: Batch, query: Batch) -> Tensor:
        x_query, y_query = query
        accuracies, adapted = [_accuracy(model(x_query), y_query)], None
        for _ in range(num_steps):
            adapted = step.adapt(support, start=adapted)
            accuracies.append(_accuracy(adapted(x_query), y_query))
        return torch.stack(accuracies)

    with torch.inference_mode():
        return torch.stack([one(support, query) for support, query in episodes.tasks()], dim=1)


def nearest_neighbour(episodes: Episodes) -> Tensor:
    """Returns the accuracy of nearest neighbours in pixel space, [episodes], as a reference without any learning."""
    support, query = episodes.x_support.flatten(2), episodes.x_query.flatten(2)
    predicted = episodes.y_support.gather(1, torch.cdist(query, support).argmin(2))
    return (predicted == episodes.y_query).float().mean(1)


def eager_adapt(model: nn.Module, support: Batch, steps: int) -> Params:
    """Adapts the model in plain PyTorch, by the loop that one writes without adaptrt. Nothing is recorded across steps."""
    x, y = support
    params = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(model, params, (x,)), y)
        gradients = torch.autograd.grad(loss, tuple(params.values()))
        params = {
            name: (value.detach() - INNER_LR * gradient).requires_grad_()
            for (name, value), gradient in zip(params.items(), gradients, strict=True)
        }
    return {name: value.detach() for name, value in params.items()}


def latency(model: nn.Module, unroll: CompiledUnroll, task: Task, *, steps: int, calls: int = 100) -> Latency:
    """Measures how long the adaptation to one task takes, compiled and eager by turns in this process.

    Raises:
      ResultsDiffer: adapted logits differ by more than float32 rounding that `steps` steps have amplified.
    """
    support, (x_query, _) = task

    def compiled() -> object:
        with torch.inference_mode():
            return unroll.adapt(support)

    def eager() -> object:
        return eager_adapt(model, support, steps)

    with torch.inference_mode():
        ours = unroll.adapt(support)(x_query)
    theirs = functional_call(model, eager_adapt(model, support, steps), (x_query,)).detach()
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not error < 1e-3:
        raise ResultsDiffer(
            f"adapted logits of the compiled and the eager loop differ by {error:.1e} of the largest logit; expected below 1e-3"
        )
    warm_up = max(calls // 10, 3)
    pairs = torch.tensor([[_time(compiled), _time(eager)] for _ in range(calls + warm_up)], dtype=torch.float64)[warm_up:]
    return Latency(pairs[:, 0], pairs[:, 1], error)


def _time(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float().mean(-1)
