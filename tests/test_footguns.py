"""Every silent mismatch we know of: each row of the hazards in the design, and those found since, as one test."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations

import adaptrt
from adaptrt import FirstOrder, Replay, Stash, Unrolled, compile_unroll, higher, optim
from adaptrt.errors import NotDifferentiable, NotTraceable, UnsupportedParameter, UnsupportedRandomness
from adaptrt.graph.capture import capture, weight_norm
from adaptrt.graph.ir import Graph
from adaptrt.tree import Spec
from tests import naive
from tests.models import MODELS, normal, regress
from tests.pairs import SINGLE_AND_TASKS, by_name, over_pairs
from tests.test_meta_gradients import differentiate
from tests.tolerances import EQUAL, META_GRADIENT, SECOND_DERIVATIVE, assert_close, assert_near, relative_error

over_adjoints = pytest.mark.parametrize("adjoint", [Unrolled(), Replay(), Replay(every=2), Stash()], ids=str)
LR = 0.1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start_of(model: nn.Module) -> naive.Start:
    return naive.Start(dict(model.named_parameters()), {}, dict(model.named_buffers()), {})


def small_mlp() -> tuple[nn.Module, Any, Any]:
    entry = MODELS["mlp"]
    return entry.model(), entry.data(1, 4), entry.data(2, 3)


def check_against_oracle(
    model: nn.Module, loss: Callable[..., Tensor], support: Any, query: Any, adjoint: adaptrt.Adjoint, backend: str = "eager", k: int = 3
) -> None:
    """The meta-gradient of plain SGD."""
    unroll = compile_unroll(model, optim.sgd(lr=LR), k, loss=loss, adjoint=adjoint, backend=backend)
    got = differentiate(unroll(support, query), model, {})
    loop = naive.Loop(model, loss, naive.sgd, {"lr": LR}, k, first_order=isinstance(adjoint, FirstOrder))
    adapted = {name: param for name, param in model.named_parameters() if param.requires_grad}
    frozen = {name: param for name, param in model.named_parameters() if not param.requires_grad}
    start = naive.Start(adapted, frozen, dict(model.named_buffers()), {})
    assert_near(got, differentiate(naive.meta_loss(loop, start, support, query), model, {}))


def operations(graph: Graph) -> set[str]:
    return {str(node.target) for node in graph.module.graph.nodes if node.op == "call_function"}


# --- capture


def test_one_tensor_given_twice_is_two_inputs() -> None:
    x = normal(generator(), 3)
    graph = capture(lambda a, b: torch.autograd.grad((a.requires_grad_() * b).sum(), a)[0], x, x)
    assert torch.equal(graph.run(x, x), x)
    assert torch.equal(graph.run(x, 2 * x), 2 * x)


@over_adjoints
def test_support_is_query(adjoint: adaptrt.Adjoint) -> None:
    model, support, _ = small_mlp()
    check_against_oracle(model, regress, support, support, adjoint)


@over_adjoints
def test_input_is_target(adjoint: adaptrt.Adjoint) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    x = normal(generator(), 4, 3)
    check_against_oracle(model, regress, (x, x), (x, x), adjoint)


@over_adjoints
def test_start_shares_a_tensor_with_support(adjoint: adaptrt.Adjoint) -> None:
    # The parameter itself is the data, as in learning to compress; each of its two roles has a gradient.
    model = nn.Linear(3, 3, bias=False).double()

    def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
        model.weight.grad = None
        run(model.weight).backward()
        assert model.weight.grad is not None
        return model.weight.grad

    target = normal(generator(1), 3, 3)
    unroll = compile_unroll(model, optim.sgd(lr=LR), 3, loss=regress, adjoint=adjoint, backend="eager")
    loop = naive.Loop(model, regress, naive.sgd, {"lr": LR}, 3)
    got = gradient(lambda w: unroll((w, target), (w, target)))
    # In the oracle the parameter is a tensor of its own, or the inner gradient would be by the data too.
    wanted = gradient(lambda w: naive.meta_loss(loop, naive.Start({"weight": w.clone()}, {}, {}, {}), (w, target), (w, target)))
    assert relative_error(got, wanted) <= META_GRADIENT[torch.float64]


class Detaches(nn.Module):
    """The user's own `detach`, in the middle of a path that gradients would take otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        with torch.no_grad():
            scale = 1 + h.square().mean()
        return self.second(h.detach() * h / scale)


