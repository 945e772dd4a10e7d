"""Says what PyTorch's autograd engine is doing, as far as only its private interface tells."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any

import torch

from adaptrt.graph.exchange import Entry, Target

RETAINED = Entry(
    "retained gradients",
    "A meta-loss gives up its gradients when `backward` has used them, unless `retain_graph` was given.",
    "they are kept as long as the meta-loss is: it takes more memory, and a second `backward` is not refused",
    needed=(Target("torch._C._autograd", "_get_current_graph_task_keep_graph"),),
)


def _kept() -> bool:
    return True


_keep_graph: Any = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", _kept)


def graph_is_kept() -> bool:
    """Within a node's `backward`: whether the caller asked to run it again later (`retain_graph=True`)."""
    return _keep_graph()
