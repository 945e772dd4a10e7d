"""Calls, results and unrolls do what users' code expects of them, or refuse by name and say what to do."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import adaptrt
from adaptrt import optim
from adaptrt.errors import (
    CannotBePickled,
    CannotBeSet,
    InvalidArgument,
    InvalidBatch,
    InvalidType,
    LongChain,
    NotDifferentiable,
    ShapeChanged,
)
from adaptrt.runtime.adapted import LONG_CHAIN
from tests import naive
from tests.bad_input import Attempt, Case, adapted, attempt, check_refused, data, fresh, mse_net, normal, squares, zeros

LR, K = 0.1, 3
BACKENDS = ("eager", "inductor")


def double(*shape: int) -> Tensor:
    return normal(*shape).double()


def linear(outputs: int = 3) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, outputs).double()


def batch() -> tuple[Tensor, Tensor]:
    return double(6, 4), torch.arange(6) % 3


def unrolled(model: nn.Module, loss: Any = F.cross_entropy, opt: Any = None, **options: Any) -> adaptrt.CompiledUnroll:
    return adaptrt.compile_unroll(model, opt or optim.sgd(lr=LR), K, loss=loss, **{"backend": "eager", **options})


def looped(model: nn.Module, loss: Callable[..., Tensor] = F.cross_entropy, k: int = K) -> tuple[naive.Loop, naive.Start]:
    loop = naive.Loop(model, loss, naive.sgd, {"lr": LR}, k)
    return loop, naive.Start(dict(model.named_parameters()), {}, dict(model.named_buffers()), {})


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


# --- results are values


def test_read_only_values_work_as_dicts(tmp_path: Path) -> None:
    model = linear()
    result = unrolled(model).adapt(batch())
    x = batch()[0]

    def total(params: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, params, (x,)).sum()

    close(total(result.params), result(x).sum())
    found = torch.func.grad(total)(result.detach().params)
    close(found["weight"], x.sum(0).expand(3, 4))
    for copied in (dict(result.params), {**result.params}, result.params | {}, result.params.copy()):
        assert type(copied) is dict and list(copied) == ["weight", "bias"]
    values = result.detach().params
    for copied in (copy.copy(values), copy.deepcopy(values), tree_map(torch.clone, values)):
        assert type(copied) is dict and torch.equal(copied["weight"], values["weight"])
    torch.save(values, tmp_path / "values.pt")
    for kept in (pickle.loads(pickle.dumps(values)), torch.load(tmp_path / "values.pt")):
        assert isinstance(kept, dict) and torch.equal(kept["weight"], values["weight"])
        kept["weight"] = None


WRITES: dict[str, Callable[[Any], Any]] = {
    "params of it": lambda result: setattr(result, "params", {}),
    "its losses": lambda result: setattr(result, "losses", None),
    "an entry": lambda result: result.params.__setitem__("0.weight", None),
    "deletes an entry": lambda result: result.params.__delitem__("0.weight"),
    "update": lambda result: result.params.update({"0.weight": None}),
    "in-place union": lambda result: result.params.__ior__({}),
    "a buffer": lambda result: result.buffers.clear(),
}

REFUSED: list[Case] = [
    *[
        Case(f"writes {name}", lambda write=write: adapted(lambda unroll, result: write(result)), CannotBeSet, r"adapted\.replace\(params=")
        for name, write in WRITES.items()
    ],
    Case("replace: a wrong shape", lambda: adapted(lambda _, a: a.replace(params={"0.bias": zeros(1)})), InvalidArgument, r"0\.bias"),
    Case("replace: an unknown name", lambda: adapted(lambda _, a: a.replace(params={"nose": zeros(1)})), InvalidArgument, r"nose"),
    Case(
        "pickles a result",
        lambda: adapted(lambda _, a: pickle.dumps(a)),
        CannotBePickled,
        r"\.save\(path\).*compile.*\.load\(path\)",
    ),
    Case("pickles an unroll", lambda: fresh(pickle.dumps), CannotBePickled, r"model\.state_dict\(\).*spawn.*compile_unroll"),
    Case("sets k", lambda: fresh(lambda unroll: setattr(unroll, "k", 5)), CannotBeSet, r"attribute 'k'.*compile_unroll"),
    Case("predicts without inputs", lambda: adapted(lambda _, a: a()), InvalidType, r"without inputs; .*adapted\(x\)"),
    Case("predicts on NumPy", lambda: adapted(lambda _, a: a(normal(6, 4).numpy())), InvalidType, r"numpy.*torch\.from_numpy"),
    Case(
        "loss: a class", lambda: attempt(call="compile", loss=nn.CrossEntropyLoss), InvalidType, r"instance.*class CrossEntropyLoss.*\(\)"
    ),
    *[
        Case(
            f"{dtype} class labels",
            lambda dtype=dtype, backend=backend: attempt(support=(normal(6, 4), zeros(6).to(dtype)), loss=F.cross_entropy, backend=backend),
            InvalidBatch,
            rf"support batch.*int64, got {str(dtype).removeprefix('torch.')}; call \.long\(\)",
        )
        for dtype in (torch.float32, torch.int32, torch.bool, torch.uint8)
        for backend in BACKENDS
    ],
    *[
        Case(
            f"a model in half precision: {name}",
            lambda model=model, x=x: attempt(model.half(), optim.sgd(LR), support=(x, zeros(6))),
            InvalidBatch,
            r"Convert the data to the dtype of the model's parameters, .*model\.float\(\); dtype=torch\.bfloat16",
        )
        for name, model, x in (
            ("linear", nn.Linear(4, 3), normal(6, 4)),
            ("convolution", nn.Sequential(nn.Conv1d(1, 3, 4), nn.Flatten()), normal(6, 1, 4)),
        )
    ],
    Case(
        "one task under vmap",
        lambda: attempt(nn.Linear(4, 3), optim.sgd(LR), vmap=True),
        InvalidBatch,
        r"support target \(int64\[6\]\) has no axis.*without vmap\(\)",
    ),
    Case(
        "one query under vmap",
        lambda: attempt(
            vmap=True, support=(normal(2, 6, 4), zeros(2, 6)), query=data(2, 4), call="meta", model=nn.Linear(4, 3), opt=optim.sgd(LR)
        ),
        InvalidBatch,
        r"query target \(int64\[2\]\) has no axis of examples",
    ),
    *[
        Case(
            f"broadcasts {name}",
            lambda loss=loss, target=target: attempt(mse_net(), loss=loss, support=(normal(6, 4), target)),
            InvalidBatch,
            rf"support batch: .*would broadcast them to \[{shape}\]; give the target the shape of the output",
        )
        for name, loss, target, shape in (
            ("what mse_loss warns of", F.mse_loss, normal(6), "6, 6"),
            ("what a module warns of", nn.SmoothL1Loss(), normal(6), "6, 6"),
            ("a difference", squares, normal(6), "6, 6"),
            ("a difference after a conversion", lambda output, y: squares(output, y.float()), normal(6).double(), "6, 6"),
            ("a difference the other way round", lambda output, y: squares(y, output), normal(6), "6, 6"),
            ("a product", lambda output, y: (1 - y * output).relu().mean(), normal(6), "6, 6"),
        )
    ],
    Case(
        "a tangent in support", lambda: with_tangent(lambda unroll, x, y: unroll.adapt((x, y))), NotDifferentiable, r"tangent.*backward\(\)"
    ),
    Case(
        "a tangent in inputs",
        lambda: with_tangent(lambda unroll, x, y: unroll.adapt(data())(x)),
        NotDifferentiable,
        r"tangent.*backward\(\)",
    ),
    Case("a freed graph", lambda: freed_graph(), NotDifferentiable, r"ExpBackward0.*optim\.schedule\(lambda step, log_lr"),
]


def with_tangent(then: Callable[[adaptrt.CompiledUnroll, Tensor, Tensor], Any]) -> Attempt:
    unroll = adaptrt.compile_unroll(nn.Linear(4, 3), optim.sgd(LR), 1, backend="eager")
    x, y = data()

    def run() -> None:
        with forward_ad.dual_level(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own, when it loads its rules for forward mode
            then(unroll, forward_ad.make_dual(x, torch.ones_like(x)), y)

    return Attempt(run, ())


def freed_graph() -> Attempt:
    log_lr = torch.zeros((), requires_grad=True)
    unroll = adaptrt.compile_unroll(nn.Linear(4, 3), optim.sgd(lr=log_lr.exp()), 1, backend="eager")
    unroll(data(), data()).backward()
    return Attempt(lambda: unroll(data(), data()).backward(), ())


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    check_refused(case)


def test_gradients_that_need_no_freed_graph() -> None:
    """The engine does not run the graph behind the learning rate where only the weights' gradients are asked for."""
    log_lr, model = torch.zeros((), requires_grad=True), linear()
    unroll = unrolled(model, opt=optim.sgd(lr=log_lr.exp()))
    unroll(batch(), batch()).backward()
    first = model.weight.grad
    (again,) = torch.autograd.grad(unroll(batch(), batch()), model.weight)
    close(again, first)


