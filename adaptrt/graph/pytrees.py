"""Makes a class of dicts known to PyTorch's own trees, which `torch.func` and `torch.vmap` take apart."""

from __future__ import annotations

from typing import Any

from adaptrt.graph.exchange import Entry, Target

PYTREES = Entry(
    "trees of PyTorch",
    "`torch.func` takes the read-only dicts of an adaptation as arguments.",
    "it is to be given `dict(adapted.params)` in the place of `adapted.params`",
    needed=(Target("torch.utils._pytree", "register_pytree_node", keywords=("serialized_type_name",)),),
)


def register(kind: type[dict[Any, Any]]) -> None:
    """Makes PyTorch's functions of trees take dicts of this class as trees. What they return are plain dicts."""
    if not PYTREES.holds:
        return
    register_node: Any = getattr(*PYTREES.needed[0].owner())

    def flatten(value: dict[Any, Any]) -> tuple[list[Any], list[Any]]:
        return list(value.values()), list(value)

    def unflatten(values: Any, keys: Any) -> dict[Any, Any]:
        return dict(zip(keys, values, strict=True))

    register_node(kind, flatten, unflatten)
