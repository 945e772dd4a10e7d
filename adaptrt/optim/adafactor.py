"""Adafactor, with the arithmetic of `torch.optim.Adafactor`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from adaptrt.optim.arithmetic import double, fit, larger, safe_sqrt, smaller
from adaptrt.optim.base import Absent, Count, Optimizer, Value
from adaptrt.optim.checks import Domain, checked, entries, is_off
from adaptrt.optim.per_parameter import Numbers, per_parameter


class AdafactorState(NamedTuple):
    """The state of one parameter, whose shape is [..., R, C], or which has fewer than two axes."""

    step: Count
    row_var: Tensor | Absent
    """Means over columns, [..., R, 1]; absent for a parameter with fewer than two axes."""
    col_var: Tensor | Absent
    """Means over rows, [..., 1, C]; absent for a parameter with fewer than two axes."""
    variance: Tensor | Absent
    """Of the parameter's shape; absent for a parameter with two axes or more."""


def adafactor(
    lr: Value = 1e-2,
    beta2_decay: Value = -0.8,
    eps: tuple[Value | None, Value] = (None, 1e-3),
    d: Value = 1.0,
    weight_decay: Value = 0.0,
    maximize: bool = False,
) -> Optimizer:
    """Adafactor: divides gradients by second moments that are kept as rows and columns (Shazeer & Stern 2018, arXiv 1804.04235).

    For each parameter p with gradient g of the same shape, at its t-th step, with rms(x) = sqrt(mean(x**2)):

        alpha = max(eps2, rms(p)) * min(lr, 1 / sqrt(t))    # if maximize, g is negated first
        p = (1 - lr * weight_decay) * p
        b = t**beta2_decay
        row = (1 - b) * row + b * mean(g**2, -1, keepdim=True)
        col = (1 - b) * col + b * mean(g**2, -2, keepdim=True)
        v = row @ col / max(mean(row, -2, keepdim=True), eps1)  # with fewer than two axes v = (1 - b) * v + b * g**2
        u = g / sqrt(max(v, eps1**2))
        p = p - alpha / max(1, rms(u) / d) * u

    Meta-gradients at kinks: rms(x) has derivative 0 at x = 0. Where the two arguments of max or min are equal, the derivative is that of
    the argument that depends on data (rms(p), v, row, rms(u); 1 / sqrt(t) in the minimum). Elsewhere meta-gradients are exact. Because
    v >= eps1**2, zero gradients cause no division by zero unless eps1 = 0.

    Each number may be of the kinds that `sgd` takes, but only `lr` and `weight_decay` may have a value for each element. In `hyper` they
    are named `lr`, `beta2_decay`, `eps1`, `eps2`, `d` and `weight_decay`.

    Args:
      lr: largest relative step size, >= 0.
      beta2_decay: exponent of t in the weight of new squares, <= 0.
      eps: lower bounds of the root of the second moment (None: the machine epsilon of the parameter's dtype) and of rms(p), each >= 0.
      d: the largest rms that an update may have without being scaled down, >= 1.
      weight_decay: factor of the decoupled decay, >= 0. The Python number 0 removes the term and its name from `hyper`.
      maximize: step along the gradient instead of against it.

    Raises:
      InvalidArgument: a number is outside its domain, or a tensor of several elements is not an entry of a mapping.
      InvalidType: an argument is not a number.

    Example:
      >>> opt = adafactor(lr=0.1)
      >>> params = {"w": torch.tensor([1.0, 1.0])}
      >>> new, state = opt.update({"w": torch.tensor([3.0, -0.5])}, opt.init(params), params, opt.hyper)
      >>> new["w"]
      tensor([0.9000, 1.1000])
    """
    eps1, eps2 = entries("eps", eps, 2)
    hyper = {
        "lr": checked("lr", lr),
        "beta2_decay": checked("beta2_decay", beta2_decay, Domain(-math.inf, 0.0)),
        "eps2": checked("eps[1]", eps2),
        "d": checked("d", d, Domain(1.0)),
    }
    if eps1 is not None:
        hyper["eps1"] = checked("eps[0]", eps1)
    with_decay = not is_off(weight_decay)
    if with_decay:
        hyper["weight_decay"] = checked("weight_decay", weight_decay)

    def init(p: Tensor) -> AdafactorState:
        step = torch.zeros((), dtype=torch.int64, device=p.device)
        if p.dim() < 2:
            return AdafactorState(step, (), (), torch.zeros_like(p))
        rows, columns = p.narrow(-1, 0, min(1, p.shape[-1])), p.narrow(-2, 0, min(1, p.shape[-2]))
        return AdafactorState(step, torch.zeros_like(rows), torch.zeros_like(columns), ())

    def update(p: Tensor, g: Tensor, state: AdafactorState, h: Numbers) -> tuple[Tensor, AdafactorState]:
        step = state.step + 1
        if not p.numel():
            return p, state._replace(step=step)
        t = double(step)
        lr = double(h["lr"])
        eps1 = double(h.get("eps1", torch.finfo(p.dtype).eps))
        alpha = larger(_rms(p), h["eps2"]) * fit(smaller(t**-0.5, lr), p)
        if with_decay:
            p = p * fit(1 - lr * double(h["weight_decay"]), p)
        share = t ** double(h["beta2_decay"])
        new, kept = fit(share, p), fit(1 - share, p)
        row, col, v = state.row_var, state.col_var, state.variance
        if isinstance(row, Tensor) and isinstance(col, Tensor):
            row = row * kept + (g * g).mean(-1, keepdim=True) * new
            col = col * kept + (g * g).mean(-2, keepdim=True) * new
            estimate = row * col / larger(row.mean(-2, keepdim=True), eps1)
        else:
            assert isinstance(v, Tensor)
            estimate = v = v * kept + g * g * new
        u = torch.rsqrt(larger(estimate, eps1 * eps1)) * g
        p = p - u * (alpha / larger(_rms(u) / fit(h["d"], p), 1.0))
        return p, AdafactorState(step, row, col, v)

    return per_parameter(hyper, init, update, maximize, scalar=("beta2_decay", "eps1", "eps2", "d"))


def _rms(x: Tensor) -> Tensor:
    return safe_sqrt((x * x).mean())
