"""`adaptrt.higher` in two processes, each with tasks of its own: gradients are those of one process that has all tasks.

The processes are spawned once; they run every entry of `CASES` and leave what they found in a file each.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from adaptrt import higher
from tests.processes import leave_group

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch was built without gloo"),
]

WORLD = 2
OUTER_STEPS = 3  # buckets are rebuilt after the first
TIMEOUT_S = 120


class Net(nn.Module):
    def __init__(self, normed: bool, spare: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8) if normed else nn.LayerNorm(8), nn.Tanh())
        self.head = nn.Linear(8, 2)
        if spare:
            self.spare = nn.Linear(3, 2)  # no loss reaches it

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Task(NamedTuple):
    supports: list[tuple[Tensor, Tensor]]  # one for each inner step
    query: tuple[Tensor, Tensor]


def tasks_of(rank: int) -> list[Task]:
    """Two tasks. Ranks take different numbers of inner steps, which would hang if one of these sent anything."""
    generator = torch.Generator().manual_seed(rank)

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(6, 3, generator=generator), torch.randn(6, 2, generator=generator)

    return [Task([batch() for _ in range(2 + rank)], batch()) for _ in range(2)]


def whole(model: Any, x: Tensor) -> Tensor:
    return model(x)


def by_parts(model: Any, x: Tensor) -> Tensor:
    inside = model.module if hasattr(model, "module") else model
    return inside.head(inside.body(x))


class Case(NamedTuple):
    normed: bool = False
    spare: bool = False
    wrap: dict[str, Any] | None = {}  # noqa: RUF012  arguments of DistributedDataParallel; None: gradients are reduced by hand
    adam: bool = False
    learned_rate: bool = False
    one_backward: bool = False  # of the mean over tasks, in place of one for each task, all but the last under no_sync
    query: Callable[[Any, Tensor], Tensor] = whole
    evaluating: bool = False  # rank 1 alone adapts without tracking before each outer step


UNUSED = {"find_unused_parameters": True}
CASES: dict[str, Case] = {
    "wrapped": Case(),
    "batch norm": Case(normed=True),
    "one backward pass": Case(normed=True, one_backward=True),
    "nothing unused": Case(normed=True, wrap=UNUSED),
    "unused": Case(normed=True, spare=True, wrap=UNUSED),
    "unused, one backward pass": Case(spare=True, wrap=UNUSED, one_backward=True),
    "views of buckets": Case(normed=True, wrap={"gradient_as_bucket_view": True}),
    "adam": Case(adam=True),
    "learned rate": Case(learned_rate=True),
    "query by parts": Case(normed=True, query=by_parts),
    "one process evaluates": Case(normed=True, evaluating=True),
    "by hand": Case(normed=True, wrap=None),
    "by hand, learned rate": Case(wrap=None, learned_rate=True),
}


def build(case: Case) -> tuple[Net, Tensor]:
    torch.manual_seed(1)
    return Net(case.normed, case.spare), torch.tensor(0.1, requires_grad=True)


def adapted_loss(model: Any, opt: torch.optim.Optimizer, rate: Tensor, task: Task, case: Case) -> Tensor:
    override = {"lr": [rate]} if case.learned_rate else None
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, override=override) as (fmodel, diffopt):
        for x, y in task.supports:
            diffopt.step(F.mse_loss(fmodel(x), y))
        return F.mse_loss(case.query(fmodel, task.query[0]), task.query[1])


def inner_optimizer(model: nn.Module, case: Case) -> torch.optim.Optimizer:
    if case.adam:
        return torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-4)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def alone(case: Case) -> list[Tensor | None]:
    """Gradients of the mean over everybody's tasks, at each outer step."""
    model, rate = build(case)
    opt, outer = inner_optimizer(model, case), torch.optim.SGD([*model.parameters(), rate], lr=0.2)
    tasks = [task for rank in range(WORLD) for task in tasks_of(rank)]
    found: list[Tensor | None] = []
    for _ in range(OUTER_STEPS):
        outer.zero_grad()
        torch.stack([adapted_loss(model, opt, rate, task, case) for task in tasks]).mean().backward()
        found += [None if p.grad is None else p.grad.clone() for p in [*model.parameters(), rate]]
        outer.step()
    return found


