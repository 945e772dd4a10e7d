"""Threads share one `CompiledUnroll`, compile at its first call in parallel, and get what each gets alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from adaptrt import CompiledUnroll, Replay, compile_unroll, optim
from tests import naive
from tests.models import MODELS, regress

THREADS = 8
CALLS = 3


def together(work: Callable[[int], Any]) -> list[Any]:
    """work(0), ... in as many threads, which begin at the same moment."""
    barrier = threading.Barrier(THREADS)

    def begin(index: int) -> Any:
        barrier.wait()
        return work(index)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def one_call(unroll: CompiledUnroll, model: nn.Module, index: int, sizes: Sequence[int]) -> list[Tensor]:
    """Meta-loss, its gradient, adaptation and prediction for data that belong to a thread."""
    entry = MODELS["mlp"]
    support, query = entry.data(index, sizes[index % len(sizes)]), entry.data(100 + index, 3)
    params = list(model.parameters())
    loss = unroll(support, query)
    results = [loss, *torch.autograd.grad(loss, params)]
    adapted = unroll.adapt(support)
    output = adapted(query[0])
    results += [output, *torch.autograd.grad(output.square().sum(), params), *adapted.params.values()]
    with torch.inference_mode():
        results.append(unroll.adapt(support).losses)
    return [value.detach().clone() for value in results]


@pytest.mark.parametrize(("backend", "sizes"), [("eager", [4]), ("eager", [4, 5, 6]), ("inductor", [4])], ids=str)
def test_threads_get_what_they_get_alone(backend: str, sizes: list[int]) -> None:
    model = MODELS["mlp"].model()

    def make() -> CompiledUnroll:
        return compile_unroll(model, optim.adam(lr=0.1), 3, loss=regress, adjoint=Replay(), backend=backend)

    shared = make()
    crowded = together(lambda index: [one_call(shared, model, index, sizes) for _ in range(CALLS)])
    alone = [one_call(make() if backend == "eager" else shared, model, index, sizes) for index in range(THREADS)]
    for calls, wanted in zip(crowded, alone, strict=True):
        for call in calls:
            assert all(torch.equal(got, expected) for got, expected in zip(call, wanted, strict=True))
    # The work was not all the same.
    assert len({float(results[0]) for results in alone}) == THREADS
    assert len(shared.graphs()) >= 3


def test_threads_agree_with_the_oracle() -> None:
    entry = MODELS["conv-bn-train"]
    model = entry.model()
    unroll = compile_unroll(model, optim.sgd(lr=0.1), 2, loss=entry.loss, adjoint=Replay(), backend="eager")
    got = together(lambda index: unroll(entry.data(index, 4), entry.data(50 + index, 3)).detach())
    loop = naive.Loop(model, entry.loss, naive.sgd, {"lr": 0.1}, 2)
    start = naive.Start(dict(model.named_parameters()), {}, dict(model.named_buffers()), {})
    for index, loss in enumerate(got):
        wanted = naive.meta_loss(loop, start, entry.data(index, 4), entry.data(50 + index, 3))
        assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-10)


def test_threads_with_generators_of_their_own() -> None:
    entry = MODELS["dropout"]
    unroll = compile_unroll(entry.model(), optim.sgd(lr=0.1), 2, loss=entry.loss, adjoint=Replay(), backend="eager")

    def work(index: int) -> Tensor:
        with torch.no_grad():
            return unroll.adapt(entry.data(1, 4), generator=Generator().manual_seed(index)).losses

    crowded = together(work)
    assert all(torch.equal(work(index), losses) for index, losses in enumerate(crowded))
    assert len({float(losses[0]) for losses in crowded}) == THREADS


def test_model_is_usable_while_others_compile() -> None:
    # Tracing swaps parameters; it must do so on a shadow, not on the module that other threads call.
    entry = MODELS["mlp"]
    model, (x, _) = entry.model(), entry.data(1, 4)
    with torch.no_grad():
        wanted = model(x)

    def work(index: int) -> bool:
        if index % 2:
            unroll = compile_unroll(model, optim.sgd(lr=0.1), 3, loss=regress, backend="eager")
            unroll(entry.data(1, 4 + index), entry.data(2, 3))
            return True
        with torch.no_grad():
            return all(torch.equal(model(x), wanted) for _ in range(300))

    assert all(together(work))
