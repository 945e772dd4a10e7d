"""Passes: each rewrite keeps a graph's values and brings about what it is for; `verify` refuses every kind of broken graph."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from adaptrt import tree
from adaptrt.backend.inductor.compile import LOWERING
from adaptrt.errors import InvalidGraph, NotTraceable, UnsupportedRandomness
from adaptrt.graph.capture import capture
from adaptrt.graph.cost import num_bytes, num_flops
from adaptrt.graph.indices import IndexBound, index_bounds
from adaptrt.graph.ir import Graph
from adaptrt.graph.noise import Noise, draw
from adaptrt.graph.operations import is_mutable, is_random
from adaptrt.graph.passes import functionalise as functionalise_file
from adaptrt.graph.passes.base import Pass, apply, copy_module
from adaptrt.graph.passes.batch import batch
from adaptrt.graph.passes.functionalise import functionalise
from adaptrt.graph.passes.late_expands import late_expands
from adaptrt.graph.passes.lift_noise import lift_noise, record_noise
from adaptrt.graph.passes.merge_duplicates import merge_duplicates
from adaptrt.graph.passes.own_outputs import own_outputs
from adaptrt.graph.passes.remove_identities import remove_identities
from adaptrt.graph.passes.standard import STANDARD
from adaptrt.graph.signature import Input, Output, Role, Signature
from adaptrt.graph.verify import verify
from adaptrt.tree import Spec
from tests.graphs import targets
from tests.tolerances import OPERATIONS, ROUNDING, assert_close

aten = torch.ops.aten
Function = Callable[..., Any]


# --- functions to capture, each with something for a pass to do


def in_place(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = (x @ w).add_(1.0)
    y[0].mul_(2.0)
    z = torch.zeros(3, 4, dtype=x.dtype)
    z[1:] = y[1:]
    return y.relu_(), z


def writes_through_view(x: Tensor, w: Tensor) -> Tensor:
    y = x.clone()
    y.t()[1].copy_(w[0, :3])
    return y.sum(0)


def detaches(x: Tensor, w: Tensor) -> Tensor:
    return x.detach() @ w + (x.detach() @ w).detach().clone()


def repeats(x: Tensor, w: Tensor) -> Tensor:
    return torch.sin(x @ w) * torch.cos(x @ w) + torch.sin(x @ w) * torch.cos(x @ w)


def numbers_of_three_kinds(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    count = x.sign().long()
    return count * 1, count * 1.0, count * True, count.clamp(0) * 1.0, x * 0.0, x * -0.0


def returns_inputs(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = x @ w
    return x, w, y, y


def returns_views(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = x @ w
    return x[0], x.view(-1), w.t(), y, y.view(2, -1), y[1]


def gradient(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    w = w.detach().requires_grad_()
    loss = F.layer_norm(torch.tanh(x @ w), (4,)).pow(3).mean()
    (grad,) = torch.autograd.grad(loss, w, create_graph=True)
    (second,) = torch.autograd.grad(grad.pow(2).sum(), w)
    return loss, second


def unused(x: Tensor, w: Tensor) -> Tensor:
    torch.exp(w.T @ w)
    return x * 2


def constant(x: Tensor, w: Tensor) -> Tensor:
    return x @ w + CONSTANT + CONSTANT.t().sum()


def nested(x: Tensor, w: Tensor) -> dict[str, Any]:
    return {"sum": x + 1, "rest": [w * 2, (x.sum(), None)], "static": "text"}


CONSTANT = torch.linspace(0, 1, 4, dtype=torch.float64)
FUNCTIONS: list[Function] = [
    in_place,
    writes_through_view,
    detaches,
    repeats,
    numbers_of_three_kinds,
    returns_inputs,
    returns_views,
    gradient,
    unused,
    constant,
    nested,
]


def arguments() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)


def raw(fn: Function, *examples: Tensor) -> Graph:
    """A graph as it is before any pass: what `capture` hands to the first."""
    returned: list[Any] = []

    def flat(*values: Tensor) -> list[Tensor]:
        result = fn(*values)
        returned.append(tree.flatten(result)[1])
        return tree.leaves(result)

    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [torch.empty(value.shape, dtype=value.dtype) for value in examples]
        module = make_fx(flat, tracing_mode="real")(*fakes)
    inputs = tuple(Input(f"x{index}", Role.DATA, Spec.of(value)) for index, value in enumerate(examples))
    outputs = tuple(Output(f"y{index}", Spec.of(node.meta["val"])) for index, node in enumerate(output_nodes(module)))
    return Graph(module, Signature(inputs, outputs), (), tree.flatten(examples)[1], returned[0])


def output_nodes(module: fx.GraphModule) -> list[fx.Node]:
    return list(list(module.graph.nodes)[-1].args[0])


def assert_equal(found: Any, expected: Any) -> None:
    assert tree.flatten(found)[1] == tree.flatten(expected)[1]
    for one, other in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other.detach(), OPERATIONS)


# --- all passes together


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_a_captured_graph_computes_what_the_function_does(fn: Function) -> None:
    args = arguments()
    before = [value.clone() for value in args]
    graph = capture(fn, *args)
    with torch.enable_grad():
        expected = fn(*[value.clone() for value in args])
    assert_equal(graph.run(*args), expected)
    assert all(map(torch.equal, args, before)), "an argument was written to"
    assert [record.name for record in graph.history] == [rewrite.name for rewrite in STANDARD]
    for record, following in zip(graph.history, graph.history[1:], strict=False):
        assert record.num_nodes_after == following.num_nodes_before
    assert graph.history[-1].num_nodes_after == graph.num_nodes


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_a_captured_graph_holds_the_invariants(fn: Function) -> None:
    graph = capture(fn, *arguments())
    assert not any(map(is_mutable, targets(graph)))
    assert not {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default} & set(targets(graph))
    outputs = output_nodes(graph.module)
    assert len(set(outputs)) == len(outputs)
    assert not any(node.op == "placeholder" for node in outputs)
    keys = [(node.target, str(node.args), str(node.kwargs)) for node in graph.module.graph.nodes if node.op == "call_function"]
    clones = sum(target is aten.clone.default for target in targets(graph))
    assert len(set(keys)) >= len(keys) - clones, "an expression is computed twice"
    assert all(node.users for node in graph.module.graph.nodes if node.op == "call_function"), "a result that nothing uses"


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_no_output_shares_memory_with_an_argument_or_another_output(fn: Function) -> None:
    """A result must stay what it is when the model is trained on, and when another result is written to."""
    args = arguments()
    graph = capture(fn, *args)
    places = [value.untyped_storage().data_ptr() for value in (*args, *graph.constants, *tree.leaves(graph.run(*args)))]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_the_passes_have_nothing_left_to_do(fn: Function) -> None:
    args = arguments()
    graph = capture(fn, *args)
    again = apply(STANDARD, graph)
    assert_equal(again.run(*args), graph.run(*args))
    assert targets(again) == targets(graph)
    assert again.signature == graph.signature
    assert len(again.history) == 2 * len(STANDARD)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "mul", "sin", "detach", "clone", "mul_", "view"]), st.integers(0, 9), st.integers(0, 9)),
        max_size=10,
    )
)
def test_random_programs_keep_their_values(program: list[tuple[str, int, int]]) -> None:
    def fn(x: Tensor, y: Tensor) -> list[Tensor]:
        stack = [x, y]
        for name, left, right in program:
            a, b = stack[left % len(stack)], stack[right % len(stack)]
            if name in ("add", "mul"):
                stack.append(getattr(torch, name)(a, b))
            elif name == "mul_":
                # Out of place first: an argument may not be written to; the view is, and what it is a view of.
                stack.append(a.clone().view(4, 3).mul_(0.5).view(3, 4))
            elif name == "view":
                stack.append(a.view(4, 3).view(3, 4))
            else:
                stack.append(getattr(a, name)())
        return stack

    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    graph = capture(fn, x, y)
    for found, expected in zip(graph.run(x, y), fn(x, y), strict=True):
        assert torch.equal(found, expected)


# --- one pass at a time


def test_functionalise_removes_mutations() -> None:
    args = arguments()
    graph = raw(in_place, *args)
    assert any(map(is_mutable, targets(graph)))
    functional = functionalise.run(graph)
    functionalise.ensures(functional)
    assert not any(map(is_mutable, targets(functional)))
    assert_equal(functional.run(*args), in_place(*args))


def test_a_chain_of_writes_is_exchanged_where_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    def chain(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).add_(1.0).mul_(2.0).view(-1).sub_(w[0, 0])

    def read_later(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        z = y.view(-1)
        y.add_(1.0).mul_(2.0)
        return z * 3.0

    x, w = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    for fn in (chain, read_later):
        found = functionalise.run(raw(fn, x, w))
        functionalise.ensures(found)
        assert torch.equal(found.run(x, w), fn(x, w))
    monkeypatch.setattr(functionalise_file, "retrace", lambda *args: pytest.fail("traced again"))
    functionalise.run(raw(lambda x, w: (x @ w).add_(1.0).mul_(2.0).sub_(0.5), x, w))


def parts_written_to(x: Tensor, w: Tensor) -> Tensor:
    """As recurrent cells do: the parts have gaps between their rows, and what replaces them has none."""
    one, two, _ = torch.unsafe_split(x @ w, 2, 1)
    return (one.sigmoid_() * two.tanh_()).view(-1) + one.t().reshape(-1)


def parts_by_strides(x: Tensor, w: Tensor) -> Tensor:
    """Nor may the strides change where an operation counts in memory."""
    one, *_ = torch.unsafe_split(x @ w, 2, 1)
    return one.sigmoid_().as_strided([3, 2], [5, 1], 0).clone()


def test_writes_to_parts_of_a_split_tensor_are_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    by_strides = raw(parts_by_strides, x, w)
    monkeypatch.setattr(functionalise_file, "retrace", lambda graph, transform: graph)
    assert functionalise.run(by_strides) is by_strides, "it was not traced again"
    monkeypatch.setattr(functionalise_file, "retrace", lambda *args: pytest.fail("traced again"))
    found = functionalise.run(raw(parts_written_to, x, w))
    assert_equal(found.run(x, w), parts_written_to(x, w))
    product = next(node for node in found.module.graph.nodes if node.target is aten.mul.Tensor)
    assert [node.meta["val"].stride() for node in product.all_input_nodes] == [(2, 1), (2, 1)]


def test_functionalise_refuses_what_writes_to_an_argument() -> None:
    """The write would be lost, or change the caller's tensor."""

    def fn(x: Tensor) -> Tensor:
        x.add_(1.0)
        return x * 2

    with pytest.raises(NotTraceable, match="writes to one of its inputs in place"):
        capture(fn, torch.zeros(3))


