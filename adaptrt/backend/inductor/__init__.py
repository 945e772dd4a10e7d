"""The backend Inductor: it calls PyTorch's graph compiler, and changes it in some points for the time of one compilation."""

from adaptrt.backend.inductor.available import warn_if_missing
from adaptrt.backend.inductor.compile import Inductor

__all__ = ["Inductor", "warn_if_missing"]
