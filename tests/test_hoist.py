"""What is the same in every step is computed once: a frozen backbone on the support batch, for adjoints that take one step at a time."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from adaptrt import Adjoint, CompiledUnroll, CudaGraph, Eager, FirstOrder, Replay, Stash, Unrolled, compile_unroll, optim
from adaptrt.adjoint.base import Wrt, pull_back
from adaptrt.graph.capture import capture
from adaptrt.graph.cost import num_bytes_to_keep, num_flops
from adaptrt.graph.passes import hoist as module
from adaptrt.graph.passes.hoist import MIN_FLOPS, hoist
from adaptrt.graph.signature import Role
from adaptrt.runtime import probe
from tests.graphs import targets
from tests.models import labelled_images
from tests.pairs import by_name, over_pairs
from tests.recorders import TapeRecorder
from tests.tolerances import LOSS, assert_close, assert_near

aten = torch.ops.aten

# --- the pass


def body(carry: Tensor, fixed: Tensor, batch: Tensor) -> Tensor:
    features = torch.tanh(batch @ fixed)
    return carry - 0.1 * ((features @ carry).sin().sum() * features.mean(0).unsqueeze(1) + carry)


def values() -> list[Tensor]:
    generator = Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((80, 1), (90, 80), (100, 90))]


def test_the_halves_are_the_whole() -> None:
    args = values()
    graph = capture(body, *args)
    halves = hoist(graph, [1, 2])
    assert halves is not None
    first, second = halves
    shared = first.run(*args)
    assert torch.equal(second.run(*args, shared), graph.run(*args))
    assert {aten.mm.default, aten.mean.dim} <= set(targets(first))
    assert targets(second).count(aten.mm.default) == 1, "the product with the carry is each step's own"
    assert aten.mean.dim not in targets(second)
    assert [entry.role for entry in second.signature.inputs].count(Role.KEPT) == len(shared) == 2
    assert [record.name for record in first.history].count("hoist") == 1


def test_cotangents_come_after_what_is_shared() -> None:
    args = values()
    joint = capture(
        pull_back(body, Wrt(([True], [True], None), (True,)), value=True),
        *args,
        [torch.ones(80, 1, dtype=torch.float64)],
        roles=[Role.PARAM, Role.PARAM, Role.DATA, Role.COTANGENT],
    )
    halves = hoist(joint, [1, 2])
    assert halves is not None
    first, second = halves
    assert Role.COTANGENT not in [entry.role for entry in first.signature.inputs]
    cotangent = [torch.randn(80, 1, dtype=torch.float64)]
    found, expected = second.run(*args, first.run(*args), cotangent), joint.run(*args, cotangent)
    for a, b in zip((found[0], *found[1][0], *found[1][1]), (expected[0], *expected[1][0], *expected[1][1]), strict=True):
        assert torch.equal(a, b)


def test_little_stays_where_it_is() -> None:
    small = capture(body, *[torch.randn(shape) for shape in ((3, 1), (4, 3), (5, 4))])
    assert num_flops(small) < MIN_FLOPS and hoist(small, [1, 2]) is None
    large = capture(body, *values())
    assert hoist(large, [2]) is None, "nothing depends on the batch alone"
    assert hoist(large, []) is None


def test_what_is_shared_is_not_counted_as_kept_in_every_step() -> None:
    graph = capture(body, *values())
    assert num_bytes_to_keep(graph, [1, 2]) < num_bytes_to_keep(graph, []) / 10


# --- unrolls


class Frozen(nn.Module):
    """A backbone with BatchNorm and Dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten())
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(16 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.backbone(x))))


def model(training: bool, learned: bool) -> Frozen:
    torch.manual_seed(0)
    net = Frozen().double().train(training)
    net.drop.train(True)
    net.backbone.requires_grad_(learned)
    return net


data = functools.partial(labelled_images, size=10)


def compiled(net: Frozen, adjoint: Adjoint, **options: Any) -> CompiledUnroll:
    adapt = torch.optim.SGD(net.head.parameters(), 0.05, momentum=0.9)
    return compile_unroll(net, adapt, 3, loss=F.cross_entropy, adjoint=adjoint, **{"backend": "eager", **options})