@over_adjoints
def test_own_detach_is_kept(adjoint: adaptrt.Adjoint) -> None:
    _, support, query = small_mlp()
    check_against_oracle(Detaches().double(), regress, support, query, adjoint)


def test_capture_runs_on_fake_tensors() -> None:
    seen: list[type] = []

    def fn(x: Tensor) -> Tensor:
        seen.append(type(x))
        return x * 2

    capture(fn, torch.ones(2))
    assert seen and all(kind.__name__ == "FakeTensor" for kind in seen)


def test_values_are_not_baked_in() -> None:
    model, support, query = small_mlp()
    unroll = compile_unroll(model, optim.sgd(lr=LR), 2, loss=regress, adjoint=Replay(), backend="eager")
    unroll(support, query)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1.5)
    other = tuple(2 * value for value in support)
    loop = naive.Loop(model, regress, naive.sgd, {"lr": LR}, 2)
    start = start_of(model)
    got, wanted = unroll(other, query), naive.meta_loss(loop, start, other, query)
    assert_near(differentiate(got, model, {}), differentiate(wanted, model, {}))


# --- kernels without a second derivative


@over_adjoints
def test_attention_has_a_second_derivative(adjoint: adaptrt.Adjoint) -> None:
    entry = MODELS["attention"]
    model = entry.model()
    check_against_oracle(model, entry.loss, entry.data(1, 4), entry.data(2, 3), adjoint, k=2)


