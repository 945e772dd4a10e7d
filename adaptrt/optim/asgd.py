"""Averaged stochastic gradient descent, with the arithmetic of `torch.optim.ASGD`.

Known limits: the rate eta and the weight mu of the average are computed from the step count and from the current numbers.
`torch.optim.ASGD` keeps both as state, rounded to PyTorch's default dtype, and computes them one step ahead. So it follows a change of
`lr`, `lambd`, `alpha` or `t0` one step later than this does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaptrt.optim.arithmetic import double, fit, larger, plus
from adaptrt.optim.base import Count, Optimizer, Value
from adaptrt.optim.checks import checked
from adaptrt.optim.per_parameter import Numbers, per_parameter


class ASGDState(NamedTuple):
    """The state of one parameter."""

    step: Count
    ax: Tensor
    """The average of iterates, of the parameter's shape and dtype."""


def asgd(
    lr: Value = 1e-2,
    lambd: Value = 1e-4,
    alpha: Value = 0.75,
    t0: Value = 1e6,
    weight_decay: Value = 0.0,
    maximize: bool = False,
) -> Optimizer:
    """Gradient descent with a decreasing rate, and the average of its iterates (Polyak & Juditsky 1992).

    For each parameter p with gradient g, all of one shape, after n earlier steps:

        g = g + weight_decay * p                            # if maximize, g is negated first
        eta = lr / (1 + lambd * lr * n)**alpha
        mu = 1 / max(1, n - t0)
        p = (1 - lambd * eta) * p - eta * g
        ax = ax + mu * (p - ax)

    The gradient is taken at p, and the average ax is only in the state. Meta-gradients are exact except at n - t0 = 1. There mu has a kink
    in t0, and the derivative is that of n - t0.

    Each number may be of the kinds that `sgd` takes. In `hyper` it has the name of its argument.

    Args:
      lr: step size, >= 0.
      lambd: how fast p and the rate decay, >= 0.
      alpha: exponent with which the rate decreases, >= 0.
      t0: number of the step after which iterates are averaged; before it the average is a copy of p. >= 0.
      weight_decay: factor of the L2 penalty, >= 0. The Python number 0 removes the term and its name from `hyper`.
      maximize: step along the gradient instead of against it.

    Raises:
      InvalidArgument: a number is outside its domain, or a tensor of several elements is not an entry of a mapping.
      InvalidType: an argument is not a number.

    Example:
      >>> opt = asgd(lr=0.5, lambd=0.0)
      >>> params = {"w": torch.tensor([1.0, 2.0])}
      >>> new, state = opt.update({"w": torch.tensor([2.0, 0.0])}, opt.init(params), params, opt.hyper)
      >>> new["w"], state["w"].ax
      (tensor([0., 2.]), tensor([0., 2.]))
    """
    hyper = {
        "lr": checked("lr", lr),
        "lambd": checked("lambd", lambd),
        "alpha": checked("alpha", alpha),
        "t0": checked("t0", t0),
    }

    def init(p: Tensor) -> ASGDState:
        return ASGDState(torch.zeros((), dtype=torch.int64, device=p.device), torch.zeros_like(p))

    def update(p: Tensor, g: Tensor, state: ASGDState, h: Numbers) -> tuple[Tensor, ASGDState]:
        lr, lambd = double(h["lr"]), double(h["lambd"])
        n = double(state.step)
        eta = lr / (1 + lambd * lr * n) ** double(h["alpha"])
        mu = 1 / larger(n - double(h["t0"]), 1.0)
        p = plus(p * fit(1 - lambd * eta, p), -eta, g)
        return p, ASGDState(state.step + 1, plus(state.ax, mu, p - state.ax))

    return per_parameter(hyper, init, update, maximize, weight_decay=weight_decay)
