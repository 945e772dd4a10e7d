"""The first call finds its programs in a rehearsal, whose results nobody sees; their code is built meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt import Replay, Stash, Unrolled
from adaptrt.adjoint import Adjoint, auto
from adaptrt.backend.base import COMPILING, Building, Form, rehearsal, rehearsing
from adaptrt.backend.inductor import instructions
from adaptrt.runtime import program
from adaptrt.runtime.program_set import ProgramSet
from tests.tolerances import assert_near


class Net(nn.Module):
    """Convolution, batch statistics, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1, dtype=torch.float64)
        self.norm = nn.BatchNorm2d(8, dtype=torch.float64)
        self.drop = nn.Dropout(0.25)
        self.out = nn.Linear(8, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(F.max_pool2d(self.norm(self.conv(x)).relu(), 2).mean((2, 3))))


class Small(nn.Module):
    """What is quick to compile: a layer and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.out = nn.Dropout(0.25), nn.Linear(72, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(x.flatten(1)).sin())


class Strided(nn.Module):
    """Values in layouts of their own, as convolutions and pools have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 8, 3, padding=1, dtype=torch.float64), nn.Linear(8, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.max_pool2d(self.conv(x).relu(), 2).mean((2, 3)))


def unrolled(
    adjoint: Adjoint, backend: str, num_tasks: int | None = None, kind: type[nn.Module] = Net
) -> tuple[nn.Module, adaptrt.CompiledUnroll]:
    torch.manual_seed(0)
    model = kind()
    k = 2 if isinstance(adjoint, Unrolled) else 3  # the code of each step is compiled
    unroll = adaptrt.compile_unroll(
        model, adaptrt.optim.sgd(lr=0.05, momentum=0.9), k, loss=F.cross_entropy, adjoint=adjoint, backend=backend
    )
    return model, unroll if num_tasks is None else unroll.vmap()


def batch(draw: torch.Generator, num: int, num_tasks: int | None) -> tuple[Tensor, Tensor]:
    size = (num,) if num_tasks is None else (num_tasks, num)
    return torch.randn(*size, 2, 6, 6, dtype=torch.float64, generator=draw), torch.randint(0, 3, size, generator=draw)


def meta_gradient(
    model: nn.Module, unroll: adaptrt.CompiledUnroll, num_tasks: int | None = None, num_queries: int = 4
) -> dict[str, Tensor]:
    """The meta-loss and its gradients."""
    draw = torch.Generator().manual_seed(2)
    loss = unroll(batch(draw, 4, num_tasks), batch(draw, num_queries, num_tasks), generator=draw)
    names, params = zip(*model.named_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, params), strict=True))}