def test_first_order_attention_stays_fused() -> None:
    entry = MODELS["attention"]
    found: dict[bool, bool] = {}
    for adjoint in (FirstOrder(), Replay()):
        unroll = compile_unroll(entry.model(), optim.sgd(lr=LR), 2, loss=entry.loss, adjoint=adjoint, backend="eager")
        unroll(entry.data(1, 4), entry.data(2, 3))
        found[adjoint.detach_gradient] = any("flash" in name for graph in unroll.graphs().values() for name in operations(graph))
    assert found == {True: True, False: False}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_recurrent_second_derivative(kind: Callable[..., nn.RNNBase], dtype: torch.dtype) -> None:
    # In float32 PyTorch takes an LSTM from mkldnn on the CPU, which has no second derivative.
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = kind(3, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.cells(x)[0][:, -1]

    torch.manual_seed(0)
    model = Last().double()
    support, query = ((normal(generator(seed), 3, 2, 3), normal(generator(seed + 1), 3, 2)) for seed in (1, 3))
    loop = naive.Loop(copy.deepcopy(model), regress, naive.sgd, {"lr": LR}, 2)
    start = start_of(loop.model)
    wanted = differentiate(naive.meta_loss(loop, start, support, query), loop.model, {})
    unroll = compile_unroll(model.to(dtype), optim.sgd(lr=LR), 2, loss=regress, adjoint=Replay(), backend="eager")
    got = differentiate(unroll(*[tuple(value.to(dtype) for value in part) for part in (support, query)]), model, {})
    assert_near(got, wanted, dtype)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(_Frozen.apply(self.first(x)))  # type: ignore[arg-type]


@over_adjoints
def test_once_differentiable_is_refused(adjoint: adaptrt.Adjoint) -> None:
    _, support, query = small_mlp()
    unroll = compile_unroll(Custom().double(), optim.sgd(lr=LR), 2, loss=regress, adjoint=adjoint, backend="eager")
    with pytest.raises(NotDifferentiable, match="_Frozen"):
        unroll(support, query)
    unroll.adapt(support)


def test_once_differentiable_in_first_order() -> None:
    _, support, query = small_mlp()
    model = Custom().double()
    loop = naive.Loop(model, regress, naive.sgd, {"lr": LR}, 2, first_order=True)
    unroll = compile_unroll(model, optim.sgd(lr=LR), 2, loss=regress, adjoint=FirstOrder(), backend="eager")
    start = start_of(model)
    got, wanted = unroll(support, query), naive.meta_loss(loop, start, support, query)
    assert_near(differentiate(got, model, {}), differentiate(wanted, model, {}))


# --- a graph is functional


class Formulas(nn.Module):
    """Operations whose derivative formulas work in place (`div_`, `add_`, `mul_`)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.linear(x)))
        h = h / (1 + h.cumsum(0).square().prod(1, keepdim=True))
        h = torch.linalg.vector_norm(h, dim=1, keepdim=True) * F.normalize(h + 2) + h.std(1, keepdim=True)
        return F.huber_loss(h, h.roll(1, 1).detach(), reduction="none", delta=0.3)[:, :2] + h.logsumexp(1, keepdim=True)


@over_adjoints
def test_formulas_that_work_in_place(adjoint: adaptrt.Adjoint) -> None:
    _, support, query = small_mlp()
    check_against_oracle(Formulas().double(), regress, support, query, adjoint)


def test_all_graphs_are_functional() -> None:
    entry = MODELS["in-place"]
    unroll = compile_unroll(entry.model(), optim.sgd(lr=LR, momentum=0.9), 2, loss=entry.loss, adjoint=Replay(), backend="eager")
    unroll(entry.data(1, 4), entry.data(2, 3))
    assert len(unroll.graphs()) == 3
    for graph in unroll.graphs().values():
        for node in graph.module.graph.nodes:
            assert not getattr(getattr(node.target, "_schema", None), "is_mutable", False)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own, from torch.func.jvp
def test_jvp_of_gradient_holds_no_special_operation() -> None:
    # jvp(grad) graphs are recorded with is_same_size and _efficientzerotensor, which few backends know.
    def fn(x: Tensor, tangent: Tensor) -> Any:
        return torch.func.jvp(torch.func.grad(lambda y: (y.sin() * y**2).sum()), (x,), (tangent,))

    x, tangent = normal(generator(), 4), normal(generator(1), 4)
    graph = capture(fn, x, tangent)
    assert not any("is_same_size" in name or "efficientzero" in name for name in operations(graph))
    for got, wanted in zip(graph.run(x, tangent), fn(x, tangent), strict=True):
        torch.testing.assert_close(got, wanted)


def test_input_written_to_is_refused() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.mul_(2.0))

    _, support, query = small_mlp()
    before = [value.clone() for value in (*support, *query)]
    unroll = compile_unroll(Overwrites().double(), optim.sgd(lr=LR), 2, loss=regress, adjoint=Replay(), backend="eager")
    with pytest.raises(adaptrt.errors.AdaptrtError):
        unroll(support, query)
    assert all(torch.equal(old, new) for old, new in zip(before, (*support, *query), strict=True))


# --- what is an input


def test_constant_attribute_is_read_live() -> None:
    entry = MODELS["attributes"]
    model, (support, query) = entry.model(), (entry.data(1, 4), entry.data(2, 3))
    unroll = compile_unroll(model, optim.sgd(lr=LR), 2, loss=regress, adjoint=Unrolled(), backend="eager")
    unroll(support, query)
    unroll.adapt(support)(query[0])
    model.scale = torch.tensor([2.0, 0.1], dtype=torch.float64)
    check_against_oracle(model, regress, support, query, Unrolled(), k=2)
    loop = naive.Loop(model, regress, naive.sgd, {"lr": LR}, 2)
    wanted = naive.meta_loss(loop, start_of(model), support, query)
    assert_near({"loss": unroll(support, query)}, {"loss": wanted})
    assert_near({"loss": regress(unroll.adapt(support)(query[0]), query[1])}, {"loss": wanted})


def test_constant_changed_in_place_is_seen() -> None:
    entry = MODELS["attributes"]
    model, (support, query) = entry.model(), (entry.data(1, 4), entry.data(2, 3))
    unroll = compile_unroll(model, optim.sgd(lr=LR), 2, loss=regress, adjoint=Replay(), backend="eager")
    first = unroll(support, query)
    model.offsets[1].mul_(2.0)  # type: ignore[index, union-attr]
    second = unroll(support, query)
    assert not torch.equal(first, second)
    loop = naive.Loop(model, regress, naive.sgd, {"lr": LR}, 2)
    wanted = naive.meta_loss(loop, start_of(model), support, query)
    assert_near({"loss": second}, {"loss": wanted})


def test_constant_that_requires_grad_is_refused() -> None:
    entry = MODELS["attributes"]
    model = entry.model()
    model.scale = torch.ones(2, dtype=torch.float64, requires_grad=True)
    unroll = compile_unroll(model, optim.sgd(lr=LR), 2, loss=regress, adjoint=Replay(), backend="eager")
    with pytest.raises(adaptrt.errors.UnsupportedParameter, match="scale"):
        unroll(entry.data(1, 4), entry.data(2, 3))


def test_tied_weights_move_together() -> None:
    entry = MODELS["tied"]
    model = entry.model()
    unroll = compile_unroll(model, optim.sgd(lr=LR), 2, loss=entry.loss, backend="eager")
    adapted = unroll.adapt(entry.data(1, 4))
    assert set(adapted.params) == {"embed.weight", "hidden.weight", "hidden.bias", "head.bias"}
    state = adapted.state_dict()
    assert set(state) == set(model.state_dict())
    assert torch.equal(state["embed.weight"], state["head.weight"])
    assert not torch.equal(state["embed.weight"], model.state_dict()["embed.weight"])


def test_unused_parameter_has_no_gradient_and_does_not_move() -> None:
    entry = MODELS["idle"]
    model = entry.model()
    opt = optim.adamw(lr=0.1, weight_decay=0.5)
    unroll = compile_unroll(model, opt, 2, loss=entry.loss, adjoint=Replay(), backend="eager")
    adapted = unroll.adapt(entry.data(1, 4))
    assert torch.equal(adapted.params["unused"], model.get_parameter("unused"))
    assert "frozen.weight" not in adapted.params
    unroll(entry.data(1, 4), entry.data(2, 3)).backward()
    unused = model.get_parameter("unused").grad
    assert unused is None or not unused.any()
    assert model.get_parameter("frozen.weight").grad is None


# --- autograd around programs


@over_adjoints
def test_double_backward_raises(adjoint: adaptrt.Adjoint) -> None:
    model, support, query = small_mlp()
    unroll = compile_unroll(model, optim.sgd(lr=LR), 2, loss=regress, adjoint=adjoint, backend="eager")
    values: list[Tensor] = [unroll(support, query)]
    adapted = unroll.adapt(support)
    values += [adapted(query[0]).sum(), adapted.params["0.weight"].square().sum(), adapted.losses.sum()]
    for value in values:
        grads = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
        with pytest.raises(RuntimeError):
            sum((grad.square().sum() for grad in grads), torch.zeros(())).backward()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_results_never_alias_arguments(backend: str) -> None:
    entry = MODELS["idle"]
    model = entry.model()
    unroll = compile_unroll(model, optim.sgd(lr=LR), 1, loss=entry.loss, adjoint=Replay(), backend=backend)
    with torch.no_grad():
        adapted = unroll.adapt(entry.data(1, 4))
        before = {name: value.clone() for name, value in adapted.params.items()}
        for param in model.parameters():
            param.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in adapted.params.items())
    memory = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    owned = [value.untyped_storage().data_ptr() for value in (*adapted.params.values(), adapted.losses)]
    assert memory.isdisjoint(owned) and len(set(owned)) == len(owned)


def test_buffers_that_do_not_change_are_copies() -> None:
    entry = MODELS["conv-bn-eval"]
    model = entry.model()
    unroll = compile_unroll(model, optim.sgd(lr=LR), 1, loss=entry.loss, backend="eager")
    adapted = unroll.adapt(entry.data(1, 4))
    wanted = {name: value.clone() for name, value in model.named_buffers()}
    for buffer in model.buffers():
        buffer.add_(1)
    assert all(torch.equal(adapted.buffers[name], value) for name, value in wanted.items())


def test_prediction_after_the_model_moved_on() -> None:
    entry = MODELS["mlp-head-only"]
    model, (x, _) = entry.model(), entry.data(2, 3)
    unroll = compile_unroll(model, optim.sgd(lr=LR), 1, loss=entry.loss, params="2.*", backend="eager")
    with torch.no_grad():
        adapted = unroll.adapt(entry.data(1, 4))
        before = adapted(x)
        assert torch.equal(adapted(x), before)
        model.get_parameter("2.weight").add_(1.0)
        assert torch.equal(adapted(x), before)


@over_adjoints
def test_backward_after_parameters_changed_in_place_raises(adjoint: adaptrt.Adjoint) -> None:
    model, support, query = small_mlp()
    unroll = compile_unroll(model, optim.sgd(lr=LR), 2, loss=regress, adjoint=adjoint, backend="eager")
    adapted = unroll.adapt(support)
    value = regress(adapted(query[0]), query[1])
    with torch.no_grad():
        model.get_parameter("0.weight").add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_optimizer_step_between_loss_and_backward() -> None:
    # The gradient of the meta-loss is computed together with it: it is that of the parameters at the call.
    model, support, query = small_mlp()
    unroll = compile_unroll(model, optim.sgd(lr=LR), 2, loss=regress, backend="eager")
    wanted = differentiate(unroll(support, query), model, {})
    value = unroll(support, query)
    with torch.no_grad():
        model.get_parameter("0.weight").add_(1.0)
    assert_near(differentiate(value, model, {}), wanted)


def test_gradients_accumulate() -> None:
    model, support, query = small_mlp()
    unroll = compile_unroll(model, optim.sgd(lr=LR), 2, loss=regress, backend="eager")
    wanted = differentiate(unroll(support, query), model, {})
    for _ in range(2):
        (unroll(support, query) * 0.5).backward()
    got = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    assert_near(got, {name: wanted[name] for name in got})


# --- the caller's modes


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_training_after_inference_mode(backend: str) -> None:
    model, support, query = small_mlp()
    unroll = compile_unroll(model, torch.optim.SGD(model.parameters(), lr=LR), 2, loss=regress, adjoint=Replay(), backend=backend)
    with torch.inference_mode():
        prediction = unroll.adapt(support)(query[0])
        loss = unroll(support, query)
    assert not prediction.requires_grad and not loss.requires_grad
    loop = naive.Loop(model, regress, naive.sgd, {"lr": LR}, 2)
    start = start_of(model)
    wanted = differentiate(naive.meta_loss(loop, start, support, query), model, {})
    assert_near(differentiate(unroll(support, query), model, {}), wanted)
    assert_near(differentiate(regress(unroll.adapt(support)(query[0]), query[1]), model, {}), wanted)


def test_inference_after_training() -> None:
    model, support, query = small_mlp()
    unroll = compile_unroll(model, optim.sgd(lr=LR), 2, loss=regress, backend="eager")
    wanted = unroll(support, query)
    wanted.backward()
    with torch.inference_mode():
        assert_near({"loss": unroll(support, query)}, {"loss": wanted})
        assert_near({"loss": regress(unroll.adapt(support)(query[0]), query[1])}, {"loss": wanted})


@pytest.mark.parametrize("cached", [False, True])
def test_autocast_outside(cached: bool) -> None:
    model, support, query = small_mlp()
    model = model.float()
    support, query = (tuple(value.float() for value in part) for part in (support, query))
    unroll = compile_unroll(model, optim.sgd(lr=LR), 2, loss=regress, adjoint=Replay(), backend="eager")
    reference = compile_unroll(model, optim.sgd(lr=LR), 2, loss=regress, adjoint=Replay(), backend="eager")
    wanted = differentiate(reference(support, query), model, {})
    if cached:
        unroll(support, query)
        unroll.adapt(support)(query[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = differentiate(unroll(support, query), model, {})
        prediction = unroll.adapt(support)(query[0])
    assert prediction.dtype is torch.float32
    for name, value in wanted.items():
        assert torch.equal(got[name], value)
    assert relative_error(regress(prediction, query[1]), wanted["value"]) < 1e-6


def test_no_grad_outside_records_nothing() -> None:
    model, support, query = small_mlp()
    unroll = compile_unroll(model, optim.sgd(lr=LR), 2, loss=regress, backend="eager")
    with torch.no_grad():
        assert not unroll(support, query).requires_grad
        adapted = unroll.adapt(support)
    assert not any(value.requires_grad for value in adapted.params.values())


def test_default_dtype_does_not_matter() -> None:
    model, support, query = small_mlp()
    unroll = compile_unroll(model, optim.adam(lr=LR), 2, loss=regress, backend="eager")
    wanted = unroll(support, query)
    other = compile_unroll(model, optim.adam(lr=LR), 2, loss=regress, backend="eager")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(other(support, query), wanted)
    finally:
        torch.set_default_dtype(before)


def test_train_and_eval_are_different_programs() -> None:
    entry = MODELS["conv-bn-train"]
    model, (support, query) = entry.model(), (entry.data(1, 4), entry.data(2, 3))
    unroll = compile_unroll(model, optim.sgd(lr=LR), 2, loss=entry.loss, backend="eager")
    for training in (True, False, True):
        model.train(training)
        loop = naive.Loop(model, entry.loss, naive.sgd, {"lr": LR}, 2)
        start = start_of(model)
        wanted = naive.meta_loss(loop, start, support, query)
        assert_near(differentiate(unroll(support, query), model, {}), differentiate(wanted, model, {}))


def test_arguments_need_not_be_contiguous() -> None:
    model, support, query = small_mlp()
    unroll = compile_unroll(model, optim.sgd(lr=LR), 2, loss=regress, backend="eager")
    wanted = unroll(support, query)
    strided = tuple(value.t().contiguous().t() for value in support)
    assert not strided[0].is_contiguous()
    assert_near({"loss": unroll(strided, query)}, {"loss": wanted})


def test_noise_is_drawn_anew_at_each_call_and_step() -> None:
    entry = MODELS["dropout"]
    model, support = entry.model(), entry.data(1, 4)
    unroll = compile_unroll(model, optim.sgd(lr=0.0), 3, loss=entry.loss, backend="eager")
    with torch.no_grad():
        first, second = unroll.adapt(support).losses, unroll.adapt(support).losses
    assert len({float(value) for value in (*first, *second)}) == 6
    same = [unroll.adapt(support, generator=generator(3)).losses for _ in range(2)]
    assert torch.equal(*same)


def test_fused_dropout_is_the_same_function() -> None:
    # What dropout is on a GPU; on the CPU PyTorch composes it from other operations.
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            kept = torch.native_dropout(x * self.weight, 0.75, True)
            return kept[0], kept[1]

    model, x = Fused(), normal(generator(), 4, 3)
    mask = torch.empty(4, 3, dtype=torch.float64).bernoulli_(0.25, generator=generator(1))
    (output, kept), _ = adaptrt.trace(model, x).run(dict(model.named_parameters()), {}, (mask,), (x,))
    torch.testing.assert_close(output, x * model.weight.detach() * mask * 4)
    assert torch.equal(kept, mask.bool())


def test_forward_and_pullback_see_the_same_noise() -> None:
    # lr = 0: the adapted model is the model; with one mask for both, the first parameter's gradient is zero where the mask is.
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 1, bias=False)).double()
    x = torch.ones(1, 8, dtype=torch.float64)
    unroll = compile_unroll(model, optim.sgd(lr=0.0), 1, loss=lambda output: output.sum(), adjoint=Replay(), backend="eager")
    adapted = unroll.adapt((x,))
    adapted.losses.sum().backward()
    weight = model.get_parameter("1.weight")
    assert weight.grad is not None
    assert float((weight.grad * weight).sum().detach()) == pytest.approx(float(adapted.losses.sum().detach()), rel=1e-12)


def test_capture_takes_specs() -> None:
    spec = Spec((2, 3), torch.float64, torch.device("cpu"))
    graph = capture(lambda x: x.t() @ x, spec)
    x = normal(generator(), 2, 3)
    assert torch.equal(graph.run(x), x.t() @ x)


IN_PLACE = {
    "gt_": (0.0,),
    "ge_": (0.0,),
    "lt_": (0.0,),
    "le_": (0.0,),
    "ne_": (0.5,),
    "eq_": (0.5,),
    "logical_not_": (),
    "relu_": (),
    "clamp_": (-0.5, 0.5),
    "mul_": (2.0,),
    "div_": (3.0,),
    "pow_": (2.0,),
    "float_power_": (2.0,),
    "fill_": (1.5,),
    "zero_": (),
    "neg_": (),
    "sign_": (),
    "t_": (),
    "unsqueeze_": (0,),
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_place_operations_keep_value_and_dtype(name: str, dtype: torch.dtype) -> None:
    # x.gt_(0) keeps the dtype of x, where x.gt(0) is boolean.
    def fn(value: Tensor) -> Any:
        changed = getattr((value * 1.0).clone(), name)(*IN_PLACE[name])
        return changed, changed + changed

    if name == "float_power_" and dtype is torch.float32:
        pytest.skip("PyTorch refuses it: the result is double")
    value = normal(generator(), 3, 4).to(dtype)
    for got, wanted in zip(capture(fn, value).run(value), fn(value), strict=True):
        assert got.dtype == wanted.dtype
        assert_close(got, wanted, EQUAL)


class Flow(nn.Module):
    """Two layers; what passes between them is up to the subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()


class MaskedInPlace(Flow):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        mask = h.detach().clone().gt_(0)
        return self.b(h * (mask + mask))


class FrozenFeedsBuffer(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        out = self.b(h - self.mean)
        self.mean = 0.5 * self.mean + 0.5 * h.mean(0)
        return out


class BufferFeedsBuffer(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("late", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("early", torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out = self.b(self.a(x)) + self.late
        self.late = self.early * 1.0
        self.early = out.mean(0)
        return out


class Transposed(Flow):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)).transpose(1, 2)


@over_pairs(
    kind={kind.__name__: kind for kind in (MaskedInPlace, FrozenFeedsBuffer, BufferFeedsBuffer, Transposed)},
    adjoint=by_name([Unrolled(), Replay(), Replay(every=2)]),
    vmap=SINGLE_AND_TASKS,
)
def test_models_that_once_gave_wrong_numbers(kind: type[Flow], adjoint: Any, vmap: bool) -> None:
    model = kind()
    select = "b.*" if kind is FrozenFeedsBuffer else None
    inputs, target = normal(generator(), 6, 3), normal(generator(1), 6, 2)
    if kind is Transposed:
        inputs, target = inputs.reshape(2, 3, 3), target.reshape(2, 2, 3)
    names = [name for name, _ in model.named_parameters() if select is None or name.startswith("b.")]
    values: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for _ in range(4):
        fast = dict(values)
        output = torch.func.functional_call(model, fast, (inputs,), tie_weights=False)
        grads = torch.autograd.grad(F.mse_loss(output, target), [values[name] for name in names], create_graph=True)
        values = {**fast, **{name: values[name] - 0.3 * grad for name, grad in zip(names, grads, strict=True)}}
    wanted = torch.autograd.grad(
        F.mse_loss(torch.func.functional_call(model, values, (inputs,), tie_weights=False), target), list(model.parameters())
    )
    unroll = compile_unroll(model, adaptrt.optim.sgd(0.3), 4, loss=F.mse_loss, params=select, adjoint=adjoint, backend="eager")
    batch: tuple[Tensor, ...] = (inputs, target)
    if vmap:
        unroll, batch = unroll.vmap(), tuple(torch.stack([value, value]) for value in batch)
    got = torch.autograd.grad(unroll(batch, batch), list(model.parameters()))
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other, SECOND_DERIVATIVE)


class InTuple(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.body = (self.a, self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.body[1](self.body[0](x))


def test_module_in_a_tuple_adapts() -> None:
    model = InTuple().requires_grad_(False)
    adapted = compile_unroll(model, adaptrt.optim.sgd(0.1), 1, params="*", backend="eager").adapt((normal(generator(), 6, 3), zeros(6)))
    assert all(not torch.equal(value, model.get_parameter(name)) for name, value in adapted.params.items())


class InClosure(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.call = lambda x: self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.call(x))


class StateInAttribute(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out = self.b(self.a(x)) + self.state
        self.state = out.mean(0).detach()
        return out


class DrawsInPython(Flow):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) if random.random() < 0.5 else x)


class DrawsInNumPy(Flow):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * float(np.random.rand()))


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (InClosure, NotTraceable, "'a.weight' is used by way of a module that the model holds in a closure"),
        (StateInAttribute, NotTraceable, r"changes model\.state \(.*test_footguns\.py:\d+\)\. .* Make it a buffer"),
        (DrawsInPython, UnsupportedRandomness, "Python's or NumPy's random numbers"),
        (DrawsInNumPy, UnsupportedRandomness, "Python's or NumPy's random numbers"),
    ],
)
def test_models_that_cannot_be_right_are_refused(kind: type[Flow], error: type[Exception], message: str) -> None:
    model = kind().requires_grad_(False)
    unroll = compile_unroll(model, adaptrt.optim.sgd(0.1), 2, params="*", backend="eager")
    with pytest.raises(error, match=message):
        unroll.adapt((normal(generator(), 6, 3), zeros(6)))


