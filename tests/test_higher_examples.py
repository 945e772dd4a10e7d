"""The examples in the style of `higher`, run short: both ways must be the same program, and the checks must notice when they are not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt.demo import learner, measure
from adaptrt.demo.digits import UNSEEN_CLASSES, Digits, load
from examples import deep_energy, maml_digits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it compares an int by identity, and says so when compiled
    import higher as original  # pyright: ignore[reportMissingTypeStubs]


def quietly(run: Callable[[], Any]) -> Any:
    """The original makes graphs by what PyTorch has deprecated since."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run()


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load()


# --- MAML


@pytest.fixture(scope="module")
def maml(digits: Digits) -> maml_digits.Comparison:
    return maml_digits.follow(digits, 3, "eager", seed=0)


def test_maml_gradients_and_losses_are_those_of_higher(maml: maml_digits.Comparison) -> None:
    maml_digits.check(maml)
    assert all(gradient.norm() > 0 for gradient in maml.exact.first_gradient if gradient.dim() > 1)
    assert len(maml.exact.first_gradient) == len(list(maml.exact.model.parameters()))
    assert maml_digits.drift(maml.exact_compiled, maml.exact, 1) < 1e-12
    assert maml_digits.drift(maml.compiled, maml.higher, 1) < 1e-6
    assert maml_digits.drift(maml.compiled, maml.higher, 3) < 1e-3
    assert [len(run.losses) for run in maml[:4]] == [3, 3, 3, 1]
    assert maml.higher.losses[2] != maml.higher.losses[0]


