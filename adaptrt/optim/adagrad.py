"""Adagrad, with the arithmetic of `torch.optim.Adagrad`.

Known limits: the sum always starts from `initial_accumulator_value`, even if another sum was written into the state of a
`torch.optim.Adagrad` that has not stepped yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaptrt.optim.arithmetic import choose, double, fit, like, plus, safe_sqrt
from adaptrt.optim.base import Count, Optimizer, Value
from adaptrt.optim.checks import checked
from adaptrt.optim.per_parameter import Numbers, per_parameter


class AdagradState(NamedTuple):
    """The state of one parameter."""

    step: Count
    sum: Tensor
    """Sum of squared gradients, of the parameter's shape and dtype. It is zero before the first step, which gives it its start."""


def adagrad(
    lr: Value = 1e-2,
    lr_decay: Value = 0.0,
    weight_decay: Value = 0.0,
    initial_accumulator_value: Value = 0.0,
    eps: Value = 1e-10,
    maximize: bool = False,
) -> Optimizer:
    """Adagrad: divides gradients by the root of the sum of all squared gradients so far (Duchi et al. 2011, JMLR 12).

    For each parameter p with gradient g, all of one shape, at its t-th step, where s is `initial_accumulator_value` before the first step:

        g = g + weight_decay * p                            # if maximize, g is negated first
        s = s + g**2
        p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)

    Meta-gradients at kinks: the derivative of sqrt at s = 0 is taken as 0. s = 0 means that g = 0, and there the derivative of
    g / (sqrt(s) + eps) along g is 1 / eps, which is what this gives. With eps = 0 the update at this point is 0 / 0, as in PyTorch.

    Each number may be of the kinds that `sgd` takes. In `hyper` it has the name of its argument.

    Args:
      lr: step size, >= 0.
      lr_decay: how fast the step size decreases, >= 0.
      weight_decay: factor of the L2 penalty, >= 0. The Python number 0 removes the term and its name from `hyper`.
      initial_accumulator_value: value at which the sum starts, >= 0.
      eps: added to the denominator, >= 0.
      maximize: step along the gradient instead of against it.

    Raises:
      InvalidArgument: a number is outside its domain, or a tensor of several elements is not an entry of a mapping.
      InvalidType: an argument is not a number.

    Example:
      >>> opt = adagrad(lr=0.1)
      >>> params = {"w": torch.tensor([1.0, 1.0])}
      >>> new, state = opt.update({"w": torch.tensor([3.0, -0.5])}, opt.init(params), params, opt.hyper)
      >>> new["w"]
      tensor([0.9000, 1.1000])
    """
    hyper = {
        "lr": checked("lr", lr),
        "lr_decay": checked("lr_decay", lr_decay),
        "initial_accumulator_value": checked("initial_accumulator_value", initial_accumulator_value),
        "eps": checked("eps", eps),
    }

    def init(p: Tensor) -> AdagradState:
        return AdagradState(torch.zeros((), dtype=torch.int64, device=p.device), torch.zeros_like(p))

    def update(p: Tensor, g: Tensor, state: AdagradState, h: Numbers) -> tuple[Tensor, AdagradState]:
        # The state cannot start with a number that is an input of the update.
        start = choose(state.step == 0, like(h["initial_accumulator_value"], p), state.sum)
        total = start + g * g
        rate = double(h["lr"]) / (1 + double(state.step) * double(h["lr_decay"]))
        p = plus(p, -rate, g / (safe_sqrt(total) + fit(h["eps"], p)))
        return p, AdagradState(state.step + 1, total)

    return per_parameter(hyper, init, update, maximize, weight_decay=weight_decay)
