"""`dtype=torch.bfloat16`: what autocast does in an eager loop, captured; parameters and state stay in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt import Adjoint, CompiledUnroll, CudaGraph, Eager, FirstOrder, Inductor, Replay, Stash, Unrolled, compile_unroll, optim
from adaptrt.errors import InvalidArgument, InvalidType
from tests import naive
from tests.recorders import TapeRecorder
from tests.tolerances import BFLOAT16, relative_error


class Autocast(nn.Module):
    """A part of an eager loop under autocast."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.part(*args)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 3))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3))


def group_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3))


MODELS = {"mlp": (mlp, (6,)), "conv": (conv, (1, 6, 6)), "group-norm": (group_norm, (1, 6, 6))}
ADJOINTS: list[Adjoint] = [Unrolled(), Replay(), Stash()]


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]()


def batch(name: str, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(9, *MODELS[name][1], generator=generator), torch.arange(9) % 3


def oracle(name: str, dtype: torch.dtype, task: int = 0, k: int = 2) -> list[Tensor]:
    """Meta-loss and meta-gradient of the eager loop: in bfloat16 by autocast, or in the dtype itself."""
    model = make(name).to(torch.float64 if dtype is torch.float64 else torch.float32)
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    mixed = dtype is torch.bfloat16
    # The wrapper's names have a part more; a step takes everything by name.
    prefix = "part." if mixed else ""
    loop = naive.Loop(
        Autocast(model) if mixed else model,
        Autocast(F.cross_entropy) if mixed else F.cross_entropy,
        naive.adam,
        {"lr": 0.02, "eps": 0.01},
        k,
    )
    start = naive.Start({prefix + key: p for key, p in params.items()}, {}, {prefix + key: b for key, b in buffers.items()}, {})
    support, query = ((x.double() if dtype is torch.float64 else x, y) for x, y in (batch(name, task), batch(name, task + 1)))
    loss = naive.meta_loss(loop, start, support, query)
    assert loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    return [loss.detach(), *torch.autograd.grad(loss, list(params.values()))]


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Of loss and whole gradient, whichever is larger."""
    got, expected = (torch.cat([value.double().flatten() for value in part[1:]]) for part in (found, wanted))
    return max(relative_error(found[0], wanted[0]), relative_error(got, expected))


def ours(name: str, adjoint: Adjoint, backend: Any, tasks: int | None = None, k: int = 2) -> tuple[CompiledUnroll, nn.Module, list[Tensor]]:
    model = make(name)
    unroll = compile_unroll(model, optim.adam(lr=0.02, eps=0.01), k, adjoint=adjoint, backend=backend, dtype=torch.bfloat16)
    support, query = batch(name, 0), batch(name, 1)
    if tasks is not None:
        unroll = unroll.vmap()
        # Task t has the batches t and t + 1.
        support, query = (
            tuple(torch.stack(parts) for parts in zip(*(batch(name, task + later) for task in range(tasks)), strict=True))
            for later in (0, 1)
        )
    loss = unroll(support, query)
    return unroll, model, [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_eager_programs_do_what_autocast_does(name: str, adjoint: Adjoint) -> None:
    _, _, found = ours(name, adjoint, Eager())
    wanted, exact = oracle(name, torch.bfloat16), oracle(name, torch.float64)
    assert all(value.dtype is torch.float32 for value in found)
    assert error(found, wanted) <= BFLOAT16 / 10, "not what autocast computes"
    assert 1e-4 < error(found, exact) <= BFLOAT16, "not in bfloat16, or too far off"


@pytest.mark.parametrize("adjoint", [Unrolled(), Stash()], ids=str)
def test_compiled_programs(adjoint: Adjoint) -> None:
    k = 1 if isinstance(adjoint, Unrolled) else 2  # the code of each step is compiled
    _, _, found = ours("mlp", adjoint, Inductor(), k=k)
    assert 1e-4 < error(found, oracle("mlp", torch.float64, k=k)) <= BFLOAT16


def test_one_launch() -> None:
    _, _, found = ours("mlp", Replay(), CudaGraph(Eager(), TapeRecorder))
    _, _, wanted = ours("mlp", Replay(), Eager())
    assert all(torch.equal(got, expected) for got, expected in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_tasks(name: str) -> None:
    _, _, found = ours(name, Stash(), Eager(), tasks=2)
    each = [oracle(name, torch.bfloat16, task) for task in range(2)]
    assert error(each[0], each[1]) > 4 * BFLOAT16, "the tasks are too alike"
    assert error(found, [torch.stack(parts).mean(0) for parts in zip(*each, strict=True)]) <= BFLOAT16


def test_what_stays_in_float32_and_what_does_not() -> None:
    model = make("conv")
    unroll = compile_unroll(model, torch.optim.Adam(model.parameters()), 2, backend="eager", dtype=torch.bfloat16)
    support = batch("conv", 0)
    before = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()
    adapted = unroll.adapt(support)
    assert (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()) == before
    floats = [*adapted.params.values(), adapted.losses, *[b for b in adapted.buffers.values() if b.is_floating_point()]]
    assert all(value.dtype is torch.float32 for value in floats)
    assert adapted(support[0]).dtype is torch.bfloat16
    graph = next(iter(unroll.graphs().values()))
    products = [node for node in graph.module.graph.nodes if "convolution" in str(node.target) or "mm" in str(node.target)]
    assert products and {node.meta["val"].dtype for node in products if isinstance(node.meta["val"], Tensor)} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):  # the caller's own changes nothing
        again = unroll.adapt(support)
    assert all(torch.equal(again.params[name], value) for name, value in adapted.params.items())


def test_first_order_and_differentiable_adaptation() -> None:
    model = make("mlp")
    support, query = batch("mlp", 0), batch("mlp", 1)
    for adjoint in (FirstOrder(), Unrolled()):
        unroll = compile_unroll(model, optim.sgd(lr=0.1), 2, adjoint=adjoint, backend="eager", dtype=torch.bfloat16)
        loss = F.cross_entropy(unroll.adapt(support)(query[0]).float(), query[1])
        through = torch.autograd.grad(loss, list(model.parameters()))
        direct = torch.autograd.grad(unroll(support, query), list(model.parameters()))
        assert error([loss.detach(), *through], [loss.detach(), *direct]) <= BFLOAT16 / 2


def test_a_model_that_was_converted_since_is_refused() -> None:
    model = make("mlp")
    unroll = compile_unroll(model, optim.sgd(lr=0.1), 1, backend="eager", dtype=torch.bfloat16)
    x, y = batch("mlp", 0)
    for _ in range(3):
        unroll.adapt((x, y))
    model.double()
    with pytest.raises(InvalidArgument, match=r"needs parameters in float32, '0.weight' is torch.float64"):
        unroll.adapt((x.double(), y))


@pytest.mark.cuda
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu(name: str) -> None:
    model = make(name).cuda()
    unroll = compile_unroll(model, optim.adam(lr=0.02, eps=0.01), 2, dtype=torch.bfloat16)
    support, query = (tuple(part.cuda() for part in batch(name, seed)) for seed in (0, 1))
    loss = unroll(support, query)
    found = [value.cpu() for value in (loss.detach(), *torch.autograd.grad(loss, list(model.parameters())))]
    assert 1e-4 < error(found, oracle(name, torch.float64)) <= BFLOAT16


def test_what_is_refused() -> None:
    model = make("mlp")
    opt = optim.sgd(lr=0.1)
    with pytest.raises(InvalidArgument, match=r"torch.float16; float16 would need its losses scaled"):
        compile_unroll(model, opt, 1, dtype=torch.float16)
    with pytest.raises(InvalidArgument, match=r"torch.float64; for another precision convert the model"):
        compile_unroll(model, opt, 1, dtype=torch.float64)
    with pytest.raises(InvalidType, match=r"dtype must be torch\.bfloat16 or None, got 'bfloat16'"):
        compile_unroll(model, opt, 1, dtype="bfloat16")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"needs parameters in float32, '0.weight' is torch.float64; call model.float\(\)"):
        compile_unroll(model.double(), opt, 1, dtype=torch.bfloat16)
