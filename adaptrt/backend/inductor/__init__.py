"""Inductor as a backend: its graph compiler, and what is changed in it for one compilation."""

from adaptrt.backend.inductor.compile import Inductor, warn_if_missing

__all__ = ["Inductor", "warn_if_missing"]
