"""Policies: whether an adaptation goes on from the tenant's state or starts from the base, and whether its result is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from adaptrt.errors import InvalidArgument, InvalidType


class History(NamedTuple):
    """What a policy is shown of a tenant before an adaptation.

    Attributes:
      num_adaptations: how many there were since the tenant last started from the base.
      age_s: seconds since the first of these was committed.
      idle_s: seconds since the last of these was committed.
    """

    num_adaptations: int
    age_s: float
    idle_s: float


class Policy(NamedTuple):
    """A policy.

    Attributes:
      goes_on: whether an adaptation goes on from the state of a tenant with this history; otherwise it starts from the base.
      keeps: whether its result becomes the tenant's state.
      forgets_refused: whether a tenant is forgotten when the guard refuses an adaptation.
    """

    goes_on: Callable[[History], bool]
    keeps: bool = True
    forgets_refused: bool = False


_NAMED = {
    "continual": Policy(lambda history: True),
    "episodic": Policy(lambda history: False, keeps=False),
    "reset_on_guard": Policy(lambda history: True, forgets_refused=True),
}
_WITH_NUMBER = ("reset_after", "max_age_s")


def policy_of(given: Any) -> Policy:
    """Returns the policy that the user named.

    Args:
      given: "continual", "episodic", "reset_on_guard", ("reset_after", n), ("max_age_s", seconds), or a function of a `History` that
        returns whether to go on.
    Raises:
      InvalidType, InvalidArgument: it is none of these.
    """
    if isinstance(given, str):
        if given in _NAMED:
            return _NAMED[given]
        raise InvalidArgument(f"there is no policy {given!r}; {_CHOICES}")
    if isinstance(given, tuple) and len(given) == 2 and given[0] in _WITH_NUMBER:
        name, bound = given
        least = 1 if name == "reset_after" else 0
        kinds = (int,) if name == "reset_after" else (int, float)
        if isinstance(bound, bool) or not isinstance(bound, kinds) or not least <= bound < math.inf:
            raise InvalidArgument(f"the policy {name!r} needs a number of at least {least}, got {bound!r}")
        if name == "reset_after":
            return Policy(lambda history: history.num_adaptations < bound)
        return Policy(lambda history: history.age_s < bound)
    if callable(given) and not isinstance(given, type):
        return Policy(cast(Callable[[History], bool], given))
    raise InvalidType(f"policy={given!r} is none; {_CHOICES}")


_CHOICES = (
    "pass 'continual', 'episodic', 'reset_on_guard', ('reset_after', n), ('max_age_s', seconds), or a function of a History that returns "
    "whether to go on from the tenant's state"
)
