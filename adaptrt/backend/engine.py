"""Says what PyTorch's autograd engine is doing, as far as only its private interface tells."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt.errors import NotDifferentiable
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


FREED = Entry(
    "graphs that were freed",
    "A `backward` that needs the graph of a hyperparameter, which an earlier one has freed, names schedules.",
    "PyTorch's own message says only that the graph was freed",
    needed=(Target("torch._C", "_will_engine_execute_node"),),
)

_MAX_NODES = 64

_will_run: Any = getattr(torch._C, "_will_engine_execute_node", None)


def refuse_freed(inputs: Sequence[Tensor]) -> None:
    """Within a node's `backward`: raises if it needs the graph behind one of its inputs, and an earlier one has freed that.

    Raises:
      NotDifferentiable: the error would be PyTorch's otherwise, and would not say what to do.
    """
    if _will_run is None:
        return
    pending = [value.grad_fn for value in inputs if value.grad_fn is not None]
    seen: set[Any] = set()
    while pending and len(seen) < _MAX_NODES:
        node = pending.pop()
        # A leaf has saved nothing, and asking for it raises within `torch.autograd.grad`.
        if node in seen or not node.next_functions or not _will_run(node):
            continue
        seen.add(node)
        if _is_freed(node):
            raise NotDifferentiable(
                f"backward() needs the graph of a tensor that was computed outside the unroll ({node.name()}), and an earlier backward() "
                "has freed it. A hyperparameter that is computed from a learned tensor, such as lr=log_lr.exp(), belongs into a schedule: "
                "adaptrt.optim.schedule(lambda step, log_lr: log_lr.exp(), log_lr=log_lr). Compute anything else anew for each call, or "
                "pass retain_graph=True to the earlier backward()"
            )
        pending += [following for following, _ in node.next_functions if following is not None]


def _is_freed(node: Any) -> bool:
    """Whether what a node has saved is gone: reading it then raises an error that tells so."""
    for name in dir(node):
        if name.startswith("_saved_"):
            try:
                getattr(node, name)
            except RuntimeError as error:
                if "a second time" in str(error):
                    return True
    return False
