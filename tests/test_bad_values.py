"""Labels out of range and numbers that are not finite are refused, and leave an unroll that still works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptrt
from adaptrt.errors import DeviceMismatch, InvalidBatch, LabelOutOfRange, NonFiniteInput
from tests.bad_input import Case, attempt, check_refused, data, mse_net, net, normal, poisoned, zeros

CASES: list[Case] = [
    Case(
        "support: negative label",
        lambda: attempt(support=(normal(6, 4), torch.tensor([0, 1, -1, 0, 0, 0]))),
        LabelOutOfRange,
        r"support target holds -1; the model's class labels are 0 to 2",
    ),
    Case(
        "support: label too large",
        lambda: attempt(support=(normal(6, 4), torch.tensor([0, 1, 3, 0, 0, 0]))),
        LabelOutOfRange,
        r"support target holds 3; the model's class labels are 0 to 2",
    ),
    Case(
        "support: label too large beside an ignored one",
        lambda: attempt(support=(normal(6, 4), torch.tensor([0, -100, 3, 0, 0, 0]))),
        LabelOutOfRange,
        r"support target holds 3; the model's class labels are 0 to 2",
    ),
    Case(
        "support: -100 where another index is ignored",
        lambda: attempt(loss=nn.CrossEntropyLoss(ignore_index=2), support=(normal(6, 4), torch.tensor([0, -100, 1, 0, 0, 0]))),
        LabelOutOfRange,
        r"support target holds -100; the model's class labels are 0 to 2",
    ),
    Case(
        "query: label too large",
        lambda: attempt(query=(normal(6, 4), torch.full((6,), 3)), call="meta"),
        LabelOutOfRange,
        r"query target holds 3; the model's class labels are 0 to 2",
    ),
    Case(
        "support: label too large, 32-bit",
        lambda: attempt(support=(normal(6, 4), torch.full((6,), 7, dtype=torch.int32))),
        LabelOutOfRange,
        r"support target holds 7; the model's class labels are 0 to 2",
    ),
    Case(
        "support: label too large in one task",
        lambda: attempt(vmap=True, support=(normal(2, 6, 4), torch.tensor([[0] * 6, [0] * 5 + [3]]))),
        LabelOutOfRange,
        r"support target holds 3; the model's class labels are 0 to 2",
    ),
    Case(
        "support: label too large in one step",
        lambda: attempt(per_step=True, support=(normal(2, 6, 4), torch.tensor([[0] * 6, [0] * 5 + [3]]))),
        LabelOutOfRange,
        r"support target holds 3; the model's class labels are 0 to 2",
    ),
    Case(
        "support: pixel label too large",
        lambda: attempt(nn.Conv2d(1, 3, 1), adaptrt.optim.sgd(0.1), (normal(2, 1, 4, 4), torch.full((2, 4, 4), 3))),
        LabelOutOfRange,
        r"support target holds 3; the model's class labels",
    ),
    Case(
        "support: label too large for a loss module",
        lambda: attempt(loss=nn.NLLLoss(), support=(normal(6, 4), torch.full((6,), 3))),
        LabelOutOfRange,
        r"support target holds 3; the model's class labels are 0 to 2",
    ),
    Case(
        "support: label too large, smoothed",
        lambda: attempt(loss=nn.CrossEntropyLoss(label_smoothing=0.1), support=(normal(6, 4), torch.full((6,), 3))),
        LabelOutOfRange,
        r"support target holds 3; the model's class labels are 0 to 2",
    ),
    Case(
        "support: token out of range",
        lambda: attempt(
            nn.Sequential(nn.Embedding(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)),
            adaptrt.optim.sgd(0.1),
            (torch.tensor([0, 1, 2, 3, 4, 5]), zeros(6)),
        ),
        LabelOutOfRange,
        r"support input.*5",
    ),
    Case(
        "support: NaN",
        lambda: attempt(support=poisoned(float("nan"))),
        NonFiniteInput,
        r'support input 0 holds nan at \[0, 1\].*nonfinite="ignore"',
    ),
    Case("support: infinity", lambda: attempt(support=poisoned(float("inf"), 3)), NonFiniteInput, r"support input 0 holds inf at \[3, 1\]"),
    Case(
        "support: both infinities",
        lambda: attempt(support=(lambda x: (x[0].index_fill(0, torch.tensor(2), float("-inf")), x[1]))(poisoned(float("inf"), 3))),
        NonFiniteInput,
        r"support input 0 holds -inf at \[2, 0\]",
    ),
    Case(
        "support: NaN in the target",
        lambda: attempt(mse_net(), support=(normal(6, 4), torch.full((6, 1), float("nan")))),
        NonFiniteInput,
        r"support target 0 holds nan at \[0, 0\]",
    ),
    Case("query: NaN", lambda: attempt(query=poisoned(float("nan")), call="meta"), NonFiniteInput, r"query input 0 holds nan at \[0, 1\]"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    check_refused(case)


@pytest.mark.parametrize("part", ["support", "query"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_data_is_passed_on_when_asked_to(part: str, value: float) -> None:
    model = net()
    unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(0.1), 1, backend="eager", nonfinite="ignore")
    bad = poisoned(value)
    if part == "support":
        assert not torch.isfinite(unroll.adapt(bad).losses).all()
    else:
        assert not torch.isfinite(unroll(data(), bad))
        assert not torch.isfinite(unroll.adapt(data())(bad[0])).all()


def test_ignored_labels_count_for_nothing() -> None:
    """Not only accepted: the step is that of the other examples."""
    model = nn.Linear(4, 3)
    x, y = data()
    y[2:] = -100
    unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(0.1), 2, backend="eager")
    whole, part = unroll.adapt((x, y)), unroll.adapt((x[:2], y[:2]))
    for name, value in whole.params.items():
        torch.testing.assert_close(value, part.params[name])


WRONG_DATA: dict[str, tuple[Any, type[Exception]]] = {
    "label": ((normal(6, 4), torch.full((6,), 3)), LabelOutOfRange),
    "NaN": (poisoned(float("nan")), NonFiniteInput),
    "empty": (data(0, 4), InvalidBatch),
    "features": (data(6, 5), InvalidBatch),
    "device": ((torch.ones(6, 4, device="meta"), zeros(6)), DeviceMismatch),
}


@pytest.mark.parametrize("wrong, error", WRONG_DATA.values(), ids=WRONG_DATA)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "inference"])
def test_the_unroll_still_works_after_an_error(wrong: Any, error: type[Exception], grad: bool) -> None:
    model = net()
    made = [adaptrt.compile_unroll(model, adaptrt.optim.sgd(0.1), 2, backend="eager") for _ in range(2)]
    losses: list[Tensor] = []
    for index, unroll in enumerate(made):
        torch.manual_seed(5)
        with torch.set_grad_enabled(grad), torch.inference_mode(not grad):
            if index:
                with pytest.raises(error) as caught:
                    unroll.adapt(wrong)
                assert type(caught.value) is error
                with pytest.raises(error) as caught:
                    unroll(data(), wrong)
                assert type(caught.value) is error
            losses.append(unroll(data(), data()).detach())
    assert torch.equal(*losses)
