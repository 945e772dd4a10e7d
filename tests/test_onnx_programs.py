"""Exported programs of every kind of model, through ONNX Runtime, against the same graphs in float64 and eager PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import adaptrt
from adaptrt import tree
from adaptrt.adjoint import Unrolled
from adaptrt.errors import NotExportable
from adaptrt.export.onnx import to_onnx, unsupported
from adaptrt.runtime.exportable import Exportable
from tests import naive
from tests.exports import Named, error, in_double, inputs_of, programs_of, run_graph, run_session, session, start_of
from tests.graphs import targets
from tests.models import MODELS, Entry, classify, sequences
from tests.tolerances import HIGH_DERIVATIVE, assert_close

aten = torch.ops.aten
PROGRAMS = ("adapt", "adapt_predict", "predict", "loss")

IN_FLOAT32 = {
    "convolutions": ["conv-bn-train", "conv-bn-batch", "conv-bn-eval", "conv-pool", "norms", "noisy"],
}
"""Models that ONNX Runtime has no kernels in float64 for, by what is missing. All others are compared in float64 as well."""

TOLERANCE, TIMES_EAGER = 1e-5, 3.0
"""In float32, how far results may be from float64: so far, or so many times as far as eager PyTorch's."""
TOLERANCE_IN_FLOAT64 = 1e-10


MOMENTUM: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}


def momentum(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, **MOMENTUM)


