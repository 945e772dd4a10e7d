"""Models and losses that cannot be traced are refused with the file, line and code of the operation."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt.errors import DataDependentControlFlow, NotTraceable, UnsupportedRandomness
from tests.bad_input import Attempt, Case, Forward, anything, attempt, check_refused, data, labels, normal

HERE = re.escape(__file__)


def branch(module: Forward, h: Tensor) -> Tensor:
    if h.sum() > 0:  # the line to be named: branch
        return h
    return -h


def read_item(module: Forward, h: Tensor) -> Tensor:
    return h * h.max().item()  # the line to be named: item


def read_float(module: Forward, h: Tensor) -> Tensor:
    return h * float(h.mean())  # the line to be named: float


def read_list(module: Forward, h: Tensor) -> Tensor:
    return h * sum(h[0].tolist())  # the line to be named: list


def read_numpy(module: Forward, h: Tensor) -> Tensor:
    return h * h.detach().numpy().max()  # the line to be named: numpy


def loop(module: Forward, h: Tensor) -> Tensor:
    while h.norm() > 1:  # the line to be named: loop
        h = h / 2
    return h


def mask(module: Forward, h: Tensor) -> Tensor:
    return h[h > 0].sum() + h  # the line to be named: mask


def where(module: Forward, h: Tensor) -> Tensor:
    return h + h.nonzero().sum()  # the line to be named: nonzero


def branching_loss(output: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(output, target)
    return loss if loss > 1 else loss**2  # the line to be named: loss


def line(tag: str) -> str:
    """`file:line: code` of the line above that ends with the tag, as a pattern."""
    with open(__file__, encoding="utf-8") as file:
        numbers = [number for number, text in enumerate(file, 1) if text.rstrip().endswith(f"# the line to be named: {tag}")]
    assert len(numbers) == 1
    return rf"{HERE}:{numbers[0]}: .* depends on the value of a tensor.*Use torch\.where"


class Alignment(nn.Module):
    """A loss: connectionist temporal classification, by an operation that has no fake kernel; `F.ctc_loss` is computed by a formula."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        frames = output.log_softmax(-1).unsqueeze(1).repeat(1, 2, 1)
        lengths = torch.tensor([6, 6]), torch.tensor([1, 1])
        return torch.ctc_loss(frames, target.view(2, 3) + 1, *lengths)


def multinomial(module: Forward, h: Tensor) -> Tensor:
    return h + torch.multinomial(h.softmax(-1), 3)


def own_generator(module: Forward, h: Tensor) -> Tensor:
    return h + torch.rand(h.shape, generator=anything(module.generator))


def own_generator_inplace(module: Forward, h: Tensor) -> Tensor:
    return h + torch.empty_like(h).normal_(generator=anything(module.generator))


def own_generator_case(fn: Callable[[Forward, Tensor], Tensor]) -> Attempt:
    generator = torch.Generator().manual_seed(3)
    made = attempt(Forward(fn, generator=generator))
    return made._replace(watched=(*made.watched, generator))


def branch_when_evaluated() -> Attempt:
    model = Forward(lambda module, h: h if module.training else branch(module, h))
    opt = adaptrt.optim.sgd(0.1)
    result = adaptrt.compile_unroll(model, opt, 1, backend="eager").adapt(data())
    model.eval()
    return Attempt(lambda: result(torch.ones(6, 4)), (model, result.params))


CASES: list[Case] = [
    Case("trace: branch on a value", lambda: attempt(Forward(branch)), DataDependentControlFlow, line("branch")),
    Case("trace: item()", lambda: attempt(Forward(read_item)), DataDependentControlFlow, line("item")),
    Case("trace: float()", lambda: attempt(Forward(read_float)), DataDependentControlFlow, line("float")),
    Case("trace: tolist()", lambda: attempt(Forward(read_list)), DataDependentControlFlow, line("list")),
    Case("trace: numpy()", lambda: attempt(Forward(read_numpy)), DataDependentControlFlow, line("numpy")),
    Case("trace: while on a value", lambda: attempt(Forward(loop)), DataDependentControlFlow, line("loop")),
    Case("trace: boolean-mask indexing", lambda: attempt(Forward(mask)), DataDependentControlFlow, line("mask")),
    Case("trace: nonzero", lambda: attempt(Forward(where)), DataDependentControlFlow, line("nonzero")),
    Case("trace: branch in the loss", lambda: attempt(loss=branching_loss), DataDependentControlFlow, line("loss")),
    Case("trace: branch in prediction only", lambda: branch_when_evaluated(), DataDependentControlFlow, line("branch")),
    Case(
        "trace(): branch on a value",
        lambda: (lambda model, x: Attempt(lambda: adaptrt.trace(model, x), (model, x)))(Forward(branch), torch.ones(6, 4)),
        DataDependentControlFlow,
        line("branch"),
    ),
    Case(
        "trace: an operation without fake kernel",
        lambda: attempt(loss=Alignment(), support=(normal(6, 4), labels(6, high=2))),
        NotTraceable,
        rf"{HERE}:\d+: .*ctc_loss\(.*_ctc_loss",
    ),
    Case(
        "random: multinomial",
        lambda: attempt(Forward(multinomial)),
        UnsupportedRandomness,
        r"'multinomial'.*cannot be drawn before.*Draw it outside the model.*bernoulli",
    ),
    Case("random: own generator, factory", lambda: own_generator_case(own_generator), UnsupportedRandomness, r"generator"),
    Case(
        "random: own generator, in place",
        lambda: own_generator_case(own_generator_inplace),
        UnsupportedRandomness,
        r"generator of its own.*pass generator=",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    check_refused(case)
