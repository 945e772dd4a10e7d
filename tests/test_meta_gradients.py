"""Meta-gradients against the oracle in `tests/naive.py`, over models, optimisers, adjoints and backends, one task and a batch of tasks.

The default run covers, on the eager backend, every pair of (model, adjoint), (model, optimiser), (model, tasks or not) and (optimiser,
adjoint), and on Inductor a few programs of each kind; `--full` runs both products.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from adaptrt import Adjoint, FirstOrder, Replay, Stash, Truncated, Unrolled, compile_unroll, optim, tree
from adaptrt.graph.passes.lift_noise import lift_noise
from adaptrt.runtime import planner
from tests import naive
from tests.gradients import gradients
from tests.models import MODELS, Entry
from tests.tolerances import assert_near

TASKS = 2
SEED = 5


class Rule(NamedTuple):
    """One optimiser, ours and the oracle's, with numbers at which every term of it matters."""

    ours: Callable[..., optim.Optimizer]
    oracle: naive.Rule
    numbers: Mapping[str, Any]
    flags: Mapping[str, bool] = {}

    def hyper(self) -> dict[str, Any]:
        """The numbers as tensors that require grad."""
        return tree.map_leaves(
            lambda value: value.clone().requires_grad_(), {key: as_tensors(value) for key, value in self.numbers.items()}
        )


def as_tensors(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(as_tensors, value))
    return torch.tensor(value, dtype=torch.float64)


# eps is large so that gradients that are zero but for rounding (a bias before BatchNorm) are not blown up to the size of the others.
OPTIMIZERS: dict[str, Rule] = {
    "sgd": Rule(optim.sgd, naive.sgd, {"lr": 0.1}),
    "nesterov": Rule(optim.sgd, naive.sgd, {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1}, {"nesterov": True}),
    "adam": Rule(optim.adam, naive.adam, {"lr": 0.05, "betas": (0.8, 0.9), "eps": 0.01}),
    "amsgrad": Rule(optim.adamw, naive.adamw, {"lr": 0.05, "betas": (0.7, 0.9), "eps": 0.01, "weight_decay": 0.2}, {"amsgrad": True}),
}
ADJOINTS: dict[str, Adjoint] = {
    "unrolled": Unrolled(),
    "replay": Replay(),
    "replay2": Replay(every=2),
    "stash": Stash(),
    "first-order": FirstOrder(),
    "truncated": Truncated(1),
}


# --- one cell


class Cell(NamedTuple):
    model: str
    optimizer: str
    adjoint: str
    tasks: bool

    def __str__(self) -> str:
        return "-".join([self.model, self.optimizer, self.adjoint, *(["vmap"] if self.tasks else [])])


class Drawn:
    """Notes the noise that programs are given, so that the oracle can be given each task's share."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.noise: list[tuple[Tensor, ...]] = []
        draw = planner.draw

        def noting(*args: Any) -> tuple[Tensor, ...]:
            self.noise.append(draw(*args))
            return self.noise[-1]

        monkeypatch.setattr(planner, "draw", noting)

    def of_task(self, task: int) -> naive.Noise:
        """For each of the steps noted last the values that one task's random operations return."""
        noted = list(self.noise)
        # Where steps have no noise, none is drawn for them.
        return lambda step: lift_noise([value[task] for value in (noted[step] if step < len(noted) else ())])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    return Drawn(monkeypatch)


def task_data(entry: Entry, tasks: bool, dtype: torch.dtype = torch.float64) -> tuple[list[Any], list[Any]]:
    """Support and query batches, one for each task."""
    count = TASKS if tasks else 1
    supports, queries = [entry.data(10 + t, 4) for t in range(count)], [entry.data(20 + t, 3) for t in range(count)]
    return cast(supports, dtype), cast(queries, dtype)


def cast(values: Any, dtype: torch.dtype) -> Any:
    return tree.map_leaves(lambda value: value.to(dtype) if value.is_floating_point() else value, values)


def joined(batches: list[Any], tasks: bool) -> Any:
    return tree.map_leaves(lambda *values: torch.stack(values), *batches) if tasks else batches[0]