class Found(NamedTuple):
    grads: list[Tensor | None]
    sent_inside: int  # buckets reduced while an inner loop ran, or under no_sync
    sent: list[int]  # buckets reduced by the backward pass of each outer step
    kept: bool  # whether the inner loops left weights, buffers and gradients as they were


def counted(sent: list[int], bucket: GradBucket) -> Any:
    sent.append(bucket.index())
    return allreduce_hook(dist.group.WORLD, bucket)  # pyright: ignore[reportArgumentType]


def together(case: Case, rank: int) -> Found:
    """The same gradients, from this process's tasks and the others' help."""
    net, rate = build(case)
    buckets: list[int] = []
    model: Any = net
    if case.wrap is not None:
        model = DistributedDataParallel(net, bucket_cap_mb=0.0002, **case.wrap)
        model.register_comm_hook(buckets, lambda sent, bucket: counted(sent, bucket))  # it looks at a function's annotations
    opt, outer = inner_optimizer(model, case), torch.optim.SGD([*model.parameters(), rate], lr=0.2)
    tasks = tasks_of(rank)
    found, inside, sent, kept = list[Tensor | None](), 0, list[int](), True

    for _ in range(OUTER_STEPS):
        outer.zero_grad()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        start = len(buckets)
        if case.evaluating and rank == 1:
            with higher.innerloop_ctx(model, opt, track_higher_grads=False) as (fmodel, diffopt):
                for x, y in tasks[0].supports:
                    diffopt.step(F.mse_loss(fmodel(x), y))
        losses: list[Tensor] = []
        for i, task in enumerate(tasks):
            last = i == len(tasks) - 1
            quiet: AbstractContextManager[None] = nullcontext() if case.wrap is None or last else model.no_sync()
            with nullcontext() if case.one_backward else quiet:
                losses.append(adapted_loss(model, opt, rate, task, case) / len(tasks))
                kept &= case.one_backward or i > 0 or all(p.grad is None for p in model.parameters())
                if not case.one_backward and not last:
                    losses[-1].backward()
        kept &= all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        inside += len(buckets) - start
        start = len(buckets)
        (torch.stack(losses).sum() if case.one_backward else losses[-1]).backward()
        sent.append(len(buckets) - start)
        by_hand = [rate] if case.wrap is not None else [*net.parameters(), rate]
        for p in by_hand:
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= WORLD
        found += [None if p.grad is None else p.grad.clone() for p in [*net.parameters(), rate]]
        outer.step()
    return Found(found, inside, sent, kept)


def static_graph_error() -> str:
    model = DistributedDataParallel(Net(False, False), static_graph=True)
    with pytest.raises(ValueError) as caught:
        higher.monkeypatch(model)
    return str(caught.value)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("error")
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=timedelta(seconds=TIMEOUT_S))
    found: dict[str, Any] = {name: tuple(together(case, rank)) for name, case in CASES.items()}
    found["static graph"] = static_graph_error()
    torch.save(found, f"{folder}/{rank}.pt")
    leave_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sequence[dict[str, Any]]]:
    """What each process found."""
    folder: Path = tmp_path_factory.mktemp("processes")
    running: Any = spawn(work, args=(str(folder),), nprocs=WORLD, join=False)
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not running.join(timeout=1):
            assert time.monotonic() < deadline, "the processes wait for each other"
    finally:
        for process in running.processes:
            if process.is_alive():
                process.kill()
    yield [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(name: str, processes: Sequence[dict[str, Any]]) -> None:
    wanted = alone(CASES[name])
    for rank in range(WORLD):
        found = Found(*processes[rank][name])
        assert [grad is None for grad in found.grads] == [grad is None for grad in wanted]
        for got, expected in zip(found.grads, wanted, strict=True):
            if got is not None and expected is not None:
                torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.wrap is not None])
def test_only_the_backward_pass_sends(name: str, processes: Sequence[dict[str, Any]]) -> None:
    for rank in range(WORLD):
        found = Found(*processes[rank][name])
        assert found.sent_inside == 0
        assert len(found.sent) == OUTER_STEPS and all(found.sent)


@pytest.mark.parametrize("name", CASES)
def test_inner_loops_leave_the_model_alone(name: str, processes: Sequence[dict[str, Any]]) -> None:
    assert all(Found(*found[name]).kept for found in processes)


def test_a_static_graph_is_refused(processes: Sequence[dict[str, Any]]) -> None:
    assert all("static_graph=False" in found["static graph"] for found in processes)
