"""Adamax, with the arithmetic of `torch.optim.Adamax`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaptrt.optim.arithmetic import average, double, fit, plus
from adaptrt.optim.base import Count, Optimizer, Value
from adaptrt.optim.checks import checked_moments
from adaptrt.optim.per_parameter import Numbers, per_parameter


class AdamaxState(NamedTuple):
    """The state of one parameter: tensors of its shape and dtype unless noted."""

    step: Count
    exp_avg: Tensor
    exp_inf: Tensor


def adamax(
    lr: Value = 2e-3,
    betas: tuple[Value, Value] = (0.9, 0.999),
    eps: Value = 1e-8,
    weight_decay: Value = 0.0,
    maximize: bool = False,
) -> Optimizer:
    """Adamax: Adam with the infinity norm of past gradients (Kingma & Ba 2015, arXiv 1412.6980, section 7.1).

    For each parameter p with gradient g, all of one shape, at its t-th step:

        g = g + weight_decay * p                            # if maximize, g is negated first
        m = beta1 * m + (1 - beta1) * g
        u = max(beta2 * u, |g| + eps)
        p = p - lr / (1 - beta1**t) * m / u

    Meta-gradients at kinks: |g| has derivative 0 at g = 0. Where the two arguments of max are equal, each gets half the derivative.
    Elsewhere meta-gradients are exact. Because u >= eps, nothing is divided by zero where eps > 0. With eps = 0 and zero gradients the
    update is 0 / 0, as in PyTorch.

    Each number may be of the kinds that `sgd` takes. In `hyper` they are named `lr`, `beta1`, `beta2`, `eps` and `weight_decay`.

    Args:
      lr: step size, >= 0.
      betas: share of the mean of gradients, and of their norm, that is kept at a step, each in [0, 1).
      eps: added to |g|, >= 0.
      weight_decay: factor of the L2 penalty, >= 0. The Python number 0 removes the term and its name from `hyper`.
      maximize: step along the gradient instead of against it.

    Raises:
      InvalidArgument: a number is outside its domain, or a tensor of several elements is not an entry of a mapping.
      InvalidType: an argument is not a number.

    Example:
      >>> opt = adamax(lr=0.1)
      >>> params = {"w": torch.tensor([1.0, 1.0])}
      >>> new, state = opt.update({"w": torch.tensor([3.0, -0.5])}, opt.init(params), params, opt.hyper)
      >>> new["w"]
      tensor([0.9000, 1.1000])
    """
    hyper = checked_moments(lr, betas, eps)

    def init(p: Tensor) -> AdamaxState:
        return AdamaxState(torch.zeros((), dtype=torch.int64, device=p.device), torch.zeros_like(p), torch.zeros_like(p))

    def update(p: Tensor, g: Tensor, state: AdamaxState, h: Numbers) -> tuple[Tensor, AdamaxState]:
        beta1 = double(h["beta1"])
        step = state.step + 1
        m = average(state.exp_avg, g, beta1)
        u = torch.maximum(state.exp_inf * fit(h["beta2"], p), g.abs() + fit(h["eps"], p))
        p = plus(p, -double(h["lr"]) / (1 - beta1 ** double(step)), m / u)
        return p, AdamaxState(step, m, u)

    return per_parameter(hyper, init, update, maximize, weight_decay=weight_decay)
