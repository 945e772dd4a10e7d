"""The examples, run short: what they claim must hold, on the backend that needs no compiler."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from adaptrt import FirstOrder
from adaptrt.optim import learned, sgd
from examples import learned_optimizer, sine


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


# --- the learned optimiser


@pytest.mark.parametrize("adjoint", learned_optimizer.ADJOINTS)
def test_learned_optimizer_meta_gradient(adjoint: str) -> None:
    learned_optimizer.check(learned_optimizer.meta_gradient_error("eager", adjoint))


def test_learned_optimizer_check_fails_on_another_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the derivative of the gradients that the rule is shown, the meta-gradient is another one, and the check says so."""
    monkeypatch.setitem(learned_optimizer.ADJOINTS, "replay", FirstOrder)
    error = learned_optimizer.meta_gradient_error("eager", "replay")
    assert error > 1e-3
    for wrong in (error, 1.1 * learned_optimizer.TOLERANCE, math.nan):
        with pytest.raises(RuntimeError, match="differs from the eager loop's"):
            learned_optimizer.check(wrong)


def test_learned_optimizer_learns() -> None:
    """Ten episodes are enough to make an optimiser of a rule that stands still."""
    model, rule = learned_optimizer.build_model(), learned_optimizer.build_rule(0)
    unroll = learned_optimizer.build_unroll(model, learned(rule), "eager")
    held_out = learned_optimizer.draw_episodes(model, seed=1, count=10)
    steps = (0, 20, learned_optimizer.HORIZON)
    untrained = learned_optimizer.losses_after(model, unroll, held_out, steps)
    assert torch.equal(untrained, untrained[:, :1].expand(-1, 3))
    training = learned_optimizer.train(model, rule, unroll, iterations=60, seed=0)
    assert (len(training.seconds), len(training.final_losses), training.num_skipped) == (60, 10, 0)
    trained = learned_optimizer.losses_after(model, unroll, held_out, steps)
    assert torch.equal(trained[:, 0], untrained[:, 0])
    assert trained[:, 1].mean() < 0.6 * untrained[:, 1].mean()
    assert trained[:, 2].mean() < 0.6 * untrained[:, 2].mean()


def test_learned_optimizer_training_skips_what_is_not_finite() -> None:
    model, rule = learned_optimizer.build_model(), learned_optimizer.build_rule(0)
    with torch.no_grad():
        rule.out.bias.fill_(1e30)
    unroll = learned_optimizer.build_unroll(model, learned(rule), "eager")
    training = learned_optimizer.train(model, rule, unroll, iterations=2, seed=0)
    assert training.num_skipped == 2
    assert rule.out.bias.item() == pytest.approx(1e30)


def test_learned_optimizer_counts_steps() -> None:
    """The loss after N steps is that of a plain loop over `torch.optim`, also across windows; what is not finite counts as infinite."""
    model = learned_optimizer.build_model()
    episodes = learned_optimizer.draw_episodes(model, seed=0, count=2)
    steps = (0, 1, learned_optimizer.WINDOW, learned_optimizer.WINDOW + 3)
    found = learned_optimizer.losses_after(model, learned_optimizer.build_unroll(model, sgd(lr=0.02), "eager"), episodes, steps)
    for episode, row in zip(episodes, found, strict=True):
        plain = learned_optimizer.build_model().requires_grad_(True)
        plain.load_state_dict(episode.weights)
        opt = torch.optim.SGD(plain.parameters(), lr=0.02)
        losses: list[float] = []
        for _ in range(max(steps) + 1):
            opt.zero_grad()
            loss = F.mse_loss(plain(episode.task.x), episode.task.y)
            loss.backward()
            opt.step()
            losses.append(loss.item())
        assert row.tolist() == pytest.approx([losses[number] for number in steps], rel=1e-4)
    burst = learned_optimizer.losses_after(model, learned_optimizer.build_unroll(model, sgd(lr=1e3), "eager"), episodes, (0, 50))
    assert burst[:, 0].isfinite().all()
    assert burst[:, 1].isinf().all()


