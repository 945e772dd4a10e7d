"""Notices what the `_update` of a registered optimiser writes to besides weights and their state.

The steps of a program carry weights and state from one to the next, and nothing else: what a step wrote to an attribute or a setting would
be lost.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from adaptrt.errors import NotTraceable
from adaptrt.higher.utils import _recursive_map, settings_of
from adaptrt.higher.watched import Watched


def snapshot(version: Any) -> dict[str, Any]:
    """Returns what a step must not change: attributes and settings, in a form that `check_writes` compares."""
    held = {name: value for name, value in vars(version).items() if name not in ("param_groups", "state", "_built")}
    settings = [settings_of(group) for group in version.param_groups]
    return {name: _content(value) for name, value in {**held, "param_groups": settings}.items()}


def _content(value: Any) -> Any:
    """A nest's form, and its leaves, each with PyTorch's count of the writes to it, which is 0 for what is no tensor."""
    leaves: list[Any] = []

    def note(leaf: Any) -> int:
        if type(leaf) is collections.deque:
            return sum(note(entry) for entry in leaf)
        leaves.append((leaf, leaf._version if type(leaf) is not Watched and isinstance(leaf, Tensor) else 0))
        return len(leaves)

    return _recursive_map(value, note), leaves


def check_writes(version: Any, before: dict[str, Any], names: Sequence[Sequence[str]]) -> None:
    """Raises if a step wrote to something that is not carried from step to step.

    Args:
      version: the differentiable optimiser after its step.
      before: its `snapshot` before the step.
      names: for each group the names of its parameters.
    Raises:
      NotTraceable: the step wrote to an attribute or a setting, or kept state under a key that is no parameter's index.
    """
    after = snapshot(version)
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        same = (
            old is not None
            and new is not None
            and old[0] == new[0]
            and len(old[1]) == len(new[1])
            and all(a is b and x == y for (a, x), (b, y) in zip(old[1], new[1], strict=True))
        )
        if not same:
            what = "a setting" if name == "param_groups" else f"self.{name}"
            raise NotTraceable(f"_update writes to {what}, which is not carried from step to step. Keep it in self.state[group][index]")
    for states, own in zip(version.state, names, strict=True):
        extra = [key for key, entry in states.items() if entry and key not in range(len(own))]
        if extra:
            raise NotTraceable(
                f"_update keeps state under {extra[0]!r}, which is no parameter's index. Keep it in self.state[group][index]"
            )
