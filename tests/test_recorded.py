"""Programs recorded once and run again: the same numbers as Inductor's own wrapper, fresh results, safe from threads and modes."""

from __future__ import annotations

import dataclasses
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptrt.backend import Inductor
from adaptrt.backend.base import Runner
from adaptrt.backend.inductor import compile as inductor
from adaptrt.backend.inductor import recorded
from adaptrt.graph.capture import capture
from adaptrt.graph.exchange import Target

Function = Callable[..., Any]


def pointwise(x: Tensor, w: Tensor) -> Any:
    return (x * w).sin(), x.sum(0) + w


def small_products(x: Tensor, w: Tensor) -> Any:
    hidden = torch.relu(x @ w)
    return hidden @ w, hidden.mean()


def library_products(x: Tensor, w: Tensor) -> Any:
    hidden = torch.relu(x @ w) + 1
    return torch.addmm(hidden, hidden, w, beta=0.5, alpha=2.0), torch.stack([hidden.sum(), hidden.mean()])


def batched_products(x: Tensor, w: Tensor) -> Any:
    return torch.tanh(x @ w @ w).sum(-1), x.transpose(1, 2) @ x


def stacked(x: Tensor, w: Tensor) -> Any:
    losses: list[Tensor] = []
    for _ in range(4):
        x = torch.tanh(x @ w)
        losses.append((x * x).mean())
    return torch.stack(losses), x


def inputs_come_back(x: Tensor, w: Tensor) -> Any:
    return x, w.reshape(-1), x + 1


PROGRAMS: dict[str, tuple[Function, tuple[int, ...], tuple[int, ...]]] = {
    "pointwise": (pointwise, (5, 4), (4,)),
    "small products": (small_products, (5, 4), (4, 4)),
    "library": (library_products, (65, 65), (65, 65)),
    "batched library": (batched_products, (4, 20, 130), (4, 130, 130)),
    "stacked": (stacked, (5, 4), (4, 4)),
    "inputs come back": (inputs_come_back, (5, 4), (4, 4)),
}


def both(fn: Function, *values: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Runner, Runner]:
    """The program as it is recorded, and as Inductor runs it."""
    graph = capture(fn, *values)
    found: list[Runner | None] = []

    def spy(call: Any, num_inputs: int) -> Runner | None:
        found.append(recorded.record(call, num_inputs))
        return None

    monkeypatch.setattr(inductor, "record", spy)
    plain = Inductor().compile(graph)
    [replayed] = found
    assert replayed is not None, "the program was not recorded"
    return replayed, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_replayed_programs_give_the_same_numbers(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, *shapes = PROGRAMS[name]
    values = [torch.randn(shape, dtype=dtype) for shape in shapes]
    replayed, plain = both(fn, *values, monkeypatch=monkeypatch)
    kept: list[tuple[Any, list[Tensor]]] = []
    for _ in range(3):
        values = [torch.randn(shape, dtype=dtype) for shape in shapes]
        found, expected = replayed(list(values)), plain(list(values))
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(found, expected, strict=True))
        kept.append((found, [value.clone() for value in found]))
        memory = {value.untyped_storage().data_ptr() for value in (*found, *values)}
        assert len(memory) == len(found) + len(values), "every result has memory of its own"
    # Later calls left the results of earlier ones alone.
    assert all(torch.equal(a, b) for found, copies in kept for a, b in zip(found, copies, strict=True))


def test_replayed_programs_run_in_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fn, *shapes = PROGRAMS["batched library"]
    replayed, plain = both(fn, *[torch.randn(shape) for shape in shapes], monkeypatch=monkeypatch)
    wrong: list[int] = []

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for _ in range(50):
            values = [torch.randn(shape, generator=generator) for shape in shapes]
            if not all(map(torch.equal, replayed(list(values)), plain(list(values)))):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_replayed_programs_run_in_and_out_of_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    fn, *shapes = PROGRAMS["library"]
    values = [torch.randn(shape) for shape in shapes]
    replayed, plain = both(fn, *values, monkeypatch=monkeypatch)
    with torch.inference_mode():
        inside = replayed(list(values))
    outside = replayed(list(values))
    assert all(map(torch.equal, inside, plain(list(values)))) and all(map(torch.equal, outside, inside))
    assert all(value.is_inference() for value in inside) and not any(value.is_inference() for value in outside)


def test_a_program_with_other_operations_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with pytest.raises(AssertionError, match="not recorded"):
        both(lambda x, w: torch.nn.functional.conv2d(x, w).relu(), x, w, monkeypatch=monkeypatch)


def test_a_program_with_large_intermediates_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fn, *shapes = PROGRAMS["library"]
    monkeypatch.setattr(recorded, "MAX_KEPT_BYTES", 65 * 65 * 4 - 1)
    with pytest.raises(AssertionError, match="not recorded"):
        both(fn, *[torch.randn(shape) for shape in shapes], monkeypatch=monkeypatch)


def generated(*lines: str, num_inputs: int = 1) -> Callable[..., Any]:
    """A function in the form of those that Inductor generates; `a0`, `a1`, ... are its inputs."""
    namespace: dict[str, Any] = {
        "torch": torch,
        "aten": torch.ops.aten,
        "other": torch.sin,
        "extern_kernels": types.SimpleNamespace(mm=torch.mm, addmm=torch.addmm),
        "cpp_fused_0": lambda source, out: torch.sin(source, out=out),
        "empty_strided_cpu": lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype),
        "reinterpret_tensor": torch.as_strided,
    }
    inputs = "".join(f"a{index}, " for index in range(num_inputs))
    exec("def call(args):\n" + "".join(f"    {line}\n" for line in (f"{inputs}= args", "args.clear()", *lines)), namespace)
    return namespace["call"]