def test_remove_identities_drops_detach_and_what_nothing_uses() -> None:
    args = arguments()
    graph = raw(detaches, *args)
    # PyTorch 2.15 records alias for detach.
    assert targets(graph).count(aten.detach.default) + targets(graph).count(aten.alias.default) >= 3
    small = remove_identities.run(graph)
    assert not {aten.detach.default, aten.alias.default, aten.clone.default} & set(targets(small))
    assert_equal(small.run(*args), detaches(*args))
    graph = remove_identities.run(raw(unused, *args))
    assert targets(graph) == [aten.mul.Tensor]
    assert len(graph.signature.inputs) == 2, "an unused input stays"


def test_remove_identities_keeps_a_clone_that_changes_the_layout() -> None:
    def fn(x: Tensor) -> Tensor:
        return x.t().contiguous().view(-1)

    graph = capture(fn, torch.zeros(2, 3))
    assert aten.clone.default in targets(graph)
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(graph.run(x), fn(x))


def test_merge_duplicates_computes_once() -> None:
    args = arguments()
    graph = raw(repeats, *args)
    assert targets(graph).count(aten.mm.default) == 4
    merged = merge_duplicates.run(graph)
    assert sorted(map(str, targets(merged))) == [
        "aten.add.Tensor",
        "aten.cos.default",
        "aten.mm.default",
        "aten.mul.Tensor",
        "aten.sin.default",
    ]
    assert_equal(merged.run(*args), repeats(*args))


