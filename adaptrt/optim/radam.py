"""RAdam, with the arithmetic of `torch.optim.RAdam`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaptrt.optim.arithmetic import average, average_square, choose, double, fit, plus, safe_sqrt, sqrt
from adaptrt.optim.base import Count, Optimizer, Value
from adaptrt.optim.checks import check_flags, checked_moments
from adaptrt.optim.per_parameter import Numbers, per_parameter


class RAdamState(NamedTuple):
    """The state of one parameter: tensors of its shape and dtype unless noted."""

    step: Count
    exp_avg: Tensor
    exp_avg_sq: Tensor


def radam(
    lr: Value = 1e-3,
    betas: tuple[Value, Value] = (0.9, 0.999),
    eps: Value = 1e-8,
    weight_decay: Value = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """RAdam: Adam whose adaptive rate is rectified, and not used while too few gradients are known (Liu et al. 2020, arXiv 1908.03265).

    For each parameter p with gradient g, all of one shape, at its t-th step:

        g = g + weight_decay * p                            # if decoupled, p = (1 - lr * weight_decay) * p instead
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        rect = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        a = rect * sqrt(1 - beta2**t) / (sqrt(v) + eps) if rho > 5 else 1
        p = p - lr / (1 - beta1**t) * m * a

    Meta-gradients at kinks: the derivative of sqrt at v = 0 is taken as 0, as in `adam`. The step at which rho exceeds 5 depends on beta2.
    At such a value of beta2 the update jumps, and the derivative is that of the side on which beta2 is.

    Each number may be of the kinds that `sgd` takes. In `hyper` they are named `lr`, `beta1`, `beta2`, `eps` and `weight_decay`.

    Args:
      lr: step size, >= 0.
      betas: share of the mean of gradients, and of the mean of their squares, that is kept at a step, each in [0, 1).
      eps: added to the denominator, >= 0.
      weight_decay: factor of the weight decay, >= 0. The Python number 0 removes the term and its name from `hyper`.
      decoupled_weight_decay: shrink the parameter, as `adamw` does, instead of adding an L2 penalty.
      maximize: step along the gradient instead of against it: g is negated first.

    Raises:
      InvalidArgument: a number is outside its domain, or a tensor of several elements is not an entry of a mapping.
      InvalidType: an argument is not a number.

    Example:
      >>> opt = radam(lr=0.1)
      >>> params = {"w": torch.tensor([1.0, 1.0])}
      >>> new, state = opt.update({"w": torch.tensor([3.0, -0.5])}, opt.init(params), params, opt.hyper)
      >>> new["w"]
      tensor([0.7000, 1.0500])
    """
    hyper = checked_moments(lr, betas, eps)
    check_flags(decoupled_weight_decay=decoupled_weight_decay)

    def init(p: Tensor) -> RAdamState:
        return RAdamState(torch.zeros((), dtype=torch.int64, device=p.device), torch.zeros_like(p), torch.zeros_like(p))

    def update(p: Tensor, g: Tensor, state: RAdamState, h: Numbers) -> tuple[Tensor, RAdamState]:
        lr, beta1, beta2 = double(h["lr"]), double(h["beta1"]), double(h["beta2"])
        step = state.step + 1
        t = double(step)
        m, v = average(state.exp_avg, g, beta1), average_square(state.exp_avg_sq, g, beta2)
        correction2 = 1 - beta2**t
        # A tensor where the count is one, even if beta2 is a float: of two floats `where` makes the default dtype.
        rho_inf = 0 * t + (2 / (1 - beta2) - 1)
        rho = rho_inf - 2 * t * beta2**t / correction2
        adaptive = rho > 5
        # Where the adaptive rate is not used, its square roots may have no value and no derivative; they get other arguments there.
        rho = choose(adaptive, rho, 6.0)
        rho_inf = choose(adaptive, rho_inf, 6.0)
        rect = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        rate = fit(rect * sqrt(correction2), p) / (safe_sqrt(choose(adaptive, v, torch.ones_like(v))) + fit(h["eps"], p))
        p = plus(p, -lr / (1 - beta1**t), m * choose(adaptive, rate, 1.0))
        return p, RAdamState(step, m, v)

    return per_parameter(hyper, init, update, maximize, weight_decay=weight_decay, decoupled=decoupled_weight_decay)