def split(model: nn.Module, select: str | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters that adapt and that do not."""
    named = dict(model.named_parameters())
    prefix = (select or "*").rstrip("*")
    adapted: dict[str, Tensor] = {name: param for name, param in named.items() if name.startswith(prefix) and param.requires_grad}
    return adapted, {name: param for name, param in named.items() if name not in adapted}


def eager_objective(loop: naive.Loop, after: Any, frozen: naive.Tensors, query: Any) -> Tensor:
    """Something of everything that an adaptation returns: query loss, support losses, buffers."""
    loss, _ = naive.evaluate(loop, {**frozen, **after.params}, after.buffers, query)
    floating = [value.sin().sum() for value in after.buffers.values() if value.is_floating_point()]
    return loss + 0.3 * after.losses.square().sum() + 0.1 * sum(floating, torch.zeros(()))


def differentiate(value: Tensor, model: nn.Module, hyper: Mapping[str, Any]) -> dict[str, Tensor]:
    """The value and its gradients by all parameters and hyperparameters, by name; zeros where nothing depends on one."""
    leaves = dict(model.named_parameters()) | dict(zip(tree.paths(hyper, "hyper"), tree.leaves(hyper), strict=True))
    return gradients(value, {name: leaf for name, leaf in leaves.items() if leaf.requires_grad})


def wanted_of(cell: Cell, noises: Sequence[naive.Noise]) -> Iterator[dict[str, Tensor]]:
    """What the oracle says: of the meta-loss, then of the eager objective."""
    entry, rule = MODELS[cell.model], OPTIMIZERS[cell.optimizer]
    model, hyper = entry.model(), rule.hyper()
    adapted, frozen = split(model, entry.select)
    loop = naive.Loop(model, entry.loss, rule.oracle, {**hyper, **rule.flags}, entry.k, first_order=cell.adjoint == "first-order")
    loop = loop._replace(num_differentiated=1 if cell.adjoint == "truncated" else None)
    start = naive.Start(adapted, frozen, dict(model.named_buffers()), {})
    for objective in (naive.meta_loss, None):
        values: list[Tensor] = []
        torch.manual_seed(SEED)
        for noise, support, query in zip(noises, *task_data(entry, cell.tasks), strict=True):
            if objective is not None:
                values.append(objective(loop, start, support, query, noise))
                continue
            after = naive.adapt(loop, start, support, noise)
            with noise(loop.k):
                values.append(eager_objective(loop, after, frozen, query))
        yield differentiate(torch.stack(values).mean(), model, hyper)


@functools.lru_cache(maxsize=64)
def wanted_without_noise(cell: Cell) -> list[dict[str, Tensor]]:
    return list(wanted_of(cell, [naive.as_drawn] * (TASKS if cell.tasks else 1)))


def check(cell: Cell, backend: str, drawn: Drawn, dtype: torch.dtype = torch.float64, through_adapt: bool = True) -> None:
    """The meta-loss and its gradients, and with `through_adapt` those of an eager loss of what `adapt` returns."""
    entry, rule = MODELS[cell.model], OPTIMIZERS[cell.optimizer]
    model, hyper = entry.model().to(dtype), cast(rule.hyper(), dtype)
    hyper = tree.map_leaves(lambda value: value.detach().requires_grad_(), hyper)
    unroll = compile_unroll(
        model,
        rule.ours(**hyper, **rule.flags),
        entry.k,
        loss=None if entry.default_loss else entry.loss,
        params=entry.select,
        adjoint=ADJOINTS[cell.adjoint],
        backend=backend,
    )
    unroll = unroll.vmap() if cell.tasks else unroll
    supports, queries = task_data(entry, cell.tasks, dtype)
    support, query = joined(supports, cell.tasks), joined(queries, cell.tasks)

    torch.manual_seed(SEED)
    got = differentiate(unroll(support, query), model, hyper)
    noise_of_call = [drawn.of_task(t) for t in range(TASKS)] if cell.tasks else [naive.as_drawn]

    no_noise = not entry.random and not any(drawn.noise)
    exact = cell if cell.adjoint in ("first-order", "truncated") else cell._replace(adjoint="exact")
    wanted, wanted_eager = wanted_without_noise(exact) if no_noise else wanted_of(cell, noise_of_call)
    assert_near(got, wanted, dtype)
    assert float(got["value"]) != 0.0
    if not through_adapt:
        return

    # The same through `adapt`, with an eager query loss after it. Its noise is that of the call.
    torch.manual_seed(SEED)
    after = unroll.adapt(support)
    _, frozen = split(model, entry.select)
    loop = naive.Loop(model, entry.loss, rule.oracle, {}, entry.k)
    values: list[Tensor] = []
    for t, batch in enumerate(queries):
        one = (
            AdaptedTask(*tree.map_leaves(lambda value, t=t: value[t], (after.params, after.buffers, after.losses))) if cell.tasks else after
        )
        with noise_of_call[t](loop.k):
            values.append(eager_objective(loop, one, frozen, batch))
    got_eager = differentiate(torch.stack(values).mean(), model, hyper)

    assert_near(got_eager, wanted_eager, dtype)


class AdaptedTask(NamedTuple):
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    losses: Tensor


# --- products


VARIANTS: Mapping[str, str] = {
    "conv-bn-eval": "conv-bn-batch",
    "lstm": "lstm-dropout",
    "transformer": "transformer-dropout",
    "attention": "attention-dropout",
    "weight-norm-hook": "weight-norm",
    "spectral-norm-hook": "spectral-norm",
    "dict-inputs": "tuple-inputs",
    "nested-inputs": "tuple-inputs",
    "dict-output": "dataclass-output",
    "scalar-output": "dataclass-output",
}
"""Models that differ from another one in what adjoints and optimisers never see: that one without noise, the same layers in another mode or
by an older function of PyTorch's, or the same tensors in another form. Each is differentiated by two adjoints, the other one by all."""


def adjoints_of(model: str) -> list[str]:
    names = list(ADJOINTS)
    return names[list(VARIANTS).index(model) % 3 :: 3] if model in VARIANTS else names


def covering() -> list[Cell]:
    """Every pair of (model, adjoint) and (model, optimiser) but for variants, and every other pair of values."""
    cells: list[Cell] = []
    for m, (model, entry) in enumerate(MODELS.items()):
        # A large model's graph under Unrolled is too large for every run with the longest optimiser and tasks: those rows are not shifted.
        m = 0 if entry.large else m
        for a, adjoint in enumerate(ADJOINTS):
            if adjoint not in adjoints_of(model):
                continue
            cells.append(Cell(model, list(OPTIMIZERS)[(m + a) % len(OPTIMIZERS)], adjoint, (a + m // len(OPTIMIZERS)) % 2 == 1))
    return cells


def product() -> list[Any]:
    """All cells; those that are not in the covering set only run with --full."""
    default = set(covering())
    cells = [Cell(*row) for row in itertools.product(MODELS, OPTIMIZERS, ADJOINTS, (False, True))]
    return [pytest.param(cell, id=str(cell), marks=() if cell in default else pytest.mark.full) for cell in cells]


def test_covering_set_covers_all_pairs() -> None:
    cells = [cell for cell in covering() if cell.model not in VARIANTS]
    tables: list[Sequence[Any]] = [[name for name in MODELS if name not in VARIANTS], list(OPTIMIZERS), list(ADJOINTS), [False, True]]
    for one, other in itertools.combinations(range(4), 2):
        assert {(cell[one], cell[other]) for cell in cells} == set(itertools.product(tables[one], tables[other]))
    assert {(cell.model, cell.adjoint) for cell in covering()} >= {(name, adjoint) for name in VARIANTS for adjoint in adjoints_of(name)}
    assert {adjoint for name in VARIANTS for adjoint in adjoints_of(name)} == set(ADJOINTS)


# Unrolled captures programs of its own for `adapt`, and large ones: by default for these only, which have buffers, indices, noise, a part
# that adapts, and a tensor that is no parameter.
UNROLLED_THROUGH_ADAPT = ("mlp", "mlp-head-only", "embeddings", "attributes", "dataclass-output", "moving-mean-live", "dropout")


def through_adapt(cell: Cell) -> bool:
    return cell.adjoint != "unrolled" or cell.model in UNROLLED_THROUGH_ADAPT


def test_every_value_is_also_differentiated_through_adapt() -> None:
    cells = [cell for cell in covering() if through_adapt(cell)]
    for place, table in enumerate([list(MODELS), list(OPTIMIZERS), list(ADJOINTS), [False, True]]):
        assert {cell[place] for cell in cells} == set(table)
    unrolled = [cell for cell in cells if cell.adjoint == "unrolled"]
    assert {cell.optimizer for cell in unrolled} == set(OPTIMIZERS) and {cell.tasks for cell in unrolled} == {False, True}


@pytest.mark.parametrize("cell", product())
def test_eager(cell: Cell, drawn: Drawn, pytestconfig: pytest.Config) -> None:
    check(cell, "eager", drawn, through_adapt=through_adapt(cell) or bool(pytestconfig.getoption("--full")))


# --- Inductor

COMPILED = [
    Cell("mlp", "nesterov", "unrolled", False),
    Cell("mlp-head-only", "sgd", "unrolled", True),
    Cell("mlp", "amsgrad", "replay", False),
    Cell("mlp", "sgd", "replay2", True),
    Cell("mlp", "sgd", "first-order", True),
    Cell("conv-bn-batch", "sgd", "replay", True),
    Cell("embeddings", "adam", "unrolled", True),  # fused with the scatter of its gradient, this was silently wrong
    Cell("lstm", "sgd", "replay", False),
    Cell("dropout", "sgd", "replay", False),
    Cell("conv-bn-train", "adam", "stash", False),
    Cell("attention-dropout", "sgd", "stash", False),
    Cell("mlp", "nesterov", "truncated", True),
]


def test_programs_of_every_kind_are_compiled() -> None:
    """Every optimiser and adjoint, and each of the adjoints that replay with and without a task axis."""
    assert {cell.optimizer for cell in COMPILED} == set(OPTIMIZERS) and {cell.adjoint for cell in COMPILED} == set(ADJOINTS)
    assert {(cell.adjoint, cell.tasks) for cell in COMPILED} >= set(itertools.product(("unrolled", "replay"), (False, True)))


def compiled_product() -> list[Any]:
    """The cells above, and with --full all others."""
    cells = [*COMPILED, *(cell for cell in map(Cell._make, itertools.product(MODELS, OPTIMIZERS, ADJOINTS, (False, True))))]
    marks = {cell: () if cell in COMPILED else pytest.mark.full for cell in cells}
    return [pytest.param(cell, id=str(cell), marks=mark) for cell, mark in marks.items()]


@pytest.mark.parametrize("cell", compiled_product())
def test_inductor(cell: Cell, drawn: Drawn, pytestconfig: pytest.Config) -> None:
    # The programs for `adapt` alone take Inductor longer than those of the meta-gradient: by default for the smallest model.
    small = cell.adjoint != "unrolled" and cell.model in ("mlp", "dropout")
    check(cell, "inductor", drawn, through_adapt=small or (bool(pytestconfig.getoption("--full")) and cell in covering()))


@pytest.mark.parametrize("cell", [Cell("mlp", "amsgrad", "replay", False), Cell("conv-bn-train", "sgd", "replay", False)], ids=str)
def test_inductor_in_single_precision(cell: Cell, drawn: Drawn) -> None:
    check(cell, "inductor", drawn, torch.float32, through_adapt=False)


@pytest.mark.parametrize(
    "model", ["conv-bn-train", "conv-pool", "norms", "embeddings", "tied", "weight-norm", "spectral-norm", "attention"]
)
def test_eager_in_single_precision(model: str, drawn: Drawn) -> None:
    check(Cell(model, "nesterov", "replay", False), "eager", drawn, torch.float32)
