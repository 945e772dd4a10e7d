"""Methods and properties of a model's own class see the fast weights on a handle, as they do in the models of large libraries.

Each model has a loss that goes through such methods.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.higher_cases import adapted_by_hand, adapted_by_handle, assert_same, ours

pytestmark = pytest.mark.usefixtures("double")


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

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.decode(self.encode(x))


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

    def prepared(self, x: Tensor) -> Tensor:
        """Passes what `forward` takes, as generation by transformers passes a mask."""
        taken = inspect.signature(self.base_model.forward).parameters
        return self.base_model(x, **{"scale": 0.5} if "scale" in taken else {})

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
    "a method that looks at a signature": lambda model, x: model.prepared(x).square().mean(),
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


@pytest.mark.parametrize("name", USES)
def test_methods_see_the_fast_weights(name: str) -> None:
    torch.manual_seed(2)
    net = Wrapper()
    assert_same(adapted_by_handle(net, USES[name]), adapted_by_hand(net, USES[name]))


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