def gradients(unroll: CompiledUnroll, net: Frozen, support: Any, query: Any) -> dict[str, Tensor]:
    wanted = {name: p for name, p in net.named_parameters() if p.requires_grad}
    unroll(support, query)  # compiles; what follows runs what is there
    loss = unroll(support, query, generator=Generator().manual_seed(5))
    return {"loss": loss.detach(), **dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))}


STEPWISE: dict[str, Adjoint] = {"replay": Replay(), "replay2": Replay(every=2), "stash": Stash()}
SHARED = "what all steps share"


@over_pairs(adjoint=by_name(STEPWISE), learned={"frozen": False, "learned": True}, backend=by_name(["eager", "inductor"]))
def test_meta_gradients(adjoint: str, learned: bool, backend: str) -> None:
    """Through a backbone that does not adapt, which has a meta-gradient or none."""
    net = model(training=False, learned=learned)
    found, wanted = compiled(net, STEPWISE[adjoint], backend=backend), compiled(net, Unrolled())
    assert_near(gradients(found, net, data(0), data(1)), gradients(wanted, net, data(0), data(1)))
    graphs = found.graphs()
    shared = [name for name in graphs if SHARED in name]
    assert len(shared) == (1 if adjoint == "stash" else 2)  # of the step, and of its pullback
    step = graphs["step with stash" if adjoint == "stash" else "step"]
    assert num_flops(step) < num_flops(graphs[shared[0]]) / 2


@pytest.mark.parametrize("adjoint", STEPWISE)
def test_statistics_in_training_mode_still_change_in_every_step(adjoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so does all that is computed from them, as far as the graph shows: the first convolution alone is shared."""
    monkeypatch.setattr(module, "MIN_FLOPS", 1)
    net = model(training=True, learned=False)
    found, wanted = compiled(net, STEPWISE[adjoint]), compiled(net, Unrolled())
    assert_near(gradients(found, net, data(0), data(1)), gradients(wanted, net, data(0), data(1)))
    assert any(SHARED in name for name in found.graphs())
    buffers = [unroll.adapt(data(0)).buffers for unroll in (found, wanted)]
    assert buffers[0]["backbone.1.num_batches_tracked"] == 3
    assert_near(buffers[0], buffers[1])


@pytest.mark.parametrize("adjoint", STEPWISE)
def test_with_a_task_axis(adjoint: str) -> None:
    net = model(training=False, learned=True)
    found, wanted = compiled(net, STEPWISE[adjoint]).vmap(), compiled(net, Unrolled()).vmap()
    assert_near(gradients(found, net, data(0, 2), data(1, 2)), gradients(wanted, net, data(0, 2), data(1, 2)))
    assert any(SHARED in name for name in found.graphs())


def test_a_batch_of_its_own_for_each_step_is_not_shared() -> None:
    net = model(training=False, learned=False)
    found, wanted = compiled(net, Stash(), per_step=True), compiled(net, Unrolled(), per_step=True)
    assert_near(gradients(found, net, data(0, 3), data(1)), gradients(wanted, net, data(0, 3), data(1)))
    assert not any(SHARED in name for name in found.graphs())


@pytest.mark.parametrize("adjoint", STEPWISE)
def test_through_adapt(adjoint: str) -> None:
    """The way back of `adapt` is asked for later, and twice."""
    net = model(training=False, learned=True)
    wanted = {name: p for name, p in net.named_parameters()}
    results: list[dict[str, Tensor]] = []
    for chosen in (STEPWISE[adjoint], Unrolled()):
        unroll = compiled(net, chosen)
        unroll.adapt(data(0))
        adapted = unroll.adapt(data(0), generator=Generator().manual_seed(5))
        other = unroll.adapt(data(2), generator=Generator().manual_seed(5))  # keeps its own
        loss = sum((value**2).sum() for result in (adapted, other) for value in result.params.values())
        assert isinstance(loss, Tensor)
        again = [torch.autograd.grad(loss, list(wanted.values()), retain_graph=True) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))
        results.append(dict(zip(wanted, again[0], strict=True)))
    assert_near(results[0], results[1])


def test_first_order() -> None:
    net = model(training=False, learned=False)
    unroll = compiled(net, FirstOrder())
    found = gradients(unroll, net, data(0), data(1))
    assert any(SHARED in name for name in unroll.graphs())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_FLOPS", 10**12)
        assert_near(found, gradients(compiled(net, FirstOrder()), net, data(0), data(1)))


@pytest.mark.parametrize("adjoint", STEPWISE)
def test_in_one_launch(adjoint: str) -> None:
    net, found = model(training=False, learned=True), list[dict[str, Tensor]]()
    params = dict(net.named_parameters())
    for unroll in (compiled(net, STEPWISE[adjoint], backend=CudaGraph(Eager(), TapeRecorder)), compiled(net, Unrolled())):
        adapted = unroll.adapt(data(0), generator=Generator().manual_seed(5))
        loss = torch.stack([(value**2).sum() for value in adapted.params.values()]).sum()
        of_adapt = torch.autograd.grad(loss, list(params.values()))
        of_adapt = {f"adapt.{name}": value for name, value in zip(params, of_adapt, strict=True)}
        found.append({**of_adapt, **gradients(unroll, net, data(0), data(1))})
    assert_near(found[0], found[1])


@pytest.mark.parametrize("adjoint", [Replay(), Stash(), FirstOrder()], ids=repr)
def test_a_single_step_is_left_whole(adjoint: Adjoint) -> None:
    net = model(training=False, learned=False)
    unroll = compile_unroll(net, optim.sgd(lr=0.1), 1, loss=F.cross_entropy, adjoint=adjoint, backend="eager", params="head.*")
    unroll(data(0), data(1))
    assert unroll.graphs() and not any(SHARED in name for name in unroll.graphs())


class Telling(nn.Module):
    """A buffer is updated, or not, by something that differs between a first look at the model and its programs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(100, 200)), nn.Linear(200, 3)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        features = (x * self.scale) @ self.weight
        if not features.requires_grad:
            self.scale = self.scale * 0.5
        return self.head(torch.tanh(features))


