"""MAML over several processes, which goes on where it was killed: sine regression (Finn et al. 2017, section 5.1), with a learned rate.

    torchrun --nproc-per-node 2 examples/maml_distributed.py [--iterations 2000] [--folder build/maml_distributed]
    python examples/maml_distributed.py  # the same numbers from one process, up to rounding

The tasks of an iteration follow from the seed and the iteration's number, and each process takes its share of them. `unroll.module()` is
the meta-loss as a module, and `DistributedDataParallel` averages its gradients, that of the learned rate included.

Every `--every` iterations the processes write a checkpoint together: parameters, the state of Adam, and the iteration. It gets its name
when it is whole, and only then the one before it is removed. So the same command goes on from the last checkpoint, whatever moment the run
was killed at, and ends with the numbers of a run that was not.

Known limits: all processes must see the same folder. Work of this size is not worth a second process; `benchmarks/distributed.py` measures
from what size on it is.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn.parallel import DistributedDataParallel

import adaptrt

SHOTS = 10  # support points of a task, and as many query points
OUTER_LR = 1e-3
TIMEOUT_S = 300
"""How long a process waits for another, which may be compiling. After that it ends with an error."""

Points = tuple[Tensor, Tensor]
"""x and y, each of [T, P, 1]. T = tasks, P = points."""


def draw_tasks(seed: int, iteration: int, num_tasks: int) -> tuple[Points, Points]:
    """Draws support and query of an iteration's tasks: y = A sin(x - b), A in [0.1, 5], b in [0, pi], x in [-5, 5], all uniform."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + iteration)
    amplitude = 0.1 + 4.9 * torch.rand(num_tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(num_tasks, 1, 1, generator=generator)
    x = 10 * torch.rand(num_tasks, 2 * SHOTS, 1, generator=generator) - 5
    y = amplitude * torch.sin(x - phase)
    return (x[:, :SHOTS], y[:, :SHOTS]), (x[:, SHOTS:], y[:, SHOTS:])


def share(points: Points, rank: int, num_processes: int) -> Points:
    """Returns the tasks of one process: every so many-th."""
    x, y = points
    return x[rank::num_processes].contiguous(), y[rank::num_processes].contiguous()


class Learner(NamedTuple):
    """What is trained.

    Attributes:
      unroll: over tasks.
      meta_loss: its module, in `DistributedDataParallel`.
      outer: the optimiser of the module's parameters.
      rate: the learned one.
    """

    unroll: adaptrt.CompiledUnroll
    meta_loss: DistributedDataParallel
    outer: torch.optim.Optimizer
    rate: nn.Parameter


def build_learner(seed: int, num_tasks: int, backend: str) -> Learner:
    """Builds a network of two hidden layers of 40, adapted by two steps. Compiles for `num_tasks` tasks, without waiting for others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    rate = nn.Parameter(torch.tensor(0.01))
    unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(lr=rate), k=2, loss=F.mse_loss, backend=backend).vmap()
    unroll.warmup(*draw_tasks(seed, 0, num_tasks))
    meta_loss = DistributedDataParallel(unroll.module())
    return Learner(unroll, meta_loss, torch.optim.Adam(meta_loss.parameters(), lr=OUTER_LR), rate)


# --- checkpoints


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest whole checkpoint; None if there is none."""
    return max(folder.glob("iteration-????????"), default=None)


def write_checkpoint(folder: Path, iteration: int, learner: Learner) -> None:
    """Writes a checkpoint, by all processes together, and removes the one before it."""
    path = folder / f"iteration-{iteration:08d}"
    partial = path.with_suffix(".partial")
    model, outer = get_state_dict(learner.meta_loss, learner.outer)
    save({"model": model, "outer": outer, "iteration": iteration}, checkpoint_id=partial)  # returns when all have written
    if dist.get_rank() == 0:
        os.replace(partial, path)
        for other in folder.glob("iteration-*"):
            if other != path:
                shutil.rmtree(other)


def read_checkpoint(path: Path, learner: Learner) -> int:
    """Reads a checkpoint that any number of processes has written. Returns the number of iterations that were done."""
    model, outer = get_state_dict(learner.meta_loss, learner.outer)
    state: dict[str, Any] = {"model": model, "outer": outer, "iteration": 0}
    load(state, checkpoint_id=path)
    set_state_dict(learner.meta_loss, learner.outer, model_state_dict=state["model"], optim_state_dict=state["outer"])
    return state["iteration"]


def resume(folder: Path, learner: Learner) -> int:
    """Goes back to the last checkpoint. Returns the number of iterations that were done, 0 without one."""
    if dist.get_rank() == 0:
        for partial in folder.glob("iteration-*.partial"):
            shutil.rmtree(partial)
    found: list[Path | None] = [last_checkpoint(folder)]
    dist.broadcast_object_list(found)  # rank 0 decides
    if found[0] is None:
        return 0
    return read_checkpoint(found[0], learner)


# --- training


def iterate(learner: Learner, seed: int, iteration: int, num_tasks: int) -> Tensor:
    """One meta-iteration. Returns this process's meta-loss."""
    rank, num_processes = dist.get_rank(), dist.get_world_size()
    support, query = (share(points, rank, num_processes) for points in draw_tasks(seed, iteration, num_tasks))
    learner.outer.zero_grad()
    loss = learner.meta_loss(support, query)
    loss.backward()
    learner.outer.step()
    return loss.detach()


def unseen_error(learner: Learner, seed: int) -> tuple[float, float]:
    """Returns the mean squared error on 500 tasks that were not trained on, before and after adaptation."""
    support, query = draw_tasks(seed, -1, 500)
    with torch.no_grad():
        outputs = [learner.meta_loss.module.model(query[0]), learner.unroll.adapt(support)(query[0])]
    before, after = (F.mse_loss(output, query[1]).item() for output in outputs)
    return before, after


def train(folder: Path, iterations: int, every: int, num_tasks: int, seed: int, backend: str) -> Learner:
    """Trains up to `iterations` from the last checkpoint in `folder`, within a process group."""
    is_first = dist.get_rank() == 0
    folder.mkdir(parents=True, exist_ok=True)
    learner = build_learner(seed, num_tasks // dist.get_world_size(), backend)
    done = resume(folder, learner)
    if is_first:
        print(f"{dist.get_world_size()} processes, {num_tasks} tasks an iteration, from iteration {done}", flush=True)
    started, first = time.perf_counter(), done
    for iteration in range(done, iterations):
        loss = iterate(learner, seed, iteration, num_tasks)
        done = iteration + 1
        if done % every == 0 or done == iterations:
            dist.all_reduce(loss)
            write_checkpoint(folder, done, learner)
            if is_first:
                speed = num_tasks * (done - first) / (time.perf_counter() - started)
                print(
                    f"iteration {done}: meta-loss {loss.item() / dist.get_world_size():.4f}, inner rate {learner.rate.item():.4f}, "
                    f"{speed:.0f} tasks a second",
                    flush=True,
                )
    return learner


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example and prints what it found."""
    parser = argparse.ArgumentParser(description="MAML over several processes, which goes on where it was killed.")
    parser.add_argument("--iterations", type=int, default=2000, help="meta-iterations in all, at least 1")
    parser.add_argument("--every", type=int, default=100, help="iterations from one checkpoint to the next, at least 1")
    parser.add_argument("--tasks", type=int, default=32, help="tasks of an iteration, a multiple of the number of processes")
    parser.add_argument("--folder", type=Path, default=Path("build/maml_distributed"), help="of the checkpoints; remove it to start afresh")
    parser.add_argument("--backend", choices=("auto", "inductor", "eager"), default="auto", help="what runs the programs")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the tasks")
    options: Any = parser.parse_args(arguments)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    for name in ("iterations", "every", "tasks"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.tasks % num_processes:
        parser.error(f"--tasks must be a multiple of the {num_processes} processes, got {options.tasks}")
    torch.set_num_threads(1)  # kernels this small are not worth sharing between threads, and the other processes need the cores
    timeout = timedelta(seconds=TIMEOUT_S)
    if "RANK" in os.environ:  # torchrun has set it
        dist.init_process_group("gloo", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout, store=HashStore(), rank=0, world_size=1)
    learner = train(options.folder, options.iterations, options.every, options.tasks, options.seed, options.backend)
    if dist.get_rank() == 0:
        before, after = unseen_error(learner, options.seed)
        print(f"mean squared error on unseen tasks: {before:.3f}, and {after:.3f} after two steps")
    dist.barrier()
    time.sleep(0.2)  # gloo's threads may abort a process that ends at once: https://github.com/pytorch/pytorch/issues/190489
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
