"""Tasks one after the other give what a program of all tasks gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from adaptrt import Adjoint, CompiledUnroll, CudaGraph, Eager, FirstOrder, Replay, Stash, Unrolled, compile_unroll, optim
from adaptrt.adjoint import auto
from adaptrt.adjoint.auto import MIN_FLOPS_OF_A_TASK, one_by_one
from adaptrt.errors import NonFiniteInput
from adaptrt.graph.signature import Role
from tests.models import conv_dropout, labelled_images
from tests.recorders import TapeRecorder
from tests.tolerances import assert_near

ADJOINTS: dict[str, Adjoint] = {"unrolled": Unrolled(), "stash": Stash()}
TASKS = 3


@pytest.fixture
def one_by_one_from(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets from how many FLOPs on tasks are done one by one."""
    return lambda flops: monkeypatch.setattr(auto, "MIN_FLOPS_OF_A_TASK", flops)


def compiled(model: nn.Module, adjoint: Adjoint, **options: Any) -> CompiledUnroll:
    opt = optim.sgd(lr=0.1, momentum=0.9)
    return compile_unroll(model, opt, 3, loss=F.cross_entropy, adjoint=adjoint, **{"backend": "eager", **options}).vmap()


def everything(model: nn.Module, unroll: CompiledUnroll, *leading: int) -> dict[str, Tensor]:
    """Adapted state, losses, meta-loss and all gradients, from the weights and from an earlier adaptation."""
    support, query = labelled_images(0, TASKS, *leading), labelled_images(1, TASKS)
    support[0].requires_grad_()
    query[0].requires_grad_()
    params = dict(model.named_parameters())
    asked = {**params, "support": support[0], "query": query[0]}
    found: dict[str, Tensor] = {}

    def take(prefix: str, values: Any) -> None:
        found.update({f"{prefix}.{name}": value.detach() for name, value in values.items()})

    generator = Generator().manual_seed(5)
    adapted = unroll.adapt(support, generator=generator)
    take("params", adapted.params)
    take("buffers", adapted.buffers)
    found["losses"] = adapted.losses.detach()
    total = torch.stack([(value**2).sum() for value in adapted.params.values()]).sum() + adapted.losses.sum()
    wanted = {name: value for name, value in asked.items() if name != "query"}
    take("of adapt", dict(zip(wanted, torch.autograd.grad(total, list(wanted.values()), retain_graph=True), strict=True)))

    loss = unroll(support, query, generator=generator)
    found["meta-loss"] = loss.detach()
    take("of meta-loss", dict(zip(asked, torch.autograd.grad(3 * loss, list(asked.values())), strict=True)))
    with torch.no_grad():
        found["meta-loss without gradients"] = unroll(support, query, generator=Generator().manual_seed(6))

    # From each task's own start, through which the gradient flows on.
    again = unroll(support, query, start=adapted, generator=generator)
    take("of a later meta-loss", dict(zip(asked, torch.autograd.grad(again, list(asked.values())), strict=True)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_the_same_as_together(adjoint: str, one_by_one_from: Callable[[int], None]) -> None:
    model, found = conv_dropout(), list[dict[str, Tensor]]()
    for flops in (0, 10**15):
        one_by_one_from(flops)
        unroll = compiled(model, ADJOINTS[adjoint])
        found.append(everything(model, unroll))
        assert ("EachTask" in str(unroll.explain())) == (flops == 0)
        data_of_first = [entry.spec.shape for entry in next(iter(unroll.graphs().values())).signature.inputs if entry.role is Role.DATA]
        assert all(shape[0] == (6 if flops == 0 else TASKS) for shape in data_of_first)
    assert_near(found[0], found[1])


@pytest.mark.slow
def test_on_inductor(one_by_one_from: Callable[[int], None]) -> None:
    one_by_one_from(0)
    model = conv_dropout()
    one, two = (compiled(model, Stash(), backend=backend) for backend in ("inductor", "eager"))
    assert_near(everything(model, one), everything(model, two))


def test_a_batch_of_its_own_for_each_step(one_by_one_from: Callable[[int], None]) -> None:
    model, found = conv_dropout(), list[dict[str, Tensor]]()
    for flops in (0, 10**15):
        one_by_one_from(flops)
        found.append(everything(model, compiled(model, Replay(), per_step=True), 3))
    assert_near(found[0], found[1])


@pytest.mark.parametrize("adjoint", ["unrolled", "stash"])
def test_in_one_launch(adjoint: str, one_by_one_from: Callable[[int], None]) -> None:
    one_by_one_from(0)
    model = conv_dropout()
    one, two = (compiled(model, ADJOINTS[adjoint], backend=backend) for backend in (CudaGraph(Eager(), TapeRecorder), "eager"))
    assert_near(everything(model, one), everything(model, two))


def test_what_is_not_finite_is_refused(one_by_one_from: Callable[[int], None]) -> None:
    one_by_one_from(0)
    for adjoint in (Unrolled(), Stash()):
        unroll = compiled(conv_dropout(), adjoint)
        support = labelled_images(0, TASKS)
        support[0][1, 2] = torch.nan
        with pytest.raises(NonFiniteInput, match="support"):
            unroll.adapt(support)


def test_auto_says_why(one_by_one_from: Callable[[int], None]) -> None:
    one_by_one_from(0)
    unroll = compiled(conv_dropout(), "auto")  # type: ignore[arg-type]
    unroll(labelled_images(0, TASKS), labelled_images(1, TASKS))
    report = str(unroll.explain())
    assert "EachTask(adjoint=Unrolled())" in report and "MFLOP, enough for one task after the other" in report


def test_only_large_tasks() -> None:
    least = MIN_FLOPS_OF_A_TASK * torch.get_num_threads()
    assert one_by_one(least) and not one_by_one(least - 1)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", [Unrolled(), Stash(), Replay(every=2), FirstOrder()], ids=repr)
def test_gradients_of_what_tasks_share(adjoint: Adjoint, one_by_one_from: Callable[[int], None]) -> None:
    """Summed over tasks: of weights that do not adapt, of a learned rate, and of the start where it is one for all."""
    model, rate = conv_dropout(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    asked = {**dict(model.named_parameters()), "rate": rate}
    found: list[dict[str, Tensor]] = []
    for flops in (0, 10**15):
        one_by_one_from(flops)
        opt = optim.sgd(lr=rate, momentum=0.9)
        unroll = compile_unroll(model, opt, 3, loss=F.cross_entropy, adjoint=adjoint, backend="eager", params=["6.*", "1.*"]).vmap()
        generator = Generator().manual_seed(5)
        adapted = unroll.adapt(labelled_images(0, TASKS), generator=generator)
        fresh = unroll(labelled_images(0, TASKS), labelled_images(1, TASKS), generator=generator)
        later = unroll(labelled_images(0, TASKS), labelled_images(1, TASKS), start=adapted, generator=generator)
        for name, loss in (("fresh", fresh), ("later", later)):
            gradients = torch.autograd.grad(loss, list(asked.values()))
            found.append({f"{name}.{key}": value for key, value in zip(asked, gradients, strict=True)})
    assert_near({**found[0], **found[1]}, {**found[2], **found[3]})


def test_without_a_task_axis_nothing_changes(one_by_one_from: Callable[[int], None]) -> None:
    one_by_one_from(0)
    unroll = compile_unroll(conv_dropout(), optim.sgd(lr=0.1), 2, loss=F.cross_entropy, backend="eager")
    unroll(labelled_images(0), labelled_images(1))
    assert "EachTask" not in str(unroll.explain())
