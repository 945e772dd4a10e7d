"""Turns strokes into images, and draws a symbol once more as a person with a pointer would.

A stroke is an array [N, 2] of points (x, y), y downwards, in units of the drawing area's side. `rasterise` is the same function as that of
`page/strokes.js`, operation by operation, so that both give equal pixels; the network is trained on the one and used with the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Stroke = NDArray[np.float64]  # [N, 2]
Strokes = Sequence[Stroke]

SIZE = 28
"""Pixels of a side of an image."""
INK = 22.0
"""Pixels of the longer side of what is drawn."""
RADIUS = 1.1
"""Half the width of a line, in pixels."""
SMALLEST = 0.1
"""What is smaller than this part of the drawing area is not enlarged further; a dot stays a dot."""


def rasterise(strokes: Strokes) -> NDArray[np.float32]:
    """Returns the image of a drawing, [SIZE, SIZE], from 0 (paper) to 1 (ink).

    The drawing is centred, and scaled so that its longer side takes `INK` pixels. A pixel's value is one minus the part of a pixel by which
    its centre is outside of the line.
    """
    points = np.concatenate([np.empty((0, 2)), *strokes])
    if not len(points):
        return np.zeros((SIZE, SIZE), np.float32)
    low, high = points.min(0), points.max(0)
    scale = INK / max(high[0] - low[0], high[1] - low[1], SMALLEST)
    middle = (low + high) / 2
    placed = [(stroke - middle) * scale + SIZE / 2 for stroke in strokes if len(stroke)]
    # A stroke of one point is a line from there to there.
    begins = np.concatenate([stroke[:-1] if len(stroke) > 1 else stroke for stroke in placed])
    ends = np.concatenate([stroke[1:] if len(stroke) > 1 else stroke for stroke in placed])
    (ax, ay), (dx, dy) = begins.T, (ends - begins).T  # [L], L = lines
    squared = dx * dx + dy * dy
    centres = np.arange(SIZE) + 0.5
    px, py = centres[None, :, None] - ax, centres[:, None, None] - ay  # [1, SIZE, L] and [SIZE, 1, L]
    with np.errstate(invalid="ignore", divide="ignore"):
        along = np.where(squared > 0, np.clip((px * dx + py * dy) / squared, 0.0, 1.0), 0.0)  # [SIZE, SIZE, L]
    ex, ey = px - along * dx, py - along * dy
    distance = np.sqrt((ex * ex + ey * ey).min(2))
    return np.clip(RADIUS + 0.5 - distance, 0.0, 1.0).astype(np.float32)


def resampled(stroke: Stroke, step: float) -> Stroke:
    """Returns points at equal distances along a stroke, about `step` apart, ends included."""
    lengths = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(stroke, axis=0), axis=1))])
    if lengths[-1] <= 0:
        return stroke[:1]
    at = np.linspace(0.0, lengths[-1], max(round(lengths[-1] / step), 1) + 1)
    return np.stack([np.interp(at, lengths, stroke[:, axis]) for axis in (0, 1)], 1)


def in_unit_box(strokes: Strokes) -> list[Stroke]:
    """Centres strokes at the origin, and scales their longer side to 1."""
    points = np.concatenate(list(strokes))
    low, high = points.min(0), points.max(0)
    return [(stroke - (low + high) / 2) / max((high - low).max(), 1e-9) for stroke in strokes]


def redrawn(strokes: Strokes, generator: np.random.Generator, *, variety: float = 1.0) -> list[Stroke]:
    """Draws a symbol once more, differently in the ways in which two drawings of one person with a mouse or finger differ.

    In this order: corners are rounded; each stroke is moved, turned, stretched and trembles; ends are too short or too long; a pen is not
    lifted between two strokes; the whole is turned, slanted, stretched and bent; and the pointer reports points at irregular distances, on
    a grid.

    Args:
      strokes: the symbol, in any unit.
      generator: of all random numbers.
      variety: 1 for the differences of an ordinary hand, 0 for none.
    """
    drawn = [resampled(stroke, 0.04) for stroke in in_unit_box(strokes)]
    roundings = int(generator.integers(0, 4)) if variety else 0
    drawn = [_drawn_stroke(stroke, generator, roundings, variety) for stroke in drawn]
    if len(drawn) > 1 and generator.random() < 0.08 * variety:
        first = int(generator.integers(len(drawn) - 1))
        drawn[first : first + 2] = [np.concatenate(drawn[first : first + 2])]
    drawn = _bent(drawn, generator, variety)
    # Where a pointer is fast its points are far apart, and where it is slow they are close together.
    grid, side = generator.uniform(80, 320), generator.uniform(0.35, 0.9)
    found: list[Stroke] = []
    for stroke in drawn:
        kept = generator.random(len(stroke)) < generator.uniform(0.5, 1.0)
        kept[[0, -1]] = True
        points = stroke[kept] * side + 0.5
        found.append(np.round(points * grid) / grid if variety else points)
    return found


def _drawn_stroke(stroke: Stroke, generator: np.random.Generator, roundings: int, variety: float) -> Stroke:
    for _ in range(roundings):
        if len(stroke) > 2:
            stroke = np.concatenate([stroke[:1], (stroke[:-2] + 2 * stroke[1:-1] + stroke[2:]) / 4, stroke[-1:]])
    if len(stroke) < 2:
        return stroke + generator.normal(0, 0.03 * variety, 2)
    middle = stroke.mean(0)
    turned = _affine(generator, 0.07 * variety, 0.04 * variety, 0.06 * variety)
    stroke = (stroke - middle) @ turned.T + middle + generator.normal(0, 0.025 * variety, 2)
    # Trembling: a random walk that is smoothed and begins and ends at no displacement.
    walk = np.cumsum(generator.normal(0, 1.0, stroke.shape), 0)
    walk -= np.linspace(walk[0], walk[-1], len(walk))
    stroke = stroke + walk * (generator.uniform(0.0, 0.008) * variety)
    first, last = generator.normal(0, 0.04 * variety, 2)
    return _ended(_ended(stroke, first)[::-1], last)[::-1]


def _ended(stroke: Stroke, by: float) -> Stroke:
    """Makes the beginning of a stroke longer, or, where `by` is negative, shorter, by a part of the drawing's side."""
    steps = np.linalg.norm(np.diff(stroke, axis=0), axis=1)
    if by < 0:
        cut = min(int(np.searchsorted(np.cumsum(steps), -by)), len(stroke) // 5)
        return stroke[cut:]
    near = stroke[min(3, len(stroke) - 1)]
    direction = stroke[0] - near
    length = np.linalg.norm(direction)
    return np.concatenate([stroke[:1] + direction * (by / length), stroke]) if length > 1e-6 else stroke


def _affine(generator: np.random.Generator, turn: float, slant: float, stretch: float) -> NDArray[np.float64]:
    angle, shear = generator.normal(0, turn), generator.normal(0, slant)
    wide, high = np.exp(generator.normal(0, stretch, 2))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return rotation @ np.array([[1.0, shear], [0.0, 1.0]]) @ np.diag([wide, high])


def _bent(strokes: list[Stroke], generator: np.random.Generator, variety: float) -> list[Stroke]:
    matrix = _affine(generator, 0.1 * variety, 0.13 * variety, 0.14 * variety)
    # Two slow waves along x and y each move all points of a neighbourhood together.
    waves = generator.normal(0, 1.6, (2, 2, 2))
    phases, sizes = generator.uniform(0, 2 * np.pi, (2, 2)), generator.normal(0, 0.03 * variety, (2, 2))
    found: list[Stroke] = []
    for stroke in strokes:
        moved = stroke @ matrix.T
        shifts = [sum(sizes[axis, w] * np.sin(moved @ waves[axis, w] * np.pi + phases[axis, w]) for w in (0, 1)) for axis in (0, 1)]
        found.append(moved + np.stack(shifts, 1))
    return found
