"""What PyTorch's autograd engine is doing, as far as only its private interface tells."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import torch


def graph_is_kept() -> bool:
    """Within a node's `backward`: whether the caller asked to run it again later (`retain_graph=True`)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
