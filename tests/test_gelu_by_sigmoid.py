"""The approximate GELU by one sigmoid: every derivative is the operation's, with one exponential and no tanh, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from adaptrt.backend import Inductor
from adaptrt.graph.capture import capture
from adaptrt.graph.operations import COSTLY, name_of
from adaptrt.graph.passes.gelu_by_sigmoid import GeluBySigmoid
from tests.graphs import targets
from tests.tolerances import HIGH_DERIVATIVE, assert_close

aten = torch.ops.aten


def operation(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def written(x: Tensor) -> Tensor:
    with GeluBySigmoid() as mode:
        found = operation(x)
    assert mode.num_written == 1
    return found


def derivative(fn: Callable[[Tensor], Tensor], x: Tensor, order: int) -> Tensor:
    found = fn(x)
    for _ in range(order):
        (found,) = torch.autograd.grad(found.sum(), x, create_graph=True)
    return found


@pytest.mark.parametrize("order", range(5))
def test_derivatives(order: int) -> None:
    x = torch.cat([torch.linspace(-9, 9, 361, dtype=torch.float64), torch.tensor([0.0, -0.0, 1e-300, 1e-9, -30.0, 30.0])]).requires_grad_()
    found, wanted = derivative(written, x, order), derivative(operation, x, order)
    sound = torch.isfinite(wanted)  # far out the operation's third derivative is infinity times zero
    assert sound.sum() > 340 and torch.isfinite(found).all()
    assert_close(found[sound], wanted[sound], HIGH_DERIVATIVE)


@pytest.mark.parametrize("order", range(3))
def test_float32_is_as_near_as_the_operation(order: int) -> None:
    x = torch.linspace(-12, 12, 20_001).requires_grad_()
    wanted = derivative(operation, x.detach().double().requires_grad_(), order)
    ours, theirs = ((derivative(fn, x, order) - wanted).abs().max() for fn in (written, operation))
    assert ours < 1.5 * theirs


def test_extremes() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
    torch.testing.assert_close(written(x), operation(x), equal_nan=True)


@pytest.mark.parametrize("x", [1e7, 1e8, 1e10, -1e8, -1e12])
def test_derivatives_far_out(x: float) -> None:
    value = torch.tensor([x]).requires_grad_()
    for order in range(3):
        assert torch.equal(derivative(written, value, order), derivative(operation, value, order))


def test_a_given_result_is_written_to() -> None:
    x, out = torch.randn(3), torch.zeros(3)
    with GeluBySigmoid():
        torch._C._nn.gelu(x, approximate="tanh", out=out)  # type: ignore[attr-defined]
    assert torch.equal(out, operation(x))


def forward_derivative(x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(operation(forward_ad.make_dual(x, torch.ones_like(x)))).tangent  # type: ignore[return-value]


def test_gradients_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU("tanh"), nn.Linear(4, 1)).double()
    params: dict[str, Tensor] = dict(model.named_parameters())

    def fn(params: dict[str, Tensor], x: Tensor) -> Any:
        params = {name: value.detach().requires_grad_() for name, value in params.items()}
        loss = torch.func.functional_call(model, params, (x,)).square().sum()
        found = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        return torch.autograd.grad(sum(value.sin().sum() for value in found), list(params.values()))  # type: ignore[union-attr]

    x = torch.randn(5, 3, dtype=torch.float64)
    plain, fused = capture(fn, params, x), capture(fn, params, x, for_fusion=True)
    assert aten.gelu.default in targets(plain) and aten.gelu.default not in targets(fused)
    assert fused.history[0].name == "gelu_by_sigmoid of 1 functions"
    for found in (fused.run(params, x), Inductor().compile(fused)([*params.values(), x])):
        assert_close(tuple(found), fn(params, x), HIGH_DERIVATIVE)


OTHERS: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {
    "exact": (F.gelu, torch.float32),
    "half precision": (operation, torch.bfloat16),
    "in forward mode": (forward_derivative, torch.float32),
    "within a transform": (lambda x: torch.func.vmap(operation)(x), torch.float32),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by which PyTorch's forward mode compiles rules
@pytest.mark.parametrize("fn, dtype", OTHERS.values(), ids=OTHERS)
def test_others_are_left_alone(fn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x = torch.randn(4, 5).to(dtype)
    with GeluBySigmoid() as mode:
        found = fn(x)
    assert mode.num_written == 0 and torch.equal(found, fn(x))


def test_a_pullback_computes_one_exponential_and_no_tanh() -> None:
    def fn(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        found = operation(x)
        (gradient,) = torch.autograd.grad(found, x, y, create_graph=True)
        return torch.autograd.grad((found, gradient), x, (y, z))[0]

    values = [torch.randn(5, 6) for _ in range(3)]
    plain, fused = (targets(Inductor().lower(capture(fn, *values, for_fusion=for_fusion))) for for_fusion in (False, True))
    assert aten.tanh.default in plain
    assert [name_of(target) for target in fused if name_of(target) in COSTLY] == ["exp"]
