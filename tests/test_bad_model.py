"""Models that cannot be adapted are refused with an error that names the parameter or module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt.errors import DeviceMismatch, InvalidArgument, InvalidType, UnsupportedParameter
from tests.bad_input import CE, Case, Forward, anything, attempt, beside, check_refused, data, normal, zeros


def two_devices() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3, device="meta"))


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(normal(10, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.table, sparse=True)


CASES: list[Case] = [
    Case(
        "model: not a module",
        lambda: attempt(model=lambda x: x, opt=adaptrt.optim.sgd(0.1)),
        InvalidType,
        r"model must be a torch\.nn\.Module, got function",
    ),
    Case("model: without parameters", lambda: attempt(nn.ReLU(), adaptrt.optim.sgd(0.1)), InvalidArgument, r"model has no parameters"),
    Case(
        "model: parameters on two devices",
        lambda: attempt(two_devices(), adaptrt.optim.sgd(0.1)),
        DeviceMismatch,
        r"0\.weight on cpu.*1\.weight on meta",
    ),
    Case(
        "model: complex parameter",
        lambda: attempt(beside("phase", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))),
        UnsupportedParameter,
        r"parameter 'phase' is of torch\.complex64; only real floating-point",
    ),
    Case(
        "model: integer parameter",
        lambda: attempt(beside("count", nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False))),
        UnsupportedParameter,
        r"parameter 'count' is of torch\.int64; only real floating-point.*Make it a buffer",
    ),
    Case(
        "model: sparse parameter",
        lambda: attempt(beside("links", nn.Parameter(torch.eye(3).to_sparse())), adaptrt.optim.sgd(0.1), call="compile"),
        UnsupportedParameter,
        r"parameter 'links' has layout torch\.sparse_coo; only dense",
    ),
    Case(
        "model: sparse embedding",
        lambda: attempt(nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3)), adaptrt.optim.sgd(0.1), (zeros(6),) * 2),
        UnsupportedParameter,
        r"module '0' was built with sparse=True.*Build it with sparse=False",
    ),
    Case(
        "model: functional sparse embedding",
        lambda: attempt(Lookup(), adaptrt.optim.sgd(0.1), (zeros(6),) * 2),
        UnsupportedParameter,
        r"'table'.*sparse gradient.*sparse=False",
    ),
    Case(
        "model: lazy module",
        lambda: attempt(nn.Sequential(nn.LazyLinear(3)), adaptrt.optim.sgd(0.1)),
        UnsupportedParameter,
        r"parameter '0\.weight' is not initialised.*run the model once",
    ),
    Case(
        "model: plain tensor attribute that requires grad",
        lambda: attempt(
            Forward(lambda module, h: h * anything(module.scale), scale=torch.ones(3, requires_grad=True)), query=data(), call="meta"
        ),
        UnsupportedParameter,
        r"tensor attribute 'scale' requires grad and is no parameter.*Make it an nn\.Parameter",
    ),
    Case(
        "loss: closed-over tensor that requires grad",
        lambda: (lambda scale: attempt(loss=lambda output, target: CE(output * scale, target)))(torch.ones(3, requires_grad=True)),
        UnsupportedParameter,
        r"shape \[3\] .*requires grad and is no parameter.*nn\.Parameter",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    check_refused(case)
