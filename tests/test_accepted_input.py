"""What looks like bad input and is none is accepted."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt import FirstOrder
from tests.bad_input import CE, Attempt, Forward, Margins, attempt, cube_once, data, labels, mse_net, normal
from tests.photographs import photograph, same, settings


class Accepted(NamedTuple):
    """What looks like a case of the table and is none."""

    name: str
    build: Callable[[], Attempt]


def zeros_like(output: Tensor) -> Tensor:
    return torch.zeros(output.shape[0], dtype=torch.long)


class Recurrent(nn.Module):
    """Takes sequences with the batch as second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][-1]


class Attention(nn.Module):
    """Fused attention has no second derivative; it is traced as matmul and softmax, not refused."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


ACCEPTED: list[Accepted] = [
    Accepted("ignored labels", lambda: attempt(support=(normal(6, 4), torch.tensor([0, 1, -100, 2, -100, 0])))),
    Accepted(
        "ignored labels of another index",
        lambda: attempt(loss=nn.CrossEntropyLoss(ignore_index=7), support=(normal(6, 4), torch.tensor([0, 1, 7, 2, 7, 0]))),
    ),
    Accepted("ignored labels in the query", lambda: attempt(query=(normal(6, 4), torch.tensor([0, 1, -100, 2, -100, 0])), call="meta")),
    Accepted("labels of 8 bits", lambda: attempt(support=(normal(6, 4), labels(6).to(torch.uint8)))),
    Accepted(
        "a target without axes",
        lambda: attempt(loss=lambda output, target: CE(output, zeros_like(output)) * target, support=(normal(6, 4), torch.tensor(0.5))),
    ),
    Accepted("soft labels", lambda: attempt(loss=CE, support=(normal(6, 4), normal(6, 3).softmax(-1)))),
    Accepted("sequences first", lambda: attempt(Recurrent(), loss=CE, support=(normal(7, 5, 4), labels(5)))),
    Accepted(
        "tokens first", lambda: attempt(nn.Sequential(nn.Embedding(9, 4), Recurrent()), loss=CE, support=(labels(7, 5, high=9), labels(5)))
    ),
    Accepted(
        "attention", lambda: attempt(Attention(), query=(normal(2, 5, 4), labels(2)), support=(normal(2, 5, 4), labels(2)), call="meta")
    ),
    Accepted("margin to first order", lambda: attempt(Margins(2), query=data(), call="meta", adjoint=FirstOrder())),
    Accepted("custom function to first order", lambda: attempt(Forward(cube_once), query=data(), call="meta", adjoint=FirstOrder())),
    Accepted("finite values whose sum is not", lambda: attempt(mse_net(), support=(torch.full((6, 4), 1e38), normal(6, 1)))),
    Accepted("a support list", lambda: attempt(support=list(data()))),
]


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.name)
def test_what_is_no_bad_input_is_accepted(case: Accepted) -> None:
    made = case.build()
    before = settings()
    photos = [photograph(thing) for thing in made.watched]
    made.run()
    assert settings() == before
    assert all(same(photo, photograph(thing)) for photo, thing in zip(photos, made.watched, strict=True))