def test_optimiser_state_is_read_only() -> None:
    model = linear()
    result = unrolled(model, opt=torch.optim.Adam(model.parameters())).adapt(batch())
    with pytest.raises(CannotBeSet, match=r"opt_state|replace"):
        result.opt_state.clear()
    later = unrolled(model, opt=torch.optim.Adam(model.parameters()))
    start = later.adapt(batch())
    count = len(later.graphs())
    close(later.adapt(batch(), start=start.replace(opt_state=start.opt_state)).losses, later.adapt(batch(), start=start).losses)
    assert len(later.graphs()) == count, "a replaced state is like any other"


def test_replaced_values_are_used() -> None:
    model = linear()
    unroll = unrolled(model)
    other = {"weight": double(3, 4)}
    start = unroll.adapt(batch()).replace(params=other)
    close(start(batch()[0]), F.linear(batch()[0], other["weight"], start.params["bias"]))
    loop, begin = looped(model)
    begin = begin._replace(params={name: value.detach().requires_grad_() for name, value in start.params.items()})
    wanted = naive.adapt(loop, begin, batch())
    close(unroll.adapt(batch(), start=start).losses, wanted.losses)


# --- copies


def test_deep_copy_of_a_result_is_a_snapshot() -> None:
    model = linear()
    unroll = unrolled(model, params="weight")
    result = unroll.adapt(batch())
    twin, before = copy.deepcopy(result), result(batch()[0]).detach()
    assert twin.params["weight"].grad_fn is None and twin.losses.grad_fn is None
    with torch.no_grad():
        model.bias.add_(1)
    close(twin(batch()[0]), before)
    close(result(batch()[0]), before + 1)
    close(unroll.adapt(batch(), start=twin.detach()).params["weight"].shape, result.params["weight"].shape)


