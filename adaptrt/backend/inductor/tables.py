"""Keeps the tables small in which PyTorch's compiler remembers things for ever.

They hold what was found for one compilation and can be found again, or statistics. Through some of them a whole compilation stays in
memory. A table that does not exist in this PyTorch, or is of another kind than expected, is left out.
"""

from __future__ import annotations

import contextlib
from typing import Any

from adaptrt.backend.inductor.exchange import COMPILER_TABLES, LATER_TABLES

MAX_ENTRIES = 200
"""Of each table. Compiling one program makes a few."""


def shorten_tables() -> None:
    """Empties the tables that hold more than `MAX_ENTRIES`, and cuts off the beginning of longer lists."""
    for target in (*COMPILER_TABLES.needed, *LATER_TABLES):
        with contextlib.suppress(Exception):  # another PyTorch may have anything under this name
            _shorten(getattr(*target.owner()))


def _shorten(table: Any) -> None:
    if isinstance(table, list):
        del table[:-MAX_ENTRIES]
    elif isinstance(table, dict):
        for value in list(table.values()):
            if isinstance(value, list):
                _shorten(value)
        if len(table) > MAX_ENTRIES:
            table.clear()
    elif table.cache_info().currsize > MAX_ENTRIES:
        table.cache_clear()
