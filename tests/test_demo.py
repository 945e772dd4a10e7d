"""The demo: its data protocol in full, its measurements and figure, and one short eager run from end to end."""

from __future__ import annotations

import io
import itertools
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from adaptrt.demo import digits as protocol
from adaptrt.demo import figure, learner, measure
from adaptrt.demo import run as story
from adaptrt.demo.digits import TRAINING_CLASSES, UNSEEN_CLASSES, Digits, ImageClass, MissingDemoExtra
from adaptrt.errors import InvalidArgument
from tests.tolerances import EQUAL, assert_close

ALL_CLASSES = TRAINING_CLASSES + UNSEEN_CLASSES
HALF_TURN = {0: 0, 1: 1, 2: 2, 5: 5, 8: 8, 6: 9, 9: 6}


@pytest.fixture(scope="module")
def digits() -> Digits:
    return protocol.load()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_class_counts() -> None:
    assert len(set(TRAINING_CLASSES)) == 14
    assert len(set(UNSEEN_CLASSES)) == 12
    assert {c.digit for c in UNSEEN_CLASSES} == {3, 4, 7}
    assert {c.digit for c in TRAINING_CLASSES}.isdisjoint(c.digit for c in UNSEEN_CLASSES)


@pytest.mark.parametrize("image_class", TRAINING_CLASSES, ids=str)
def test_no_class_is_another_after_a_half_turn(image_class: ImageClass) -> None:
    assert ImageClass(HALF_TURN[image_class.digit], (image_class.quarter_turns + 2) % 4) not in ALL_CLASSES


def test_all_classes_look_different(digits: Digits) -> None:
    """Nearest neighbours, over handwriting they have not seen in any rotation, confuse no class with another."""
    known, asked, known_labels, asked_labels = [], [], [], []
    for label, image_class in enumerate(ALL_CLASSES):
        images = digits.images(image_class).flatten(1)
        order = torch.randperm(len(images), generator=generator(image_class.digit))  # the same halves in every rotation
        half = len(images) // 2
        known.append(images[order[:half]])
        asked.append(images[order[half:]])
        known_labels += [label] * half
        asked_labels += [label] * (len(images) - half)
    nearest = torch.cdist(torch.cat(asked), torch.cat(known)).argmin(1)
    predicted, truth = torch.tensor(known_labels)[nearest], torch.tensor(asked_labels)
    confusion = torch.zeros(len(ALL_CLASSES), len(ALL_CLASSES)).index_put((truth, predicted), torch.tensor(1.0), accumulate=True)
    rates = confusion / confusion.sum(1, keepdim=True)
    assert rates.diagonal().min() > 0.85
    assert (rates - torch.diag(rates.diagonal())).max() < 0.12


@pytest.mark.parametrize("turns", range(4))
def test_rotations_are_anticlockwise_quarter_turns(digits: Digits, turns: int) -> None:
    upright, turned = digits.images(ImageClass(7, 0)), digits.images(ImageClass(7, turns))
    assert len(upright) == 179
    for _ in range(turns):
        upright = upright.transpose(-2, -1).flip(-2)
    assert_close(turned, upright, EQUAL)


def test_training_images_are_standardised_without_the_unseen(digits: Digits) -> None:
    images = torch.cat([digits.images(ImageClass(digit, 0)) for digit in (0, 1, 2, 5, 6, 8, 9)])
    assert abs(images.mean().item()) < 1e-5
    assert abs(images.std().item() - 1) < 1e-5


@pytest.mark.parametrize("classes", [TRAINING_CLASSES, UNSEEN_CLASSES], ids=["training", "unseen"])
def test_episodes(digits: Digits, classes: tuple[ImageClass, ...]) -> None:
    episodes = digits.draw(classes, generator(), tasks=10, ways=5, shots=5, queries=10)
    assert episodes.x_support.shape == (10, 25, 1, 8, 8)
    assert episodes.x_query.shape == (10, 50, 1, 8, 8)
    assert episodes.y_support.flatten().bincount().tolist() == [50] * 5
    for task in range(10):
        support_ids, query_ids = set(episodes.support_ids[task].tolist()), set(episodes.query_ids[task].tolist())
        assert len(support_ids) == 25, "one handwriting twice in a support set"
        assert support_ids.isdisjoint(query_ids)
        # Each label stands for one class in support and query, and for different classes with different labels.
        seen = [_class_of(digits, classes, episodes.x_support[task][episodes.y_support[task] == label]) for label in range(5)]
        asked = [_class_of(digits, classes, episodes.x_query[task][episodes.y_query[task] == label]) for label in range(5)]
        assert seen == asked
        assert len(set(seen)) == 5


