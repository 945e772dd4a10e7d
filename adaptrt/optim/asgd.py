"""Averaged stochastic gradient descent, with the arithmetic of `torch.optim.ASGD`.

Known limits: the rate eta and the weight mu of the average follow from the step count and the numbers as they stand. `torch.optim.ASGD`
keeps both as state, rounded to PyTorch's default dtype, and forms them a step ahead: it answers to a change of `lr`, `lambd`, `alpha` or
`t0` one step later.
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
    """Of one parameter."""

    step: Count
    ax: Tensor
    """The average, with the parameter's shape and dtype."""


def asgd(
    lr: Value = 1e-2,
    lambd: Value = 1e-4,
    alpha: Value = 0.75,
    t0: Value = 1e6,
    weight_decay: Value = 0.0,
    maximize: bool = False,
) -> Optimizer:
    """Gradient descent with a falling rate, and the average of its iterates (Polyak & Juditsky 1992).

    For each parameter p with gradient g, all of one shape, n steps having been made before:

        g = g + weight_decay * p                            # -g first, if maximize
        eta = lr / (1 + lambd * lr * n)**alpha
        mu = 1 / max(1, n - t0)
        p = (1 - lambd * eta) * p - eta * g
        ax = ax + mu * (p - ax)

    What moves is p; the average ax is in the state. Meta-gradients are exact but at n - t0 = 1, where mu has a kink in t0 and the
    derivative is that of n - t0.

    Numbers may be of the same kinds as in `sgd`, and have their arguments' names in `hyper`.

    Args:
      lr: step size, >= 0.
      lambd: decay of p and of the rate, >= 0.
      alpha: power with which the rate falls, >= 0.
      t0: step after which iterates are averaged rather than copied, >= 0.
      weight_decay: L2 penalty's factor, >= 0. The Python number 0 removes the term and its name from `hyper`.
      maximize: ascend.

    Raises:
      InvalidArgument: a number outside its domain, or a tensor of several elements outside a mapping.
      InvalidType: an argument that is no number.

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
