"""Where iterators and generators of random numbers are, as far as Python tells, so that one can see whether code has advanced them."""

from __future__ import annotations

import operator
import random
import types
import warnings
from typing import Any

from adaptrt.inner.user_code import IMMUTABLE


def position(value: Any) -> Any:
    """Where an iterator or a generator of random numbers is; None for everything else."""
    if isinstance(value, random.Random):
        return None if isinstance(value, random.SystemRandom) else value.getstate()
    if type(value).__module__.startswith("numpy.random") and hasattr(value, "bit_generator"):
        return value.bit_generator.state
    if type(value).__module__.startswith("numpy.random") and hasattr(value, "get_state"):
        return value.get_state(legacy=False)
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        if frame is None:
            return "ended"
        return frame.f_lasti, tuple([(name, _mark(entry)) for name, entry in frame.f_locals.items()])
    if hasattr(type(value), "__next__") and not hasattr(value, "__dict__"):
        return repr(value), operator.length_hint(value, -1), _inside_iterator(value)
    return None


def put_position(value: Any, state: Any) -> None:
    """Puts a generator of random numbers back to where it was; for iterators there is no way back."""
    if isinstance(value, random.Random):
        value.setstate(state)
    elif hasattr(value, "bit_generator"):
        value.bit_generator.state = state
    elif hasattr(value, "set_state"):
        value.set_state(state)


def _inside_iterator(value: Any) -> Any:
    """Where the iterators are that one of the standard library's goes through, as far as Python tells (until 3.13 for `itertools`)."""
    if type(value).__module__ not in ("itertools", "builtins"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made_of = value.__reduce__()[1:]
        except (TypeError, AttributeError):
            return None
    return tuple([_mark(entry) for part in made_of for entry in (part if isinstance(part, tuple) else (part,))])


def _mark(entry: Any) -> Any:
    """Something that is equal as long as a value stays what it is."""
    if isinstance(entry, IMMUTABLE):
        return entry
    if isinstance(entry, list):
        return id(entry), len(entry)
    return position(entry) or id(entry)
