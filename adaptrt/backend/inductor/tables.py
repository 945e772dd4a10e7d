"""Keeps the tables small in which PyTorch's compiler remembers things for ever.

They hold what was found for one compilation and can be found again, or statistics. Through some of them a whole compilation stays in
memory. A table that does not exist in this PyTorch is left out.
"""

from __future__ import annotations

from typing import Any

from adaptrt.graph.exchange import Target

MAX_ENTRIES = 200
"""Of each table. Compiling one program makes a few."""

_SHAPES = "torch.fx.experimental.symbolic_shapes"
_INDUCTOR = "torch._inductor"

_CACHES = (
    *[
        Target(_SHAPES, f"ShapeEnv.{method}")
        for method in ("simplify", "replace", "get_axioms", "_maybe_evaluate_static", "_inner_evaluate_expr")
    ],
    Target(f"{_INDUCTOR}.codegen.debug_utils", "DebugPrinterManager._get_debug_filtered_kernel_names"),
)
"""Functions that remember their results. The key of each result holds the object whose method was called."""

_DICTS = (Target(f"{_INDUCTOR}.codecache", "FxGraphCachePickler._pickleable_type_cache"),)
"""By class, and every generated module has a class of its own."""

_LISTS = (Target(f"{_INDUCTOR}.metrics", "cpp_outer_loop_fused_inner_counts"),)

_DICTS_OF_LISTS = (Target("torch._dynamo.utils", "compilation_time_metrics"),)
"""How long each part of each compilation took."""


def shorten_tables() -> None:
    """Empties the tables that hold more than `MAX_ENTRIES`, and cuts off the beginning of longer lists."""
    for cached in _present(_CACHES):
        if cached.cache_info().currsize > MAX_ENTRIES:
            cached.cache_clear()
    for table in _present(_DICTS):
        if len(table) > MAX_ENTRIES:
            table.clear()
    lists = [*_present(_LISTS), *(values for table in _present(_DICTS_OF_LISTS) for values in list(table.values()))]
    for values in lists:
        if len(values) > MAX_ENTRIES:
            del values[:-MAX_ENTRIES]


def _present(targets: tuple[Target, ...]) -> list[Any]:
    return [getattr(*target.owner()) for target in targets if target.fault() is None]
