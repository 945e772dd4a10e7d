"""What is measured: models, data, losses, inner optimisers. Plain PyTorch, no library's own.

Every model takes one tensor and returns one. Inner optimisers are plain SGD or Adam, so that every contestant has them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class Workload(NamedTuple):
    """One problem of adaptation.

    Attributes:
      name, title: for keys and for tables.
      make: the model, in the mode in which it is used; parameters that do not adapt do not require grad.
      data: one batch of so many examples.
      support, query: numbers of examples.
      loss: of (output, target).
      optimizer: "sgd" or "adam".
      numbers: its hyperparameters.
      k: inner steps.
      num_tasks: length of the leading task axis of all data; None without one.
      part: path of the submodule whose parameters adapt, where that is how one would say it.
      calls: how often each contestant is timed.
      device: where PyTorch's model and data are; JAX takes what it has.
    """

    name: str
    title: str
    make: Callable[[], nn.Module]
    data: Callable[[Generator, int], Batch]
    support: int
    query: int
    loss: Loss
    optimizer: str
    numbers: Mapping[str, float]
    k: int = 5
    num_tasks: int | None = None
    part: str = ""
    calls: int = 300
    device: str = "cpu"

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().to(self.device, dtype)

    def batches(self, dtype: torch.dtype = torch.float32) -> tuple[Batch, Batch]:
        """Support and query, the same at every call."""
        generator = Generator().manual_seed(1)

        def draw(count: int) -> Batch:
            tasks = [self.data(generator, count) for _ in range(self.num_tasks or 1)]
            x, y = (torch.stack(parts) for parts in zip(*tasks, strict=True)) if self.num_tasks else tasks[0]
            return _cast(x, dtype).to(self.device), _cast(y, dtype).to(self.device)

        return draw(self.support), draw(self.query)


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


# --- data


def sine(generator: Generator, count: int) -> Batch:
    """Points of one sine wave (Finn et al. 2017): amplitude in [0.1, 5], phase in [0, pi]."""
    amplitude = 0.1 + 4.9 * torch.rand((), generator=generator)
    phase = math.pi * torch.rand((), generator=generator)
    x = 10 * torch.rand(count, 1, generator=generator) - 5
    return x, amplitude * torch.sin(x + phase)


def images(size: int, channels: int = 1, ways: int = 5) -> Callable[[Generator, int], Batch]:
    """Noise around a pattern of each class, [N, C, H, W], with as many examples of each."""

    def draw(generator: Generator, count: int) -> Batch:
        patterns = torch.randn(ways, channels, size, size, generator=Generator().manual_seed(2))
        labels = torch.arange(count) % ways
        return patterns[labels] + 0.5 * torch.randn(count, channels, size, size, generator=generator), labels

    return draw


def sequences(length: int, width: int, ways: int = 5) -> Callable[[Generator, int], Batch]:
    """Noise around a pattern of each class, [N, L, D]."""

    def draw(generator: Generator, count: int) -> Batch:
        patterns = torch.randn(ways, length, width, generator=Generator().manual_seed(2))
        labels = torch.arange(count) % ways
        return 0.1 * patterns[labels] + torch.randn(count, length, width, generator=generator), labels

    return draw


def vectors(width: int, targets: int) -> Callable[[Generator, int], Batch]:
    """A linear map and noise, [N, D] to [N, E]."""

    def draw(generator: Generator, count: int) -> Batch:
        weight = torch.randn(width, targets, generator=Generator().manual_seed(2)) / width**0.5
        x = torch.randn(count, width, generator=generator)
        return x, x @ weight

    return draw


# --- models


def sine_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def conv4(width: int = 64, ways: int = 5) -> nn.Module:
    """The network of Vinyals et al. 2016: four blocks on 28×28, BatchNorm with batch statistics.

    Convolutions have no bias: BatchNorm takes it out again, and its gradient would be rounding alone.
    """
    blocks: list[nn.Module] = []
    for before, after in itertools.pairwise([1, width, width, width, width]):
        norm = nn.BatchNorm2d(after, track_running_stats=False)
        blocks += [nn.Conv2d(before, after, 3, padding=1, bias=False), norm, nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(width, ways))


class Encoder(nn.Module):
    """A transformer encoder without dropout and biases, whose mean over positions is classified.

    The bias of attention's keys has no effect, and Adam would make steps of the rounding that is its gradient.
    """

    def __init__(self, layers: int = 4, width: int = 128, heads: int = 4, ways: int = 5) -> None:
        super().__init__()
        self.heads = heads
        self.layers = nn.ModuleList([EncoderLayer(width, heads) for _ in range(layers)])
        self.head = nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(-2))


class EncoderLayer(nn.Module):
    """Attention and a feed-forward part, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # N = examples, L = positions, H = heads, D = width of a head
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, N, H, L, D]
        q, k, v = parts[0], parts[1], parts[2]
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Recurrent(nn.Module):
    """One LSTM layer over [N, L, D]; its last output is classified."""

    def __init__(self, inputs: int = 16, width: int = 64, ways: int = 5) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, width, batch_first=True)
        self.head = nn.Linear(width, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Block(nn.Module):
    """Two convolutions with BatchNorm around a shortcut (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False) if stride != 1 or before != after else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class ResNet18(nn.Module):
    """Eleven million weights that are frozen, in eval mode, and a linear head that adapts."""

    def __init__(self, ways: int = 5) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        rows = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
        self.blocks = nn.ModuleList([Block(*row) for row in rows])
        self.head = nn.Linear(512, ways)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((-1, -2)))


def head_only() -> nn.Module:
    model = ResNet18().eval().requires_grad_(False)
    model.head.requires_grad_(True)
    return model


class LowRank(nn.Module):
    """A frozen linear layer and a product of two thin matrices beside it that adapts (Hu et al. 2021)."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5), nn.Parameter(torch.randn(outputs, rank) / rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def adapters() -> nn.Module:
    return nn.Sequential(LowRank(64, 256, 4), nn.Tanh(), LowRank(256, 256, 4), nn.Tanh(), LowRank(256, 8, 4))


_ALL = (
    Workload("sine", "sine MLP 1-40-40-1, 10 + 10 points", sine_mlp, sine, 10, 10, F.mse_loss, "sgd", {"lr": 0.01}),
    Workload("sine-tasks", "sine MLP, 32 tasks at once", sine_mlp, sine, 10, 10, F.mse_loss, "sgd", {"lr": 0.01}, num_tasks=32, calls=100),
    Workload(
        "conv4-5shot", "conv4-64, 28×28, 5-way 5-shot, 75 queries", conv4, images(28), 25, 75, F.cross_entropy, "sgd", {"lr": 0.1}, calls=15
    ),
    Workload(
        "conv4-1shot", "conv4-64, 28×28, 5-way 1-shot, 75 queries", conv4, images(28), 5, 75, F.cross_entropy, "sgd", {"lr": 0.1}, calls=20
    ),
    Workload(
        "conv4-tasks",
        "conv4-64, 28×28, 32 tasks at once, 5-way 1-shot, 15 queries",
        conv4,
        images(28),
        5,
        15,
        F.cross_entropy,
        "sgd",
        {"lr": 0.1},
        num_tasks=32,
        calls=5,
    ),
    Workload(
        "transformer",
        "transformer, 4 layers of 128, 16 + 16 sequences of 32",
        Encoder,
        sequences(32, 128),
        16,
        16,
        F.cross_entropy,
        "adam",
        {"lr": 0.001, "eps": 1e-3},
        calls=15,
    ),
    Workload(
        "lstm", "LSTM of 64, 16 + 16 sequences of 12", Recurrent, sequences(12, 16), 16, 16, F.cross_entropy, "sgd", {"lr": 0.1}, calls=50
    ),
    Workload(
        "head-only",
        "head of a ResNet-18, 64×64, 5-way 5-shot, 25 queries",
        head_only,
        images(64, 3),
        25,
        25,
        F.cross_entropy,
        "sgd",
        {"lr": 0.1},
        part="head",
        calls=12,
    ),
    Workload(
        "adapters",
        "low-rank adapters in an MLP 64-256-256-8, 16 + 16",
        adapters,
        vectors(64, 8),
        16,
        16,
        F.mse_loss,
        "sgd",
        {"lr": 0.05},
        calls=100,
    ),
)
WORKLOADS = {workload.name: workload for workload in _ALL}