def test_merge_duplicates_keeps_numbers_of_different_kinds_apart() -> None:
    x, w = arguments()
    found = capture(numbers_of_three_kinds, x, w).run(x, w)
    for one, other in zip(found, numbers_of_three_kinds(x, w), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        if one.is_floating_point():
            assert torch.equal(one.signbit(), other.signbit()), "0.0 and -0.0 were merged"


def test_late_expands_broadcasts_where_a_whole_tensor_is_met() -> None:
    def fn(mean: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = (mean.expand(2, 3, 4) / 4).exp()
        return wide * x, torch.where(x > 0, mean.expand(2, 3, 4), 0.0)

    args = double(3, 1), double(2, 3, 4)
    graph = apply((late_expands,), capture(fn, *args))
    assert aten.expand.default not in targets(graph)
    sizes = {node.target: node.meta["val"].shape for node in graph.module.graph.nodes if node.op == "call_function"}
    assert sizes[aten.div.Tensor] == sizes[aten.exp.default] == (3, 1)
    assert_equal(graph.function()(*args), list(fn(*args)))


def test_late_expands_keeps_what_decides_a_dtype_or_is_an_output() -> None:
    def fn(number: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return number.expand(3) * x, number.expand(2, 3).neg()

    args = double(), double(3).float()
    graph = apply((late_expands, own_outputs), capture(fn, *args))
    assert targets(graph).count(aten.expand.default) == 2
    assert [node.meta["val"].dtype for node in output_nodes(graph.module)] == [torch.float64] * 2
    assert_equal(graph.function()(*args), list(fn(*args)))


@pytest.mark.parametrize(
    "limit", [torch.tensor(0.1, dtype=torch.float64), torch.tensor(2**32 + 1)], ids=["double beside float", "long beside int"]
)
def test_late_expands_keeps_the_dtype_in_which_numbers_are_compared(limit: Tensor) -> None:
    """A tensor without axes would be compared in the dtype of the other: 0.1 is not more than 0.1 there, and 2³² + 1 is 1."""

    def fn(limit: Tensor, x: Tensor) -> Tensor:
        return torch.stack([x > limit.expand(x.shape), x == limit.expand(x.shape)])

    x = torch.full((3,), 0.1) if limit.is_floating_point() else torch.ones(3, dtype=torch.int32)
    graph = apply((late_expands,), capture(fn, limit, x))
    assert torch.equal(graph.function()(limit, x)[0], fn(limit, x))
    assert not torch.equal(torch.stack([x > limit, x == limit]), fn(limit, x))


def test_own_outputs_copies_inputs_and_repeated_results() -> None:
    args = arguments()
    graph = raw(returns_inputs, *args)
    with pytest.raises(InvalidGraph, match="output"):
        verify(graph)
    owned = verify(own_outputs.run(graph))
    assert targets(owned).count(aten.clone.default) == 3, "x, w, and y the second time"
    assert_equal(owned.run(*args), returns_inputs(*args))


def test_apply_leaves_the_graph_it_is_given_alone() -> None:
    args = arguments()
    for fn in (repeats, detaches, returns_inputs):
        graph = raw(fn, *args)
        before = str(graph)
        apply((remove_identities, merge_duplicates, own_outputs), graph)
        assert str(graph) == before


def test_apply_records_and_checks() -> None:
    graph = capture(repeats, *arguments())
    order: list[str] = []

    def refuse(graph: Graph) -> None:
        order.append("requires")
        raise InvalidGraph("not here")

    def note(graph: Graph) -> None:
        order.append("ensures")

    passed = apply((Pass("nothing", lambda graph: graph, ensures=note),), graph)
    assert passed.history[-1].name == "nothing"
    with pytest.raises(InvalidGraph, match="not here"):
        apply((Pass("never", lambda graph: pytest.fail("ran"), requires=refuse),), graph)
    assert order == ["ensures", "requires"]

    def breaks(graph: Graph) -> Graph:
        return dataclasses.replace(graph, signature=Signature(graph.signature.inputs, ()))

    with pytest.raises(InvalidGraph, match="0 outputs"):
        apply((Pass("breaks", breaks),), graph)


def test_copy_module_is_a_copy() -> None:
    graph = capture(repeats, *arguments())
    copied = copy_module(graph)
    for node in reversed(list(copied.graph.nodes)):
        if node.op == "output":
            node.args = ([next(iter(copied.graph.nodes))],)
    assert verify(graph) is graph


# --- the task axis


class Batched(NamedTuple):
    """A function of one task, and which of its inputs have a value for each task."""

    fn: Function
    axes: tuple[bool, ...]
    args: tuple[Tensor, ...]


T = 3


def conv_step(x: Tensor, w: Tensor) -> Tensor:
    return F.max_pool2d(F.conv2d(x, w, padding=1).relu(), 2).mean((2, 3))


def norm_step(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    w = w.detach().requires_grad_()
    y = F.batch_norm(x @ w, mean, var, training=True, momentum=0.1)
    return y, mean, torch.autograd.grad(y.pow(3).sum(), w)[0]


def lookup_step(table: Tensor, index: Tensor) -> Tensor:
    return F.cross_entropy(F.embedding(index, table), index % 4)


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


BATCHED: list[tuple[str, Batched]] = [
    ("matmul, both", Batched(lambda x, w: x @ w, (True, True), (double(T, 3, 4), double(T, 4, 4)))),
    ("matmul, shared weight", Batched(lambda x, w: x @ w, (True, False), (double(T, 3, 4), double(4, 4)))),
    ("matmul, shared data", Batched(lambda x, w: x @ w, (False, True), (double(3, 4), double(T, 4, 4)))),
    ("conv and pooling", Batched(conv_step, (True, True), (double(T, 2, 3, 4, 4), double(T, 5, 3, 3, 3)))),
    ("batch norm and its gradient", Batched(norm_step, (True, True), (double(T, 6, 4), double(T, 4, 4)))),
    ("batch norm, shared weight", Batched(norm_step, (True, False), (double(T, 6, 4), double(4, 4)))),
    ("embedding and cross-entropy", Batched(lookup_step, (True, True), (double(T, 5, 4), torch.arange(6).view(T, 2) % 5))),
    ("a result that no task changes", Batched(lambda x, w: (w * 2, x * 1.5), (True, False), (double(T, 2), double(4)))),
    ("second derivative", Batched(gradient, (True, True), (double(T, 3, 4), double(T, 4, 4)))),
    ("a constant", Batched(constant, (True, False), (double(T, 3, 4), double(4, 4)))),
    ("in place", Batched(in_place, (True, True), (double(T, 3, 4), double(T, 4, 4)))),
    ("returns its arguments", Batched(returns_inputs, (True, False), (double(T, 3, 4), double(4, 4)))),
]


@pytest.mark.parametrize("case", [case for _, case in BATCHED], ids=[name for name, _ in BATCHED])
@pytest.mark.parametrize("num_tasks", [1, T])
def test_batch_is_a_loop_over_tasks(case: Batched, num_tasks: int) -> None:
    args = [arg[:num_tasks] if axis else arg for arg, axis in zip(case.args, case.axes, strict=True)]
    rows = [[arg[task] if axis else arg for arg, axis in zip(args, case.axes, strict=True)] for task in range(num_tasks)]
    graph = capture(case.fn, *rows[0])
    loop = [tree.leaves(graph.run(*row)) for row in rows]
    count = len(loop[0])
    stacked = batch(graph, case.axes, [False] * count, num_tasks)
    for index, found in enumerate(tree.leaves(stacked.run(*args))):
        assert_close(found, torch.stack([results[index] for results in loop]), OPERATIONS)
    summed = batch(graph, case.axes, [index % 2 == 0 for index in range(count)], num_tasks)
    for index, found in enumerate(tree.leaves(summed.run(*args))):
        expected = torch.stack([results[index] for results in loop])
        assert_close(found, expected.sum(0) if index % 2 == 0 else expected, OPERATIONS)
    for entry, axis, arg in zip(stacked.signature.inputs, case.axes, args, strict=False):
        assert entry.spec == Spec.of(arg), axis
    assert [entry.name for entry in stacked.signature.inputs] == [entry.name for entry in graph.signature.inputs]
    assert not any(map(is_mutable, targets(stacked)))


# --- randomness


DRAWS: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("dropout", lambda x: F.dropout(x, 0.3), "bernoulli"),
    ("dropout1d", lambda x: F.dropout1d(x, 0.3), "bernoulli"),
    ("alpha_dropout", lambda x: F.alpha_dropout(x, 0.3, training=True), "bernoulli"),
    ("rand", lambda x: x + torch.rand(3, 4, dtype=x.dtype), "uniform"),
    ("randn", lambda x: x + torch.randn(3, 4, dtype=x.dtype), "normal"),
    ("rand_like", lambda x: x + torch.rand_like(x), "uniform"),
    ("randn_like", lambda x: x + torch.randn_like(x), "normal"),
    ("randint", lambda x: x + torch.randint(2, 7, (3, 4)), "randint"),
    ("randint from 0", lambda x: x + torch.randint(7, (3, 4)), "randint"),
    ("randint_like", lambda x: x + torch.randint_like(x, 5), "randint"),
    ("randperm", lambda x: x[torch.randperm(3)], "randperm"),
    ("uniform_", lambda x: x + torch.empty_like(x).uniform_(-2, 3), "uniform"),
    ("normal_", lambda x: x + torch.empty_like(x).normal_(1, 2), "normal"),
    ("exponential_", lambda x: x + torch.empty_like(x).exponential_(2.0), "exponential"),
    ("bernoulli_", lambda x: x * torch.empty_like(x).bernoulli_(0.3), "bernoulli"),
    ("bernoulli with p", lambda x: x * torch.bernoulli(x, 0.3), "bernoulli"),
    ("normal of two numbers", lambda x: x + torch.normal(1.0, 2.0, (3, 4), dtype=x.dtype), "normal"),
    ("gumbel_softmax", lambda x: F.gumbel_softmax(x, hard=True), "exponential"),
    ("rrelu", lambda x: x + torch.empty_like(x).uniform_(0.1, 0.3) * x, "uniform"),
    ("two draws", lambda x: F.dropout(x, 0.3) + torch.rand_like(x), "bernoulli"),
]


@pytest.mark.parametrize(("fn", "kind"), [(fn, kind) for _, fn, kind in DRAWS], ids=[name for name, _, _ in DRAWS])
def test_lifted_noise_is_what_eager_draws(fn: Callable[[Tensor], Tensor], kind: str) -> None:
    """From one seed the same numbers, whoever draws them."""
    x = torch.rand(3, 4, dtype=torch.float64)
    torch.manual_seed(3)
    expected = fn(x)
    after = torch.get_rng_state()

    def probe(x: Tensor) -> Tensor:
        with record_noise() as found:
            result = fn(x)
        noises.extend(found)
        return result

    noises: list[Noise] = []
    capture(probe, x)
    assert noises[0].kind == kind

    def lifted(x: Tensor, noise: tuple[Tensor, ...]) -> Tensor:
        with lift_noise(noise):
            return fn(x)

    torch.manual_seed(3)
    drawn = draw(noises)
    assert torch.equal(torch.get_rng_state(), after), "draws as much as eager code does"
    graph = capture(lifted, x, tuple(noise.spec for noise in noises), roles=(Role.DATA, Role.NOISE))
    assert [entry.role for entry in graph.signature.inputs] == [Role.DATA] + [Role.NOISE] * len(noises)
    assert_close(graph.run(x, drawn), expected, OPERATIONS)
    assert_close(lifted(x, drawn), expected, OPERATIONS)


def test_noise_passes_derivatives_through() -> None:
    x = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    mask = (torch.rand(3, 4) < 0.5).double()
    with lift_noise((mask,)):
        y = F.dropout(x, 0.5)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, mask * 2)


def test_no_noise_without_randomness() -> None:
    x = torch.ones(3, 4)
    for fn in (lambda x: F.dropout(x, 0.5, training=False), lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])):
        with record_noise() as found:
            fn(x)
        assert found == []


