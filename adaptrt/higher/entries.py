"""What the `_update` of a registered optimiser keeps for each parameter, in the form in which a program keeps it.

A program's state is a tree of tensors that has the same form at every step. So numbers become tensors, and a state that changes its form is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.errors import NotTraceable, OptimizerMismatch
from adaptrt.higher.utils import _recursive_map
from adaptrt.higher.watched import plain

Entries = dict[str, Any]
"""The state of all parameters: by parameter name what `_update` keeps of it, numbers as tensors."""


def cloned(leaf: Any) -> Any:
    """Returns a copy of a tensor, and anything else as it is."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def frozen(entry: Mapping[str, Any], param: Tensor, name: str) -> Any:
    """Returns one parameter's state with its numbers as 0-dim float64 tensors and its keys in order.

    Args:
      entry: what `_update` keeps for the parameter.
      param: tells the device of the numbers.
      name: the parameter's name, for messages.
    Raises:
      NotTraceable: it holds something other than tensors, numbers, bools, strings, None and nests of those.
    """

    def as_tensor(leaf: Any) -> Any:
        leaf = plain(leaf)
        if isinstance(leaf, bool | str | None | Tensor):
            return leaf
        if isinstance(leaf, int | float):
            return torch.full((), float(leaf), dtype=torch.float64, device=param.device)
        raise NotTraceable(
            f"_update keeps a {type(leaf).__name__} in the state of parameter '{name}'. Keep tensors, numbers, and lists, tuples and dicts "
            "of those"
        )

    return {key: _recursive_map(entry[key], as_tensor) for key in sorted(entry)}


def conformed(expected: Entries, got: Entries) -> Entries:
    """Returns the state after a step with the dtypes that it has after the first step; floating-point tensors are cast.

    Args:
      expected: the state after the first step, by parameter name.
      got: the state after this step, by parameter name. Some parameters may be missing.
    Raises:
      NotTraceable: it has other keys or shapes, or one dtype is floating-point and the other is not.
    """

    def cast(name: str, new: Tensor, old: Tensor) -> Tensor:
        if new.dtype != old.dtype and not (new.is_floating_point() and old.is_floating_point()):
            raise _unlike(name, expected[name], got[name])
        return new.to(old.dtype)

    found = Entries()
    for name, entry in got.items():
        (new, form), (old, wanted) = tree.flatten(entry), tree.flatten(expected.get(name, {}))
        if form != wanted or any(a.shape != b.shape for a, b in zip(new, old, strict=True)):
            raise _unlike(name, expected.get(name, {}), entry)
        found[name] = tree.unflatten(form, [cast(name, a, b) for a, b in zip(new, old, strict=True)])
    return found


def _unlike(name: str, expected: Any, got: Any) -> NotTraceable:
    return NotTraceable(
        f"_update must keep the same state at every step; for parameter '{name}' it keeps other keys, shapes, dtypes or constants at a "
        f"later one: {tree.difference(expected, got)}"
    )


def fitted(entry: Any, like: Any, name: str) -> Any:
    """Returns a detached copy of what a real instance keeps for one parameter, in the form in which a program keeps it.

    Args:
      entry: `opt.state[parameter]`.
      like: the parameter's state before the first step, in the program's form.
      name: the parameter's name, for messages.
    Raises:
      NotTraceable: as `frozen`.
      OptimizerMismatch: it has other keys or shapes than `like`.
    """
    found = frozen(entry, next(iter(tree.leaves(like)), torch.zeros(())), name)
    (values, form), (wanted, expected) = tree.flatten(found), tree.flatten(like)
    if form != expected or any(a.shape != b.shape for a, b in zip(values, wanted, strict=True)):
        raise OptimizerMismatch(
            f"The optimiser's state for parameter '{name}' is not what its _update keeps: {tree.difference(like, found)}. Clear opt.state, "
            "or let both keep the same."
        )
    return tree.map_leaves(lambda value, other: value.detach().to(other, copy=True), found, like)
