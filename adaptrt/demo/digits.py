"""Defines the few-shot protocol on real handwriting: the classes, and how an episode is drawn.

The 1,797 digits of 8×8 pixels that scikit-learn ships have only ten classes, which are too few for meta-training. As in the Omniglot
protocol of Santoro et al. 2016, a rotated class is a class of its own, so a class is a digit and a number of quarter-turns. Not every
rotation qualifies, because some digits look like themselves, or like another, after a half-turn:

| digits    | after a half-turn        | rotations           | classes                                          |
|-----------|--------------------------|---------------------|--------------------------------------------------|
| 0 1 2 5 8 | look the same            | 0°, 90°             | 10 for training                                  |
| 6 9       | 6 looks like 9, 9 like 6 | 0°, 90°             | 4 for training; 9 at 0° stands for 6 at 180°     |
| 3 4 7     | look like nothing else   | 0°, 90°, 180°, 270° | 12 unseen                                        |

`tests/test_demo.py` verifies the table: nearest neighbours tell all 26 classes apart. Training and unseen classes share no digit, so no
handwriting of an unseen class was ever shown, in whatever rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adaptrt.errors import AdaptrtError, InvalidArgument


class MissingDemoExtra(AdaptrtError, ImportError):
    """A package of the `demo` extra is not installed."""


Batch = tuple[Tensor, Tensor]  # inputs, labels
Task = tuple[Batch, Batch]  # support, query


class ImageClass(NamedTuple):
    """One class: a digit that is turned anticlockwise by `quarter_turns` × 90°."""

    digit: int
    quarter_turns: int


TRAINING_CLASSES = tuple(ImageClass(digit, turns) for digit in (0, 1, 2, 5, 6, 8, 9) for turns in (0, 1))
UNSEEN_CLASSES = tuple(ImageClass(digit, turns) for digit in (3, 4, 7) for turns in (0, 1, 2, 3))


class Episodes(NamedTuple):
    """A batch of few-shot tasks. T = tasks, S = ways × shots, Q = ways × queries."""

    x_support: Tensor  # [T, S, 1, 8, 8]
    y_support: Tensor  # [T, S], int64 labels in 0..ways-1
    x_query: Tensor  # [T, Q, 1, 8, 8]
    y_query: Tensor  # [T, Q]
    support_ids: Tensor  # [T, S], which of the 1,797 images each example is
    query_ids: Tensor  # [T, Q]

    def tasks(self) -> list[Task]:
        """(support, query) of each task."""
        support = zip(self.x_support, self.y_support, strict=True)
        query = zip(self.x_query, self.y_query, strict=True)
        return list(zip(support, query, strict=True))


class Digits:
    """All images in all four rotations, ready to be drawn from.

    Args:
      images: [N, 8, 8] grey levels.
      digits: [N] which digit each image shows.
    """

    def __init__(self, images: Tensor, digits: Tensor) -> None:
        seen = torch.isin(digits, torch.tensor(sorted({c.digit for c in TRAINING_CLASSES})))
        # Standardised by the training digits alone, because the unseen ones must not influence anything.
        scaled = (images - images[seen].mean()) / images[seen].std()
        self._turned = torch.stack([torch.rot90(scaled, turns, (1, 2)) for turns in range(4)]).unsqueeze(2)  # [4, N, 1, 8, 8]
        self._members = {digit: torch.nonzero(digits == digit).flatten() for digit in range(10)}

    def images(self, image_class: ImageClass) -> Tensor:
        """Returns every image of one class, [n, 1, 8, 8]."""
        return self._turned[image_class.quarter_turns, self._members[image_class.digit]]

    def draw(
        self,
        classes: Sequence[ImageClass],
        generator: torch.Generator,
        *,
        tasks: int,
        ways: int = 5,
        shots: int = 5,
        queries: int = 10,
    ) -> Episodes:
        """Draws tasks of `ways` classes in random order, with `shots` support and `queries` query images for each class.

        Two classes of one episode may be rotations of the same digit. Each digit's images are dealt out without
        replacement over the whole episode, so that no handwriting is both support and query, in whatever rotation.

        Returns:
          Episodes with ways × shots support and ways × queries query examples a task.

        Raises:
          InvalidArgument: a digit has too few images for so many shots and queries.
        """
        drawn = [self._draw_one(classes, generator, ways, shots, queries) for _ in range(tasks)]
        return Episodes(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))

    def _draw_one(self, classes: Sequence[ImageClass], generator: torch.Generator, ways: int, shots: int, queries: int) -> Episodes:
        chosen = [classes[i] for i in torch.randperm(len(classes), generator=generator)[:ways].tolist()]
        decks: dict[int, Tensor] = {}
        turns, ids = [], []
        for image_class in chosen:
            members = self._members[image_class.digit]
            deck = decks.get(image_class.digit)
            if deck is None:
                deck = members[torch.randperm(len(members), generator=generator)]
            if len(deck) < shots + queries:
                raise InvalidArgument(
                    f"digit {image_class.digit} has too few images for {shots} shots and {queries} queries a class; ask for fewer queries"
                )
            ids.append(deck[: shots + queries])
            decks[image_class.digit] = deck[shots + queries :]
            turns.append(torch.full((shots + queries,), image_class.quarter_turns))
        image_ids, image_turns = torch.stack(ids), torch.stack(turns)  # [ways, shots + queries]
        examples = self._turned[image_turns, image_ids]
        labels = torch.arange(ways).unsqueeze(1).expand(ways, shots + queries)
        return Episodes(
            examples[:, :shots].flatten(0, 1),
            labels[:, :shots].flatten(),
            examples[:, shots:].flatten(0, 1),
            labels[:, shots:].flatten(),
            image_ids[:, :shots].flatten(),
            image_ids[:, shots:].flatten(),
        )


def load() -> Digits:
    """Loads the digits that scikit-learn ships from its own installation. Nothing is downloaded.

    Raises:
      MissingDemoExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDemoExtra(f"the demo needs {error.name or 'scikit-learn'}: pip install 'adaptrt[demo]'") from error
    images, digits = load_digits(return_X_y=True)
    return Digits(torch.from_numpy(images).float().reshape(-1, 8, 8) / 16, torch.from_numpy(digits).long())
