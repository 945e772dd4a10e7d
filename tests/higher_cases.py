"""What the tests of `adaptrt.higher` share: the original beside ours, small models, optimisers and data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt import higher as ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it compares an int by identity, and says so when compiled
    import higher as theirs  # pyright: ignore[reportMissingTypeStubs]

STEPS = 4


class Shared(nn.Module):
    """A module used twice, and one whose weight is another's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.first.weight
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.tied(torch.tanh(self.again(torch.tanh(self.first(x)))))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, batch_first=True)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)),
    "shared": Shared,
    "lstm": Recurrent,
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Sequential(nn.Tanh(), nn.Linear(4, 2))),
}


class Case(NamedTuple):
    kind: type[torch.optim.Optimizer]
    settings: dict[str, Any]


# Only where the original is right. It adds Adam's eps before the bias correction, as PyTorch once did; a tiny eps hides that.
CASES: dict[str, Case] = {
    "sgd": Case(torch.optim.SGD, {"lr": 0.1}),
    "momentum": Case(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "nesterov": Case(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": Case(torch.optim.Adam, {"lr": 0.05, "eps": 1e-30, "weight_decay": 0.1}),
    "amsgrad": Case(torch.optim.Adam, {"lr": 0.05, "eps": 1e-30, "amsgrad": True, "betas": (0.5, 0.6)}),
    "adadelta": Case(torch.optim.Adadelta, {"lr": 1.0, "rho": 0.8, "eps": 0.01, "weight_decay": 0.1}),
    "adagrad": Case(torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.1, "eps": 0.01}),
    "adamax": Case(torch.optim.Adamax, {"lr": 0.05, "eps": 0.01, "weight_decay": 0.1}),
    "asgd": Case(torch.optim.ASGD, {"lr": 0.1, "lambd": 0.1, "weight_decay": 0.1}),
    "rmsprop": Case(torch.optim.RMSprop, {"lr": 0.02, "alpha": 0.8, "eps": 0.01, "momentum": 0.5, "weight_decay": 0.1}),
    "centered": Case(torch.optim.RMSprop, {"lr": 0.02, "alpha": 0.8, "eps": 0.01, "centered": True}),
    "rprop": Case(torch.optim.Rprop, {"lr": 0.05}),
}
over_both = pytest.mark.parametrize("package", [theirs, ours], ids=["theirs", "ours"])


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, generator=generator), torch.randn(6, 2, generator=generator)


def loss_of(model: Any, seed: int) -> Tensor:
    x, y = batch(seed)
    return F.mse_loss(model(x), y)


def make(kind: str, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[kind]()


def quietly(run: Callable[[], Any]) -> Any:
    """The original warns of its RMSprop and Rprop, and of graphs made by what PyTorch has deprecated since."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run()


def assert_same(mine: Sequence[Any], wanted: Sequence[Any], tolerance: float = 1e-10) -> None:
    assert len(mine) == len(wanted)
    for got, expected in zip(mine, wanted, strict=True):
        scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(got, expected, rtol=0.0, atol=tolerance * scale)


class _Loss(nn.Module):
    """A module whose forward is a loss that is computed by other methods of a model."""

    def __init__(self, model: nn.Module, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.model, x)


def adapted_by_handle(net: nn.Module, use: Callable[[Any, Tensor], Tensor], lr: float = 0.3, steps: int = 3) -> list[Tensor]:
    """Steps a handle of `net` on the loss `use(handle, x)`, and returns the loss of another batch and its meta-gradients."""
    opt = torch.optim.SGD(net.parameters(), lr=lr)
    with ours.innerloop_ctx(net, opt, copy_initial_weights=False) as (handle, diffopt):
        for step in range(steps):
            diffopt.step(use(handle, batch(step)[0]))
        loss = use(handle, batch(9)[0])
        return [loss, *torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, materialize_grads=True)]


def adapted_by_hand(net: nn.Module, use: Callable[[Any, Tensor], Tensor], lr: float = 0.3, steps: int = 3) -> list[Tensor]:
    """Returns the same by a loop that runs `torch.func.functional_call` on a module whose forward is this loss."""
    module = _Loss(net, use)
    weights = {name: p.clone() for name, p in net.named_parameters()}  # as a handle begins, with weights that are computed

    def loss_at(x: Tensor) -> Tensor:
        return torch.func.functional_call(module, {f"model.{name}": value for name, value in weights.items()}, (x,))

    for step in range(steps):
        values = list(weights.values())
        grads = torch.autograd.grad(loss_at(batch(step)[0]), values, create_graph=True, allow_unused=True)
        weights = {name: p if g is None else p - lr * g for (name, p), g in zip(weights.items(), grads, strict=True)}
    wanted = loss_at(batch(9)[0])
    return [wanted, *torch.autograd.grad(wanted, list(net.parameters()), allow_unused=True, materialize_grads=True)]