def test_dropout_at_both_ends() -> None:
    x = torch.ones(3, 4)
    with record_noise() as found:
        assert torch.equal(F.dropout(x, 0.0), x)
    assert found == []
    with lift_noise((torch.zeros(3, 4),)):
        assert torch.equal(F.dropout(x, 1.0), torch.zeros(3, 4))


def test_record_noise_draws_nothing() -> None:
    before = torch.get_rng_state()
    with record_noise() as found:
        F.dropout(torch.ones(3, 4))
        torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [(noise.kind, noise.spec.shape) for noise in found] == [("bernoulli", (3, 4)), ("uniform", (2,))]


def test_too_little_noise_and_noise_of_another_shape_are_refused() -> None:
    for noise in ((), (torch.zeros(3),)):
        with pytest.raises(UnsupportedRandomness, match="must not vary"), lift_noise(noise):
            F.dropout(torch.ones(3, 4))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: torch.multinomial(x, 1), "multinomial"),
        (lambda x: torch.poisson(x), "poisson"),
        (lambda x: torch.empty_like(x).cauchy_(), "cauchy_"),
        (lambda x: torch.rand(2, generator=torch.Generator()), "generator"),
        (lambda x: torch.empty_like(x).normal_(generator=torch.Generator()), "generator"),
        (lambda x: torch.bernoulli(x, generator=torch.Generator()), "generator"),
    ],
    ids=["multinomial", "poisson", "cauchy", "factory", "in place", "bernoulli"],
)
def test_what_cannot_be_lifted_is_refused(fn: Function, message: str) -> None:
    with pytest.raises(UnsupportedRandomness, match=message), record_noise():
        fn(torch.full((2, 3), 0.5))


