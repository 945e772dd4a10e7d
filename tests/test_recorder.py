"""What a captured function may do besides operations on the tensors that it is given."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import _symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from adaptrt.backend.inductor import Inductor
from adaptrt.errors import InvalidGraph, NotTraceable
from adaptrt.graph.capture import capture
from adaptrt.graph.collector import collecting, garbage_collection_paused
from adaptrt.graph.passes.decompose import decompose
from adaptrt.graph.passes.recorder import record
from adaptrt.graph.signature import Role
from tests.graphs import targets

aten = torch.ops.aten


def gradient_of_gradient(x: Tensor, w: Tensor) -> list[Tensor]:
    """With several results of one operation, writes in place, a constant, and a tensor that is given twice."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = F.layer_norm(F.conv2d(x, w, padding=1), (4, 4)).mul_(torch.tensor(0.5, dtype=x.dtype)).relu_()
    first, second = torch.chunk(y, 2, dim=1)
    (gradient,) = torch.autograd.grad((first * second * second).sum(), w, create_graph=True)
    return [y, *torch.autograd.grad(gradient.square().sum(), (x, w))]


def test_the_same_operations_as_make_fx() -> None:
    with FakeTensorMode(), torch.enable_grad():
        x, w = torch.empty(2, 3, 4, 4, dtype=torch.float64), torch.empty(4, 3, 3, 3, dtype=torch.float64)
        module, constants = record(gradient_of_gradient, (x, w))
        expected = make_fx(gradient_of_gradient, tracing_mode="real")(x, w)
    expected.graph.eliminate_dead_code()
    assert [value.item() for value in constants] == [0.5]

    def operations(graph: fx.Graph) -> list[object]:
        # How often autograd detaches what it saves depends on who else holds it; in PyTorch 2.14 it does so by another operation.
        views = {aten.detach.default, aten.alias.default}
        return [node.target for node in graph.nodes if node.op == "call_function" and node.target not in views]

    assert operations(module.graph) == operations(expected.graph)
    args = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        results = module(*args, *constants)
    for found, wanted in zip(results, gradient_of_gradient(*args), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_values_are_those_before_what_changes_them_in_place() -> None:
    with FakeTensorMode():
        module, _ = record(lambda x: [(x + 1.0).unsqueeze_(0)], (torch.empty(3),))
    shapes = {node.target: tuple(node.meta["val"].shape) for node in module.graph.nodes if node.op == "call_function"}
    assert shapes == {aten.add.Tensor: (3,), aten.unsqueeze_.default: (1, 3)}


def test_what_is_no_operation_leaves_no_trace() -> None:
    def fn(x: Tensor) -> Tensor:
        factor = torch.tensor(2.0, dtype=torch.float64)
        factor.add_(1.0)
        with torch.profiler.record_function("scale"):
            x = x * factor if float(torch.tensor(3.0)) == 3.0 else x
        return torch.vmap(torch.sin)(x)

    x = torch.randn(3, 2, dtype=torch.float64)
    graph = capture(fn, x)
    for _ in range(2):  # a write to a tensor that was made of a constant does not change the constant
        assert torch.equal(graph.run(x), fn(x))
    assert sorted(map(str, targets(graph))) == ["aten.add.Tensor", "aten.mul.Tensor", "aten.sin.default"]
    assert [entry.role for entry in graph.signature.inputs] == [Role.DATA, Role.CONST, Role.CONST]


def test_a_cast_of_one_function_is_none_of_the_next() -> None:
    """Autocast keeps casts of weights from one operation to the next, and would keep one that belongs to another graph."""
    w = torch.randn(4, 4, requires_grad=True)

    def fn(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ w

    x = torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            graph = capture(fn, x)
            assert len(graph.constants) == 1
            assert graph.constants[0] is w
            assert torch.equal(graph.run(x), fn(x))


def test_a_compiled_function_runs_uncompiled() -> None:
    """Its kernels would compute on fake tensors, unseen."""
    compiled = torch.compile(torch.tanh, backend="eager")
    graph = capture(lambda x: compiled(x) * 2.0, torch.zeros(1, 2))
    assert sorted(map(str, targets(graph))) == ["aten.mul.Tensor", "aten.tanh.default"]


def test_a_compiled_module_runs_in_another_thread_meanwhile() -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    results: list[Tensor] = []

    def fn(x: Tensor) -> Tensor:
        other = threading.Thread(target=lambda: results.append(compiled(torch.ones(1, 2))))
        other.start()
        other.join()
        return x * 2.0

    capture(fn, torch.zeros(1, 2))
    assert len(results) == 1


class Scaled(Tensor):
    """Small integers and a scale, as quantised weights are kept."""

    quantised: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, quantised: Tensor, scale: Tensor) -> Scaled:
        made: Scaled = Tensor._make_wrapper_subclass(cls, quantised.size(), dtype=scale.dtype)
        made.quantised, made.scale = quantised, scale
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Scaled, lambda value: value.quantised * value.scale, (args, kwargs or {}))
        return func(*args, **kwargs)


