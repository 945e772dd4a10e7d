"""The symbols on which the network is meta-trained: Japanese characters and parts of them, and signs and doodles that are made up.

Neither has the letters, digits and simple shapes that visitors are likely to draw. Those are in `unseen.py`, and are for measuring only.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from export.browser.strokes import Stroke, in_unit_box, rasterise

KANJIVG = "kanjivg"
FIRST_KANA = 0x3041
"""Characters of KanjiVG before this code are punctuation, and Latin letters and digits, which stay unseen."""
MAX_STROKES = 5
SHARES = 0.5, 0.15, 0.15, 0.2
"""Of signs, characters, parts of characters and doodles among the symbols."""
MOST_INK = 0.38
"""The mean of a symbol's image, at most."""
Symbol = list[Stroke]


class MissingPackage(ImportError):
    """A package of the extra `browser` is not installed."""


def characters(*, below: int = 1 << 32, first: int = FIRST_KANA) -> dict[str, Symbol]:
    """Returns the strokes of KanjiVG's characters with codes from `first` to `below`, in the order in which they are written.

    Raises:
      MissingPackage: the package is not there.
    """
    try:
        files = importlib.metadata.files(KANJIVG) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackage("the strokes of characters are in a package: pip install 'adaptrt[browser]'") from error
    found: dict[str, Symbol] = {}
    for file in files:
        name = re.fullmatch(r"kanji/([0-9a-f]{5})\.svg", file.as_posix())
        if name and first <= int(name[1], 16) < below:
            text = file.read_text(encoding="utf-8")
            found[chr(int(name[1], 16))] = [path_points(path) for path in re.findall(r'<path[^>]*\sd="([^"]+)"', text)]
    return found


def path_points(path: str, per_curve: int = 8) -> Stroke:
    """Returns points along an SVG path of lines and cubic curves that does not lift the pen.

    Raises:
      ValueError: the path has a command that is none of M, L, H, V, C, S and Z.
    """
    tokens = re.findall(r"[A-Za-z]|-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?", path)
    points: list[NDArray[np.float64]] = []
    at, control, begin = np.zeros(2), np.zeros(2), np.zeros(2)
    place, command = 0, ""

    def pair(base: NDArray[np.float64]) -> NDArray[np.float64]:
        nonlocal place
        place += 2
        return base + np.array([float(tokens[place - 2]), float(tokens[place - 1])])

    while place < len(tokens):
        if tokens[place].isalpha():
            command, place = tokens[place], place + 1
        base = at if command.islower() else np.zeros(2)
        kind = command.upper()
        if kind in "ML":
            at = control = pair(base)
            points.append(at)
            if kind == "M":
                begin, command = at, "l" if command == "m" else "L"
        elif kind in "HV":
            axis = "HV".index(kind)
            at = at.copy()
            at[axis] = base[axis] + float(tokens[place])
            control, place = at, place + 1
            points.append(at)
        elif kind in "CS":
            first = pair(base) if kind == "C" else 2 * at - control
            second, end = pair(base), pair(base)
            t = np.linspace(0, 1, per_curve + 1)[1:, None]
            points.extend((1 - t) ** 3 * at + 3 * (1 - t) ** 2 * t * first + 3 * (1 - t) * t**2 * second + t**3 * end)
            at, control = end, second
        elif kind == "Z":
            at = control = begin
            points.append(at)
        else:
            raise ValueError(f"the path command {command!r} is not known")
    return np.stack(points)


def parts(character: Symbol, generator: np.random.Generator) -> Symbol:
    """Returns a few strokes of a character that follow one another: a simple symbol that a visitor might invent."""
    count = min(int(generator.integers(1, MAX_STROKES + 1)), len(character))
    first = int(generator.integers(len(character) - count + 1))
    return character[first : first + count]


# --- doodles


def _line(generator: np.random.Generator) -> Stroke:
    return generator.uniform(-1, 1, (int(generator.integers(2, 6)), 2))


