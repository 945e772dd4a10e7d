"""Tables of tests in which every pair of values occurs, for products of three tables and more; `--full` runs the whole products."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest

SINGLE_AND_TASKS: Mapping[str, bool] = {"single": False, "vmap": True}
ONE_BATCH_AND_PER_STEP: Mapping[str, bool] = {"one batch": False, "per step": True}


def by_name(values: Iterable[Any]) -> dict[str, Any]:
    """A table of values by what `str` makes of each."""
    return {str(value): value for value in values}


def covering_rows(*tables: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of the product of tables in which each pair of values of two tables occurs: always the one next that has most new pairs.

    >>> covering_rows("ab", "xy", "01")
    [('a', 'x', '0'), ('a', 'y', '1'), ('b', 'x', '1'), ('b', 'y', '0')]
    """
    rows = list(itertools.product(*map(range, map(len, tables))))
    pairs_of = {row: set(itertools.combinations(enumerate(row), 2)) for row in rows}
    missing = set[Any]().union(*pairs_of.values())
    found: list[tuple[int, ...]] = []
    while missing:
        found.append(max(rows, key=lambda row: len(pairs_of[row] & missing)))
        missing -= pairs_of[found[-1]]
    return [tuple([table[index] for table, index in zip(tables, row, strict=True)]) for row in sorted(found)]


def over_pairs(**tables: Mapping[str, Any]) -> pytest.MarkDecorator:
    """Runs a test with the values of these tables as arguments: every pair of values by default, and the whole product with `--full`."""
    rows = covering_rows(*map(list, tables.values()))
    return pytest.mark.parametrize(
        list(tables),
        [
            pytest.param(
                *[table[key] for table, key in zip(tables.values(), row, strict=True)],
                id="-".join(row),
                marks=() if row in rows else pytest.mark.full,
            )
            for row in itertools.product(*tables.values())
        ],
    )