def test_randomness_outside_lift_noise_is_refused() -> None:
    with pytest.raises(UnsupportedRandomness, match="outside the model"):
        capture(lambda x: x + torch.rand_like(x), torch.zeros(3))


@pytest.mark.parametrize("kind", ["bernoulli", "uniform", "normal", "exponential", "randint", "randperm"])
def test_tasks_draw_noise_of_their_own(kind: str) -> None:
    constants = {
        "bernoulli": (0.5,),
        "uniform": (2.0, 3.0),
        "normal": (5.0, 0.1),
        "exponential": (1.0,),
        "randint": (3.0, 9.0),
        "randperm": (40.0,),
    }
    dtype = torch.int64 if kind in ("randint", "randperm") else torch.float64
    noise = Noise(kind, constants[kind], Spec((40,), dtype, torch.device("cpu")))
    one, many = noise.draw(), noise.draw(num_tasks=3)
    assert (one.shape, many.shape) == ((40,), (3, 40))
    assert one.dtype == many.dtype == dtype
    assert not torch.equal(many[0], many[1])
    if kind == "randperm":
        assert all(sorted(row.tolist()) == list(range(40)) for row in many)
    if kind == "randint":
        assert many.min() >= 3
        assert many.max() < 9
    if kind == "uniform":
        assert many.min() >= 2
        assert many.max() < 3
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    before = torch.get_rng_state()
    assert torch.equal(*(noise.draw(generator, 3) for generator in generators))
    assert torch.equal(torch.get_rng_state(), before)