@pytest.mark.parametrize("kind", ["pure", "torch.optim", "computed rate"])
def test_deep_copy_of_an_unroll_has_its_own_model(kind: str) -> None:
    model = linear()
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    opt = {
        "pure": lambda: optim.adam(lr=0.1),
        "torch.optim": lambda: torch.optim.Adam(model.parameters(), lr=0.1),
        "computed rate": lambda: optim.sgd(lr=rate * 2),
    }[kind]()
    unroll = unrolled(model, opt=opt)
    learner: dict[str, Any] = copy.deepcopy({"model": model, "unroll": unroll})
    close(learner["unroll"].adapt(batch()).losses, unroll.adapt(batch()).losses)
    with torch.no_grad():
        learner["model"].weight.mul_(2)
    loop, start = looped(learner["model"])
    if kind == "computed rate":
        loop = loop._replace(hyper={"lr": 0.2})
        close(learner["unroll"].adapt(batch()).losses, naive.adapt(loop, start, batch()).losses)
    assert not torch.equal(learner["unroll"].adapt(batch()).losses, unroll.adapt(batch()).losses)
    assert unroll.k == learner["unroll"].k == K
    assert copy.copy(unroll) is unroll


# --- the caller's gradient mode


class Asking(nn.Linear):
    """Scales its output by what it finds out about the mode."""

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        if torch.is_inference_mode_enabled():
            return output * 5
        return output if torch.is_grad_enabled() else output * 3


