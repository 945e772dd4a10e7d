"""The one table of models that capture and meta-gradients are tested on: tiny, float64, every kind that the library promises to handle."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils import parametrizations

Batch = tuple[Any, ...]
"""(inputs, target), or (inputs,) for a model that returns its own loss."""


def classify(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def regress(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target)


def own_loss(output: Any) -> Tensor:
    return output["loss"] if isinstance(output, Mapping) else output.loss if hasattr(output, "loss") else output


class Entry(NamedTuple):
    """A model and its data.

    `batch(generator, n)` makes n examples. `default_loss`: compile_unroll finds `loss` by itself. `random`: the forward pass draws.
    `select`: which parameters adapt. `k`: how many inner steps to test. `large`: a step is a graph of many operations.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[Generator, int], Batch]
    loss: Callable[..., Tensor]
    default_loss: bool = False
    random: bool = False
    select: str | None = None
    k: int = 2
    large: bool = False

    def model(self, seed: int = 0) -> nn.Module:
        """A model in float64; equal for equal seeds. The global generator is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().double()

    def data(self, seed: int, n: int) -> Batch:
        return self.batch(Generator().manual_seed(seed), n)


# --- data


def normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels(generator: Generator, n: int, num_classes: int = 3) -> Tensor:
    return torch.randint(num_classes, (n,), generator=generator)


def vectors(generator: Generator, n: int) -> Batch:
    return normal(generator, n, 3), normal(generator, n, 2)


def labelled(generator: Generator, n: int) -> Batch:
    return normal(generator, n, 3), labels(generator, n)


def images(generator: Generator, n: int) -> Batch:
    return normal(generator, n, 1, 6, 6), labels(generator, n)


def sequences(generator: Generator, n: int) -> Batch:
    return normal(generator, n, 2, 4), labels(generator, n)


def time_first(generator: Generator, n: int) -> Batch:
    return normal(generator, 2, n, 4), labels(generator, n)


def tokens(generator: Generator, n: int) -> Batch:
    return torch.randint(7, (n, 5), generator=generator), labels(generator, n)


def next_tokens(generator: Generator, n: int) -> Batch:
    return torch.randint(7, (n, 5), generator=generator), torch.randint(7, (n, 7), generator=generator).double()


def pairs(generator: Generator, n: int) -> Batch:
    return (normal(generator, n, 3), normal(generator, n, 2)), normal(generator, n, 2)


def keywords(generator: Generator, n: int) -> Batch:
    return {"left": normal(generator, n, 3), "right": normal(generator, n, 2)}, normal(generator, n, 2)


def nested(generator: Generator, n: int) -> Batch:
    return ({"left": normal(generator, n, 3), "rest": [normal(generator, n, 2)]},), normal(generator, n, 2)


def with_labels(generator: Generator, n: int) -> Batch:
    return (({"x": normal(generator, n, 3), "labels": labels(generator, n)},),)


def labelled_images(seed: int, *leading: int, n: int = 6, size: int = 7) -> Batch:
    """Images [*leading, n, 1, size, size] and their labels; equal for equal seeds."""
    generator = Generator().manual_seed(seed)
    return normal(generator, *leading, n, 1, size, size), torch.randint(3, (*leading, n), generator=generator)


# --- models


def classifier(*between: nn.Module) -> nn.Sequential:
    """Four numbers to three classes, with these modules before the last layer."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *between, nn.Linear(5, 3))


def conv_dropout() -> nn.Sequential:
    """Of 7 by 7 pixels: running statistics, a pool and randomness. In float64, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        norm = nn.BatchNorm2d(4)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2), nn.Flatten(), nn.Linear(36, 3)
        ).double()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def conv_norm(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, padding=1), norm, nn.ReLU(), nn.Flatten(), nn.Linear(27, 3))


def conv_bn_eval() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
    nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return conv_norm(norm).eval()


def conv_pool() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 3))


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.AdaptiveMaxPool2d((2, 1)),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.GELU(),
        nn.Linear(8, 3),
    )


class Recurrent(nn.Module):
    """Labels from a recurrent network's last output."""

    def __init__(self, cells: nn.RNNBase) -> None:
        super().__init__()
        self.cells = cells
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.cells(x)
        return self.head(output[:, -1] if self.cells.batch_first else output[-1])


class Encoder(nn.Module):
    def __init__(self, dropout: float, num_layers: int = 1) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=dropout, batch_first=True, norm_first=False)
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Attention(nn.Module):
    """Nothing but a projection and fused attention; dropout only in training mode, as its caller has to see to."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(1))


class Bag(nn.Module):
    """Embeddings, one of them with a padding index."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4, padding_idx=0)
        self.places = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 3)
        self.register_buffer("positions", torch.arange(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x) + self.places(self.positions)).mean(1))


class Tied(nn.Module):
    """One tensor is the embedding, the output's weight, and known under both names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(x).mean(1))))


class Twice(nn.Module):
    """A module that stands in two places, and is called twice in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.again = self.inner
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.inner(self.inner(x))))


def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), parametrizations.weight_norm(nn.Linear(4, 2), dim=1))


def spectral_norm() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4), n_power_iterations=2), nn.Tanh(), nn.Linear(4, 2))


def weight_norm_hook() -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # deprecated, and still what old checkpoints are made of
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def spectral_norm_hook() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


class InPlace(nn.Module):
    """Activations and arithmetic that overwrite their argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(F.leaky_relu_(self.first(x), 0.2))
        h += self.second.bias
        h[:, 0] = h[:, 1] * 2.0
        h[:, 2].mul_(h[:, 3].detach().clone())
        return F.elu(self.third(h.tanh_()), inplace=True)


class Idle(nn.Module):
    """A parameter that nothing uses, a frozen layer, and one that is used only outside of training."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.head = nn.Linear(4, 2)
        self.in_eval = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(torch.tanh(self.frozen(x)))
        return out if self.training else self.in_eval(out)


