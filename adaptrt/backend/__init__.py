"""Backends: what runs a graph, and what launches a whole call at once."""

from adaptrt.backend.base import Backend
from adaptrt.backend.cudagraph import CudaGraph
from adaptrt.backend.eager import Eager
from adaptrt.backend.inductor import Inductor
from adaptrt.backend.tiered import Tiered

__all__ = ["Backend", "CudaGraph", "Eager", "Inductor", "Tiered"]
