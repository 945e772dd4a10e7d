"""Has Inductor vectorise loops over expensive functions, however scattered their loads are.

Inductor leaves a loop scalar if more than about an eighth of its operations are loads and stores that are not contiguous. That is right
for sums and products. It is wrong for a loop over `tanh`, which takes many times longer one value at a time. In an MLP with low-rank
adapters such loops took two thirds of an adaptation: the adapters' products had become part of the loops over `tanh`, and read an adapter
by columns.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from adaptrt.backend.inductor.exchange import COSTLY_LOOPS
from adaptrt.graph.exchange import exchanged
from adaptrt.graph.operations import COSTLY


def costly_loops_vectorised() -> contextlib.AbstractContextManager[None]:
    """A block in which Inductor's heuristic is overruled where it would leave a loop scalar that holds a costly function."""
    return exchanged(COSTLY_LOOPS, _select_tiling)


def _select_tiling(by_heuristic: Callable[..., Any]) -> Callable[..., Any]:
    """What is called in place of `TilingSelect.select_tiling`."""
    from torch._inductor import config
    from torch._inductor.codegen import cpp

    bodies_of: Callable[[Any], Sequence[Any]] = cpp._get_loop_body  # pyright: ignore[reportPrivateImportUsage]

    def select_tiling(self: Any, fn_list: Any, var_sizes_list: Any) -> Any:
        found = by_heuristic(self, fn_list, var_sizes_list)
        if found[0] or not any(_is_costly(body) for body in bodies_of(fn_list)):
            return found
        with config.patch("cpp.enable_tiling_heuristics", False):
            tiling = by_heuristic(self, fn_list, var_sizes_list)
        return *tiling[:2], *found[2:]  # newer versions count operations besides, with the heuristic only

    return select_tiling


def _is_costly(body: Any) -> bool:
    return any(node.target in COSTLY for block in (body.root_block, *body.subblocks.values()) for node in block.graph.nodes)