class Attributes(nn.Module):
    """Tensors that are plain attributes: neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.scale = torch.tensor([0.5, -1.5], dtype=torch.float64)
        self.offsets = [torch.tensor(0.3, dtype=torch.float64), torch.tensor([[1.0, 2.0]], dtype=torch.float64)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) * self.scale + self.offsets[0]) * self.offsets[1]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Bilinear(2, 2, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.right(torch.tanh(self.left(left)), right)


class NestedInput(TwoInputs):
    def forward(self, parts: Mapping[str, Any]) -> Tensor:  # type: ignore[override]
        return super().forward(parts["left"], parts["rest"][0])


class ReturnsDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 3))

    def forward(self, parts: Mapping[str, Tensor]) -> Any:
        logits = self.net(parts["x"])
        return {"logits": logits, "loss": F.cross_entropy(logits, parts["labels"])}


@dataclasses.dataclass
class ModelOutput:
    loss: Tensor
    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


class ReturnsDataclass(ReturnsDict):
    def forward(self, parts: Mapping[str, Tensor]) -> ModelOutput:
        output = super().forward(parts)
        return ModelOutput(output["loss"], output["logits"], (output["logits"].exp(),))


class ReturnsScalar(ReturnsDict):
    def forward(self, parts: Mapping[str, Tensor]) -> Tensor:
        return super().forward(parts)["loss"]


class MovingMean(nn.Module):
    """Assigns its buffer anew; later steps see the new value, and gradients flow through it unless it is detached."""

    mean: Tensor
    calls: Tensor

    def __init__(self, detached: bool) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("mean", torch.full((4,), 0.1))
        self.register_buffer("calls", torch.tensor(0))
        self.detached = detached

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        self.mean = 0.8 * self.mean + 0.2 * (h.detach() if self.detached else h).mean(0)
        self.calls += 1
        return self.head(torch.sin(h - self.mean))


class Noisy(nn.Module):
    """Randomness of many kinds: whole channels, self-normalising dropout, normal and uniform noise, a permutation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 3, stride=2), nn.Linear(12, 3)
        self.channels, self.alpha = nn.Dropout2d(0.4), nn.AlphaDropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.alpha(self.channels(torch.tanh(self.conv(x))))
        h = h + 0.1 * torch.randn_like(h) * torch.rand(h.shape[1:], dtype=h.dtype)
        h = h[:, torch.randperm(3)]
        return self.head(h.flatten(1))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 2))


def norm_mlp() -> nn.Module:
    """A network in train mode whose steps change buffers; the same weights at every call. The global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


MODELS: dict[str, Entry] = {
    "mlp": Entry(mlp, vectors, regress, default_loss=True, k=3),
    "mlp-head-only": Entry(mlp, vectors, regress, select="2.*"),
    "conv-bn-train": Entry(lambda: conv_norm(nn.BatchNorm2d(3)), images, classify, default_loss=True, k=3),
    "conv-bn-batch": Entry(lambda: conv_norm(nn.BatchNorm2d(3, track_running_stats=False)), images, classify),
    "conv-bn-eval": Entry(conv_bn_eval, images, classify),
    "conv-pool": Entry(conv_pool, images, classify),
    "norms": Entry(norms, images, classify),
    "lstm": Entry(lambda: Recurrent(nn.LSTM(4, 3, batch_first=True)), sequences, classify, large=True),
    "lstm-dropout": Entry(lambda: Recurrent(nn.LSTM(4, 3, 2, dropout=0.3, batch_first=True)), sequences, classify, random=True, large=True),
    "gru": Entry(lambda: Recurrent(nn.GRU(4, 3, num_layers=2)), time_first, classify, large=True),
    "transformer": Entry(lambda: Encoder(0.2).eval(), sequences, classify, large=True),
    "transformer-dropout": Entry(lambda: Encoder(0.2), sequences, classify, random=True, large=True),
    "attention": Entry(Attention, sequences, classify),
    "attention-dropout": Entry(lambda: Attention(0.2), sequences, classify, random=True),
    "embeddings": Entry(Bag, tokens, classify),
    "tied": Entry(Tied, next_tokens, classify),
    "twice": Entry(Twice, vectors, regress),
    "weight-norm": Entry(weight_norm, vectors, regress),
    "weight-norm-hook": Entry(weight_norm_hook, vectors, regress),
    "spectral-norm": Entry(spectral_norm, vectors, regress),
    "spectral-norm-hook": Entry(spectral_norm_hook, vectors, regress),
    "in-place": Entry(InPlace, vectors, regress),
    "idle": Entry(Idle, vectors, regress),
    "attributes": Entry(Attributes, vectors, regress),
    "tuple-inputs": Entry(TwoInputs, pairs, regress, default_loss=True),
    "dict-inputs": Entry(TwoInputs, keywords, regress),
    "nested-inputs": Entry(NestedInput, nested, regress),
    "dict-output": Entry(ReturnsDict, with_labels, own_loss, default_loss=True),
    "dataclass-output": Entry(ReturnsDataclass, with_labels, own_loss, default_loss=True),
    "scalar-output": Entry(ReturnsScalar, with_labels, own_loss, default_loss=True),
    "moving-mean": Entry(lambda: MovingMean(detached=True), vectors, regress),
    "moving-mean-live": Entry(lambda: MovingMean(detached=False), vectors, regress, k=3),
    "dropout": Entry(dropout, vectors, regress, random=True, k=3),
    "noisy": Entry(Noisy, images, classify, random=True),
}
