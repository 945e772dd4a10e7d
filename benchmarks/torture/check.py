"""One thing that a process must bear."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Check(NamedTuple):
    """One thing that may happen.

    Attributes:
      name: for `--only`.
      what: happens, in words.
      run: lets it happen for so many seconds; returns what was found, in one line, or raises.
    """

    name: str
    what: str
    run: Callable[[float], str]