def test_a_tensor_of_tensors_computes_by_these() -> None:
    weights = Scaled(torch.randint(-8, 8, (3, 2)), torch.tensor(0.1, dtype=torch.float64))
    x = torch.randn(4, 3, dtype=torch.float64)
    graph = capture(lambda x: x @ weights, x)
    assert [type(value) for value in graph.constants] == [Tensor, Tensor]
    assert torch.equal(graph.run(x), x @ weights)


@torch.library.custom_op("adaptrt_tests::halve_", mutates_args=("x",))
def halve_(x: Tensor) -> int:
    x.div_(2.0)
    return x.numel()


@halve_.register_fake
def _(x: Tensor) -> int:
    return x.numel()


def test_a_write_that_returns_a_number_is_not_lost() -> None:
    def fn(x: Tensor) -> Tensor:
        y = x.clone()
        halve_(y)
        return y

    with pytest.raises(RuntimeError, match="halve_"):  # PyTorch's functionalisation does not know it
        capture(fn, torch.ones(3))


def test_writes_to_lists_and_to_given_outputs() -> None:
    def fn(x: Tensor) -> list[Tensor]:
        values, out = [x + 1.0, x * 2.0], torch.empty_like(x)
        torch._foreach_mul_(values, 3.0)  # pyright: ignore[reportPrivateImportUsage]
        torch.add(values[0], values[1], out=out)
        return [*values, out]

    x = torch.randn(4, dtype=torch.float64)
    for found, wanted in zip(capture(fn, x).run(x), fn(x), strict=True):
        assert torch.equal(found, wanted)


def test_assigned_data_is_refused() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        x.data = y
        return x * 2.0

    with pytest.raises(NotTraceable, match=r"\.data"):
        capture(fn, torch.zeros(2), torch.ones(2))


def test_a_tensor_of_an_earlier_capture_is_refused() -> None:
    kept: list[Tensor] = []

    def fn(x: Tensor) -> Tensor:
        kept.append(x * 2.0)
        return kept[0] + x

    capture(fn, torch.zeros(2))
    with pytest.raises(NotTraceable, match="where it was not traced"):
        capture(fn, torch.zeros(2))


def test_a_failure_leaves_pytorch_as_it_was() -> None:
    def fn(x: Tensor) -> Tensor:
        raise KeyError("on purpose")

    before = _symbolic_trace.is_fx_symbolic_tracing(), torch.is_autocast_cache_enabled(), gc.isenabled()
    with pytest.raises(KeyError, match="on purpose"):
        capture(fn, torch.zeros(2))
    assert (_symbolic_trace.is_fx_symbolic_tracing(), torch.is_autocast_cache_enabled(), gc.isenabled()) == before == (False, True, True)


# --- the garbage collector


def collects() -> bool:
    return gc.isenabled() and gc.get_threshold()[0] < 1_000_000


def test_garbage_collection_is_paused_but_for_what_takes_long() -> None:
    def fails() -> None:
        raise KeyError("on purpose")

    before = gc.get_threshold()
    long, long_failing = collecting(collects), collecting(fails)
    with garbage_collection_paused():
        assert not collects()
        assert long()
        with pytest.raises(KeyError):
            long_failing()
        assert not collects()
    assert gc.get_threshold() == before and collects()


def test_the_collector_is_not_left_off_by_two_threads() -> None:
    """One measures without collector, another begins to compile meanwhile, and ends later."""
    compiling, measured = threading.Event(), threading.Event()

    def long() -> None:
        compiling.set()
        assert measured.wait(60)

    def compile_in_background() -> None:
        fn = collecting(long)
        with garbage_collection_paused():
            fn()

    other = threading.Thread(target=compile_in_background)
    gc.disable()
    try:
        other.start()
        assert compiling.wait(60)
    finally:
        gc.enable()
    measured.set()
    other.join()
    assert collects()


