"""NAdam, with the arithmetic of `torch.optim.NAdam`.

Known limits: `torch.optim.NAdam` keeps `mu_product` in PyTorch's default dtype, which is float32 unless it was changed, and rounds it to
that. Here it is float64. The two agree to float32 accuracy, and to float64 accuracy under `torch.set_default_dtype(torch.float64)`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaptrt.optim.arithmetic import average, average_square, double, fit, plus, safe_sqrt
from adaptrt.optim.base import Count, Optimizer, Value
from adaptrt.optim.checks import check_flags, checked, checked_moments
from adaptrt.optim.per_parameter import Numbers, per_parameter


class NAdamState(NamedTuple):
    """The state of one parameter: tensors of its shape and dtype unless noted."""

    step: Count
    mu_product: Tensor
    """0-dim float64: the product of all mu so far."""
    exp_avg: Tensor
    exp_avg_sq: Tensor


def nadam(
    lr: Value = 2e-3,
    betas: tuple[Value, Value] = (0.9, 0.999),
    eps: Value = 1e-8,
    weight_decay: Value = 0.0,
    momentum_decay: Value = 4e-3,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """NAdam: Adam with Nesterov's momentum (Dozat 2016, "Incorporating Nesterov momentum into Adam").

    For each parameter p with gradient g, all of one shape, at its t-th step, where P is 1 before the first step:

        g = g + weight_decay * p                            # if decoupled, p = (1 - lr * weight_decay) * p instead
        mu = beta1 * (1 - 0.96**(t * momentum_decay) / 2)
        mu_next = beta1 * (1 - 0.96**((t + 1) * momentum_decay) / 2)
        P = P * mu
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        d = sqrt(v / (1 - beta2**t)) + eps
        p = p - lr * ((1 - mu) / (1 - P) * g + mu_next / (1 - P * mu_next) * m) / d

    Meta-gradients at kinks: as in `adam`, the derivative of sqrt at v = 0 is taken as 0. With eps > 0 this makes the derivative of the
    whole update exact there.

    Each number may be of the kinds that `sgd` takes, but `beta1` and `momentum_decay` cannot have a value for each element, because P has
    no axes. In `hyper` they are named `lr`, `beta1`, `beta2`, `eps`, `momentum_decay` and `weight_decay`.

    Args:
      lr: step size, >= 0.
      betas: share of the mean of gradients, and of the mean of their squares, that is kept at a step, each in [0, 1).
      eps: added to the denominator, >= 0.
      weight_decay: factor of the weight decay, >= 0. The Python number 0 removes the term and its name from `hyper`.
      momentum_decay: how fast the momentum grows to beta1, >= 0.
      decoupled_weight_decay: shrink the parameter, as `adamw` does, instead of adding an L2 penalty.
      maximize: step along the gradient instead of against it: g is negated first.

    Raises:
      InvalidArgument: a number is outside its domain, or a tensor of several elements is not an entry of a mapping.
      InvalidType: an argument is not a number.

    Example:
      >>> opt = nadam(lr=0.1)
      >>> params = {"w": torch.tensor([1.0, 1.0])}
      >>> new, state = opt.update({"w": torch.tensor([3.0, -0.5])}, opt.init(params), params, opt.hyper)
      >>> new["w"]
      tensor([0.8944, 1.1056])
    """
    hyper = checked_moments(lr, betas, eps)
    hyper["momentum_decay"] = checked("momentum_decay", momentum_decay)
    check_flags(decoupled_weight_decay=decoupled_weight_decay)

    def init(p: Tensor) -> NAdamState:
        step = torch.zeros((), dtype=torch.int64, device=p.device)
        return NAdamState(step, torch.ones((), dtype=torch.float64, device=p.device), torch.zeros_like(p), torch.zeros_like(p))

    def update(p: Tensor, g: Tensor, state: NAdamState, h: Numbers) -> tuple[Tensor, NAdamState]:
        lr, beta1, beta2, psi = double(h["lr"]), double(h["beta1"]), double(h["beta2"]), double(h["momentum_decay"])
        step = state.step + 1
        t = double(step)
        mu = beta1 * (1 - 0.5 * 0.96 ** (t * psi))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * psi))
        product = state.mu_product * mu
        m, v = average(state.exp_avg, g, beta1), average_square(state.exp_avg_sq, g, beta2)
        d = safe_sqrt(v / fit(1 - beta2**t, p)) + fit(h["eps"], p)
        of_gradient, of_mean = lr * (1 - mu) / (1 - product), lr * mu_next / (1 - product * mu_next)
        p = plus(plus(p, -of_gradient, g / d), -of_mean, m / d)
        return p, NAdamState(step, product, m, v)

    return per_parameter(
        hyper, init, update, maximize, scalar=("beta1", "momentum_decay"), weight_decay=weight_decay, decoupled=decoupled_weight_decay
    )
