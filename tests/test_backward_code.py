"""What Python code reads that runs only on the way back: in the `backward` of a custom autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt import Replay, Stash, Unrolled
from tests import naive
from tests.test_refusals import close, double, looped, unrolled

FACTOR = 1.0
SECOND = 1.0


class Settings:
    factor = 1.0


class Reversed(torch.autograd.Function):
    """Reverses gradients, and scales them by a global name, an attribute of an object, and one of the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module = module
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -FACTOR * Settings.factor * ctx.module.factor * grads[0], None


class Net(nn.Module):
    """Its gradients are reversed where it does not train, so that no support pass runs the code that does it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.factor = 1.0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(h if self.training else Reversed.apply(h, self))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["global", "class", "module"])
def test_a_prediction_follows_what_its_gradient_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = Net(), double()
    unroll = unrolled(model)
    adapted = unroll.adapt((x, y))
    model.eval()

    def assert_same() -> None:
        inputs = x.clone().requires_grad_()
        found = torch.autograd.grad(adapted(inputs).square().sum(), [adapted.params["first.weight"], inputs], retain_graph=True)
        output = torch.func.functional_call(model, dict(adapted.params), (inputs,))
        wanted = torch.autograd.grad(output.square().sum(), [adapted.params["first.weight"], inputs], retain_graph=True)
        close(found, wanted)

    assert_same()
    for value in (3.0, 5.0, 1.0):
        if name == "global":
            monkeypatch.setitem(globals(), "FACTOR", value)
        elif name == "class":
            monkeypatch.setattr(Settings, "factor", value)
        else:
            model.factor = value
        assert_same()


class Slope(torch.autograd.Function):
    """The gradient of `Cube`, whose own gradient is scaled by a global name."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(x, grad)
        return 3.0 * x.square() * grad

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, grad = ctx.saved_tensors
        return SECOND * 6.0 * x * grad * grads[0], 3.0 * x.square() * grads[0]


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return Slope.apply(*ctx.saved_tensors, grads[0])


class Cubed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(Cube.apply(self.first(x)))  # type: ignore[arg-type]


@pytest.mark.parametrize("adjoint", [Unrolled(), Stash(), Replay()], ids=str)
@pytest.mark.parametrize("call", ["meta-loss", "adapt"])
def test_a_meta_gradient_follows_what_the_second_gradient_reads(
    call: str, adjoint: adaptrt.Adjoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = Cubed(), double()
    unroll = unrolled(model, adjoint=adjoint)

    def gradients() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        params = list(model.parameters())
        if call == "meta-loss":
            found, wanted = unroll(batch, batch), naive.meta_loss(*looped(model), batch, batch)
        else:
            found = F.cross_entropy(unroll.adapt(batch)(batch[0]), batch[1])
            wanted = naive.meta_loss(*looped(model), batch, batch)
        return torch.autograd.grad(found, params), torch.autograd.grad(wanted, params)

    first = gradients()
    close(*first)
    monkeypatch.setitem(globals(), "SECOND", 3.0)
    second = gradients()
    close(*second)
    assert not torch.allclose(first[1][0], second[1][0])
