"""Convolutions whose weights differ from task to task, on the CPU: what is fastest, by shape.

    python benchmarks/convolutions_over_tasks.py [--unrolls]

Prints, in milliseconds, one convolution and its gradients in images and in weights: as one grouped convolution (what `vmap` makes of it),
task by task, and as windows times weights in a batched product. With `--unrolls`, which compiles for minutes: conv nets adapted and
meta-differentiated with all tasks in each program, and one by one. By turns, medians; every way is compared with another one before it is
timed. `adaptrt.adjoint.auto.MIN_FLOPS_OF_A_TASK` rests on this.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__":  # run as a script
    sys.path.insert(0, str(Path(__file__).parents[1]))
from adaptrt.adjoint import auto
from benchmarks.suite.contest import by_turns
from benchmarks.suite.contestants import ours
from benchmarks.suite.report import table
from benchmarks.suite.workloads import WORKLOADS, conv4, images

SHAPES = ((32, 5, 1, 64, 28), (32, 5, 3, 16, 16), (32, 5, 16, 16, 16), (32, 5, 32, 32, 14), (32, 5, 64, 64, 14), (32, 15, 64, 64, 14))
"""Tasks, images, channels in and out, size; kernels are 3x3 with padding 1."""
NETS = ((16, 16, 32), (32, 28, 8), (64, 28, 8), (64, 28, 32))
"""Channels, size, tasks."""
CALLS = 7

Conv = Callable[[Tensor, Tensor], Tensor]


def grouped(x: Tensor, w: Tensor) -> Tensor:
    """[T, N, C, H, W] by [T, O, C, 3, 3] to [T, N, O, H, W], with tasks as groups of channels."""
    num_tasks, n, _, height, width = x.shape
    y = F.conv2d(x.transpose(0, 1).reshape(n, -1, height, width), w.flatten(0, 1), padding=1, groups=num_tasks)
    return y.unflatten(1, w.shape[:2]).transpose(0, 1)


def task_by_task(x: Tensor, w: Tensor) -> Tensor:
    return torch.stack([F.conv2d(images, weights, padding=1) for images, weights in zip(x, w, strict=True)])


def windows(x: Tensor, w: Tensor) -> Tensor:
    columns = F.unfold(x.flatten(0, 1), (3, 3), padding=1).unflatten(0, x.shape[:2])  # [T, N, C * 9, H * W]
    return torch.matmul(w.flatten(2).unsqueeze(1), columns).unflatten(3, x.shape[3:])


WAYS: dict[str, Conv] = {"grouped": grouped, "task by task": task_by_task, "windows": windows}


def medians(calls: dict[str, Callable[[], Any]]) -> list[str]:
    times = by_turns(calls, CALLS, 1)
    return [f"{1e3 * statistics.median(times[name]):.1f}" for name in calls]


def one_convolution(num_tasks: int, n: int, inputs: int, outputs: int, size: int) -> list[str]:
    """Milliseconds of each way: forward, gradient in the images, in the weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tasks, n, inputs, size, size, generator=generator, requires_grad=True)
    w = torch.randn(num_tasks, outputs, inputs, 3, 3, generator=generator, requires_grad=True)
    y = {name: way(x, w) for name, way in WAYS.items()}
    cotangent = torch.randn_like(y["grouped"])
    expected = grouped(x.double(), w.double())
    assert all(((value - expected).abs().max() < 1e-4 * expected.abs().max()) for value in y.values())

    def gradient(name: str, wanted: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(y[name], wanted, cotangent, retain_graph=True)

    with torch.no_grad():
        forward = medians({name: functools.partial(way, x, w) for name, way in WAYS.items()})
    in_images = medians({name: gradient(name, x) for name in WAYS})
    in_weights = medians({name: gradient(name, w) for name in WAYS})
    return [f"{num_tasks} x {n} x {inputs}→{outputs}, {size}²", *forward, *in_images, *in_weights]


def whole_unroll(width: int, size: int, num_tasks: int) -> list[str]:
    """Milliseconds of adaptation and meta-gradient, all tasks in each program and one by one."""
    w = WORKLOADS["conv4-tasks"]._replace(make=functools.partial(conv4, width), data=images(size), num_tasks=num_tasks)
    calls: dict[str, Any] = {}
    found: list[list[Tensor]] = []
    for name, least in (("together", sys.maxsize), ("one by one", 0)):
        with mock.patch.object(auto, "MIN_FLOPS_OF_A_TASK", least):
            calls[name] = ours(w, torch.float32)
            calls[name]["adapt"]()
            found.append(calls[name]["meta"]())
    assert all((a - b).norm() < 1e-2 * a.norm() for a, b in zip(*found, strict=True))
    times = [medians({name: call[quantity] for name, call in calls.items()}) for quantity in ("adapt", "meta")]
    return [f"conv4-{width}, {size}², {num_tasks} tasks of {w.support} + {w.query}", *times[0], *times[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unrolls", action="store_true")
    if not parser.parse_args().unrolls:
        head = [f"{what}: {way}" for what in ("forward", "in images", "in weights") for way in WAYS]
        print(table(["tasks x images x channels, size; ms", *head], [one_convolution(*shape) for shape in SHAPES]))
        return
    head = [f"{what}: {way}" for what in ("adapt", "meta-gradient") for way in ("together", "one by one")]
    print(table(["ms", *head], [whole_unroll(*net) for net in NETS]))


if __name__ == "__main__":
    main()