def test_loss_that_holds_an_adapted_parameter_is_refused() -> None:
    class Regularised(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output, target) + sum(param.square().sum() for param in self.model.parameters())

    model = Flow()
    with pytest.raises(UnsupportedParameter, match=r"the loss holds the model's parameter 'a.weight'"):
        compile_unroll(model, adaptrt.optim.sgd(0.1), 1, loss=Regularised(model))


def test_attributes_that_shared_a_tensor_may_not_part() -> None:
    class Scaled(Flow):
        def __init__(self) -> None:
            super().__init__()
            self.default = torch.tensor(2.0, dtype=torch.float64)
            self.scale = self.default

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) * self.scale

    scaled = Scaled()
    batch = normal(generator(), 6, 3), zeros(6)
    unroll = compile_unroll(scaled, adaptrt.optim.sgd(0.1), 1, backend="eager")
    unroll.adapt(batch)
    scaled.scale = torch.tensor(3.0, dtype=torch.float64)
    with pytest.raises(NotTraceable, match="default, scale held one tensor"):
        unroll.adapt(batch)


def test_glob_on_the_second_name_of_a_tied_weight_adapts_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    model[1].weight = model[0].weight
    unroll = compile_unroll(model, adaptrt.optim.sgd(0.1), 1, params="1.*", backend="eager")
    assert set(unroll.adapt((normal(generator(), 6, 3), zeros(6))).params) == {"0.weight", "1.bias"}


