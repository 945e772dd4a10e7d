"""`adapt(outputs="first")`: what the model returned in the first step, and the rest of the adaptation as without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import adaptrt
from adaptrt import Adapted, Adjoint, CompiledUnroll, FirstOrder, Replay, Stash, Truncated, Unrolled, compile_unroll, optim
from adaptrt.adjoint import auto
from adaptrt.errors import InvalidArgument, NonFiniteInput, ShapeChanged
from tests import naive
from tests.gradients import gradients
from tests.models import MODELS, norm_mlp, normal, regress
from tests.pairs import ONE_BATCH_AND_PER_STEP, SINGLE_AND_TASKS, by_name, over_pairs
from tests.tolerances import assert_near

T = 2
LR = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
ADJOINTS: list[Adjoint] = [Unrolled(), Replay(), Stash(), FirstOrder(), Truncated(2)]
over_tasks = pytest.mark.parametrize("tasks", [False, True], ids=["single", "vmap"])


@pytest.fixture
def one_task_after_another(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(auto, "MIN_FLOPS_OF_A_TASK", 0)
    yield


def data(tasks: bool, per_step: int = 0) -> tuple[Tensor, Tensor]:
    generator, lead = Generator().manual_seed(1), (*([T] if tasks else []), *([per_step] if per_step else []))
    return normal(generator, *lead, 5, 3), normal(generator, *lead, 5, 2)


def make(net: nn.Module, adjoint: Adjoint | str, k: int, tasks: bool, backend: str = "eager", opt: Any = None, **options: Any) -> Any:
    opt = optim.sgd(lr=LR, momentum=0.8) if opt is None else opt
    unroll = compile_unroll(net, opt, k, loss=regress, adjoint=adjoint, backend=backend, **options)
    return unroll.vmap() if tasks else unroll


def wanted(net: nn.Module, adjoint: Adjoint | str, k: int, support: Any, per_step: bool) -> tuple[Tensor, naive.Adapted]:
    """The outputs of a forward pass before one task's first step, and the state after its last."""
    found = adjoint if isinstance(adjoint, Adjoint) else Unrolled()
    num_constant = found.num_constant_steps(k)
    start = naive.Start(dict(net.named_parameters()), {}, dict(net.named_buffers()), {})
    hyper: dict[str, Any] = {"lr": LR, "momentum": 0.8}
    kept = k - num_constant if num_constant else None
    loop = naive.Loop(net, regress, naive.sgd, hyper, k, per_step, found.detach_gradient, kept)
    output, _ = naive.call(net, start.params, start.buffers, support[0][0] if per_step else support[0])
    return output.detach() if num_constant else output, naive.adapt(loop, start, support)


def check(adjoint: Adjoint | str, tasks: bool, k: int, per_step: bool, backend: str, start: bool = False) -> CompiledUnroll:
    """Outputs, state and losses, and gradients of a sum of functions of all of them."""
    # Statistics of a batch are tested on the eager backend; their kernels take long to compile.
    net = norm_mlp() if backend == "eager" else MODELS["mlp"].model()
    support = data(tasks, k if per_step else 0)
    rows = [tuple(value[task] for value in support) for task in range(T)] if tasks else [support]
    pairs = [wanted(net, adjoint, k, row, per_step) for row in rows]
    outputs = torch.stack([output for output, _ in pairs]) if tasks else pairs[0][0]
    params = {n: torch.stack([own.params[n] for _, own in pairs]) if tasks else pairs[0][1].params[n] for n in pairs[0][1].params}
    losses = torch.stack([own.losses for _, own in pairs]) if tasks else pairs[0][1].losses
    unroll = make(net, adjoint, k, tasks, backend, per_step=per_step)
    begin = unroll.start(num_tasks=T if tasks else None) if start else None
    adapted = unroll.adapt(support, outputs="first", start=begin)
    assert_near({"outputs": adapted.outputs.detach()}, {"outputs": outputs.detach()}, torch.float64)
    assert_near(dict(adapted.detach().params), {n: v.detach() for n, v in params.items()}, torch.float64)
    assert_near({"losses": adapted.losses.detach()}, {"losses": losses.detach()}, torch.float64)
    leaves = {"lr": LR, **dict(net.named_parameters())}

    def value(outputs: Tensor, params: Any, losses: Tensor) -> Tensor:
        return torch.stack([(part + 1).square().sum() for part in (outputs, losses, *params.values())]).sum()

    found = gradients(value(adapted.outputs, adapted.params, adapted.losses), leaves)
    assert_near(found, gradients(value(outputs, params, losses), leaves), torch.float64)
    with torch.no_grad():
        again = unroll.adapt(support, outputs="first", start=begin)
    assert_near({"outputs": again.outputs}, {"outputs": outputs.detach()}, torch.float64)
    assert not again.outputs.requires_grad
    return unroll


