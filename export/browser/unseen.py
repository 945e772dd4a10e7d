"""The symbols on which accuracy is measured: letters, digits and simple shapes, of which the network has seen none.

Letters and digits are those of single-line typefaces, most of them drawn after somebody's handwriting. A class is a letter, a *hand* is a
typeface, so the drawings of a class differ as those of several people, or, within one hand, as `strokes.redrawn` lets them differ.
"""

from __future__ import annotations

import functools
import html
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from export.browser.strokes import Stroke, in_unit_box
from export.browser.symbols import Symbol, characters, path_points

TYPEFACES = Path(__file__).parent / "node_modules" / "hersheytext"
HERSHEY = "futural", "scripts", "cursive"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "23456789" + "abdefghnqrt"
"""Letters and digits that differ from all others when their size is not seen, as that of `o`, `O` and `0` is not."""


@functools.cache
def hands() -> dict[str, dict[str, Symbol]]:
    """Returns letters and digits by the name of the hand and the letter.

    Raises:
      FileNotFoundError: the typefaces are not installed; `npm ci` in this folder does it.
    """
    if not TYPEFACES.is_dir():
        raise FileNotFoundError(f"{TYPEFACES} is missing: run `npm ci` in {Path(__file__).parent}")
    found: dict[str, dict[str, Symbol]] = {}
    for file in sorted((TYPEFACES / "svg_fonts").glob("EMS*.svg")):
        glyphs = re.findall(r'<glyph unicode="([^"]+)"[^>]*\sd="([^"]+)"', file.read_text(encoding="utf-8"))
        letters = {html.unescape(name): path for name, path in glyphs}
        found[file.stem] = {letter: _flipped(_strokes(letters[letter])) for letter in LETTERS if letter in letters}
    fonts = json.loads((TYPEFACES / "hersheytext.json").read_bytes())
    for font in HERSHEY:  # which begins at the exclamation mark
        found[font] = {letter: _strokes(fonts[font]["chars"][ord(letter) - 33]["d"]) for letter in LETTERS}
    latin = characters(first=0x30, below=0x7B)
    found["KanjiVG"] = {letter: in_unit_box(latin[letter]) for letter in LETTERS if letter in latin}
    return found


def _strokes(path: str) -> Symbol:
    return in_unit_box([path_points(part) for part in re.split(r"(?=M)", path) if part.strip()])


def _flipped(symbol: Symbol) -> Symbol:
    return [stroke * [1.0, -1.0] for stroke in symbol]


# --- shapes, each with proportions of its own at every drawing


def _turn(*angles: float) -> Stroke:
    """Points of the unit circle at angles in turns, clockwise from the top."""
    return np.array([[math.sin(2 * math.pi * angle), -math.cos(2 * math.pi * angle)] for angle in angles])


def _around(generator: np.random.Generator, begin: float = 0.0, end: float = 1.0) -> Stroke:
    return _turn(*np.linspace(begin, end + generator.normal(0, 0.02), 40))


def _closed(corners: list[list[float]], generator: np.random.Generator) -> Symbol:
    points = np.array(corners) + generator.normal(0, 0.06, (len(corners), 2))
    begin = int(generator.integers(len(points)))
    points = np.roll(points, begin, 0)
    return [np.concatenate([points, points[:1]])[:: int(generator.choice([-1, 1]))]]


def _open(points: list[list[float]], generator: np.random.Generator) -> Stroke:
    return np.array(points) + generator.normal(0, 0.05, (len(points), 2))


def _star(generator: np.random.Generator) -> Symbol:
    return [_turn(0, 0.4, 0.8, 0.2, 0.6, 1.0) + generator.normal(0, 0.05, (6, 2))]


def _spiral(generator: np.random.Generator) -> Symbol:
    turns = generator.uniform(2.2, 3.0)
    angle = np.linspace(0, turns, 90)
    return [_turn(*angle) * (angle / turns)[:, None]]


def _heart(generator: np.random.Generator) -> Symbol:
    t = np.linspace(0, 2 * math.pi, 50)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [np.stack([16 * np.sin(t) * generator.uniform(0.85, 1.15), -y], 1) / 16]


