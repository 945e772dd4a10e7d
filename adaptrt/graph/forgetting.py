"""Keeps PyTorch's own tables from growing with every capture.

Tracing leaves something behind in the process: what an operation does to fake tensors of some shape, the source of every generated module,
and a context variable for every setting that was changed for a while. PyTorch keeps all of it for ever. A process that sees data of
thousands of shapes would keep hundreds of kilobytes of each. Context variables are dealt with in `adaptrt/process.py` (`leaving_nothing`).
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import functools
import linecache
from collections import deque
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from adaptrt.graph.exchange import Entry, Target

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

FAKE_RESULTS = Entry(
    "cache of fake results",
    "What operations do to fake tensors is forgotten when much is known (`forgetting.py`).",
    "it is kept, and memory grows with every new shape",
    needed=(Target("torch._subclasses.fake_tensor", "FakeTensorMode.cache.clear"),),
)

GENERATED_SOURCES = Entry(
    "sources of generated modules",
    "The sources of modules that captures have generated are forgotten when there are many (`forgetting.py`).",
    "they are kept, and memory grows with every new shape",
    needed=(Target("torch.fx.graph_module", "_loader.eval_cache"), Target("torch.fx.graph_module", "_loader.next_id")),
)

MAX_FAKE_RESULTS = 1_500
"""About 3 KB each."""

MAX_SOURCES = 60
"""About 10 to 25 KB each. Tracebacks show lines of the sources that are kept."""

_sources: deque[str] = deque()
_num_noted = 0
"""Sources before this one are in `_sources`, or are somebody else's."""


def forgetting(fn: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Makes a function that traces leave little behind in the process. It is to be called under the lock `COMPILING`."""

    @functools.wraps(fn)
    def traces(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        first = _next_source()
        try:
            return fn(*args, **kwargs)
        finally:
            with contextlib.suppress(Exception):  # another PyTorch may have anything under these names, and then memory grows
                _forget(first)

    return traces


def _next_source() -> int:
    if not GENERATED_SOURCES.holds:
        return 0
    from torch.fx import graph_module

    loader: Any = graph_module._loader
    return loader.next_id


def _forget(first_source: int) -> None:
    """Forgets the oldest of what was left behind. The sources from `first_source` on are new."""
    global _num_noted
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx import graph_module

    if FAKE_RESULTS.holds and len(FakeTensorMode.cache) > MAX_FAKE_RESULTS:
        FakeTensorMode.cache.clear()
    if GENERATED_SOURCES.holds:
        loader: Any = graph_module._loader
        _sources.extend(f"<eval_with_key>.{number}" for number in range(max(first_source, _num_noted), loader.next_id))
        _num_noted = loader.next_id
        while len(_sources) > MAX_SOURCES:
            name = _sources.popleft()
            loader.eval_cache.pop(name, None)
            linecache.cache.pop(name, None)