MODES: dict[str, Callable[[], Any]] = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize(
    ("order", "backend"),
    [
        (("grad", "no_grad", "inference", "grad"), "eager"),
        (("inference", "grad", "no_grad"), "eager"),
        (("inference", "grad", "no_grad"), "inductor"),
    ],
)
def test_a_model_that_asks_for_the_mode(backend: str, order: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = Asking(4, 3).double()
    unroll = unrolled(model, backend=backend)
    loop, start = looped(model)
    after = naive.adapt(loop, start, batch())
    for mode in order:
        with MODES[mode]():
            output = naive.call(model, after.params, {}, batch()[0])[0]
            close(unroll.adapt(batch()).losses, after.losses.detach() if mode != "grad" else after.losses)
            close(unroll.adapt(batch())(batch()[0]), output)
            close(unroll(batch(), batch()), F.cross_entropy(output, batch()[1]))


def test_a_model_that_does_not_ask_has_one_program_for_all_modes() -> None:
    unroll = unrolled(nn.Sequential(linear(), nn.TransformerEncoderLayer(3, 1, 4, dropout=0.0).double()).eval())
    x, y = double(6, 4), torch.arange(6) % 3
    for mode in MODES.values():
        with mode():
            unroll.adapt((x, y))(x)
    assert [name for name in unroll.graphs() if name.startswith("predict")] == ["predict"]


# --- chains of calls


def test_a_long_chain_warns_once() -> None:
    unroll = unrolled(linear())
    result = unroll.adapt(batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(LONG_CHAIN - 1):
            result = unroll.adapt(batch(), start=result)
    with pytest.warns(LongChain, match=r"detach\(\).*torch\.inference_mode\(\)"):
        result = unroll.adapt(batch(), start=result)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(LONG_CHAIN + 1):
            result = unroll.adapt(batch(), start=result)
        result = unroll.adapt(batch())
        for _ in range(LONG_CHAIN + 1):
            result = unroll.adapt(batch(), start=result.detach())
        with torch.inference_mode():
            for _ in range(LONG_CHAIN + 1):
                result = unroll.adapt(batch(), start=result)


# --- inference mode


@pytest.mark.parametrize(
    ("made_there", "backend"), [("start", "eager"), ("data", "eager"), ("model", "eager"), ("start", "inductor"), ("model", "inductor")]
)
def test_tensors_of_inference_mode(made_there: str, backend: str) -> None:
    with torch.inference_mode(made_there == "model"):
        model = linear()
    twin = linear()
    unroll = unrolled(model, backend=backend)
    loop, start = looped(twin)
    with torch.inference_mode(made_there == "data"):
        x, y = batch()
        x, y = x + 0, y + 0
    begin: Any = None
    if made_there == "start":
        with torch.inference_mode():
            begin = unroll.adapt(batch())
        first = naive.adapt(loop, start, batch())
        start = start._replace(params={name: value.detach() for name, value in first.params.items()})
        start = start._replace(params={name: value.requires_grad_() for name, value in start.params.items()})
    extra = batch()[0].requires_grad_()
    wanted = naive.adapt(loop, start, (extra, batch()[1]))  # as eager code, which would not take the others
    (wanted_grad,) = torch.autograd.grad(wanted.losses.sum(), extra, retain_graph=True)
    found = unroll.adapt((extra, y), start=begin)
    close(found.losses, wanted.losses)
    (found_grad,) = torch.autograd.grad(found.losses.sum() + 0 * found(x).sum(), extra)
    close(found_grad, wanted_grad)
    if made_there != "start":
        unroll((x, y), (x, y)).backward()
        naive.meta_loss(loop, start, batch(), batch()).backward()
        close(model.weight.grad, twin.weight.grad)


# --- warmup for calls with start=


def test_warmup_for_start_with_tasks() -> None:
    support = double(2, 6, 4), torch.arange(12).reshape(2, 6) % 3
    unroll = unrolled(linear(), on_new_shape="error").vmap()
    unroll.warmup(support, support)
    result = unroll.adapt(support).detach()
    with pytest.raises(ShapeChanged, match=r"warmup\(support, query, start=True\)"):
        unroll.adapt(support, start=result)
    unroll.warmup(support, support, start=True)
    count = len(unroll.graphs())
    with torch.no_grad():
        later = unroll.adapt(support, start=result)
    unroll(support, support, start=result)
    assert len(unroll.graphs()) == count
    model = unroll._settings.model
    loop, start = looped(model, k=2 * K)
    for task in range(2):
        wanted = naive.adapt(loop, start, (support[0][task], support[1][task]))
        close(later.losses[task], wanted.losses[K:].detach())


def test_start_without_tasks_needs_no_other_program() -> None:
    unroll = unrolled(linear(), on_new_shape="error").warmup(batch(), batch())
    with torch.no_grad():
        result = unroll.adapt(batch())
        count = len(unroll.graphs())
        unroll.adapt(batch(), start=result)
    assert len(unroll.graphs()) == count


# --- targets


class Energy(nn.Module):
    """One value for all atoms together."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).sum(0)


@pytest.mark.parametrize(("loss", "backend"), [(F.mse_loss, "eager"), (squares, "eager"), (F.mse_loss, "inductor")])
def test_one_target_for_a_whole_graph(loss: Callable[..., Tensor], backend: str) -> None:
    model = Energy()
    x, y = double(6, 4), double(1)
    unroll = adaptrt.compile_unroll(model, optim.sgd(lr=0.001), K, loss=loss, backend=backend)
    unroll((x, y), (x, y)).backward()
    found = model.layer.weight.grad
    loop, start = looped(model, loss)
    (wanted,) = torch.autograd.grad(naive.meta_loss(loop._replace(hyper={"lr": 0.001}), start, (x, y), (x, y)), model.layer.weight)
    close(found, wanted)


def test_broadcasts_that_change_nothing_or_are_meant() -> None:
    x = double(6, 4)
    cases: list[tuple[nn.Module, Callable[..., Tensor], Tensor]] = [
        (linear(3), lambda output, y: (1 - y * output).relu().mean(), double(6, 1)),
        (linear(3), squares, double(6, 1)),
        (linear(1), lambda output, y: squares(output, y[:, None]), double(6)),
        (linear(1), lambda output, y: squares(output[:, 0], y), double(6)),
        (linear(1), lambda output, y: (output.mean() - y).square().mean(), double(1)),
    ]
    for model, loss, y in cases:
        loop, start = looped(model, loss)
        close(unrolled(model, loss).adapt((x, y)).losses, naive.adapt(loop, start, (x, y)).losses)


def test_anomaly_mode() -> None:
    model = linear()
    unroll = unrolled(model)
    loop, start = looped(model)
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("ignore")
        found = unroll(batch(), batch())
        assert torch.is_anomaly_enabled()
    close(found, naive.meta_loss(loop, start, batch(), batch()))
