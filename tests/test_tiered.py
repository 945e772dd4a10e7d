"""`tiered=True`: answers at once, compiled programs later, the same numbers, and no call that fails between."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt import Replay, Stash, Unrolled, compile_unroll
from adaptrt.backend import Backend, Eager, Inductor
from adaptrt.backend.base import Runner
from adaptrt.backend.tiered import TieredRunner
from adaptrt.errors import CompilerUnavailable, InvalidArgument
from adaptrt.graph.ir import Graph
from tests.models import MODELS, Batch
from tests.tolerances import SECOND_DERIVATIVE, assert_close


@dataclasses.dataclass(frozen=True, slots=True)
class Gate(Backend):
    """Compiles when it is let, and marks what its programs return by their call."""

    opened: threading.Event = dataclasses.field(default_factory=threading.Event)
    calls: list[int] = dataclasses.field(default_factory=list[int])
    fails: bool = False

    name = "gate"
    fuses = True

    def compile(self, graph: Graph) -> Runner:
        assert self.opened.wait(30)
        if self.fails:
            raise RuntimeError("no luck")
        run = Eager().compile(graph)

        def counted(values: list[Tensor]) -> Any:
            self.calls.append(1)
            return run(values)

        return counted


def net() -> nn.Module:
    return MODELS["mlp"].model()


def batch(seed: int) -> Batch:
    return MODELS["mlp"].data(seed, 6)


def runners(unroll: adaptrt.CompiledUnroll) -> list[TieredRunner]:
    programs = [program for _, program in unroll._execution.planner.programs()]
    found = [program.run for program in programs if isinstance(program.run, TieredRunner)]
    assert len(found) == len(programs) > 0
    return found


def gradients(unroll: adaptrt.CompiledUnroll, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(unroll(batch(0), batch(1)), list(model.parameters())))


@pytest.mark.parametrize("adjoint", [Unrolled(), Replay(), Stash()], ids=str)
def test_calls_answer_before_and_after(adjoint: adaptrt.Adjoint) -> None:
    model, gate = net(), Gate()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = gradients(compile_unroll(model, opt, 3, loss=F.mse_loss, adjoint=adjoint, backend="eager"), model)
    unroll = compile_unroll(model, opt, 3, loss=F.mse_loss, adjoint=adjoint, backend=gate, tiered=True)
    for _ in range(3):
        for found, wanted in zip(gradients(unroll, model), expected, strict=True):
            assert_close(found, wanted, SECOND_DERIVATIVE)
    assert not gate.calls and all(runner.is_pending for runner in runners(unroll))
    assert "to be compiled in the background" in str(unroll.explain()) and "backend tiered" in str(unroll.explain())
    gate.opened.set()
    assert all(runner.wait(30) for runner in runners(unroll))
    for found, wanted in zip(gradients(unroll, model), expected, strict=True):
        assert_close(found, wanted, SECOND_DERIVATIVE)
    assert gate.calls and not any(report.is_pending for report in unroll.explain().programs)


def test_calls_from_threads_while_programs_are_replaced() -> None:
    model, gate = net(), Gate()
    unroll = compile_unroll(model, torch.optim.SGD(model.parameters(), lr=0.1), 3, loss=F.mse_loss, backend=gate, tiered=True)
    expected = gradients(unroll, model)
    wrong: list[Any] = []
    stop = threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                for found, wanted in zip(gradients(unroll, model), expected, strict=True):
                    assert_close(found, wanted, SECOND_DERIVATIVE)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    gate.opened.set()
    assert all(runner.wait(30) for runner in runners(unroll))
    while not gate.calls and not wrong:
        pass
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and gate.calls


def test_what_cannot_be_compiled_stays_eager_and_says_so() -> None:
    model, gate = net(), Gate(fails=True)
    unroll = compile_unroll(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, loss=F.mse_loss, backend=gate, tiered=True)
    expected = gradients(unroll, model)
    # The warning comes from the background thread.
    with pytest.warns(CompilerUnavailable, match="no luck"):
        gate.opened.set()
        assert all(runner.wait(30) for runner in runners(unroll))
    assert all(map(torch.equal, gradients(unroll, model), expected))


def test_warmup_waits_for_inductor() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    unroll = compile_unroll(model, opt, 1, loss=F.mse_loss, adjoint=Unrolled(), backend="inductor", tiered=True)
    assert unroll.warmup(batch(0)) is unroll
    assert not any(report.is_pending for report in unroll.explain().programs)
    plain = compile_unroll(model, opt, 1, loss=F.mse_loss, adjoint=Unrolled(), backend="eager")
    with torch.no_grad():
        for name, value in unroll.adapt(batch(0)).params.items():
            assert_close(value, plain.adapt(batch(0)).params[name], SECOND_DERIVATIVE)


def test_tiers_need_a_compiler() -> None:
    with pytest.raises(InvalidArgument, match="tiered=True needs backend="):
        compile_unroll(net(), adaptrt.optim.sgd(lr=0.1), 1, backend="eager", tiered=True)
    unroll = compile_unroll(net(), adaptrt.optim.sgd(lr=0.1), 1, backend=Inductor(), tiered=True)
    assert "backend=tiered" in repr(unroll)
