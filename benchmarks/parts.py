"""Parts of models on which single rewrites are measured: functions of tensors, each with the values that it is measured on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptrt import optim
from benchmarks.small_matmuls import chain


class Part(NamedTuple):
    """A function that is compiled, and trees of tensors to call it with.

    Attributes:
      what: for the table.
    """

    what: str
    fn: Callable[..., Any]
    values: Callable[[], Sequence[Any]]


def normal(*shapes: tuple[int, ...]) -> Callable[[], list[Tensor]]:
    """Normal numbers of these shapes, the same at every call."""
    return lambda: [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed, shape in enumerate(shapes)]


# --- images, [N, H, W, C] in memory as convolutions leave them


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Batch normalisation's statistics."""
    return torch.var_mean(x.permute(0, 3, 1, 2), (0, 2, 3))


def three_sums(x: Tensor) -> list[Tensor]:
    """As in its derivatives: sums over the same images of several expressions."""
    return [(x.permute(0, 3, 1, 2) + scale).square().sum((0, 2, 3)) for scale in (1.0, 2.0, 3.0)]


def twice_differentiated(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, v) -> the derivative of <gradient of sum(fn(x)^2), v>, as in a meta-gradient."""

    def derivative(x: Tensor, v: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(fn(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad((gradient * v).sum(), x)[0]

    return derivative


def normalised(x: Tensor) -> Tensor:
    return F.batch_norm(x.permute(0, 3, 1, 2), None, None, training=True).sin()


def pooled(x: Tensor) -> Tensor:
    return F.max_pool2d(torch.relu(x.permute(0, 3, 1, 2)), 2)


def first_layers(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Two convolutions of images of one channel."""
    return F.conv2d(torch.relu(F.conv2d(x, w, padding=1)), v, padding=1)


def step_of_layers(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """The derivative by the weights of an inner gradient of two layers."""
    w, v = w.detach().requires_grad_(), v.detach().requires_grad_()
    inner = torch.autograd.grad(first_layers(x, w, v).sin().sum(), [w, v], create_graph=True)
    return torch.autograd.grad([part.square().sum() for part in inner], [w, v])[0]


# --- rows


def gelu_pulled_back(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The approximate GELU's pullback through value and gradient."""
    x = x.detach().requires_grad_()
    found = F.gelu(x, approximate="tanh")
    (gradient,) = torch.autograd.grad(found, x, y, create_graph=True)
    return torch.autograd.grad((found, gradient), x, (y, z))[0]


ADAM = optim.adam(lr=1e-3)


def adam(params: Any, gradients: Any, state: Any, hyper: Any) -> Any:
    return ADAM.update(gradients, state, params, hyper)


def adams_values() -> list[Any]:
    params = {"w": torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))}
    return [params, {"w": params["w"].flip(0)}, ADAM.init(params), ADAM.hyper]


def _sums() -> list[Part]:
    shapes = ((5, 28, 28, 64), (25, 28, 28, 64), (25, 14, 14, 64), (25, 42, 42, 64), (25, 56, 56, 64), (25, 84, 84, 64))
    found = [("statistics", moments), ("three sums", three_sums)]
    return [Part(f"{what} of {'×'.join(map(str, shape))}", fn, normal(shape)) for what, fn in found for shape in shapes]


_IMAGES = (25, 28, 28, 64)
_WEIGHTS = ((64, 1, 3, 3), (64, 64, 3, 3))
PARTS: dict[str, Sequence[Part]] = {
    "channel sums": _sums(),
    "merge sums": [Part("second derivative of batch normalisation", twice_differentiated(normalised), normal(_IMAGES, _IMAGES))],
    "convolutions as products": [
        Part("512 to 512 channels of 25×2×2", lambda x, w: F.conv2d(x, w, padding=1), normal((25, 512, 2, 2), (512, 512, 3, 3)))
    ],
    "convolution gradients": [Part("derivative of a gradient of two layers", step_of_layers, normal((5, 1, 28, 28), *_WEIGHTS))],
    "one channel last": [Part("two layers on 25×28×28", first_layers, normal((25, 1, 28, 28), *_WEIGHTS))],
    "pooling as maxima": [Part("second derivative of 25×28×28×64", twice_differentiated(pooled), normal(_IMAGES, _IMAGES))],
    "small products inlined": [Part("four layers, 10×40×40", chain, normal((10, 40), *4 * [(40, 40)]))],
    "small products by a function": [Part("four layers, 10×40×40", chain, normal((10, 40), *4 * [(40, 40)]))],
    "products by oneDNN": [Part("four layers, 512×512×512", chain, normal((512, 512), *4 * [(512, 512)]))],
    "GELU by a sigmoid": [Part("pullback of 512×512", gelu_pulled_back, normal(*3 * [(512, 512)]))],
    "computed once": [Part("Adam on 262,144 numbers", adam, adams_values)],
    "kernels recorded": [Part("four layers, 10×40×40", chain, normal((10, 40), *4 * [(40, 40)]))],
    "one thread for small operations": [Part("softmax of 32×64", lambda x: torch.softmax(x, 1).log(), normal((32, 64)))],
}
"""By rewrite."""