@pytest.mark.parametrize("adjoint", STEPWISE)
def test_what_stays_the_same_is_read_off_the_program_itself(adjoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_require_no_answer", lambda *args: None)  # which would refuse the model for its question
    torch.manual_seed(0)
    net = Telling().double()
    net.weight.requires_grad_(False)
    batch = torch.randn(60, 100, dtype=torch.float64), torch.arange(60) % 3
    losses: list[Tensor] = []
    for chosen in (STEPWISE[adjoint], Unrolled()):
        unroll = compile_unroll(net, optim.sgd(lr=0.1), 3, loss=F.cross_entropy, adjoint=chosen, backend="eager", params="head.*")
        losses.append(unroll.adapt(batch).losses.detach())
    assert_close(losses[0], losses[1], LOSS)


def test_several_updates_a_step() -> None:
    net, found = model(training=False, learned=False), list[dict[str, Tensor]]()
    for adjoint in (Stash(), Unrolled()):
        opt = optim.lbfgs(lr=0.1, max_iter=2, history_size=2)
        unroll = compile_unroll(net, opt, 2, loss=F.cross_entropy, adjoint=adjoint, backend="eager", params="head.*")
        found.append(gradients(unroll, net, data(0), data(1)))
        assert any(SHARED in name for name in unroll.graphs()) == isinstance(adjoint, Stash)
    assert_near(found[0], found[1])


def test_weights_that_change_between_calls_are_read_anew() -> None:
    net = model(training=False, learned=False)
    unroll = compiled(net, Stash())
    before = gradients(unroll, net, data(0), data(1))
    with torch.no_grad():
        net.get_parameter("backbone.0.weight").mul_(1.5)
    after = gradients(unroll, net, data(0), data(1))
    assert not torch.allclose(before["head.weight"], after["head.weight"])
    assert_near(after, gradients(compiled(net, Unrolled()), net, data(0), data(1)))


def test_an_optimiser_of_the_library_and_learned_settings() -> None:
    net = model(training=False, learned=False)
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    found: list[dict[str, Tensor]] = []
    for adjoint in (Stash(), Unrolled()):
        unroll = compile_unroll(net, optim.sgd(lr=lr), 3, loss=F.cross_entropy, adjoint=adjoint, backend="eager", params="head.*")
        loss = unroll(data(0), data(1), generator=Generator().manual_seed(5))
        found.append({"lr": torch.autograd.grad(loss, lr)[0]})
    assert_near(found[0], found[1])
