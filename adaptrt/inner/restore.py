"""Puts back what objects held before a pass wrote to them."""

from __future__ import annotations

import array
import collections
import contextvars
import dataclasses
import functools
import operator
import threading
import types
from typing import Any

from adaptrt.inner.positions import put_position
from adaptrt.inner.reachable import MISSING
from adaptrt.inner.user_code import is_array


@dataclasses.dataclass(frozen=True, slots=True)
class Named:
    """The attributes of an object that are in no dict."""

    owner: Any


def put(holder: Any, content: Any, present: Any) -> None:
    """Puts a content in the place of the present one. What others have put there meanwhile stays."""
    if isinstance(holder, types.CellType):
        if content is not MISSING:
            holder.cell_contents = content
    elif isinstance(holder, Named | type):
        owner = holder.owner if isinstance(holder, Named) else holder
        # Not by what the class makes of it: it may refuse, as a frozen dataclass does.
        kind: Any = next(kind for kind in (type, threading.local, object) if isinstance(owner, kind))
        for name in present.keys() - content.keys():
            kind.__delattr__(owner, name)
        for name, value in content.items():
            kind.__setattr__(owner, name, value)
    elif isinstance(holder, contextvars.ContextVar):
        if content is not MISSING:
            holder.set(content)
    elif isinstance(holder, functools._lru_cache_wrapper):
        holder.cache_clear()
    elif is_array(holder):
        holder[slice(None) if isinstance(holder, bytearray | array.array) else ...] = content
    elif isinstance(holder, dict):
        _put_entries(holder, content, present)
    elif isinstance(holder, list | collections.deque):
        _put_items(holder, content, present)
    elif isinstance(holder, set):
        holder.difference_update(present - content)
        holder.update(content - present)
    else:
        put_position(holder, content[0])


def _put_entries(holder: dict[Any, Any], content: dict[Any, Any], present: dict[Any, Any]) -> None:
    """Puts back what is another object. Everything else stays, as another thread may use the dict meanwhile."""
    kind: Any = collections.OrderedDict if isinstance(holder, collections.OrderedDict) else dict  # whatever a subclass does with entries
    for key in {**content, **present}:
        if dict.get(holder, key, MISSING) is not present.get(key, MISSING):  # another thread has written again
            continue
        if key not in content:
            kind.__delitem__(holder, key)
        elif present.get(key, MISSING) is not content[key]:
            kind.__setitem__(holder, key, content[key])


def _put_items(holder: list[Any] | collections.deque[Any], content: list[Any], present: list[Any]) -> None:
    """Takes out what was added at the end, which another thread may do, too, or puts everything back."""
    if not is_longer(content, present):
        holder.clear()
        holder.extend(content)
        return
    added = {id(entry): entry for entry in present[len(content) :]}
    for index in reversed(range(len(content), len(holder))):
        if id(holder[index]) in added:
            del holder[index]


def is_longer(before: list[Any], after: list[Any]) -> bool:
    """Whether entries were added at the end, and nothing else."""
    return len(after) > len(before) and all(map(operator.is_, before, after))