def _class_of(digits: Digits, classes: tuple[ImageClass, ...], images: Tensor) -> ImageClass:
    holders = [c for c in classes if (digits.images(c).flatten(1)[:, None] == images.flatten(1)).all(2).any(0).all()]
    (only,) = holders
    return only


def test_rotations_of_one_digit_share_no_handwriting(digits: Digits) -> None:
    episodes = digits.draw([ImageClass(3, turns) for turns in range(4)], generator(), tasks=5, ways=4, shots=5, queries=15)
    for support_ids, query_ids in zip(episodes.support_ids, episodes.query_ids, strict=True):
        assert len(torch.cat([support_ids, query_ids]).unique()) == 4 * 20


def test_episodes_follow_their_seed(digits: Digits) -> None:
    first, again, other = (digits.draw(UNSEEN_CLASSES, generator(seed), tasks=2) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.support_ids, other.support_ids)


def test_too_many_queries_are_refused(digits: Digits) -> None:
    with pytest.raises(InvalidArgument, match="ask for fewer queries"):
        digits.draw([ImageClass(3, turns) for turns in range(4)], generator(), tasks=1, ways=4, queries=60)


def test_training_tasks_move_as_a_whole(digits: Digits) -> None:
    """Support and query of a task go through the same symmetry, and all eight occur."""
    found = set()
    for seed in range(5):
        plain = digits.draw(
            TRAINING_CLASSES, generator(seed), tasks=learner.TASKS, ways=learner.WAYS, shots=learner.SHOTS, queries=learner.QUERIES
        )
        moved = learner.training_batch(digits, generator(seed))
        for task in range(learner.TASKS):
            symmetry = _symmetry(plain.x_support[task], moved.x_support[task])
            assert symmetry == _symmetry(plain.x_query[task], moved.x_query[task])
            found.add(symmetry)
    assert len(found) == 8


def _symmetry(before: Tensor, after: Tensor) -> tuple[int, bool]:
    candidates = itertools.product(range(4), (False, True))
    (only,) = [
        (turns, mirror)
        for turns, mirror in candidates
        if torch.equal(torch.rot90(before, turns, (-2, -1)).flip(-1) if mirror else torch.rot90(before, turns, (-2, -1)), after)
    ]
    return only


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDemoExtra, match=r"pip install 'adaptrt\[demo\]'"):
        protocol.load()


def test_building_the_model_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again = learner.build_model(5), learner.build_model(5)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_estimate_is_a_mean_with_its_confidence_interval() -> None:
    value = measure.estimate(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert value.mean == 0.75
    assert value.half_width == pytest.approx(1.96 * 0.5 / 2)
    assert str(measure.Estimate(0.9765, 0.0041)) == "97.7% ± 0.4"


def test_latency_is_not_reported_for_different_results(digits: Digits) -> None:
    model = learner.build_model(0)
    unroll = learner.build_unroll(model, steps=1, backend="eager")
    with pytest.raises(measure.ResultsDiffer, match="differ"):
        measure.latency(model, unroll, digits.draw(UNSEEN_CLASSES, generator(), tasks=1).tasks()[0], steps=2, calls=1)


def test_short_run_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"NUM_ITERATIONS_EAGER": 3, "NUM_WATCHED": 3, "EVALUATED_STEPS": 6}.items():
        monkeypatch.setattr(story, name, value)
    written = io.StringIO()
    out = tmp_path / "figure.png"
    console = Console(file=written, width=120, highlight=False)
    story.run(minutes=2, out=out, seed=0, backend="eager", num_episodes=4, console=console)
    text = written.getvalue()
    for expected in ("3/3", "before adaptation", "after 5 steps", "after 6 steps", "4 episodes", "eager PyTorch", str(out)):
        assert expected in text
    assert out.read_bytes().startswith(b"\x89PNG")


def test_figure_of_one_iteration_is_drawn(tmp_path: Path) -> None:
    estimate = measure.Estimate(0.5, 0.1)
    timing = measure.Latency(torch.tensor([1e-3, 2e-3]), torch.tensor([2e-3, 4e-3]), 1e-6)
    curve = figure.Curve([1.0], [(0, estimate)])
    figure.draw(tmp_path / "a.png", curve, [estimate] * 3, estimate, timing, trained_steps=1, label="compiled")
    assert (tmp_path / "a.png").stat().st_size > 1000
