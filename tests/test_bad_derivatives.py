"""What has no second derivative is refused with the operation and the module that called it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import adaptrt
from adaptrt import Replay, Unrolled
from adaptrt.errors import NotDifferentiable
from tests.bad_input import (
    Attempt,
    Case,
    Forward,
    Margins,
    attempt,
    check_refused,
    cube_once,
    data,
    labels,
    normal,
)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(10, 4, mode="max")
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.words(tokens))


def backward_of_adapt(model: nn.Module) -> Attempt:
    result = adaptrt.compile_unroll(model, adaptrt.optim.sgd(0.1), 2, backend="eager").adapt(data())
    return Attempt(lambda: result.params["layer.weight"].sum().backward(), (model, result.params))


def penalty() -> Attempt:
    """A penalty on the meta-gradient, beside a term that can be differentiated: without an error the penalty would be dropped."""
    model = nn.Linear(4, 1)
    loss = adaptrt.compile_unroll(model, adaptrt.optim.sgd(0.1), 1, backend="eager")(
        (normal(6, 4), normal(6, 1)), (normal(6, 4), normal(6, 1))
    )

    def run() -> None:
        (grad,) = torch.autograd.grad(loss, [model.weight], create_graph=True)
        torch.autograd.grad(grad.square().sum() + model.weight.square().sum(), [model.weight])

    return Attempt(run, (model,))


CASES: list[Case] = [
    *[
        Case(
            f"second derivative: margin p={p}, {adjoint}",
            lambda p=p, adjoint=adjoint: attempt(nn.Sequential(nn.Identity(), Margins(p)), query=data(), call="meta", adjoint=adjoint),
            NotDifferentiable,
            r"'multi_margin_loss_backward', called in module '1' \(Margins\).*adjoint=FirstOrder\(\)",
        )
        for p in (2, 1)
        for adjoint in (Unrolled(), Replay())
    ],
    *[
        Case(
            f"second derivative: behind dropout, {adjoint}",
            lambda adjoint=adjoint: attempt(nn.Sequential(nn.Dropout(0.5), Margins(2)), query=data(), call="meta", adjoint=adjoint),
            NotDifferentiable,
            r"'multi_margin_loss_backward', called in module '1' \(Margins\)",
        )
        for adjoint in (Unrolled(), Replay())
    ],
    Case(
        "second derivative: embedding_bag max",
        lambda: attempt(
            Bag(), support=(labels(6, 2, high=10), labels(6, high=3)), query=(labels(6, 2, high=10), labels(6, high=3)), call="meta"
        ),
        NotDifferentiable,
        r"'_embedding_bag\w*_backward', called in module 'words' \(EmbeddingBag\)",
    ),
    Case(
        "second derivative: custom function",
        lambda: attempt(Forward(cube_once), query=data(), call="meta"),
        NotDifferentiable,
        r"once_differentiable \(CubeOnce\).*adjoint=FirstOrder\(\)",
    ),
    Case(
        "second derivative: custom function, through adapt",
        lambda: backward_of_adapt(Forward(cube_once)),
        NotDifferentiable,
        r"once_differentiable \(CubeOnce\)",
    ),
    Case(
        "second derivative: of the meta-gradient", penalty, NotDifferentiable, r"a meta-gradient was differentiated \(create_graph=True\)"
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    check_refused(case)


def test_an_error_leaves_the_callers_generator_alone() -> None:
    unroll = adaptrt.compile_unroll(
        nn.Sequential(nn.Dropout(0.5), Margins(2)), adaptrt.optim.sgd(0.1), 2, adjoint=Replay(), backend="eager"
    )
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(NotDifferentiable):
        unroll(data(), data(), generator=generator)
    assert torch.equal(generator.get_state(), before)