def everything(model: nn.Module, unroll: adaptrt.CompiledUnroll, num_tasks: int | None = None) -> dict[str, Tensor]:
    """Gradients through `adapt`, and meta-gradients on two sizes of queries."""
    draw = torch.Generator().manual_seed(1)
    adapted = unroll.adapt(batch(draw, 4, num_tasks), generator=draw)
    total = torch.stack([(value**2).sum() for value in adapted.params.values()]).sum() + adapted.losses.sum()
    names, params = zip(*model.named_parameters(), strict=True)
    found = {f"adapt: {name}": value for name, value in zip(names, torch.autograd.grad(total, params), strict=True)}
    for num_queries in (4, 6):
        found |= {f"{num_queries}: {name}": value for name, value in meta_gradient(model, unroll, num_tasks, num_queries).items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("adjoint, num_tasks", [(Replay(every=2), None), (Stash(), None), (Unrolled(), None), (Stash(), 2)], ids=str)
def test_what_a_rehearsal_computes_is_never_seen(adjoint: Adjoint, num_tasks: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "MIN_FLOPS_OF_A_TASK", 1)  # tasks one by one
    made: list[Form] = []

    def nonsense(form: Form) -> Tensor:
        made.append(form)
        value = float("nan") if form.dtype.is_floating_point else torch.iinfo(form.dtype).max
        return torch.empty_strided(form.shape, form.strides, dtype=form.dtype).fill_(value if form.shape else 0)

    monkeypatch.setattr(program, "without_values", nonsense)
    found, expected = [everything(*unrolled(adjoint, backend, num_tasks), num_tasks) for backend in ("inductor", "eager")]
    assert made
    assert_near(found, expected)


def test_code_is_built_while_other_programs_are_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx
    from torch._inductor.async_compile import AsyncCompile

    events: list[str] = []
    generate, wait = compile_fx.compile_fx_inner, AsyncCompile.wait

    def generating(*args: Any, **kwargs: Any) -> Any:
        events.append("generate")
        return generate(*args, **kwargs)

    def waiting(self: AsyncCompile, scope: dict[str, Any]) -> None:
        events.append("wait")
        wait(self, scope)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", generating)
    monkeypatch.setattr(AsyncCompile, "wait", waiting)
    model, unroll = unrolled(Replay(), "inductor", kind=Small)
    first = meta_gradient(model, unroll)
    assert events == ["generate"] * 3 + ["wait"] * 3
    assert not any(program.is_building for _, program in unroll._execution.planner.programs())
    assert_near(meta_gradient(model, unroll), first)
    assert len(events) == 6


@pytest.mark.parametrize("adjoint", [Replay(), Stash()], ids=str)
def test_results_have_the_layout_that_was_foretold(adjoint: Adjoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise what one program leaves for the next would be copied at every call."""
    model, unroll = unrolled(adjoint, "inductor", kind=Strided)
    meta_gradient(model, unroll)
    copied: list[Any] = []
    monkeypatch.setattr(program, "_with_strides", lambda value, strides: copied.append(strides) or value)
    meta_gradient(model, unroll)
    assert not copied


def test_a_program_that_cannot_be_built_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.async_compile import AsyncCompile

    wait, failures = AsyncCompile.wait, []

    def failing_at_first(self: AsyncCompile, scope: dict[str, Any]) -> None:
        if not failures:
            failures.append(instructions._trusts_the_processor)
            raise RuntimeError("unrecognized option -mavx512f")
        wait(self, scope)

    monkeypatch.setattr(AsyncCompile, "wait", failing_at_first)
    found, expected = [meta_gradient(*unrolled(Replay(), backend, kind=Small)) for backend in ("inductor", "eager")]
    assert failures
    assert_near(found, expected)


def test_errors_of_a_rehearsal_are_those_of_the_call() -> None:
    model, unroll = unrolled(Replay(), "inductor", kind=Small)
    support = torch.randn(4, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 2])
    query = torch.full((4, 2, 6, 6), torch.nan, dtype=torch.float64), support[1]
    for _ in range(2):
        with pytest.raises(adaptrt.errors.NonFiniteInput, match="query"):
            unroll(support, query)
    assert not rehearsing()
    meta_gradient(model, unroll)


def test_another_thread_waits_for_the_code() -> None:
    calls: list[str] = []

    def finish() -> Any:
        calls.append("finish")
        return lambda values: [2.0 * value for value in values]

    building = Building([Form((3,), (1,), torch.float64, torch.device("cpu"))], finish)
    x, found = torch.randn(3, dtype=torch.float64), list[Tensor]()
    other = threading.Thread(target=lambda: found.append(building([x])[0]))
    with COMPILING:
        other.start()
        other.join(0.2)
        assert other.is_alive() and not calls
    other.join()
    torch.testing.assert_close(found[0], 2.0 * x)
    with COMPILING:  # once it is built, nobody waits for others
        again = threading.Thread(target=lambda: found.append(building([x])[0]))
        again.start()
        again.join()
    assert len(found) == 2 and calls == ["finish"]


def test_rehearsals_end_one_by_one() -> None:
    with rehearsal():
        with rehearsal():
            pass
        assert rehearsing()
    assert not rehearsing()


def test_a_program_that_is_being_built_is_not_taken_for_all_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProgramSet, "finish_building", lambda self: None)  # as another thread finds it meanwhile
    model = nn.Linear(2, 1, dtype=torch.float64)
    unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(lr=0.1), 2, loss=F.mse_loss, adjoint=Unrolled(), backend="inductor")
    support, query = [(torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)) for _ in range(2)]
    first = [unroll(support, query).item() for _ in range(3)]
    route = unroll._execution.router.find(support, (query,), None, False).route
    assert route.whole is None and not route.is_settled
    assert len(set(first)) == 1


def test_threads_that_call_at_once_get_what_one_alone_gets() -> None:
    model, unroll = unrolled(Replay(), "inductor", kind=Small)
    found: list[dict[str, Tensor]] = []
    threads = [threading.Thread(target=lambda: found.append(meta_gradient(model, unroll))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = meta_gradient(*unrolled(Replay(), "eager", kind=Small))
    assert len(found) == 3
    for one in found:
        assert_near(one, expected)
