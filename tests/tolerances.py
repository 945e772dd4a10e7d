"""How near results must be, by dtype: one table, the same everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

META_GRADIENT: Mapping[torch.dtype, float] = {torch.float64: 1e-10, torch.float32: 2e-4}
"""Relative error of losses and gradients after a few inner steps, against the float64 oracle."""

BFLOAT16 = 5e-2
"""Of loss and whole meta-gradient after a few steps under autocast to bfloat16 (8 bits), against the float64 oracle."""

FORWARD_ULPS = 32
"""Of the largest value: a captured forward pass against eager. Kernels may sum in another order, no more."""

PRODUCT: Mapping[torch.dtype, float] = {torch.float64: 1e-14, torch.float32: 3e-6}
"""Of the largest element: a few matrix products, one after the other."""


class Tolerance(NamedTuple):
    """How far each element may be off: so much of its own size, and so much besides."""

    relative: float
    absolute: float


EQUAL = Tolerance(0.0, 0.0)
LAST_BIT = Tolerance(1e-15, 0.0)
"""In float64, of one sum."""
ROUNDING = Tolerance(1e-13, 1e-13)
"""In float64, of a product or a sum of sums."""
OPERATIONS = Tolerance(1e-12, 1e-12)
"""In float64, of a few operations and their derivatives."""
LOSS = Tolerance(1e-12, 0.0)
"""In float64, of a loss after a few steps."""
GRADIENT = Tolerance(1e-11, 1e-12)
"""In float64, of the meta-gradient of a head after a few steps."""
SECOND_DERIVATIVE = Tolerance(1e-10, 1e-12)
"""In float64, also of a meta-gradient after a few smooth steps."""
HIGH_DERIVATIVE = Tolerance(1e-9, 1e-11)
"""In float64, also of a meta-gradient with batch normalisation or Adam in it."""
KERNEL = Tolerance(1e-6, 1e-6)
"""In float32, of pointwise operations."""
STEPS = Tolerance(1e-5, 1e-6)
"""In float32, of a few steps or of second derivatives."""
STATISTIC = Tolerance(1e-5, 0.0)
"""In float32, of means and variances."""
LONG_SUM = Tolerance(1e-5, 1e-4)
"""In float32, of products whose terms cancel."""

SMALL = 1e-3
"""A leaf with less than this share of the whole gradient's norm is measured against that share: some are zero but for rounding."""


def relative_error(got: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    """The norm of the difference, relative to the norm of what is wanted."""
    assert got.shape == wanted.shape, f"shape {list(got.shape)}, wanted {list(wanted.shape)}"
    difference = (got.detach().double() - wanted.detach().double()).norm()
    return float(difference / wanted.detach().double().norm().clamp(min=max(floor, 1e-300)))


def assert_near(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
    """Equal names, and each tensor within the tolerance of `dtype`; NaN fails."""
    assert set(got) == set(wanted)
    floor = SMALL * norm(wanted.values())
    wrong = {name: error for name in wanted if not (error := relative_error(got[name], wanted[name], floor)) <= META_GRADIENT[dtype]}
    assert not wrong, f"relative errors above {META_GRADIENT[dtype]:.0e}: " + ", ".join(
        f"{name} {error:.1e}" for name, error in wrong.items()
    )


def assert_close(got: Any, wanted: Any, tolerance: Tolerance, **options: Any) -> None:
    """Equal within a named tolerance; `options` are those of `torch.testing.assert_close`."""
    torch.testing.assert_close(got, wanted, rtol=tolerance.relative, atol=tolerance.absolute, **options)


def assert_ulps(got: Tensor, wanted: Tensor) -> None:
    """Equal but for the order of summation."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    if not wanted.is_floating_point():
        assert torch.equal(got, wanted)
        return
    error = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300))
    assert error <= FORWARD_ULPS * torch.finfo(wanted.dtype).eps, (
        f"off by {error / torch.finfo(wanted.dtype).eps:.0f} ulp of the largest value"
    )


def norm(values: Iterable[Tensor]) -> float:
    """The joint Euclidean norm."""
    return float(sum(float(value.detach().double().norm()) ** 2 for value in values)) ** 0.5
