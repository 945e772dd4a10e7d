"""What `Replay` promises: programs that do not depend on k, and memory that grows by one carry a step.

The quick form of `benchmarks/adjoint_scaling.py`, on the eager backend. Each test also runs `Unrolled`, which must not keep the promise:
otherwise the test could not fail.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adaptrt
from adaptrt import tree
from benchmarks import adjoint_scaling


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same bytes on fewer threads, and no waiting for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def build(adjoint: adaptrt.Adjoint, optimizer: adaptrt.optim.Optimizer, k: int) -> tuple[adaptrt.CompiledUnroll, nn.Module]:
    """The benchmark's conv net, one block of width 8."""
    torch.manual_seed(0)
    model, _, _ = adjoint_scaling.conv_net(8, 1)
    return adaptrt.compile_unroll(model, optimizer, k, loss=F.cross_entropy, adjoint=adjoint, backend="eager"), model


def program_sizes(adjoint: adaptrt.Adjoint, k: int) -> dict[str, int]:
    unroll, _ = build(adjoint, adaptrt.optim.adam(lr=0.001), k)
    _, support, query = adjoint_scaling.conv_net(8, 1)
    unroll(support, query).backward()
    return {program.name: program.num_nodes for program in unroll.explain().programs}


@pytest.mark.parametrize("every", [1, 3])
def test_programs_of_replay_do_not_depend_on_k(every: int) -> None:
    sizes = program_sizes(adaptrt.Replay(every), 2)
    assert sizes == program_sizes(adaptrt.Replay(every), 7)
    assert len(sizes) == 3


def test_program_of_unrolled_grows_with_k() -> None:
    sizes = [program_sizes(adaptrt.Unrolled(), k)["meta-gradient"] for k in (1, 2)]
    assert sizes[1] > 1.4 * sizes[0]


def step_ratio(adjoint: adaptrt.Adjoint, optimizer: adaptrt.optim.Optimizer, ks: tuple[int, ...]) -> float:
    """Growth of peak memory a step, in copies of the parameters and the optimiser's state."""
    peaks: list[tuple[int, int]] = []
    carry_bytes = 0
    for k in ks:
        unroll, model = build(adjoint, optimizer, k)
        _, support, query = adjoint_scaling.conv_net(8, 1)
        unroll(support, query).backward()
        model.zero_grad()
        peaks.append((k, adjoint_scaling.peak_of(lambda unroll=unroll, support=support, query=query: unroll(support, query).backward())))
        params = dict(model.named_parameters())
        carry_bytes = sum(tree.Spec.of(leaf).num_bytes for leaf in tree.leaves((params, optimizer.init(params))))
    return adjoint_scaling.slope(peaks) / carry_bytes


@pytest.mark.parametrize(
    "optimizer",
    [adaptrt.optim.sgd(lr=0.01, momentum=0.9), adaptrt.optim.adam(lr=0.001)],
    ids=["momentum", "adam"],
)
def test_memory_of_replay_grows_by_one_carry_a_step(optimizer: adaptrt.optim.Optimizer) -> None:
    ratio = step_ratio(adaptrt.Replay(), optimizer, (3, 8))
    assert 0.5 < ratio <= adjoint_scaling.MAX_STEP_RATIO


def test_memory_of_unrolled_grows_by_activations() -> None:
    assert step_ratio(adaptrt.Unrolled(), adaptrt.optim.sgd(lr=0.01), (1, 2)) > 5 * adjoint_scaling.MAX_STEP_RATIO


def test_peak_counts_what_is_live_at_once() -> None:
    def run() -> None:
        first = torch.zeros(1000, dtype=torch.uint8)
        second = torch.zeros(500, dtype=torch.uint8)
        del first, second
        _ = torch.zeros(1200, dtype=torch.uint8)

    assert adjoint_scaling.peak_of(run) == 1500


def test_slope() -> None:
    assert adjoint_scaling.slope([(1, 12), (2, 15), (5, 24)]) == pytest.approx(3)