def _curve(generator: np.random.Generator) -> Stroke:
    """A smooth curve through random points (Catmull and Rom 1974)."""
    points = generator.uniform(-1, 1, (int(generator.integers(3, 7)), 2))
    around = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    return _through(around)


def _loop(generator: np.random.Generator) -> Stroke:
    """A closed smooth curve around a centre, by a few harmonics."""
    angle = np.linspace(0, 2 * np.pi, 40) + generator.uniform(0, 2 * np.pi)
    radius = 1 + sum(generator.normal(0, 0.35 / n) * np.sin(n * angle + generator.uniform(0, 2 * np.pi)) for n in (1, 2, 3))
    return np.stack([radius * np.cos(angle) * generator.uniform(0.4, 1), radius * np.sin(angle)], 1)


def _arc(generator: np.random.Generator) -> Stroke:
    angle = np.linspace(0, generator.uniform(0.4, 1.9) * np.pi, 30) + generator.uniform(0, 2 * np.pi)
    return np.stack([np.cos(angle) * generator.uniform(0.3, 1), np.sin(angle)], 1)


def _coil(generator: np.random.Generator) -> Stroke:
    """A circle that moves on while it is drawn: loops, cusps and waves."""
    turns = generator.uniform(1, 3.5)
    angle = np.linspace(0, 2 * np.pi * turns, 60) * generator.choice([-1, 1])
    way = np.linspace(-1, 1, 60)[:, None] * generator.uniform(-1.5, 1.5, (1, 2))
    radius = np.linspace(generator.uniform(0.3, 1), generator.uniform(0.3, 1), 60)
    return way + radius[:, None] * np.stack([np.cos(angle) * generator.uniform(0.3, 1), np.sin(angle)], 1)


def _polygon(generator: np.random.Generator) -> Stroke:
    count = int(generator.integers(3, 7))
    angle = np.sort(generator.uniform(0, 2 * np.pi, count))
    radius = generator.uniform(0.4, 1, count)
    corners = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    return np.concatenate([corners, corners[:1]])


def _comb(generator: np.random.Generator) -> Stroke:
    """A line that goes to and fro."""
    count = int(generator.integers(3, 8))
    along = np.sort(generator.uniform(-1, 1, count))
    across = generator.uniform(0.2, 1, count) * np.where(np.arange(count) % 2, 1, -1)
    angle = generator.uniform(0, np.pi)
    return np.stack([along, across], 1) @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _dot(generator: np.random.Generator) -> Stroke:
    return generator.uniform(-1, 1, (1, 2))


def _through(around: Stroke) -> Stroke:
    a, b, c, d = (around[i : len(around) - 3 + i, None] for i in range(4))
    t = np.linspace(0, 1, 9)[None, :, None]
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - 3 * c + d - a) * t**3)
    return curve.reshape(-1, 2)


KINDS: tuple[tuple[Callable[[np.random.Generator], Stroke], float], ...] = (
    (_line, 3), (_curve, 3), (_loop, 2), (_arc, 2), (_coil, 1.5), (_polygon, 1.5), (_comb, 1), (_dot, 0.5),
)  # fmt: skip


def doodle(generator: np.random.Generator) -> Symbol:
    """Makes up a symbol of one to four strokes."""
    shares = np.array([share for _, share in KINDS])
    count = int(generator.choice([1, 2, 3, 4], p=[0.4, 0.3, 0.2, 0.1]))
    made: Symbol = []
    for number in range(count):
        stroke = KINDS[int(generator.choice(len(KINDS), p=shares / shares.sum()))][0](generator)
        if len(stroke) == 1 and not number:
            stroke = _arc(generator)
        size = 1.0 if not number else generator.uniform(0.25, 1.0)
        place = generator.uniform(-0.5, 0.5, 2) if number else np.zeros(2)
        if number and generator.random() < 0.4:  # strokes of symbols often touch
            before = made[int(generator.integers(len(made)))]
            place = before[int(generator.integers(len(before)))] - size * stroke[int(generator.integers(len(stroke)))]
        made.append(size * stroke + place)
    return in_unit_box(made)


# --- signs


