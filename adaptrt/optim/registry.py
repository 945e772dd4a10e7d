"""The classes of optimisers that users have registered: the one table that says how an instance of each is stepped.

`adaptrt.higher.register_optim` writes to it. `adaptrt.higher` looks in it for the class that makes eager steps, `convert` for the class of
`torch.optim` with the same arithmetic, and `source` for the object that an unroll reads such an instance by. A class that is not in the
table is stepped as `families` says, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from adaptrt.optim.base import Params
from adaptrt.optim.reading import Source


@dataclass(frozen=True, slots=True)
class Registration:
    """How the instances of one registered class are stepped.

    Attributes:
      version: the class whose `step` makes eager steps on autograd's tape: a subclass of
        `adaptrt.higher.optim.DifferentiableOptimizer`.
      steps_as: the class of `torch.optim` with the same arithmetic. None means that only `version` knows the arithmetic.
      make_source: makes the object that an unroll reads an instance by, from the instance and the parameters that adapt. None means that
        `steps_as` says all that an unroll needs to know.
    """

    version: Any
    steps_as: type[torch.optim.Optimizer] | None = None
    make_source: Callable[[Any, Params], Source] | None = None


REGISTERED: dict[type[torch.optim.Optimizer], Registration] = {}
"""The registrations by class. They hold for instances of exactly that class."""


def stepping_class(opt: torch.optim.Optimizer) -> type[torch.optim.Optimizer]:
    """Returns the class by whose arithmetic `opt` steps: its own, unless that is registered to step as another one."""
    registration = REGISTERED.get(type(opt))
    return (registration and registration.steps_as) or type(opt)
