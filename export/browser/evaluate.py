"""Measures accuracy on symbols that the network has never seen, through the page's own code.

    python -m export.browser.evaluate [--model build/browser/model] [--tasks 200]

Strokes are drawn here. `evaluate.mjs` turns them into images, adapts and recognises with the modules of the page and onnxruntime-web, all
of it in Node.js. Nearest neighbours among the examples' images are the reference without any learning.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from export.browser.strokes import redrawn
from export.browser.symbols import Symbol
from export.browser.unseen import LETTERS, SHAPES, hands

HERE = Path(__file__).parent
QUERIES = 5
DECIMALS = 6  # of a coordinate, as a part of the drawing area
CASES = (("letters", 5, 3), ("letters", 5, 5), ("shapes", 5, 3), ("shapes", 5, 5), ("several hands", 5, 5))
HANDS = (("as in training", 1.0), ("steadier", 0.6))
TITLES = {
    "letters": "letters and digits",
    "shapes": "shapes",
    "several hands": "letters and digits, each drawing by another hand",
}


class Result(NamedTuple):
    """Mean accuracy, and half the width of its 95 % confidence interval."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} % ± {100 * self.half_width:.1f}"


def drawers(kind: str, count: int, generator: np.random.Generator) -> list[Callable[[], Symbol]]:
    """Returns functions that give each of `count` symbols of a task, before a hand has drawn them."""
    if kind == "shapes":
        return [partial(SHAPES[str(name)], generator) for name in generator.permutation(list(SHAPES))[:count]]
    known = hands()
    names = [str(name) for name in generator.permutation(list(LETTERS))[:count]]
    if kind == "letters":
        hand = known[str(generator.choice(list(known)))]
        return [partial(hand.__getitem__, name) for name in names]
    return [partial(lambda name: known[str(generator.choice(list(known)))][name], name) for name in names]


def task(kind: str, num_symbols: int, num_examples: int, variety: float, generator: np.random.Generator) -> dict[str, Any]:
    """Returns a task: for each symbol the strokes of its examples, and of drawings that are to be recognised."""

    def drawn(give: Callable[[], Symbol]) -> list[list[list[float]]]:
        return [np.round(stroke, DECIMALS).tolist() for stroke in redrawn(give(), generator, variety=variety)]

    given = drawers(kind, num_symbols, generator)
    return {
        "examples": [[drawn(give) for _ in range(num_examples)] for give in given],
        "queries": [[drawn(give) for _ in range(QUERIES)] for give in given],
    }


def accuracies(model: Path, tasks: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Returns the accuracies of every task by the network and by nearest neighbours, and the milliseconds of each adaptation."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tasks.json").write_text(json.dumps(tasks))
        command = ["node", str(HERE / "evaluate.mjs"), str(model), str(Path(folder) / "tasks.json")]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def result(values: list[float]) -> Result:
    return Result(float(np.mean(values)), 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("build/browser/model"))
    parser.add_argument("--tasks", type=int, default=200, help="tasks of each kind")
    arguments = parser.parse_args()
    print(
        f"{arguments.tasks} tasks each, {QUERIES} drawings of each symbol to be recognised; {len(LETTERS)} letters and digits by ", end=""
    )
    print(
        f"{len(hands())} hands, {len(SHAPES)} shapes\n\n| symbols | hand | examples | accuracy | nearest neighbour |\n|---|---|---|---|---|"
    )
    for kind, num_symbols, num_examples in CASES:
        for hand, variety in HANDS:
            generator = np.random.default_rng(7)
            tasks = [task(kind, num_symbols, num_examples, variety, generator) for _ in range(arguments.tasks)]
            found = accuracies(arguments.model, tasks)
            cells = [f"{num_symbols} {TITLES[kind]}", hand, f"{num_examples} each", result(found["network"]), result(found["neighbour"])]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