def test_attention_is_random_only_with_dropout() -> None:
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert not is_random(attention, (None, None, None))
    assert not is_random(attention, (None, None, None, 0.0))
    assert is_random(attention, (None, None, None, 0.1))
    assert is_random(aten.rand.default)
    assert not is_random(aten.add.Tensor)
    assert not is_random(operator.getitem)


# --- class labels and other indices


LABELS = "the model's class labels"
LABELLED: list[tuple[str, Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...], list[IndexBound]]] = [
    ("cross-entropy", lambda x, y: F.cross_entropy(x, y), (6, 3), (6,), [IndexBound(1, "y", 3, -100, LABELS)]),
    ("ignored index", lambda x, y: F.cross_entropy(x, y, ignore_index=2), (6, 3), (6,), [IndexBound(1, "y", 3, 2, LABELS)]),
    ("weighted", lambda x, y: F.cross_entropy(x, y, torch.ones(3)), (6, 3), (6,), [IndexBound(1, "y", 3, -100, LABELS)]),
    ("smoothed", lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1), (6, 3), (6,), [IndexBound(1, "y", 3, -100, LABELS)]),
    ("not reduced", lambda x, y: F.cross_entropy(x, y, reduction="none").sum(), (6, 3), (6,), [IndexBound(1, "y", 3, -100, LABELS)]),
    ("negative log-likelihood", lambda x, y: F.nll_loss(x, y), (6, 3), (6,), [IndexBound(1, "y", 3, -100, LABELS)]),
    ("pixels", lambda x, y: F.cross_entropy(x, y), (2, 3, 4, 4), (2, 4, 4), [IndexBound(1, "y", 3, -100, LABELS)]),
    ("sequences", lambda x, y: F.cross_entropy(x, y), (2, 3, 5), (2, 5), [IndexBound(1, "y", 3, -100, LABELS)]),
    ("one example", lambda x, y: F.cross_entropy(x, y), (3,), (), [IndexBound(1, "y", 3, -100, LABELS)]),
    ("through views", lambda x, y: F.cross_entropy(x.view(-1, 3), y.view(-1)), (2, 4, 3), (2, 4), [IndexBound(1, "y", 3, -100, LABELS)]),
    ("other integers", lambda x, y: F.cross_entropy(x, y.int().long()), (6, 3), (6,), [IndexBound(1, "y", 3, -100, LABELS)]),
    ("embedding", lambda x, y: F.embedding(y, x), (6, 3), (4,), [IndexBound(1, "y", 6, None, "rows of the embedding")]),
    ("gather", lambda x, y: x.gather(1, y[:, None]), (6, 3), (6,), [IndexBound(1, "y", 3, None, "positions along the gathered axis")]),
    ("index_select", lambda x, y: x.index_select(0, y), (6, 3), (4,), [IndexBound(1, "y", 6, None, "positions along the gathered axis")]),
    ("computed", lambda x, y: F.cross_entropy(x, y % 3), (6, 3), (6,), []),
    ("none", lambda x, y: (x.sum(-1) - y).mean(), (6, 3), (6,), []),
]