@over_pairs(adjoint=by_name(ADJOINTS), tasks=SINGLE_AND_TASKS, per_step=ONE_BATCH_AND_PER_STEP)
def test_outputs_and_gradients(adjoint: Adjoint, tasks: bool, per_step: bool) -> None:
    check(adjoint, tasks, 3, per_step, "eager")


@over_tasks
def test_a_single_step(tasks: bool) -> None:
    check("auto", tasks, 1, False, "eager")


@pytest.mark.parametrize(("adjoint", "tasks", "k"), [(Unrolled(), False, 1), (Stash(), True, 2)], ids=str)
def test_outputs_and_gradients_compiled(adjoint: Adjoint, tasks: bool, k: int) -> None:
    check(adjoint, tasks, k, False, "inductor")


@pytest.mark.parametrize("adjoint", [Unrolled(), Truncated(2)], ids=str)
def test_one_task_after_another(adjoint: Adjoint, one_task_after_another: None) -> None:
    for start in (False, True):
        assert "EachTask" in str(check(adjoint, True, 3, False, "eager", start).explain())


@over_tasks
def test_going_on(tasks: bool) -> None:
    check(Stash(), tasks, 2, False, "eager", start=True)


def test_several_updates_a_step_and_noise() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 2)).double()
    for opt in (optim.sgd(lr=0.1), optim.lbfgs(lr=0.1, max_iter=3)):
        unroll = make(net, "auto", 2, False, opt=opt)
        support = data(False)
        plain = unroll.adapt(support, generator=Generator().manual_seed(3))
        adapted = unroll.adapt(support, generator=Generator().manual_seed(3), outputs="first")
        assert_near(dict(adapted.detach().params), dict(plain.detach().params), torch.float64)
        assert torch.equal(adapted.losses.detach(), plain.losses.detach())
        assert_near({"loss": regress(adapted.outputs, support[1]).detach()}, {"loss": plain.losses[0].detach()}, torch.float64)


def test_with_guards_numbers_of_steps_and_parts_of_a_batch() -> None:
    net = norm_mlp()
    support = data(True)
    unroll = make(net, Replay(), 3, True)
    adapted = unroll.adapt(support, outputs="first", keep=lambda before, after: after.loss > before.loss, steps=2)
    plain = unroll.adapt(support, steps=2)
    assert not adapted.kept.any() and torch.equal(adapted.params["0.weight"][1], net[0].weight)  # type: ignore[index]
    assert torch.equal(adapted.losses, plain.losses) and plain.outputs is None
    row: Adapted
    for place, row in enumerate(adapted):
        assert torch.equal(row.outputs, adapted.outputs[place]) and torch.equal(adapted[place].outputs, adapted.outputs[place])
    assert adapted.detach()[:1].outputs.shape == (1, 5, 2)
    assert adaptrt.stack(adapted.unbind()).outputs is None and adapted.replace().outputs is None
    unroll = make(net, Unrolled(), 2, True)
    assert unroll.adapt(support, outputs="first", steps=2).losses.shape == (T, 2)


def test_outputs_that_are_no_tensor() -> None:
    class Two(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            output = super().forward(input)
            return {"logits": output, "pair": (output.sum(-1), None), "name": "two"}

    net = Two(3, 2).double()
    unroll = compile_unroll(net, optim.sgd(lr=0.1), 1, loss=lambda found, y: regress(found["logits"], y), backend="eager").vmap()
    x, y = data(True)
    adapted = unroll.adapt((x, y), outputs="first")
    right = net(x)
    for found, own in ((adapted.outputs, right), (adapted[1].outputs, {key: None for key in right}), (adapted.unbind()[1].outputs, right)):
        assert found["name"] == "two" and found["pair"][1] is None and set(found) == set(own)
    assert_near({"logits": adapted.unbind()[1].outputs["logits"].detach()}, {"logits": right["logits"][1].detach()}, torch.float64)


def test_ahead_of_time_and_bad_input() -> None:
    net, support = norm_mlp(), data(False)
    for adjoint in (Unrolled(), Stash()):
        unroll = make(net, adjoint, 2, False, on_new_shape="error")
        unroll.warmup(support)
        with pytest.raises(ShapeChanged, match=r"no program 'first step' .* call unroll.warmup\(support, outputs='first'\) first"):
            unroll.adapt(support, outputs="first")
        unroll.warmup(support, outputs="first")
        before = list(unroll.graphs())
        with torch.no_grad():
            unroll.adapt(support, outputs="first")
        assert list(unroll.graphs()) == before
    with pytest.raises(InvalidArgument, match="outputs must be one of 'first', got 'last'"):
        unroll.adapt(support, outputs="last")
    bad = support[0].clone()
    bad[2, 1] = float("nan")
    with pytest.raises(NonFiniteInput, match=r"support input 0 holds nan at \[2, 1\]"):
        unroll.adapt((bad, support[1]), outputs="first")
