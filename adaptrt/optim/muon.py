"""Muon, with the arithmetic of `torch.optim.Muon`.

Known limits: with bfloat16 parameters and without nesterov, `torch.optim.Muon` (PyTorch 2.11 to 2.13) scales its momentum buffer in place,
and loses digits by that. Here the buffer is not scaled, so results differ in these digits.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from adaptrt.errors import InvalidArgument, InvalidType, UnsupportedParameter
from adaptrt.optim.arithmetic import average, double, larger, plus
from adaptrt.optim.base import Number, Optimizer, Value
from adaptrt.optim.checks import check_flags, checked, entries
from adaptrt.optim.per_parameter import Numbers, per_parameter

ADJUSTMENTS = (None, "original", "match_rms_adamw", "spectral_unclamped")


class MuonState(NamedTuple):
    """The state of one parameter: tensors of its shape and dtype."""

    momentum_buffer: Tensor


def muon(
    lr: Value = 1e-3,
    weight_decay: Value = 0.1,
    momentum: Value = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
    eps: Value = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    ns_dtype: torch.dtype = torch.bfloat16,
) -> Optimizer:
    """Muon: orthogonalises the momentum by a Newton-Schulz iteration (Jordan et al. 2024, "Muon: an optimizer for hidden layers").

    For each matrix p [R, C] with gradient g [R, C], where `adjust_lr_fn` gives r:

        b = momentum * b + (1 - momentum) * g
        u = (1 - momentum) * g + momentum * b if nesterov else b
        x = u / max(norm(u), eps)                           # transposed if R > C; in `ns_dtype`
        for _ in range(ns_steps):  x = a0 * x + (a1 * x @ x.T + a2 * (x @ x.T) @ (x @ x.T)) @ x
        p = (1 - lr * weight_decay) * p - lr * r * x

    Meta-gradients are those of this iteration, rounded to `ns_dtype`. With the default bfloat16, which `torch.optim.Muon` uses, two or
    three of their digits are right. `ns_dtype=torch.float32` makes them as exact as the rest of a float32 program. At u = 0 the derivative
    of the norm is taken as 0, and the derivative of the last x along u is a0**ns_steps / eps. Where norm(u) = eps, the derivative of the
    maximum is that of the norm.

    Each number may be of the kinds that `sgd` takes, but `eps` cannot have a value for each element. In `hyper` it has the name of its
    argument. `ns_coefficients` and `ns_steps` are not among these numbers: they are constants of a program.

    Args:
      lr: step size, >= 0.
      weight_decay: factor of the decoupled decay, >= 0. The Python number 0 removes the term and its name from `hyper`.
      momentum: share of the buffer that is kept, >= 0.
      nesterov: look ahead along the buffer.
      ns_coefficients: the floats a0, a1, a2.
      eps: lower bound of the norm, >= 0.
      ns_steps: number of iterations, from 0 to 99.
      adjust_lr_fn: tells what r is: sqrt(max(1, R / C)) for None or "original", 0.2 * sqrt(max(R, C)) for "match_rms_adamw" (Liu et al.
        2025, arXiv 2502.16982), sqrt(R / C) for "spectral_unclamped".
      ns_dtype: floating-point dtype of the iteration.

    Raises:
      InvalidArgument: a number is outside its domain, or a tensor of several elements is not an entry of a mapping.
      InvalidType: an argument is not a number, or `ns_dtype` is not a floating-point dtype.
      UnsupportedParameter: from `init`: a parameter is not a matrix.

    Example:
      >>> opt = muon(lr=0.1, weight_decay=0.0)
      >>> params = {"w": torch.zeros(2, 2)}
      >>> new, state = opt.update(
      ...     {"w": torch.diag(torch.tensor([3.0, 4.0]))}, opt.init(params), params, opt.hyper
      ... )
      >>> new["w"].diag()
      tensor([-0.0695, -0.1094])
    """
    check_flags(nesterov=nesterov)
    hyper = {
        "lr": checked("lr", lr),
        "momentum": checked("momentum", momentum),
        "eps": checked("eps", eps),
    }
    if not all(isinstance(a, float | int) for a in entries("ns_coefficients", ns_coefficients, 3)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidArgument(f"ns_coefficients must be three floats, got {ns_coefficients}.")
    if isinstance(ns_steps, bool) or not isinstance(ns_steps, int) or not 0 <= ns_steps < 100:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidArgument(f"ns_steps must be an int from 0 to 99, got {ns_steps!r}.")
    if adjust_lr_fn not in ADJUSTMENTS:
        raise InvalidArgument(f"adjust_lr_fn must be one of {', '.join(map(repr, ADJUSTMENTS))}, got {adjust_lr_fn!r}.")
    if not (isinstance(ns_dtype, torch.dtype) and ns_dtype.is_floating_point):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidType(f"ns_dtype must be a floating-point dtype, got {ns_dtype!r}.")

    def init(p: Tensor) -> MuonState:
        if p.dim() != 2:
            raise UnsupportedParameter(
                f"muon is for matrices, got a parameter of shape {list(p.shape)}. Give it those with two axes and another optimiser the "
                "rest, by adaptrt.optim.partition."
            )
        return MuonState(torch.zeros_like(p))

    def update(p: Tensor, g: Tensor, state: MuonState, h: Numbers) -> tuple[Tensor, MuonState]:
        mu = h["momentum"]
        buffer = average(state.momentum_buffer, g, mu)
        u = average(buffer, g, mu) if nesterov else buffer
        x = _orthogonalise(u.to(ns_dtype), ns_coefficients, h["eps"], ns_steps)
        return plus(p, -double(h["lr"]) * _adjustment(adjust_lr_fn, *p.shape), x.to(p.dtype)), MuonState(buffer)

    return per_parameter(hyper, init, update, scalar=("eps",), weight_decay=weight_decay, decoupled=True)


def _orthogonalise(u: Tensor, coefficients: tuple[float, float, float], eps: Number, num_steps: int) -> Tensor:
    a0, a1, a2 = coefficients
    tall = u.shape[0] > u.shape[1]
    x = u.T if tall else u
    # Two masks, as in `safe_sqrt`. The rounding of each operation in half precision is part of the result: these are PyTorch's.
    zero = torch.all(x == 0)
    norm = cast("Tensor", torch.linalg.vector_norm(torch.where(zero, 1.0, x)))  # pyright: ignore[reportUnknownMemberType]
    norm = norm.masked_fill(zero, 0.0)
    x = x / larger(norm, eps)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=a1, alpha=a2), x, beta=a0)
    return x.T if tall else x


def _adjustment(name: str | None, rows: int, columns: int) -> float:
    if not rows or not columns:
        return 1.0
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns if name == "spectral_unclamped" else max(1, rows / columns))