def test_maml_check_fails_on_another_gradient(digits: Digits, maml: maml_digits.Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_order(model: nn.Module, backend: str) -> adaptrt.CompiledUnroll:
        inner = maml_digits.inner_optimizer(model)
        return adaptrt.compile_unroll(
            model, inner, maml_digits.INNER_STEPS, loss=F.cross_entropy, adjoint=adaptrt.FirstOrder(), backend=backend
        )

    monkeypatch.setattr(maml_digits, "compiled_meta_loss", first_order)
    wrong = maml_digits.follow(digits, 1, "eager", seed=0)
    for mixed in (wrong, maml._replace(exact_compiled=wrong.exact_compiled)):
        with pytest.raises(RuntimeError, match="differs from that of higher"):
            maml_digits.check(mixed)


def test_maml_runs_with_the_original_package(digits: Digits, maml: maml_digits.Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    """The import is all that is new: under `import higher` the same code gives the same gradient."""
    monkeypatch.setattr(maml_digits, "higher", original)
    model = learner.build_model(0).double()
    run = maml_digits.Run(model, maml_digits.higher_meta_loss(model))
    quietly(lambda: run.iterate(learner.training_batch(digits, torch.Generator().manual_seed(0))))
    assert maml_digits.gradient_error(maml.exact, run) < 1e-12


def test_maml_accuracy_is_the_same_in_both_ways(digits: Digits, maml: maml_digits.Comparison) -> None:
    """Of one model, in float64, where no rounding decides between two classes."""
    episodes = digits.draw(UNSEEN_CLASSES, torch.Generator().manual_seed(1), tasks=4)
    episodes = episodes._replace(x_support=episodes.x_support.double(), x_query=episodes.x_query.double())
    model = maml.exact.model
    found = maml_digits.higher_accuracy(model, episodes)
    assert found.shape == (4,)
    assert torch.equal(found, measure.accuracy(maml_digits.compiled_meta_loss(model, "eager"), episodes))
    assert found.mean() > 0.5


def test_maml_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    num_threads = torch.get_num_threads()
    try:
        maml_digits.main(["--iterations", "2", "--episodes", "2", "--backend", "eager"])
    finally:
        torch.set_num_threads(num_threads)
    printed = capsys.readouterr().out
    assert "first meta-gradient" in printed
    assert "nearest neighbour" in printed


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--iterations", "0"], "iterations must be"), (["--episodes", "1"], "episodes must be")]
)
def test_maml_refuses_too_few(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        maml_digits.main(arguments)
    assert message in capsys.readouterr().err


# --- deep energy


@pytest.fixture(scope="module")
def energy(digits: Digits) -> deep_energy.Comparison:
    return deep_energy.follow(deep_energy.Rows(digits), 4, "eager", seed=0)


def test_energy_gradients_and_losses_are_those_of_higher(energy: deep_energy.Comparison) -> None:
    deep_energy.checked_error(energy.compiled, energy.higher)
    deep_energy.checked_error(energy.exact_compiled, energy.exact)
    names = [name for name, _ in energy.exact.networks.named_parameters()]
    without = [name for name, gradient in zip(names, energy.exact.first_gradient, strict=True) if gradient.norm() == 0]
    assert without == [names[-1]], "a constant in the energy is all that does not matter"
    assert energy.compiled.losses == pytest.approx(energy.higher.losses, rel=1e-5)
    assert energy.higher.losses == pytest.approx(energy.exact.losses, rel=1e-5)
    assert energy.higher.losses[3] < energy.higher.losses[0]


def test_energy_follows_exactly_in_float64(digits: Digits, energy: deep_energy.Comparison) -> None:
    run = deep_energy.energy_run(0, 4, torch.float64, "eager")
    deep_energy.train([run], deep_energy.Rows(digits), 4, seed=0)
    assert run.losses == pytest.approx(energy.exact.losses, rel=1e-9)
    for (name, found), expected in zip(run.networks.named_parameters(), energy.exact.networks.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_energy_check_fails_on_another_gradient(digits: Digits, energy: deep_energy.Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptrt, "Replay", adaptrt.FirstOrder)
    wrong = deep_energy.energy_run(0, 1, torch.float64, "eager")
    deep_energy.train([wrong], deep_energy.Rows(digits), 1, seed=0)
    assert wrong.losses == pytest.approx(energy.exact.losses[:1], rel=1e-12), "the prediction is the same, its derivative is not"
    with pytest.raises(RuntimeError, match="differs from that of higher"):
        deep_energy.checked_error(wrong, energy.exact)
    wrong.first_gradient[0].fill_(torch.nan)
    with pytest.raises(RuntimeError, match="by inf"):
        deep_energy.checked_error(wrong, energy.exact)


def test_energy_runs_with_the_original_package(digits: Digits, energy: deep_energy.Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_energy, "higher", original)
    run = deep_energy.energy_run(0, 1, torch.float64, None)
    quietly(lambda: deep_energy.train([run], deep_energy.Rows(digits), 1, seed=0))
    assert deep_energy.checked_error(energy.exact, run) < 1e-12


def test_energy_goes_on_where_it_stopped(digits: Digits, energy: deep_energy.Comparison) -> None:
    """Two rounds are twice as many steps, and go further down: by a plain loop too."""
    networks = energy.exact.networks
    assert isinstance(networks, deep_energy.Networks)
    images, _ = deep_energy.Rows(digits, test=True).draw(deep_energy.ROWS, torch.Generator().manual_seed(3))
    local = networks.local(images.double()).detach()
    logits = torch.zeros_like(local, requires_grad=True)
    energies: list[float] = []
    for _ in range(2 * deep_energy.INNER_STEPS):
        value = networks.energy((logits, local))
        (gradient,) = torch.autograd.grad(value, logits)
        logits = (logits - networks.rate * gradient).detach().requires_grad_()
        energies.append(value.item())
    assert energies[-1] < energies[deep_energy.INNER_STEPS] < energies[0]
    for infer in (deep_energy.higher_inference(networks), deep_energy.compiled_inference(networks, "eager")):
        torch.testing.assert_close(infer(local, 2), logits, rtol=1e-10, atol=1e-10, check_stride=False)


def test_energy_learns_what_rows_there_are(digits: Digits) -> None:
    """Labels of a row agree with each other sooner than any image can be read alone."""
    iterations, source = 150, deep_energy.Rows(digits)
    run = deep_energy.energy_run(0, iterations, torch.float32, "eager")
    alone = deep_energy.Networks(0).local
    deep_energy.train([run, deep_energy.Run(alone, alone, iterations)], source, iterations, seed=0)
    images, labels = deep_energy.Rows(digits, test=True).draw(4 * deep_energy.ROWS, torch.Generator().manual_seed(1))

    def whole_rows(predict: deep_energy.Predict) -> float:
        logits = torch.cat([predict(part).detach() for part in images.split(deep_energy.ROWS)])
        return (logits.argmax(-1) == labels).all(1).double().mean().item()

    assert whole_rows(run.predict) > 0.2 > 3 * whole_rows(alone) > 0
    assert whole_rows(lambda part: deep_energy.best_valid_row(alone(part))) > whole_rows(run.predict)


def test_energy_rows(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    valid = {tuple(row) for row in deep_energy.valid_rows().tolist()}
    assert len(valid) == 20
    assert {(8, 9, 0, 1, 2), (2, 1, 0, 9, 8)} < valid
    monkeypatch.setattr(deep_energy, "NOISE", 0.0)
    drawn: list[set[tuple[float, ...]]] = []
    for test in (False, True):
        images, labels = deep_energy.Rows(digits, test=test).draw(500, torch.Generator().manual_seed(0))
        assert images.shape == (500, deep_energy.LENGTH, 64)
        assert {tuple(row) for row in labels.tolist()} == valid
        reference = torch.stack([digits.images(deep_energy.ImageClass(digit, 0)).flatten(1).mean(0) for digit in range(10)])
        nearest = torch.cdist(images.flatten(0, 1), reference).argmin(1)
        assert (nearest == labels.flatten()).double().mean() > 0.85, "an image shows its label"
        drawn.append({tuple(image) for image in images.flatten(0, 1).tolist()})
    assert len(drawn[1]) > 400
    assert not drawn[0] & drawn[1], "no handwriting is in both"


def test_energy_accuracy() -> None:
    labels = torch.zeros(256, deep_energy.LENGTH, dtype=torch.long)

    def predict(images: Tensor) -> Tensor:
        """Right everywhere but in the first label of the first half of each batch."""
        logits = torch.zeros(*images.shape[:2], deep_energy.CLASSES)
        logits[..., 0] = 1
        logits[: len(images) // 2, 0, 3] = 2
        return logits

    assert deep_energy.accuracy(predict, torch.zeros(256, deep_energy.LENGTH, 64), labels).split() == [
        "90.0%",
        "±",
        "1.2",
        "50.0%",
        "±",
        "6.1",
    ]


def test_energy_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_energy, "TEST_ROWS", 128)
    num_threads = torch.get_num_threads()
    try:
        deep_energy.main(["--iterations", "2", "--backend", "eager"])
    finally:
        torch.set_num_threads(num_threads)
    printed = capsys.readouterr().out
    assert "first gradient" in printed
    assert "energy, trained compiled" in printed


def test_energy_refuses_no_iterations(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        deep_energy.main(["--iterations", "0"])
    assert "--iterations must be at least 1" in capsys.readouterr().err
