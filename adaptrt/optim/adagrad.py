"""Adagrad, with the arithmetic of `torch.optim.Adagrad`.

Known limits: the sum starts from the number, also where someone has written another one into the state of a `torch.optim.Adagrad` that has
not stepped.
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
    """Of one parameter."""

    step: Count
    sum: Tensor
    """Of squared gradients, with the parameter's shape; zero before the first step, which starts it."""


def adagrad(
    lr: Value = 1e-2,
    lr_decay: Value = 0.0,
    weight_decay: Value = 0.0,
    initial_accumulator_value: Value = 0.0,
    eps: Value = 1e-10,
    maximize: bool = False,
) -> Optimizer:
    """Steps divided by the root of the sum of squared gradients (Duchi et al. 2011, JMLR 12).

    For each parameter p with gradient g, all of one shape, at its t-th step, s being `initial_accumulator_value` before the first:

        g = g + weight_decay * p                            # -g first, if maximize
        s = s + g**2
        p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)

    Meta-gradients at kinks. The derivative of sqrt at s = 0 is taken as 0; s = 0 means that g = 0, where the derivative of
    g / (sqrt(s) + eps) along g is 1 / eps, as found. With eps = 0 the update there is 0 / 0, as in PyTorch.

    Numbers may be of the same kinds as in `sgd`, and have their arguments' names in `hyper`.

    Args:
      lr: step size, >= 0.
      lr_decay: how fast the step size falls, >= 0.
      weight_decay: L2 penalty's factor, >= 0. The Python number 0 removes the term and its name from `hyper`.
      initial_accumulator_value: where the sum starts, >= 0.
      eps: added to the denominator, >= 0.
      maximize: ascend.

    Raises:
      InvalidArgument: a number outside its domain, or a tensor of several elements outside a mapping.
      InvalidType: an argument that is no number.

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
