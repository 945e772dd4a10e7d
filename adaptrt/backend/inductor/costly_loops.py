"""Loops over expensive functions are vectorised, however scattered their loads.

Inductor leaves a loop scalar where more than about an eighth of its operations are loads and stores that are not contiguous. That is right
for sums and products, and wrong where the loop is over `tanh`, which takes many times longer one value at a time: in an MLP with low-rank
adapters that was two thirds of an adaptation, when their products were part of the loops over `tanh` and read an adapter by columns.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

from adaptrt.backend.inductor.exchange import exchanged
from adaptrt.graph.operations import COSTLY


@contextlib.contextmanager
def costly_loops_vectorised() -> Generator[None]:
    """Within the block, Inductor's heuristic is overruled where it would leave a loop scalar that holds a costly function."""
    from torch._inductor import config
    from torch._inductor.codegen import cpp

    # Private, and in another version perhaps not there.
    chooser: Any = getattr(cpp, "TilingSelect", None)
    bodies_of: Callable[[Any], Sequence[Any]] | None = getattr(cpp, "_get_loop_body", None)
    if chooser is None or bodies_of is None or not hasattr(config.cpp, "enable_tiling_heuristics"):
        yield
        return
    by_heuristic = chooser.select_tiling

    def select_tiling(self: Any, fn_list: Any, var_sizes_list: Any) -> Any:
        found = by_heuristic(self, fn_list, var_sizes_list)
        if found[0] or not any(_is_costly(body) for body in bodies_of(fn_list)):
            return found
        with config.patch("cpp.enable_tiling_heuristics", False):
            tiling = by_heuristic(self, fn_list, var_sizes_list)
        return *tiling[:2], *found[2:]  # newer versions count operations besides, with the heuristic only

    with exchanged(chooser, "select_tiling", select_tiling):
        yield


def _is_costly(body: Any) -> bool:
    return any(node.target in COSTLY for block in (body.root_block, *body.subblocks.values()) for node in block.graph.nodes)
