"""A call takes over what the one before it found: never where anything that matters has changed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt import compile_unroll, optim
from adaptrt.backend import Eager, Inductor
from adaptrt.backend.guards import MAX_KNOWN, Known, alike
from adaptrt.errors import InvalidBatch, InvalidType, LabelOutOfRange, NonFiniteInput
from adaptrt.graph.capture import capture
from adaptrt.graph.passes.check_finite import check_finite
from adaptrt.runtime.program import Program
from tests.models import classifier


def batch(rows: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4, dtype=dtype), torch.randint(3, (rows,))


def gradients(unroll: Any, model: nn.Module, support: Any, query: Any) -> list[Tensor]:
    wanted = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(unroll(support, query), wanted))


def set_rate(model: nn.Sequential, opt: torch.optim.Optimizer) -> None:
    opt.param_groups[0]["lr"] = 0.5


def set_momentum(model: nn.Sequential, opt: torch.optim.Optimizer) -> None:
    opt.param_groups[0]["momentum"] = 0.9


def replace_parameter(model: nn.Sequential, opt: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        weight = model[3].weight
        assert isinstance(weight, Tensor)
        weight.copy_(torch.randn(3, 5))


def replace_data(model: nn.Sequential, opt: torch.optim.Optimizer) -> None:
    model[3].weight.data = torch.randn(5, 3, dtype=torch.float64).t()


def stop_a_gradient(model: nn.Sequential, opt: torch.optim.Optimizer) -> None:
    model[3].bias.requires_grad_(False)


def to_eval(model: nn.Sequential, opt: torch.optim.Optimizer) -> None:
    model.eval()


CHANGES: list[Callable[[nn.Sequential, torch.optim.Optimizer], None]] = [
    set_rate,
    set_momentum,
    replace_parameter,
    replace_data,
    stop_a_gradient,
    to_eval,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changes_between_calls_are_seen(change: Callable[..., None]) -> None:
    model = classifier(nn.Dropout(0.0)).double()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    # All adapt whatever requires grad later; left to requires_grad, a change of it is refused.
    unroll = compile_unroll(model, opt, 2, backend="eager", params="*")
    support, query = batch(), batch()
    before = gradients(unroll, model, support, query)
    assert all(map(torch.equal, before, gradients(unroll, model, support, query)))
    prediction = unroll.adapt(support)(query[0])
    fresh = compile_unroll(model, opt, 2, backend="eager", params="*")  # not called yet
    torch.manual_seed(1)
    change(model, opt)
    for _ in range(2):
        found, expected = (gradients(each, model, support, query) for each in (unroll, fresh))
        assert len(found) == len(expected) and all(map(torch.equal, found, expected))
        assert torch.equal(unroll.adapt(support)(query[0]), fresh.adapt(support)(query[0]))
    if change not in (to_eval, stop_a_gradient):
        assert not torch.equal(unroll.adapt(support)(query[0]), prediction)


def test_the_order_of_hyperparameters_does_not_matter() -> None:
    model, opt = classifier(nn.Dropout(0.0)).double(), optim.sgd(lr=0.1, momentum=0.9)
    unroll = compile_unroll(model, opt, 2, backend="eager")
    support, query = batch(), batch()
    torch.manual_seed(1)
    model.eval()  # no noise: the whole call is one program
    for _ in range(2):
        gradients(unroll, model, support, query)
    before = gradients(unroll, model, support, query)
    adapted = unroll.adapt(support).params
    hyper: Any = opt.hyper
    hyper["lr"] = hyper.pop("lr")
    for _ in range(2):
        assert all(map(torch.equal, before, gradients(unroll, model, support, query)))
        assert all(torch.equal(value, adapted[name]) for name, value in unroll.adapt(support).params.items())


def test_a_rate_of_shape_one_is_read_at_every_call() -> None:
    model, rate = classifier(nn.Dropout(0.0)).double(), torch.tensor([0.1], dtype=torch.float64)
    unroll = compile_unroll(model, torch.optim.SGD(model.parameters(), lr=rate), 2, backend="eager")
    support, query = batch(), batch()
    model.eval()
    for _ in range(2):
        unroll(support, query)
    loss = unroll(support, query)
    rate.requires_grad_()
    unroll(support, query).backward()
    assert rate.grad is not None and rate.grad.abs() > 0
    rate.data = torch.tensor([0.5], dtype=torch.float64)
    assert not torch.equal(unroll(support, query), loss)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ((torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (5,))), InvalidBatch),
        ((torch.randn(0, 4, dtype=torch.float64), torch.randint(3, (0,))), InvalidBatch),
        ((torch.full((6, 4), float("nan"), dtype=torch.float64), torch.randint(3, (6,))), NonFiniteInput),
        ((torch.randn(6, 4, dtype=torch.float64), torch.full((6,), 3)), LabelOutOfRange),
        ((torch.randn(6, 4, dtype=torch.float64).to_sparse(), torch.randint(3, (6,))), InvalidType),
        (torch.randn(6, 4), InvalidType),
    ],
)
def test_what_is_wrong_is_refused_after_what_was_right(wrong: Any, error: type[Exception]) -> None:
    unroll = compile_unroll(classifier(nn.Dropout(0.0)).double(), optim.sgd(lr=0.1), 2, backend="eager")
    right = batch()
    for _ in range(2):
        adapted = unroll.adapt(right)
        adapted(right[0])
        unroll(right, right)
    for call in (lambda: unroll.adapt(wrong), lambda: unroll(wrong, right), lambda: unroll(right, wrong)):
        with pytest.raises(error):
            call()
    unroll.adapt(right)


def test_data_that_requires_grad_gets_its_gradient_after_data_that_did_not() -> None:
    unroll = compile_unroll(classifier(nn.Dropout(0.0)).double(), optim.sgd(lr=0.1), 2, backend="eager")
    x, y = batch()
    for _ in range(2):
        unroll((x, y), (x, y)).backward()
        leaf = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(unroll((leaf, y), (x, y)), leaf)
        assert found.abs().max() > 0
        (found,) = torch.autograd.grad(unroll.adapt((x, y))(leaf).sum(), leaf)
        assert found.abs().max() > 0


def test_modes_of_gradients_and_inference_alternate() -> None:
    model = classifier(nn.Dropout(0.0)).double()
    unroll = compile_unroll(model, optim.sgd(lr=0.1), 2, backend="eager")
    support, query = batch(), batch()
    expected = unroll(support, query).detach()
    for _ in range(2):
        with torch.no_grad():
            assert not unroll(support, query).requires_grad and torch.equal(unroll(support, query), expected)
            assert not unroll.adapt(support)(query[0]).requires_grad
        with torch.inference_mode():
            assert unroll.adapt(support)(query[0]).is_inference()
        assert unroll(support, query).requires_grad and unroll.adapt(support)(query[0]).requires_grad


# --- the backward pass hands its gradients out


def test_gradients_are_handed_out_once_and_kept_on_request() -> None:
    model = classifier(nn.Dropout(0.0)).double()
    unroll = compile_unroll(model, optim.sgd(lr=0.1), 2, backend="eager")
    support, query = batch(), batch()
    parameters = list(model.parameters())
    loss = unroll(support, query)
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    copies = [value.clone() for value in first]
    for value in first:
        value.zero_()  # what the caller does with them is his
    second = torch.autograd.grad(loss * 3, parameters)
    for value, copy in zip(second, copies, strict=True):
        torch.testing.assert_close(value, 3 * copy)
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()


def test_gradients_accumulate_over_calls() -> None:
    model = classifier(nn.Dropout(0.0)).double()
    unroll = compile_unroll(model, optim.sgd(lr=0.1), 2, backend="eager")
    pairs = [(batch(), batch()) for _ in range(3)]
    each = [gradients(unroll, model, *pair) for pair in pairs]
    for pair in pairs:
        unroll(*pair).backward()
    for index, parameter in enumerate(model.parameters()):
        torch.testing.assert_close(parameter.grad, sum(values[index] for values in each))


# --- guards, and data that a program looks at


def test_alike_sees_every_difference() -> None:
    x = torch.randn(3, 4)
    check = alike([x, torch.zeros(2)])
    y = torch.zeros(2)
    assert check(torch.randn(3, 4), y)
    others = [
        torch.randn(3, 5),
        torch.randn(4, 3).t(),
        x.double(),
        x.clone().requires_grad_(),
        nn.Parameter(x),
        x.to("meta"),
        x.to_sparse(),
    ]
    assert not any(check(other, y) for other in others)
    assert not alike([x.to_sparse()])(x)
    with torch.inference_mode():
        assert not check(x, y)


def test_alike_knows_one_tensor_given_twice() -> None:
    x, y, other = torch.randn(3), torch.randn(3), torch.randn(3)
    twice = alike([x, y, x, y, x])
    assert twice(y, x, y, x, y)
    assert not twice(x, y, other, y, x) and not twice(x, x, x, x, x) and not twice(x, y, x, y, x.double())
    assert not alike([x, y])(x, x)


def test_known_is_bounded() -> None:
    known = Known()
    sorts = [[torch.zeros(size)] for size in range(1, MAX_KNOWN + 3)]
    for values in sorts:
        assert values not in known
        known.add(values)
    assert [values in known for values in sorts] == [True] * MAX_KNOWN + [False] * 2


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_graph_looks_at_its_data(backend: str, dtype: torch.dtype) -> None:
    values = [torch.randn(3, 4).to(dtype), torch.randint(5, (3,)), torch.randn(2).to(dtype)]
    graph = check_finite(capture(lambda x, i, w: (x.tanh() + i[:, None], w * 2), *values), [0, 1, 2])
    assert graph.history[-1].name == "check_finite"
    run = {"eager": Eager(), "inductor": Inductor()}[backend].compile(graph)
    largest = max(float(values[0].abs().max()), float(values[2].abs().max()))
    assert float(run(list(values))[-1]) == largest
    for place, bad in ((0, float("nan")), (0, float("inf")), (2, -float("inf")), (2, float("nan"))):
        spoilt = [value.clone() for value in values]
        spoilt[place].view(-1)[-1] = bad
        assert not torch.isfinite(run(list(spoilt))[-1])


def test_compiled_programs_refuse_what_is_not_finite_and_say_where() -> None:
    model = classifier(nn.Dropout(0.0)).double()
    unroll = compile_unroll(model, optim.sgd(lr=0.1), 1, loss=F.cross_entropy, backend="inductor")
    right, wrong = batch(), batch()
    wrong[0][2, 1] = float("inf")
    state = torch.random.get_rng_state()
    for call in (lambda: unroll.adapt(wrong), lambda: unroll(wrong, right)):
        with pytest.raises(NonFiniteInput, match=r"support input 0 holds inf at \[2, 1\]"):
            call()
    with pytest.raises(NonFiniteInput, match=r"query input 0 holds inf at \[2, 1\]"):
        unroll(right, wrong)
    assert torch.equal(torch.random.get_rng_state(), state)
    ignoring = compile_unroll(model, optim.sgd(lr=0.1), 1, loss=F.cross_entropy, nonfinite="ignore", backend="eager")
    ignoring.adapt(wrong)


def functions_called_by(fn: Callable[[], Any]) -> list[tuple[str, str]]:
    """File and name of each Python function that is entered."""
    found: list[tuple[str, str]] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        del argument
        if event == "call":
            found.append((frame.f_code.co_filename, frame.f_code.co_qualname))

    sys.setprofile(note)
    try:
        fn()
    finally:
        sys.setprofile(None)
    return found[1:]


def test_a_program_is_called_through_few_functions_and_none_of_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a program with next to nothing to do these functions would be most of the time."""
    called: list[tuple[Program, list[Tensor]]] = []
    run = Program.run_leaves

    def noted(self: Program, values: list[Tensor]) -> Any:
        called.append((self, list(values)))
        return run(self, values)

    monkeypatch.setattr(Program, "run_leaves", noted)
    unroll = compile_unroll(nn.Linear(1, 1), optim.sgd(lr=0.1), 1, loss=F.mse_loss, backend="inductor")
    with torch.no_grad():
        unroll.adapt((torch.ones(1, 1), torch.ones(1, 1)))
    monkeypatch.undo()
    program, values = called[-1]
    with torch.no_grad():
        program.run_leaves(list(values))
        entered = functions_called_by(lambda: program.run_leaves(list(values)))
    assert entered and not [name for file, name in entered if "/torch/" in file]
    assert len(entered) <= 6, entered
