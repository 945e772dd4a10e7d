"""Strategies for the meta-gradient, one a file."""

from adaptrt.adjoint.base import Adjoint
from adaptrt.adjoint.first_order import FirstOrder
from adaptrt.adjoint.implicit import Implicit
from adaptrt.adjoint.replay import Replay
from adaptrt.adjoint.stash import Stash
from adaptrt.adjoint.truncated import Truncated
from adaptrt.adjoint.unrolled import Unrolled

__all__ = ["Adjoint", "FirstOrder", "Implicit", "Replay", "Stash", "Truncated", "Unrolled"]