# --- decompose


def test_rules_hold_for_what_rules_call() -> None:
    x = torch.randn(5, dtype=torch.float64)
    graph = capture(lambda x: (F.silu(x), F.hardswish(x)), x)
    assert set(targets(graph)) == {aten.silu.default, aten.hardswish.default}
    rules = get_decompositions([aten.silu, aten.hardswish]) | {aten.sigmoid.default: lambda x: 1.0 / (1.0 + torch.exp(-x))}
    simple = decompose(graph, rules)
    assert not {aten.silu.default, aten.hardswish.default, aten.sigmoid.default} & set(targets(simple))
    for found, wanted in zip(simple.run(x), graph.run(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-15, atol=1e-15)


def test_a_rule_may_leave_an_operation_or_have_several_results() -> None:
    def smallest(x: Tensor, *rest: object) -> list[Tensor] | object:
        return NotImplemented if x.dim() > 1 else list(torch.topk(x, len(x), largest=False))

    x = torch.randn(5), torch.randn(2, 5)
    graph = capture(lambda x, y: (*torch.sort(x), *torch.sort(y)), *x)
    simple = decompose(graph, {aten.sort.default: smallest})
    assert (targets(simple).count(aten.sort.default), targets(simple).count(aten.topk.default)) == (1, 1)
    for found, wanted in zip(simple.run(*x), graph.run(*x), strict=True):
        assert torch.equal(found, wanted)


def test_strides_follow_from_inputs_and_rules() -> None:
    """A rule may give its result another layout than the operation has; what reads it gets the layout that follows."""
    x = torch.randn(2, 3)
    graph = capture(lambda x: torch.cos(torch.relu(x)).view(-1), x)
    simple = decompose(graph, {aten.relu.default: lambda x: x.t().contiguous().t().clamp_min(0.0)})
    value = next(node for node in simple.module.graph.nodes if node.target is aten.cos.default).meta["val"]
    assert value.stride() == (1, 2)
    assert torch.equal(simple.run(x), graph.run(x)), "the view became a copy"


def test_strides_that_a_pass_changed_are_followed() -> None:
    """A convolution that is named a weight gradient has other strides; a reshape of what follows has to copy."""

    def fn(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(F.conv2d(a.transpose(0, 1), b.transpose(0, 1))).reshape(-1)

    a, b = torch.randn(8, 4, 9, 9, dtype=torch.float64), torch.randn(8, 3, 7, 7, dtype=torch.float64)
    graph = capture(fn, a, b)
    assert aten.convolution_backward.default in targets(graph)
    lowered = Inductor().lower(graph)
    torch.testing.assert_close(lowered.run(a, b), fn(a, b), rtol=1e-12, atol=1e-12)


def test_one_tensor_given_twice_to_a_rule_is_one() -> None:
    seen: list[bool] = []

    def rule(tensors: list[Tensor], dim: int = 0) -> object:
        seen.append(tensors[0] is tensors[1])
        return NotImplemented

    x, y = torch.randn(2), torch.randn(2)
    graph = capture(lambda x, y: torch.cat([torch.cat([x, x]), torch.cat([x, y])]), x, y)
    decompose(graph, {aten.cat.default: rule})
    assert seen == [True, False, False]


def test_a_rule_with_a_tensor_of_its_own_is_refused() -> None:
    graph, ones = capture(torch.sin, torch.zeros(2)), torch.ones(2)
    with pytest.raises(InvalidGraph, match="uses a tensor that is no argument"):
        decompose(graph, {aten.sin.default: lambda x: x * ones})


def test_tf32_may_have_been_set_in_the_new_way() -> None:
    convolutions: Any = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "tf32" if before == "ieee" else "ieee"
    try:
        with pytest.raises(RuntimeError):
            _ = torch.backends.cudnn.allow_tf32
        assert torch.equal(capture(torch.sin, torch.ones(2)).run(torch.ones(2)), torch.ones(2).sin())
        assert torch.backends.cudnn.enabled
    finally:
        convolutions.fp32_precision = before