def _infinity(generator: np.random.Generator) -> Symbol:
    t = np.linspace(0, 2 * math.pi, 50) + generator.uniform(0, 2 * math.pi)
    return [np.stack([np.cos(t), np.sin(2 * t) * generator.uniform(0.35, 0.55)], 1)]


def _wave(generator: np.random.Generator) -> Symbol:
    t = np.linspace(0, 1, 60)
    return [np.stack([2 * t, generator.uniform(0.25, 0.4) * np.sin(2 * math.pi * generator.uniform(1.9, 2.3) * t)], 1)]


def _flower(generator: np.random.Generator) -> Symbol:
    petals = [_around(generator) * 0.33 + 0.62 * _turn(place)[0] for place in np.arange(5) / 5]
    return [_around(generator) * 0.3, *petals]


def _face(generator: np.random.Generator) -> Symbol:
    eyes = [np.array([[x, -0.3], [x, -0.2]]) + generator.normal(0, 0.03, 2) for x in (-0.35, 0.35)]
    return [_around(generator), *eyes, 0.55 * _around(generator, 0.65, 0.35)]


def _sun(generator: np.random.Generator) -> Symbol:
    rays = [np.stack([0.6 * _turn(a)[0], _turn(a)[0]]) for a in np.arange(8) / 8 + generator.normal(0, 0.01, 8)]
    return [_around(generator) * 0.45, *rays]


def _moon(generator: np.random.Generator) -> Symbol:
    outer, inner = _around(generator, 0.05, 0.45), _turn(*np.linspace(0.42, 0.08, 30))
    return [np.concatenate([outer, inner * [generator.uniform(0.3, 0.5), 1]])]


SHAPES: dict[str, Callable[[np.random.Generator], Symbol]] = {
    "circle": lambda g: [_around(g)],
    "triangle": lambda g: _closed([[0, -1], [1, 0.8], [-1, 0.8]], g),
    "square": lambda g: _closed([[-1, -1], [1, -1], [1, 1], [-1, 1]], g),
    "diamond": lambda g: _closed([[0, -1.2], [0.8, 0], [0, 1.2], [-0.8, 0]], g),
    "star": _star,
    "spiral": _spiral,
    "zigzag": lambda g: [_open([[-1, 0.4], [-0.6, -0.4], [-0.2, 0.4], [0.2, -0.4], [0.6, 0.4], [1, -0.4]], g)],
    "wave": _wave,
    "heart": _heart,
    "arrow": lambda g: [_open([[-1, 0], [1, 0]], g), _open([[0.5, -0.5], [1, 0], [0.5, 0.5]], g)],
    "cross": lambda g: [_open([[-1, -1], [1, 1]], g), _open([[1, -1], [-1, 1]], g)],
    "plus": lambda g: [_open([[-1, 0], [1, 0]], g), _open([[0, -1], [0, 1]], g)],
    "check": lambda g: [_open([[-0.8, 0], [-0.3, 0.6], [0.8, -0.8]], g)],
    "infinity": _infinity,
    "house": lambda g: [*_closed([[-0.8, 0], [0.8, 0], [0.8, 1], [-0.8, 1]], g), _open([[-1, 0], [0, -0.9], [1, 0]], g)],
    "lightning": lambda g: [_open([[0.3, -1], [-0.4, 0.1], [0.3, 0], [-0.3, 1]], g)],
    "hourglass": lambda g: _closed([[-0.7, -1], [0.7, -1], [-0.7, 1], [0.7, 1]], g),
    "flower": _flower,
    "face": _face,
    "sun": _sun,
    "moon": _moon,
    "equals": lambda g: [_open([[-1, -0.4], [1, -0.4]], g), _open([[-1, 0.4], [1, 0.4]], g)],
    "hash": lambda g: [
        _open(line, g) for line in ([[-0.4, -1], [-0.4, 1]], [[0.4, -1], [0.4, 1]], [[-1, -0.4], [1, -0.4]], [[-1, 0.4], [1, 0.4]])
    ],
    "stairs": lambda g: [_open([[-1, 1], [-1, 0.33], [-0.33, 0.33], [-0.33, -0.33], [0.33, -0.33], [0.33, -1], [1, -1]], g)],
}