def adam(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


class Exported(NamedTuple):
    """A model's programs, and the values that they take."""

    programs: dict[str, Exportable]
    inputs: dict[str, Named]


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    return tree.map_leaves(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, value)


def exported(entry: Entry, dtype: torch.dtype, task_axis: bool = False) -> Exported:
    model = entry.model().to(dtype)
    opt = (momentum if entry.large else adam)([value for value in model.parameters() if value.requires_grad])
    loss = None if entry.default_loss else entry.loss
    unroll = adaptrt.compile_unroll(model, opt, entry.k, loss=loss, params=entry.select, adjoint=Unrolled(), backend="eager")
    unroll = unroll.vmap() if task_axis else unroll
    support, query = as_dtype(entry.data(1, 6), dtype), as_dtype(entry.data(2, 4)[0], dtype)
    programs, start = programs_of(unroll, support, query), start_of(unroll)
    data = {"adapt": (support,), "adapt_predict": (support, query), "predict": (query,), "loss": (support,)}
    return Exported(programs, {name: inputs_of(programs[name], start, data[name]) for name in PROGRAMS})


def parts_of(name: str) -> list[str]:
    """What is compared on its own: each is measured by the norm of all of it."""
    return ["result.0.params", "result.0", "result.1"] if name == "adapt" else ["result"]


def check(got: Exported, exact: Exported, dtype: torch.dtype) -> None:
    """Compares every program, run by ONNX Runtime, with the graphs of a model in float64 for the same inputs."""
    for name in PROGRAMS:
        program, inputs = got.programs[name], got.inputs[name]
        found = run_session(session(to_onnx(program.graph, name)), inputs)
        eager = run_graph(program.graph, inputs)
        wanted = run_graph(exact.programs[name].graph, in_double(exact.programs[name], inputs))
        assert list(found) == list(wanted)
        for key, value in eager.items():
            assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
            assert value.is_floating_point() or torch.equal(found[key], value), key
        for part in parts_of(name):
            allowed = TOLERANCE_IN_FLOAT64 if dtype == torch.float64 else max(TOLERANCE, TIMES_EAGER * error(eager, wanted, part))
            assert error(found, wanted, part) <= allowed, (name, part)


def losses_may_mix_dtypes() -> bool:
    one = torch.ones((), dtype=torch.float64)
    try:
        torch.ops.aten.mse_loss_backward(one, one, one.float(), 1)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("model", MODELS)
def test_exported_programs_compute_what_eager_pytorch_does(model: str) -> None:
    if model == "attributes" and not losses_may_mix_dtypes():
        pytest.skip("this PyTorch's own gradient of mse_loss refuses predictions in float64 for a target in float32")
    exact = exported(MODELS[model], torch.float64)
    start = exact.inputs["adapt"]
    after = run_graph(exact.programs["adapt"].graph, start)
    before = {f"result.0.{name.removeprefix('carry.')}": value for name, value in start.items() if name.startswith("carry.params")}
    assert error(after, before) > 1e-3, "steps that change nothing show nothing"
    check(exported(MODELS[model], torch.float32), exact, torch.float32)
    if not any(model in names for names in IN_FLOAT32.values()):
        check(exact, exact, torch.float64)


class Spectrum(nn.Module):
    """Filters in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.head = nn.Parameter(torch.rand(3)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(x.mean(1)) * self.filter, n=4))


class Solved(nn.Module):
    """Solves a system of equations in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.head = nn.Parameter(torch.eye(4) + 0.1 * torch.rand(4, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.linalg.solve(self.matrix, x.mean(1).t()).t())


REFUSED = {
    "complex numbers": (Entry(Spectrum, sequences, classify), "aten._fft_r2c.default of dtype complex"),
    "linear algebra": (Entry(Solved, sequences, classify), "aten._linalg_solve_ex.default"),
}
"""Models that cannot be exported, and what is named. All of `MODELS` can be."""


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_exported_is_refused_by_name(kind: str) -> None:
    entry, named = REFUSED[kind]
    for program in exported(entry, torch.float32).programs.values():
        assert any(text.startswith(named) for text in unsupported(program.graph)), unsupported(program.graph)
        with pytest.raises(NotExportable, match=rf"{program.name} cannot become an ONNX model.* {named}"):
            to_onnx(program.graph, program.name)


@pytest.mark.parametrize("model", ["mlp", "attention", "embeddings", "in-place", "moving-mean-live"])
def test_an_exported_adaptation_is_the_eager_loop(model: str) -> None:
    entry = MODELS[model]
    got = exported(entry._replace(large=True), torch.float64)
    module = entry.model()
    params = {name: value.detach().requires_grad_() for name, value in module.named_parameters()}
    start = naive.Start(params, {}, dict(module.named_buffers()), {})
    wanted = naive.adapt(naive.Loop(module, entry.loss, naive.sgd, MOMENTUM, entry.k), start, entry.data(1, 6))
    found = run_session(session(to_onnx(got.programs["adapt"].graph, "adapt")), got.inputs["adapt"])
    for name, value in (*wanted.params.items(), *wanted.buffers.items()):
        kind = "params" if name in wanted.params else "buffers"
        assert_close(found[f"result.0.{kind}.{name}"], value.detach(), HIGH_DERIVATIVE)
    assert_close(found["result.1"], wanted.losses.detach(), HIGH_DERIVATIVE)


def test_an_export_has_gradients_that_nobody_differentiates() -> None:
    entry = MODELS["norms"]
    got = exported(entry._replace(large=True), torch.float64)
    graph, inputs = got.programs["adapt"].graph, got.inputs["adapt"]
    assert {aten.native_group_norm_backward.default, aten.silu_backward.default} <= set(targets(graph))
    module = entry.model()
    params = {name: value.detach().requires_grad_() for name, value in module.named_parameters()}
    start = naive.Start(params, {}, {}, {})
    wanted = naive.adapt(naive.Loop(module, entry.loss, naive.sgd, MOMENTUM, entry.k), start, entry.data(1, 6))
    found = run_graph(graph, inputs)
    for name, value in wanted.params.items():
        assert_close(found[f"result.0.params.{name}"], value.detach(), HIGH_DERIVATIVE)


@pytest.mark.parametrize("model", ["conv-pool", "norms", "attention", "embeddings", "dropout"])
def test_tasks_are_adapted_together(model: str) -> None:
    got, exact = (over_tasks(MODELS[model], dtype) for dtype in (torch.float32, torch.float64))
    assert got.programs["adapt"].num_tasks == 3
    check(got, exact, torch.float32)
    outputs = run_graph(got.programs["adapt_predict"].graph, got.inputs["adapt_predict"])["result.0"]
    assert not torch.allclose(outputs[0], outputs[1])


def over_tasks(entry: Entry, dtype: torch.dtype) -> Exported:
    tasks = tree.map_leaves(lambda *parts: torch.stack(parts), *[entry.data(seed, 4) for seed in (1, 2, 3)])
    return exported(entry._replace(batch=lambda generator, n: tasks), dtype, task_axis=True)
