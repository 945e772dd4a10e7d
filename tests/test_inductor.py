"""The Inductor backend: what it compiled is found again, and only by what is equal."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptrt.backend import Inductor
from adaptrt.backend.inductor import instructions
from adaptrt.graph.capture import capture

pytestmark = pytest.mark.usefixtures("empty_cache")


def hits() -> int:
    from torch._dynamo.utils import counters

    return counters["inductor"]["fxgraph_cache_hit"]


def compiled(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`fn(x)` by Inductor, captured anew."""
    return Inductor().compile(capture(fn, torch.empty_like(x)))([x])[0]


def test_a_graph_is_compiled_once() -> None:
    x = torch.randn(5)
    before = hits()
    first = compiled(lambda x: (2.0 * x).sin(), x)
    assert hits() == before
    again = compiled(lambda x: (2.0 * x).sin(), -x)
    assert hits() == before + 1
    torch.testing.assert_close(first, (2.0 * x).sin())
    torch.testing.assert_close(again, -first)


def test_another_graph_is_not_taken_for_it() -> None:
    x = torch.randn(4, 4, dtype=torch.float64)
    cases: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda x: 2.0 * x, x),
        (lambda x: 2.0000000000000004 * x, x),
        (lambda x: 2.0 + x, x),
        (lambda x: x.sum(0), x),
        (lambda x: x.sum(1), x),
        (lambda x: 2.0 * x, x.float()),
        (lambda x: 2.0 * x, x[:3]),
    ]
    before = hits()
    for fn, x in cases:
        torch.testing.assert_close(compiled(fn, x), fn(x), rtol=1e-15, atol=0)
    assert hits() == before


@pytest.mark.slow
def test_code_for_other_instructions_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpu_vec_isa

    instructions = cpu_vec_isa.valid_vec_isa_list()
    if len(instructions) < 2:
        pytest.skip("the processor has one set of vector instructions")
    x, before = torch.randn(40), hits()
    for isa in instructions[-2:]:
        # The list, which all of Inductor asks by way of `pick_vec_isa`: code and compiler flags have to be for the same instructions.
        monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", functools.cache(lambda isa=isa: [isa]))
        torch.testing.assert_close(compiled(lambda x: (8.5 * x).exp(), x), (8.5 * x).exp())
    assert hits() == before


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The code of Inductor's trials of vector instructions, which all succeed. What it knows of them is forgotten before and after."""
    from torch._inductor import cpu_vec_isa

    made: list[str] = []
    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", lambda self, code: made.append(code) or True)
    monkeypatch.setattr(instructions, "_trusts_the_processor", True)
    instructions.forget_instructions()
    yield made
    instructions.forget_instructions()


def test_no_trials_of_vector_instructions(trials: list[str]) -> None:
    from torch._inductor import cpu_vec_isa

    x, trial = torch.randn(5), cpu_vec_isa.VecISA.check_build
    torch.testing.assert_close(compiled(lambda x: (3.5 * x).cos(), x), (3.5 * x).cos())
    assert not trials and instructions._trusts_the_processor
    assert cpu_vec_isa.VecISA.check_build is trial


@pytest.mark.parametrize("works_before", [False, True])
def test_trials_where_a_program_cannot_be_built(works_before: bool, trials: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx, cpu_vec_isa

    trusted: list[bool] = []
    trial, compile_fx_inner = cpu_vec_isa.VecISA.check_build, compile_fx.compile_fx_inner
    x = torch.randn(5)
    if works_before:
        compiled(lambda x: (7.5 * x).cos(), x)

    def without_instructions(*args: Any, **kwargs: Any) -> Any:
        trusted.append(cpu_vec_isa.VecISA.check_build is not trial)
        cpu_vec_isa.valid_vec_isa_list()
        if trusted[-1]:
            raise RuntimeError("unrecognized option -mavx512f")
        return compile_fx_inner(*args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", without_instructions)
    for factor in (4.5, 5.5):
        torch.testing.assert_close(compiled(lambda x, factor=factor: (factor * x).cos(), x), (factor * x).cos())
    assert trusted == [True, False, False]
    if cpu_vec_isa.valid_vec_isa_list():  # a processor with none makes no trial
        assert cpu_vec_isa.VecISA._avx_code in trials


def test_an_error_of_another_kind_says_nothing_about_the_processor(trials: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no lowering")

    with monkeypatch.context() as patch:
        patch.setattr(compile_fx, "compile_fx_inner", fail)
        with pytest.raises(RuntimeError, match="no lowering"):
            compiled(lambda x: (6.5 * x).cos(), torch.randn(5))
    assert instructions._trusts_the_processor


_FAULTS = """
import resource, sys
import torch
from adaptrt.backend.inductor.compile import let_freed_memory_stay

if sys.argv[1] == "stays":
    let_freed_memory_stay()

def work():
    blocks = [torch.ones(1 << 20) for _ in range(8)]  # 4 MiB each
    del blocks

work(), work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how other C libraries keep memory is not known")
def test_freed_memory_stays() -> None:
    changes = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(changes)}

    def faults(what: str) -> int:
        return int(subprocess.check_output([sys.executable, "-c", _FAULTS, what], env=environment, text=True))

    goes = faults("goes")
    if goes < 1000:
        pytest.skip("the system gives memory without faults, or does not count them")
    assert 10 * faults("stays") < goes


def test_what_another_thread_draws_while_one_compiles_is_not_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.graph import GraphLowering

    drawn: list[Tensor] = []
    run: Any = GraphLowering.run

    def while_another_draws(self: GraphLowering, *args: Any) -> Any:
        other = threading.Thread(target=lambda: drawn.append(torch.rand(1)))
        other.start()
        other.join()
        return run(self, *args)

    x = torch.ones(3)
    graph = capture(lambda x: x * 5 - 3, x)
    monkeypatch.setattr(GraphLowering, "run", while_another_draws)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    Inductor().compile(graph)
    assert torch.equal(torch.cat([*drawn, torch.rand(1)]), expected)