def test_prediction_after_the_optimiser_has_changed_its_form() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    unroll = compile_unroll(model, opt, 2, backend="eager")
    support, query = (normal(generator(), 6, 3), zeros(6)), normal(generator(1), 4, 3)
    unroll.adapt(support)(query)
    opt.param_groups[0]["momentum"] = 0.9
    assert unroll.adapt(support)(query).shape == (4, 2)


def zeros(rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.int64)


def test_inductor_keeps_the_memory_layout_of_weights() -> None:
    """It prefers another for convolutions; eager code that follows would then draw other random numbers, and `view` could fail."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    batch = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    adapted = compile_unroll(model, optim.sgd(lr=LR), 1, adjoint=FirstOrder(), backend="inductor").adapt(batch)
    assert {name: p.stride() for name, p in adapted.params.items()} == {name: p.stride() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weight_norm_by_its_formula_is_as_accurate_as_the_operation(dtype: torch.dtype) -> None:
    """Which rounds once in half precision."""
    torch.manual_seed(0)
    v, g = torch.randn(64, 64).to(dtype), (torch.rand(64, 1) + 0.5).to(dtype)
    exact = v.double() * (g.double() / v.double().norm(dim=1, keepdim=True))

    def error(value: Tensor) -> float:
        assert value.dtype is dtype
        return float(((value.double() - exact) / exact).abs().max())

    by_operation, by_formula = error(torch._weight_norm(v, g, 0)), error(weight_norm(v, g, 0))  # pyright: ignore[reportPrivateImportUsage]
    assert by_formula <= max(by_operation, 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.weight_norm], ids=["parametrization", "hook"])
@pytest.mark.parametrize("on_the_tape", [False, True], ids=["program", "tape"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_weight_norm_has_the_right_second_derivative(wrap: Callable[..., nn.Module], on_the_tape: bool) -> None:
    """PyTorch differentiates the gradient of `torch._weight_norm` as if the norms in it did not depend on `v`."""
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(3, 4)), nn.Tanh(), wrap(nn.Linear(4, 2), dim=1)).double()
    support, query = (tuple(torch.randn(5, size, dtype=torch.float64) for size in (3, 2)) for _ in range(2))
    opt = torch.optim.SGD(model.parameters(), lr=0.3)
    unroll = compile_unroll(model, opt, 2, loss=F.mse_loss, adjoint=Replay(), backend="eager")

    def value() -> Tensor:
        if not on_the_tape:
            return unroll(support, query)
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
            for _ in range(2):
                diffopt.step(F.mse_loss(fmodel(support[0]), support[1]))
            return F.mse_loss(fmodel(query[0]), query[1])

    params = list(model.parameters())
    grads = torch.autograd.grad(value(), params)
    directions = [torch.randn_like(p) for p in params]
    values: list[float] = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, direction in zip(params, directions, strict=True):
                p.add_(direction, alpha=step)
        values.append(float(value().detach()))
    found = sum(float((grad * direction).sum()) for grad, direction in zip(grads, directions, strict=True))
    assert found == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)