@pytest.mark.parametrize(("fn", "shape", "target", "bounds"), [row[1:] for row in LABELLED], ids=[row[0] for row in LABELLED])
def test_index_bounds(fn: Function, shape: tuple[int, ...], target: tuple[int, ...], bounds: list[IndexBound]) -> None:
    graph = capture(fn, torch.zeros(shape), torch.zeros(target, dtype=torch.long), names=("x", "y"))
    assert index_bounds(graph) == bounds


# --- cost and text


def test_flops_by_hand() -> None:
    graph = capture(lambda x, w, b: F.linear(x, w, b).relu(), torch.zeros(6, 4), torch.zeros(3, 4), torch.zeros(3))
    assert num_flops(graph) == 2 * 6 * 4 * 3
    graph = capture(lambda a, b: a @ b, torch.zeros(5, 6, 4), torch.zeros(5, 4, 3))
    assert num_flops(graph) == 5 * 2 * 6 * 4 * 3
    graph = capture(lambda x, w: F.conv2d(x, w), torch.zeros(2, 3, 8, 8), torch.zeros(5, 3, 3, 3))
    assert num_flops(graph) == 2 * (2 * 5 * 6 * 6) * (3 * 3 * 3)
    assert num_flops(capture(lambda x: x.exp().sum(), torch.zeros(9))) == 0


def test_bytes_by_hand() -> None:
    graph = capture(lambda x, w, b: F.linear(x, w, b), torch.zeros(6, 4), torch.zeros(3, 4), torch.zeros(3))
    assert num_bytes(graph) == 4 * (6 * 4 + 3 * 4 + 3 + 6 * 3)
    graph = capture(lambda x, i: x[i].double(), torch.zeros(6, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.long))
    assert num_bytes(graph) == 2 * 6 + 8 * 2 + 8 * 2


def test_a_graph_prints_every_input_operation_and_output() -> None:
    graph = capture(
        lambda params, x: {"loss": (x @ params["w"]).topk(2)[0].mean(), "copy": x},
        {"w": torch.zeros(4, 3)},
        torch.zeros(6, 4, dtype=torch.float32),
        roles=(Role.PARAM, Role.DATA),
        names=("params", "x"),
    )
    lines = str(graph).splitlines()
    assert lines[0] == f"graph of {graph.num_nodes} operations, 2 inputs, 2 outputs"
    assert lines[1] == "  param     params.w: f32[4, 3]"
    assert lines[2] == "  data      x: f32[6, 4]"
    assert lines[3] == "  %0: f32[6, 3] = mm(x, params.w)"
    assert lines[4].startswith("  %1: tuple = topk(%0, 2")
    assert lines[-1].startswith("  return result.loss=%")
    assert "result.copy=%" in lines[-1]
    assert len(lines) == 1 + 2 + graph.num_nodes + 1
    assert str(graph.signature).splitlines() == [
        "param   params.w     float32[4, 3]",
        "data    x            float32[6, 4]",
        "output  result.loss  float32[]",
        "output  result.copy  float32[6, 4]",
    ]


def test_run_takes_only_what_was_captured() -> None:
    graph = capture(nested, *arguments())
    with pytest.raises(ValueError, match="2 tensors"):
        graph.run(torch.zeros(3, 4))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert not any(value.requires_grad for value in tree.leaves(graph.run(x, arguments()[1])))


# --- verify


def edited(edit: Callable[[fx.Graph], None], fn: Function = repeats) -> Graph:
    """A good graph, broken by `edit`."""
    graph = capture(fn, *arguments())
    module = copy_module(graph)
    edit(module.graph)
    return dataclasses.replace(graph, module=module)


def with_signature(inputs: Callable[[tuple[Input, ...]], Any] = tuple, outputs: Callable[[tuple[Output, ...]], Any] = tuple) -> Graph:
    graph = capture(repeats, *arguments())
    return dataclasses.replace(graph, signature=Signature(inputs(graph.signature.inputs), outputs(graph.signature.outputs)))


def replace_first(target: Any, op: str = "call_function", args: tuple[Any, ...] | None = None) -> Callable[[fx.Graph], None]:
    def edit(graph: fx.Graph) -> None:
        node = next(node for node in graph.nodes if node.op == "call_function")
        with graph.inserting_before(node):
            other = graph.create_node(op, target, node.args if args is None else args)
        other.meta = dict(node.meta)
        node.replace_all_uses_with(other)
        graph.erase_node(node)

    return edit


def return_input(graph: fx.Graph) -> None:
    first = next(iter(graph.nodes))
    end = list(graph.nodes)[-1]
    end.args = ([first],)
    end.args[0][0].meta["val"] = end.args[0][0].meta["val"]


def return_twice(graph: fx.Graph) -> None:
    end = list(graph.nodes)[-1]
    end.args = ([end.args[0][0]] * len(end.args[0]),)


def drop_meta(graph: fx.Graph) -> None:
    del list(graph.nodes)[-1].args[0][0].meta["val"]


def use_before_definition(graph: fx.Graph) -> None:
    nodes = list(graph.nodes)
    nodes[2].prepend(nodes[-2])


