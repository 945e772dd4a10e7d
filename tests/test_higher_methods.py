"""Methods and properties of a model's own class see the fast weights on a handle, as they do in the models of large libraries.

Each model has a loss that goes through such methods. The oracle is a loop that makes a new copy of the model for every step, by
`torch.func.functional_call` on a module whose forward is this loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.higher_cases import assert_same, batch, ours

pytestmark = pytest.mark.usefixtures("double")

LR = 0.3


class Adapter(nn.Module):
    """A layer whose adapters may be turned off, as in peft."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 3)
        self.low = nn.Linear(3, 2, bias=False)
        self.high = nn.Linear(2, 3, bias=False)
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (self.high(self.low(x)) if self.enabled else 0.0)


class Base(nn.Module):
    """An inner model, which a wrapper shows as its own."""

    scale = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Adapter(), Adapter()])
        self.head = nn.Linear(3, 2)
        self.temperature = nn.Parameter(torch.tensor(1.3))

    @property
    def norm(self) -> Tensor:
        return torch.stack([p.square().sum() for p in self.parameters()]).sum()

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @classmethod
    def scaled(cls, x: Tensor) -> Tensor:
        return cls.scale * x

    @staticmethod
    def squashed(x: Tensor) -> Tensor:
        return torch.tanh(x)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> nn.Module:
        return self.layers[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.layers)

    def encode(self, x: Tensor) -> Tensor:
        for layer in self:
            x = self.squashed(layer(x))
        return x

    def decode(self, x: Tensor) -> Tensor:
        return F.linear(x, self.head.weight, self.head.bias) / self.temperature

    def get_head(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class Wrapper(nn.Module):
    """Shows the attributes of its inner model as its own, turns adapters off in a block, and generates step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Base()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        layers = [part for part in self.modules() if isinstance(part, Adapter)]
        for layer in layers:
            layer.enabled = False
        try:
            yield
        finally:
            for layer in layers:
                layer.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        return self.base_model(x)

    def generate(self, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = torch.cat([x[:, :1], self(x)], dim=1)
        return x

    def rollout(self, x: Tensor, steps: int) -> Iterator[Tensor]:
        for _ in range(steps):
            x = torch.cat([x[:, :1], self.base_model(x)], dim=1)
            yield x


def _disabled(model: Any, x: Tensor) -> Tensor:
    with model.disable_adapter():
        without = model(x)
    return (model(x) - without).square().mean() + without.mean()


def _generated_while_disabled(model: Any, x: Tensor) -> Tensor:
    with model.disable_adapter():
        return model.generate(x, 2).square().mean()


USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a context manager": _disabled,
    "a method that calls self": lambda model, x: model.generate(x, 3).square().mean(),
    "both": _generated_while_disabled,
    "a generator": lambda model, x: torch.stack([y.square().mean() for y in model.rollout(x, 3)]).sum(),
    "a method of an inner model": lambda model, x: model.decode(model.encode(x)).square().mean(),
    "a part": lambda model, x: model.base_model.get_head()(model.base_model.layers[0](x)).square().mean(),
    "a property that reads parameters": lambda model, x: model.norm + model.base_model.norm + 0 * x.sum(),
    "indices and lengths": lambda model, x: len(model.base_model) * model.base_model[1](x).square().mean(),
    "an iteration": lambda model, x: torch.stack([layer(x).square().mean() for layer in model.base_model]).sum(),
    "class methods and static methods": lambda model, x: model.scaled(model.squashed(model(x))).square().mean(),
    "parts by name": lambda model, x: model.get_submodule("base_model.layers.1")(x).square().mean(),
    "named parameters": lambda model, x: (
        torch.stack([p.square().sum() for n, p in model.named_parameters() if "low" in n]).sum() * x.mean()
    ),
    "a state dict": lambda model, x: model(x).square().mean() + model.state_dict()["base_model.head.bias"].sum(),
    "an unbound method": lambda model, x: Base.encode(model.base_model, x).square().mean(),
}


class Loss(nn.Module):
    """A module whose forward is a loss that is computed by other methods of a model."""

    def __init__(self, model: nn.Module, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.model, x)


@pytest.mark.parametrize("name", USES)
def test_methods_see_the_fast_weights(name: str) -> None:
    use = USES[name]
    torch.manual_seed(2)
    net = Wrapper()
    names = [name for name, _ in net.named_parameters()]
    with ours.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=LR), copy_initial_weights=False) as (handle, diffopt):
        for step in range(3):
            diffopt.step(use(handle, batch(step)[0]))
        loss = use(handle, batch(9)[0])
        mine = [loss, *torch.autograd.grad(loss, list(net.parameters()), allow_unused=True, materialize_grads=True)]

    module = Loss(net, use)
    weights: dict[str, Tensor] = dict(net.named_parameters())

    def loss_at(x: Tensor) -> Tensor:
        return torch.func.functional_call(module, {f"model.{name}": weights[name] for name in names}, (x,))

    for step in range(3):
        values = list(weights.values())
        grads = torch.autograd.grad(loss_at(batch(step)[0]), values, create_graph=True, allow_unused=True)
        weights = {name: p if g is None else p - LR * g for name, p, g in zip(names, values, grads, strict=True)}
    wanted = loss_at(batch(9)[0])
    assert_same(mine, [wanted, *torch.autograd.grad(wanted, list(net.parameters()), allow_unused=True, materialize_grads=True)])


def test_parameters_are_found_by_name() -> None:
    """`nn.Module` itself refuses to return what is no `nn.Parameter`."""
    torch.manual_seed(2)
    net = Wrapper()
    handle: Any = ours.monkeypatch(net, copy_initial_weights=False)
    handle.update_params([2 * p for p in handle.parameters()])
    named = dict(handle.named_parameters())
    assert all(handle.get_parameter(name) is value for name, value in named.items())
    assert handle.base_model.get_parameter("head.weight") is named["base_model.head.weight"]
    for name in ("base_model.head.missing", "base_model.missing.weight", "base_model.head"):
        with pytest.raises(AttributeError):
            handle.get_parameter(name)
        with pytest.raises(AttributeError):
            net.get_parameter(name)