ALLOCATES = "b = empty_strided_cpu((3, ), (1, ), torch.float32)"


def test_generated_code_as_it_is_known() -> None:
    """The following tests change one line each; without a change the code is recorded."""
    run = recorded.record(generated(ALLOCATES, "cpp_fused_0(a0, b)", "del a0", "return (b, )"), 1)
    x = torch.randn(3)
    assert run is not None and torch.equal(run([x])[0], x.sin())


@pytest.mark.parametrize(
    "line", ["b = aten.sin(a0)", "b = torch.sin(a0)", "b = a0.sin()", "b = other(a0)", "b = extern_kernels.convolution(a0)"]
)
def test_generated_code_that_is_not_known_is_not_recorded(line: str) -> None:
    assert recorded.record(generated(line, "return (b,)"), 1) is None


@pytest.mark.parametrize(
    "lines",
    [
        ["b = empty_strided_cpu((3, ), (1, ), torch.float32, True)"],
        ["b = empty_strided_cpu((3, ), (1, ), dtype=torch.float32, pinned=True)"],
        ["b = empty_strided_cpu((3, ))"],
        ["b = empty_strided_cpu(3, 1, torch.float32)"],
        ["b = empty_strided_cpu((a0, ), (1, ), torch.float32)"],
        ["b = empty_strided_cpu((3.0, ), (1, ), torch.float32)"],
        [ALLOCATES, "b = reinterpret_tensor(b, (3, ), (1, ), 0, torch.int32)"],
        [ALLOCATES, "b = reinterpret_tensor(b, (3, ), (1, ))"],
        [ALLOCATES, "b = reinterpret_tensor(b, size=(3, ), stride=(1, ), storage_offset=0)"],
        [ALLOCATES, "b = reinterpret_tensor(b, (3, ), (1, ), 2)"],
        [ALLOCATES, "b = reinterpret_tensor(b, (3, ), (1, ), None)"],
        [ALLOCATES, "cpp_fused_0(a0, out=b)"],
        [ALLOCATES, "cpp_fused_0(a0, b, 3)"],
        [ALLOCATES, "cpp_fused_0([a0], b)"],
        [ALLOCATES, "b = cpp_fused_0(a0, b)"],
        [ALLOCATES, "extern_kernels.mm(a0, a0)"],
        [ALLOCATES, "extern_kernels.addmm(b, a0, a0, alpha=a0, out=b)"],
        [ALLOCATES, "extern_kernels.addmm(b, a0, a0, beta='1', out=b)"],
        [ALLOCATES, "extern_kernels.mm(a0, a0, out=[b])"],
        [ALLOCATES, "b = b + 1"],
        [ALLOCATES, "b = b[0]"],
        [ALLOCATES, "raise KeyError(3)"],
        [ALLOCATES, "a0, b = a0"],
        [ALLOCATES, "b = 1 / 0"],
        [ALLOCATES, "if a0 is None: cpp_fused_0(a0, b)"],
        [ALLOCATES, "for _ in (1, 2): cpp_fused_0(a0, b)"],
        ["try: b = empty_strided_cpu(3)", "except TypeError: b = a0"],
        ["import os as b"],
        ["def b(): pass"],
    ],
    ids=lambda lines: lines[-1],
)
def test_generated_code_with_other_arguments_is_not_recorded(lines: list[str]) -> None:
    assert recorded.record(generated(*lines, "return (b, )"), 1) is None


@pytest.mark.parametrize("end", ["return b", "return None", "return (b, 3)", "return [[b]]", "return {'b': b}", "yield b"])
def test_generated_code_with_other_results_is_not_recorded(end: str) -> None:
    run = recorded.record(generated(ALLOCATES, "cpp_fused_0(a0, b)", end), 1)
    x = torch.randn(3)
    # A generator yields one tensor, which is all that there is of it.
    assert run is None or (end == "yield b" and torch.equal(run([x])[0], x.sin()))


def test_another_number_of_inputs_is_not_recorded() -> None:
    call = generated("return (a0, a1)", num_inputs=2)
    assert recorded.record(call, 1) is None and recorded.record(call, 3) is None and recorded.record(call, 2) is not None


def test_functions_of_other_kinds_are_not_recorded() -> None:
    def with_default(args: Any, other: Any = 1) -> Any:
        return args

    def with_more(args: Any, other: Any) -> Any:
        return args

    for call in (with_default, with_more, lambda: (), lambda *, args: args, len, int, object(), 3):
        assert recorded.record(call, 1) is None


def test_nothing_is_recorded_without_the_functions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    call = generated(ALLOCATES, "cpp_fused_0(a0, b)", "return (b, )")
    missing = dataclasses.replace(recorded.RECORDED, needed=(Target("torch._C._dynamo.guards", "_not_there"),))
    monkeypatch.setattr(recorded, "RECORDED", missing)
    assert recorded.record(call, 1) is None


def test_what_is_no_generated_function_is_not_recorded() -> None:
    assert recorded.record(None, 1) is None
    assert recorded.record(torch.sin, 1) is None
