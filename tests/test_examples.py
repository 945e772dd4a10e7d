"""The examples, run short: what they claim must hold, on the backend that needs no compiler."""

from __future__ import annotations

import pytest
import torch

from examples import sine


@pytest.fixture(scope="module")
def runs() -> sine.Comparison:
    return sine.follow(sine.CHECKED_ITERATIONS, "eager", seed=0)


def test_sine_compiled_follows_eager(runs: sine.Comparison) -> None:
    sine.check(runs)
    assert runs.compiled.curve.losses[-1] != runs.compiled.curve.losses[0]


def test_sine_check_fails_on_another_run(runs: sine.Comparison) -> None:
    shifted = sine.Curve([loss * (1 + 2 * sine.TOLERANCE) for loss in runs.eager.curve.losses], runs.eager.curve.seconds)
    other = sine.Run(runs.eager.model, sine.eager_meta_loss(runs.eager.model))
    other.curve = shifted
    with pytest.raises(RuntimeError, match="differ by"):
        sine.check(runs._replace(compiled=other))


def test_sine_follows_exactly_in_float64() -> None:
    """What is left between the two float32 curves is rounding: in float64 they agree a billion times better."""
    models = [sine.build_model(1).double() for _ in range(2)]
    compiled, eager = sine.Run(models[0], sine.compiled_meta_loss(models[0], "eager")), sine.Run(models[1], sine.eager_meta_loss(models[1]))
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        tasks = sine.Tasks(*(sine.Points(points.x.double(), points.y.double()) for points in sine.draw_tasks(generator, sine.TASKS)))
        compiled.iterate(tasks)
        eager.iterate(tasks)
    assert sine.largest_difference(compiled.curve.losses, eager.curve.losses, 20) < 1e-12


def test_sine_tasks() -> None:
    tasks = sine.draw_tasks(torch.Generator().manual_seed(0), 200, num_query=50)
    assert tasks.support.x.shape == tasks.support.y.shape == (200, sine.SHOTS, 1)
    assert tasks.query.x.shape == tasks.query.y.shape == (200, 50, 1)
    assert tasks.query.x.abs().max() <= 5
    # |y| stays below the largest amplitude, and the sine of each task fits its points: sin(x - b) = cos(b) sin(x) - sin(b) cos(x).
    assert tasks.query.y.abs().max() <= 5
    basis = torch.cat([tasks.query.x.sin(), tasks.query.x.cos()], dim=2).double()
    fit = torch.linalg.lstsq(basis, tasks.query.y.double())
    assert torch.allclose(basis @ fit.solution, tasks.query.y.double(), atol=1e-5)
    amplitude, phase = fit.solution.norm(dim=1), torch.atan2(-fit.solution[:, 1], fit.solution[:, 0])
    assert amplitude.min() >= 0.1 - 1e-4
    assert amplitude.max() <= 5 + 1e-4
    assert phase.min() >= -1e-3
    assert phase.max() <= torch.pi + 1e-3


def test_sine_errors_by_step(runs: sine.Comparison) -> None:
    errors = sine.post_adaptation_errors(runs.compiled.model, "eager", seed=0, num_tasks=20)
    assert set(errors) == {"not trained", "meta-trained"}
    for by_step in errors.values():
        assert [error.shape for error in by_step] == [(20,)] * len(sine.EVALUATED_STEPS)
    before, after = errors["meta-trained"][0].mean(), errors["meta-trained"][1].mean()
    assert after < before


def test_sine_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    num_threads = torch.get_num_threads()
    try:
        sine.main(["--iterations", "6", "--backend", "eager"])
    finally:
        torch.set_num_threads(num_threads)
    printed = capsys.readouterr().out
    assert "largest relative difference" in printed
    assert "meta-trained" in printed


def test_sine_refuses_no_iterations(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sine.main(["--iterations", "0"])
    assert "at least 1" in capsys.readouterr().err
