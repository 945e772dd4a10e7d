"""A gradient through an unroll is a constant to whatever differentiates it again; that raises, whatever it was to be differentiated by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt import FirstOrder, Replay, Stash, Unrolled, optim
from adaptrt.errors import NotDifferentiable
from tests import naive

LR, K = 0.1, 2
ADJOINTS = [Unrolled(), Stash(), Replay(), FirstOrder()]
MESSAGE = r"a meta-gradient was differentiated \(create_graph=True\)"


class Case:
    """A model, its data, and an unroll; everything that can be differentiated requires grad."""

    def __init__(self, adjoint: adaptrt.Adjoint | str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        self.support = normal(6, 4), normal(6, 2)
        self.query = normal(5, 4), normal(5, 2)
        self.lr = torch.tensor(LR, dtype=torch.float64, requires_grad=True)
        self.unroll = adaptrt.compile_unroll(self.model, optim.sgd(self.lr), K, loss=F.mse_loss, adjoint=adjoint, backend="eager")

    def parts(self) -> dict[str, Tensor]:
        return {"support": self.support[0], "parameter": next(self.model.parameters()), "hyperparameter": self.lr}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


OUTPUTS: dict[str, Callable[[Case], Tensor]] = {
    "meta-loss": lambda case: case.unroll(case.support, case.query),
    "parameters": lambda case: case.unroll.adapt(case.support).params["0.weight"],
    "losses": lambda case: case.unroll.adapt(case.support).losses,
    "prediction": lambda case: case.unroll.adapt(case.support)(case.query[0]),
    "chained": lambda case: case.unroll(case.support, case.query, start=case.unroll.adapt(case.support)),
    "tasks": lambda case: case.unroll.vmap()(*(tuple(torch.stack([v, v]) for v in part) for part in (case.support, case.query))),
}


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_gradient_cannot_be_differentiated_by_its_cotangent(output: str, adjoint: adaptrt.Adjoint) -> None:
    case = Case(adjoint)
    for part in case.parts().values():
        found = OUTPUTS[output](case)
        cotangent = torch.ones_like(found, requires_grad=True)
        (gradient,) = torch.autograd.grad(found, part, cotangent, create_graph=True)
        with pytest.raises(NotDifferentiable, match=MESSAGE):
            torch.autograd.grad(gradient.sum(), cotangent, allow_unused=True)
        weight = torch.ones((), dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad((weight * OUTPUTS[output](case)).sum(), part, create_graph=True)
        with pytest.raises(NotDifferentiable, match=MESSAGE):
            torch.autograd.grad(gradient.sum(), weight, allow_unused=True)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_gradient_cannot_be_differentiated_by_what_went_in(output: str, adjoint: adaptrt.Adjoint) -> None:
    case = Case(adjoint)
    parts = case.parts()
    for part in parts.values():
        for by in parts.values():
            (gradient,) = torch.autograd.grad(OUTPUTS[output](case).sum(), part, create_graph=True)
            with pytest.raises(NotDifferentiable, match=MESSAGE):
                torch.autograd.grad(gradient.sum(), by, allow_unused=True)


def test_a_gradient_whose_graph_is_not_kept_cannot_be_differentiated_either() -> None:
    case = Case("auto")
    (gradient,) = torch.autograd.grad(case.unroll(case.support, case.query), case.lr, create_graph=True, retain_graph=False)
    with pytest.raises(NotDifferentiable, match=MESSAGE):
        gradient.backward()


@pytest.mark.parametrize("call", ["meta-loss", "parameters", "losses", "prediction"])
def test_products_with_a_tangent_are_refused(call: str) -> None:
    """PyTorch forms them by differentiating a gradient by its cotangent."""
    case = Case("auto")

    def of_support(inputs: Tensor) -> Tensor:
        case.support = inputs, case.support[1]
        return OUTPUTS[call](case)

    inputs = case.support[0].detach()
    for function in (torch.autograd.functional.jvp, torch.autograd.functional.hvp):
        for strict in (False, True):
            with pytest.raises(NotDifferentiable, match=MESSAGE):
                function(lambda value: of_support(value).sum(), inputs, torch.ones_like(inputs), strict=strict)
    with pytest.raises(NotDifferentiable, match=MESSAGE):
        torch.autograd.functional.hessian(lambda value: of_support(value).sum(), inputs)


def test_gradgradcheck_is_refused() -> None:
    case = Case("auto")
    assert torch.autograd.gradcheck(lambda inputs: case.unroll((inputs, case.support[1]), case.query), case.support[:1])
    with pytest.raises(NotDifferentiable, match=MESSAGE):
        torch.autograd.gradgradcheck(lambda inputs: case.unroll((inputs, case.support[1]), case.query), case.support[:1])


@pytest.mark.parametrize("adjoint", [Unrolled(), Stash(), Replay()], ids=str)
def test_a_gradient_with_a_graph_has_the_right_values_and_can_be_used(adjoint: adaptrt.Adjoint) -> None:
    case = Case(adjoint)
    params = list(case.model.parameters())
    loop = naive.Loop(case.model, F.mse_loss, naive.sgd, {"lr": case.lr}, K)
    start = naive.Start(dict(case.model.named_parameters()), {}, {}, {})
    wanted = torch.autograd.grad(3.0 * naive.meta_loss(loop, start, case.support, case.query), params)
    weight = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(weight * case.unroll(case.support, case.query), params, create_graph=True)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        stepped = [param - LR * gradient for param, gradient in zip(params, found, strict=True)]
        expected = [param - LR * gradient for param, gradient in zip(params, wanted, strict=True)]
    torch.testing.assert_close(stepped, expected, rtol=1e-10, atol=1e-10)
    # A loss beside the gradient, which is detached, is differentiated as usual.
    penalty = sum((gradient.detach() * param.square()).sum() for param, gradient in zip(params, found, strict=True))
    assert isinstance(penalty, Tensor)
    for param, gradient, of in zip(params, wanted, torch.autograd.grad(penalty, params), strict=True):
        torch.testing.assert_close(of, 2.0 * gradient * param, rtol=1e-10, atol=1e-10)


def test_backward_with_a_graph_accumulates() -> None:
    case = Case("auto")
    loop = naive.Loop(case.model, F.mse_loss, naive.sgd, {"lr": case.lr}, K)
    start = naive.Start(dict(case.model.named_parameters()), {}, {}, {})
    params = list(case.model.parameters())
    wanted = torch.autograd.grad(naive.meta_loss(loop, start, case.support, case.query), params)
    case.unroll(case.support, case.query).backward(inputs=params, retain_graph=True)
    case.unroll(case.support, case.query).backward(inputs=params)
    for param, gradient in zip(params, wanted, strict=True):
        torch.testing.assert_close(param.grad, 2.0 * gradient, rtol=1e-10, atol=1e-10)
