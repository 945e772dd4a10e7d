"""Where the graph of results and gradients is cut, and what `Stash` does with the halves."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt import Replay, Stash, compile_unroll, optim
from adaptrt.adjoint import auto
from adaptrt.adjoint.auto import MAX_KEPT_BYTES, choose
from adaptrt.adjoint.base import Wrt, pull_back
from adaptrt.graph.capture import capture
from adaptrt.graph.cost import num_bytes_to_keep
from adaptrt.graph.cut import is_cheap
from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.partition import partition
from adaptrt.graph.signature import Role
from adaptrt.runtime import plan
from tests.models import conv_dropout, labelled_images
from tests.tolerances import GRADIENT, HIGH_DERIVATIVE, assert_close

aten = torch.ops.aten


def joint_of(fn: Any, *args: Any) -> Graph:
    """Results and gradients of a function of tensors with one result."""
    (out,) = capture(fn, *args).signature.outputs
    both = pull_back(fn, Wrt(tuple([True] for _ in args), (True,)), value=True)
    roles = [*[Role.DATA for _ in args], Role.COTANGENT]
    return capture(both, *args, [torch.empty(out.spec.shape, dtype=out.spec.dtype)], roles=roles)


def chain(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(torch.exp(torch.sin(x @ w)) @ v)


def halves() -> tuple[Graph, Graph, Graph, list[Tensor]]:
    args = [torch.randn(size, dtype=torch.float64) for size in ((5, 4), (4, 3), (3, 6))]
    joint = joint_of(chain, *args)
    return joint, *partition(joint, 1), args


def test_the_halves_are_the_whole() -> None:
    joint, forward, backward, args = halves()
    cotangent = torch.randn(5, 6, dtype=torch.float64)
    expected, gradients = joint.run(*args, [cotangent])
    found, kept = forward.run(*args)
    assert torch.equal(found, expected)
    again = backward.run(*args, kept, [cotangent])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again, gradients, strict=True))


def test_products_are_kept_and_pointwise_operations_are_not() -> None:
    _, forward, backward, _ = halves()
    kept = [output.spec.shape for output in forward.signature.outputs if output.kept]
    # x @ w is the smallest that gives sin and exp of it; the second product, or tanh of it, gives the other derivative.
    assert sorted(kept) == [(5, 3), (5, 6)]
    products = [node for node in backward.module.graph.nodes if node.op == "call_function" and not is_cheap(node)]
    assert [node.target for node in products] == [aten.mm.default] * 4, "the gradients' own"
    assert [entry.role for entry in backward.signature.inputs].count(Role.KEPT) == 2


def test_inputs_are_not_kept() -> None:
    args = [torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)]
    forward, backward = partition(joint_of(lambda x, w: x @ w, *args), 1)
    assert not any(output.kept for output in forward.signature.outputs)
    assert backward.run(*args, [], [torch.eye(3, dtype=torch.float64)])[0][0].equal(args[1].T)


def test_the_estimate_of_what_is_kept_counts_products() -> None:
    graph = capture(chain, torch.randn(5, 4), torch.randn(4, 3), torch.randn(3, 6))
    assert num_bytes_to_keep(graph, ()) == 4 * (5 * 3 + 5 * 6)


def test_the_estimate_knows_what_differentiation_reads() -> None:
    def all_kinds(x: Tensor, w: Tensor) -> Tensor:
        y = (x @ w).relu()  # [5, 3]: relu reads its result, cheaply made of the product
        z = 2 * y.sum(0) + y.mean(0)  # linear: nothing
        mask = (y @ y.T) > 0  # no gradient flows through it, but where reads it: [5, 5]
        return torch.where(mask, z.sum(), y.sum()).sum()

    graph = capture(all_kinds, torch.randn(5, 4), torch.randn(4, 3))
    assert num_bytes_to_keep(graph, ()) == 4 * 5 * 3 + 5 * 5


def test_auto_keeps_what_fits() -> None:
    cpu = torch.device("cpu")
    for kept, expected in ((MAX_KEPT_BYTES, Stash()), (MAX_KEPT_BYTES + 1, Replay())):
        adjoint, reason = choose(1000, 0, 5, lambda kept=kept: kept, cpu)
        assert adjoint == expected and "MB" in reason


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_stash_and_replay_agree(backend: str) -> None:
    model, found = conv_dropout(), list[list[Tensor]]()
    for adjoint in (Replay(), Stash()):
        unroll = compile_unroll(model, optim.adam(lr=0.05), 3, loss=F.cross_entropy, adjoint=adjoint, backend=backend)
        unroll(labelled_images(0), labelled_images(1))  # compiles; what follows runs what is there
        loss = unroll(labelled_images(0), labelled_images(1), generator=torch.Generator().manual_seed(7))
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
        if isinstance(adjoint, Stash):
            assert set(unroll.graphs()) == {"step with stash", "step pullback from stash", "query pullback"}
    # Adam divides by roots of second moments, some of them small: rounding is enlarged.
    for a, b in zip(*found, strict=True):
        assert_close(a, b, HIGH_DERIVATIVE)


@pytest.mark.slow
def test_auto_looks_closer_before_it_finds_it_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decomposed for Inductor, a step keeps less than its operations would; the estimate is of that."""
    monkeypatch.setattr(auto, "MAX_UNROLLED_OPERATIONS", 0)
    monkeypatch.setattr(plan, "MAX_KEPT_BYTES", 0)  # the first estimate is too much, and the second is judged by another limit
    k = 40
    unroll = compile_unroll(conv_dropout().eval(), optim.sgd(lr=0.1), k, loss=F.cross_entropy, backend="inductor")
    unroll(labelled_images(0), labelled_images(1))
    kept = k * sum(output.spec.num_bytes for output in unroll.graphs()["step with stash"].signature.outputs if output.kept)
    stated = re.search(r"about ([\d.]+) MB", str(unroll.explain()))
    assert stated is not None
    assert 0.5 * kept <= 1e6 * float(stated[1]) <= 2 * kept


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_statistics_that_stay_as_they_are(backend: str) -> None:
    """In eval mode the buffers before and after a step are one value; each is a result of its own."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3)).double().eval()
    head = list(model.requires_grad_(False)[-1].requires_grad_(True).parameters())
    found: list[Sequence[Tensor]] = []
    for adjoint in (Replay(), Stash()):
        unroll = compile_unroll(model, torch.optim.SGD(head, 0.1), 2, loss=F.cross_entropy, adjoint=adjoint, backend=backend)
        found.append(torch.autograd.grad(unroll(labelled_images(0), labelled_images(1)), head))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, GRADIENT)


@pytest.mark.slow
def test_inductors_rules_find_what_they_use_in_a_fresh_process() -> None:
    """That of max-pooling uses a module of Inductor's that it does not import."""
    code = """
import torch
from adaptrt.backend.inductor import Inductor
from adaptrt.graph.capture import capture
from adaptrt.graph.cost import num_bytes_to_keep
Inductor().lower(capture(lambda x: torch.nn.functional.max_pool2d(x, 3, 2, 1), torch.zeros(1, 1, 9, 9)))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_two_calls_may_be_under_way_at_once() -> None:
    """What a call keeps is its own, and serves each backward pass that is asked for."""
    model = conv_dropout().eval()
    unroll = compile_unroll(model, optim.sgd(lr=0.1), 2, adjoint=Stash(), backend="eager")
    x, y = labelled_images(2)
    first, second = unroll.adapt(labelled_images(0)), unroll.adapt(labelled_images(1))
    losses = [F.cross_entropy(adapted(x), y) for adapted in (first, second)]
    expected = [torch.autograd.grad(unroll(labelled_images(i), (x, y)), list(model.parameters())) for i in (0, 1)]
    for index in (1, 0):
        for _ in range(2):
            found = torch.autograd.grad(losses[index], list(model.parameters()), retain_graph=True)
            for a, b in zip(found, expected[index], strict=True):
                assert_close(a, b, HIGH_DERIVATIVE)


def test_stash_is_public() -> None:
    assert adaptrt.Stash() == Stash() and "Stash" in adaptrt.__all__