def wrong_spec(entry: Any) -> Any:
    return dataclasses.replace(entry, spec=dataclasses.replace(entry.spec, shape=(7, 7)))


def wrong_dtype(entry: Any) -> Any:
    return dataclasses.replace(entry, spec=dataclasses.replace(entry.spec, dtype=torch.float32))


X, W = arguments()
BROKEN: list[tuple[str, Callable[[], Graph], str]] = [
    ("a Python function", lambda: edited(replace_first(torch.nn.functional.linear)), "only ATen operations"),
    ("a method call", lambda: edited(replace_first("matmul", "call_method")), "only ATen operations"),
    ("an operation that mutates", lambda: edited(replace_first(aten.add_.Tensor)), "mutates its argument"),
    ("an operation that writes to out", lambda: edited(replace_first(aten.mm.out)), "mutates its argument"),
    ("a random operation", lambda: edited(replace_first(aten.rand.default, args=([3, 4],))), "random operation that was not lifted"),
    (
        "attention with dropout",
        lambda: edited(replace_first(aten._scaled_dot_product_flash_attention_for_cpu.default, args=(1, 1, 1, 0.5))),
        "random operation",
    ),
    ("an input is returned", lambda: edited(return_input, lambda x, w: x + 1), "alias"),
    ("a result is returned twice", lambda: edited(return_twice, lambda x, w: (x + 1, x + 2)), "alias"),
    ("no metadata", lambda: edited(drop_meta), "output .* the signature says"),
    (
        "an input too few in the signature",
        lambda: with_signature(inputs=lambda entries: entries[1:]),
        "signature has 1 inputs, the graph 2",
    ),
    (
        "an output too many in the signature",
        lambda: with_signature(outputs=lambda entries: entries * 2),
        "signature has 2 outputs, the graph 1",
    ),
    (
        "an input's shape",
        lambda: with_signature(inputs=lambda entries: (wrong_spec(entries[0]), entries[1])),
        r"input .* is float64\[3, 4\], the signature says float64\[7, 7\]",
    ),
    (
        "an output's dtype",
        lambda: with_signature(outputs=lambda entries: tuple(map(wrong_dtype, entries))),
        r"output .* is float64\[3, 4\], the signature says float32",
    ),
    (
        "a constant too many",
        lambda: dataclasses.replace(capture(repeats, X, W), constants=(X,)),
        "2 arguments and 1 constants, but 2 inputs",
    ),
    (
        "arguments of another structure",
        lambda: dataclasses.replace(capture(repeats, X, W), arguments=tree.flatten((X,))[1]),
        "1 arguments and 0 constants, but 2 inputs",
    ),
    ("a result of another structure", lambda: dataclasses.replace(capture(repeats, X, W), result=tree.flatten((X, W))[1]), "result"),
]


@pytest.mark.parametrize(("build", "message"), [(build, message) for _, build, message in BROKEN], ids=[name for name, _, _ in BROKEN])
def test_verify_refuses_broken_graphs(build: Callable[[], Graph], message: str) -> None:
    graph = build()
    with pytest.raises(InvalidGraph, match=message):
        verify(graph)


def test_verify_lints() -> None:
    with pytest.raises(RuntimeError, match=r"before|used"):
        verify(edited(use_before_definition))


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_verify_passes_good_graphs(fn: Function) -> None:
    graph = capture(fn, *arguments())
    assert verify(graph) is graph


# --- small matrix products


def products(a: Tensor, b: Tensor, c: Tensor, big: Tensor, stack: Tensor, half: Tensor) -> tuple[Tensor, ...]:
    return (
        a @ b,
        a[:1] @ b,
        torch.addmm(c, a, b),
        torch.addmm(c, a, b, beta=0.5, alpha=-2.0),
        torch.addmm(torch.full_like(c, float("nan")), a, b, beta=0),
        torch.bmm(stack, stack.mT),
        torch.baddbmm(stack.mT.sum(1, keepdim=True), stack, stack.mT, alpha=3.0),
        big @ big,
        half @ half.mT,
    )


def test_inline_small_matmuls() -> None:
    shapes = [(3, 4), (4, 5), (5,), (65, 65), (6, 3, 4)]
    values = [*[torch.randn(shape, dtype=torch.float64) for shape in shapes], torch.randn(3, 4).bfloat16()]
    graph = capture(products, *values)
    inlined = apply(LOWERING[:1], graph)
    wanted = graph.run(*values)
    for found, value in zip(inlined.run(*values), wanted, strict=True):
        assert_close(found, value, ROUNDING)
    targets = [(str(node.target), node.meta["val"]) for node in inlined.module.graph.nodes if node.op == "call_function"]
    left = [value for target, value in targets if "aten" in target and "mm" in target]
    assert [value.dtype for value in left] == [torch.float64, torch.bfloat16] and left[0].shape == (65, 65)
    assert sum("small_matmul" in target for target, _ in targets) == 6
    assert any("inline_small_matmuls" in record.name for record in inlined.history)
    assert num_flops(inlined) == num_flops(graph) - 2 * 4 * 5  # without the one that became a loop