def test_learned_optimizer_tunes_its_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that is too small, a good one and one that blows up: each column is what the best of them gives."""
    monkeypatch.setattr(learned_optimizer, "REPORTED_STEPS", (5, 20))
    model = learned_optimizer.build_model()
    episodes = learned_optimizer.draw_episodes(model, seed=0, count=6)
    rival = learned_optimizer.Rival("SGD", lambda lr: sgd(lr=lr), (1e-5, 0.02, 1e3))
    found = learned_optimizer.measure_rival(model, rival, "eager", episodes[:4], episodes[4:])
    assert found.rates == (0.02, 0.02)
    unroll = learned_optimizer.build_unroll(model, sgd(lr=0.02), "eager")
    assert torch.equal(found.losses, learned_optimizer.losses_after(model, unroll, episodes[4:], (5, 20)))


def test_learned_optimizer_episodes() -> None:
    model = learned_optimizer.build_model()
    episodes = learned_optimizer.draw_episodes(model, seed=0, count=50)
    for name, param in model.named_parameters():
        bound = 1 / math.sqrt({"0": 1, "2": 40, "4": 40}[name.split(".")[0]])
        drawn = torch.stack([episode.weights[name] for episode in episodes])
        assert drawn.shape == (50, *param.shape)
        assert 0.8 * bound < drawn.abs().max() <= bound
        assert drawn.std(0).min() > 0.4 * bound, "every episode has weights of its own; a uniform distribution has 0.58"
    for episode in episodes:
        x, y = episode.task
        assert x.shape == y.shape == (learned_optimizer.SUPPORT, 1)
        assert x.abs().max() <= 5
        basis = torch.cat([x.sin(), x.cos()], dim=1).double()
        assert torch.allclose(basis @ torch.linalg.lstsq(basis, y.double()).solution, y.double(), atol=1e-4)


def test_learned_optimizer_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_optimizer, "REPORTED_STEPS", (20, 100))
    ours = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    rival = ours + torch.tensor([0.5, -0.25])
    found = [learned_optimizer.Measured("learned rule", ours), learned_optimizer.Measured("Adam", rival, (0.1, 0.02))]
    lines = [line.split() for line in learned_optimizer.report(found)]
    # Two values 2 apart: standard deviation sqrt(2), 1.96 * sqrt(2) / sqrt(2) to either side.
    assert lines[1] == ["learned", "rule", "2.000", "±", "1.960", "2.000", "±", "0.000"]
    assert lines[2] == ["Adam", "2.500", "±", "1.960", "(lr", "0.1)", "1.750", "±", "0.000", "(lr", "0.02)"]
    assert lines[4] == ["Adam", "0.500", "±", "0.000", "-0.250", "±", "0.000"]


def test_learned_optimizer_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_optimizer, "TUNING_TASKS", 2)
    monkeypatch.setattr(learned_optimizer, "REPORTED_STEPS", (5, 20))
    num_threads = torch.get_num_threads()
    try:
        learned_optimizer.main(["--iterations", "6", "--tasks", "2", "--backend", "eager", "--adjoint", "first_order"])
    finally:
        torch.set_num_threads(num_threads)
    printed = capsys.readouterr().out
    assert "largest relative error" in printed
    assert "2 held-out tasks" in printed
    assert all(rival.label in printed for rival in learned_optimizer.RIVALS)


def test_learned_optimizer_refuses_no_iterations(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        learned_optimizer.main(["--iterations", "0"])
    assert "--iterations must be at least 1" in capsys.readouterr().err


# --- the engine in LitServe


class Answer(NamedTuple):
    """Of an HTTP server."""

    status: int
    body: Any


def ask(port: int, path: str, question: Any = None) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        body = None if question is None else json.dumps(question)
        connection.request("GET" if body is None else "POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        return Answer(response.status, json.loads(text) if question is not None else text)
    finally:
        connection.close()


@pytest.fixture
def litserve_port(tmp_path: Path) -> Iterator[int]:
    """The port of examples/litserve_app.py, which keeps states in a file."""
    if importlib.util.find_spec("litserve") is None:
        pytest.skip("the package litserve is not installed; pip install 'adaptrt[litserve]'")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    script = Path(__file__).parents[1] / "examples" / "litserve_app.py"
    command = [sys.executable, script, "--port", str(port), "--backend", "eager", "--store", str(tmp_path / "tenants.db")]
    log = tmp_path / "log"
    with log.open("w") as file:
        environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                if ask(port, "/health").status == 200:
                    break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # LitServe's own processes, too
        process.wait()


@pytest.mark.slow
def test_litserve_app(litserve_port: int) -> None:
    x, y = [[0.1, 0.2], [0.3, -0.4], [-0.5, 0.6]], [0, 1, 1]

    def question(**parts: Any) -> Answer:
        return ask(litserve_port, "/predict", {"tenant": "ann", "x": x, **parts})

    base = question().body["logits"]
    with ThreadPoolExecutor(8) as threads:
        adapted = list(threads.map(lambda number: question(tenant=f"tenant {number}", y=y), range(16)))
        again = list(threads.map(lambda number: question(tenant=f"tenant {number}"), range(16)))
    for outcome, prediction in zip(adapted, again, strict=True):
        assert outcome.status == prediction.status == 200
        assert outcome.body["kept"] and outcome.body["losses"][-1] < outcome.body["losses"][0]
        assert prediction.body["logits"] != base
        torch.testing.assert_close(torch.tensor(prediction.body["logits"]), torch.tensor(again[0].body["logits"]))
    assert question().body["logits"] == base
    for parts, status, words in (
        ({"y": [0, 1, 2]}, 400, "class"),
        ({"y": [0, 1]}, 400, "examples"),
        ({"x": [[0.0, 0.0]] * 9}, 400, "9 examples"),
        ({"tenant": ""}, 400, "tenant"),
        ({"tenant": 3}, 422, "string"),
        ({"x": "x"}, 422, "list"),
    ):
        answer = question(**parts)
        assert (answer.status, words in json.dumps(answer.body)) == (status, True), (parts, answer)