def sign(generator: np.random.Generator) -> Symbol:
    """Makes up a symbol as scripts have them: one to four strokes between the points of a grid, straight, round, or bent."""
    columns, rows = int(generator.integers(2, 4)), int(generator.integers(2, 5))
    wide = generator.uniform(0.5, 1.1)
    grid = np.array([[x * wide, y] for x in np.linspace(-1, 1, columns) for y in np.linspace(-1, 1, rows)])
    count = int(generator.choice([1, 2, 3, 4], p=[0.35, 0.35, 0.2, 0.1]))
    made: Symbol = []
    for _ in range(count):
        made.append(_between(grid, generator))
    if np.ptp(np.concatenate(made), 0).max() < 1:  # two neighbouring points
        return sign(generator)
    return in_unit_box(made)


def _between(grid: Stroke, generator: np.random.Generator) -> Stroke:
    """A stroke through points of a grid."""
    kind = generator.choice(["line", "bent", "closed", "smooth", "bow", "ring"], p=[0.27, 0.2, 0.08, 0.2, 0.17, 0.08])
    if kind == "line":
        return generator.permutation(grid)[:2]
    if kind in ("bent", "closed"):
        points = generator.permutation(grid)[: int(generator.integers(3, 5))]
        return np.concatenate([points, points[:1]]) if kind == "closed" else points
    if kind == "smooth":
        points = generator.permutation(grid)[: int(generator.integers(3, 6))]
        return _through(np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]]))
    a, b = generator.permutation(grid)[:2]
    middle, half = (a + b) / 2, (b - a) / 2
    across = np.array([-half[1], half[0]]) * generator.choice([-1, 1]) * generator.uniform(0.5, 1.1)
    angle = np.linspace(0, np.pi if kind == "bow" else 2 * np.pi, 24)[:, None]
    return middle - half * np.cos(angle) + across * np.sin(angle)


def relative(symbol: Symbol, generator: np.random.Generator) -> Symbol:
    """Returns a symbol that is nearly the same: a stroke is missing, mirrored, moved, or there is one more."""
    made = list(symbol)
    place = int(generator.integers(len(made)))
    stroke = made[place]
    middle = (stroke.min(0) + stroke.max(0)) / 2
    change = generator.choice(["without", "mirrored", "moved", "with"])
    if change == "without" and len(made) > 1:
        del made[place]
    elif change == "mirrored" and len(stroke) > 2:
        made[place] = (stroke - middle) * generator.choice([[-1.0, 1.0], [1.0, -1.0]]) + middle
    elif change == "moved" and len(made) > 1:
        made[place] = stroke + generator.choice([-1, 1], 2) * generator.uniform(0.2, 0.5, 2)
    else:
        more = in_unit_box([generator.choice(_ONE)(generator)])[0]
        made.append(more * generator.uniform(0.3, 0.8) + generator.uniform(-0.4, 0.4, 2))
    return in_unit_box(made)


_ONE = np.array([_line, _curve, _loop, _arc], dtype=object)


def training_symbols(count: int, generator: np.random.Generator) -> list[Symbol]:
    """Returns symbols for training: half of them signs, the rest characters of few strokes, parts of characters, and doodles.

    Every second one is a `relative` of the one before. Symbols of very much ink are left out, as at this size they are blots.
    """
    whole = list(characters().values())
    simple = [character for character in whole if len(character) <= MAX_STROKES]
    found: list[Symbol] = []
    while len(found) < count:
        kind = generator.choice(["sign", "character", "part", "doodle"], p=SHARES)
        if kind == "sign":
            symbol = sign(generator)
        elif kind == "character":
            symbol = simple[int(generator.integers(len(simple)))]
        elif kind == "part":
            symbol = parts(whole[int(generator.integers(len(whole)))], generator)
        else:
            symbol = doodle(generator)
        pair = in_unit_box(symbol), relative(in_unit_box(symbol), generator)
        if max(rasterise(each).mean() for each in pair) < MOST_INK:
            found.extend(pair)
    return found[:count]
