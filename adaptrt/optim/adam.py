"""Adam and AdamW, with the arithmetic of `torch.optim.Adam` and `torch.optim.AdamW`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaptrt.optim.arithmetic import average, average_square, double, fit, plus, safe_sqrt, sqrt
from adaptrt.optim.base import Absent, Count, Optimizer, Value
from adaptrt.optim.checks import check_flags, checked_moments
from adaptrt.optim.per_parameter import Numbers, per_parameter


class AdamState(NamedTuple):
    """The state of one parameter: tensors of its shape and dtype unless noted."""

    step: Count
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | Absent
    """The largest `exp_avg_sq` so far; absent without `amsgrad`."""


def adam(
    lr: Value = 1e-3,
    betas: tuple[Value, Value] = (0.9, 0.999),
    eps: Value = 1e-8,
    weight_decay: Value = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980), with an L2 penalty and AMSGrad (Reddi et al. 2018) as options.

    For each parameter p with gradient g, all of one shape, at its t-th step:

        g = g + weight_decay * p                            # if maximize, g is negated first
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        w = max(w, v) if amsgrad else v
        p = p - lr / (1 - beta1**t) * m / (sqrt(w) / sqrt(1 - beta2**t) + eps)

    Meta-gradients at kinks: the derivative of sqrt at w = 0 is infinite, and is taken as 0 here. For m / (sqrt(w) + eps) this is no
    approximation where m is zero, too: w = 0 means that every gradient so far was zero, and so m is zero. Along g the quotient is
    a * g / (b * |g| + eps), whose derivative at g = 0 is a / eps. So with eps > 0 meta-gradients and hypergradients are finite and
    right at zero gradients. With eps = 0 the update itself is 0 / 0, as in PyTorch. `max` gives half its gradient to each of two equal
    arguments.

    Each number may be of the kinds that `sgd` takes. In `hyper` they are named `lr`, `beta1`, `beta2`, `eps` and `weight_decay`.

    Args:
      lr: step size, >= 0.
      betas: share of the mean of gradients, and of the mean of their squares, that is kept at a step, each in [0, 1).
      eps: added to the denominator, >= 0.
      weight_decay: factor of the L2 penalty, >= 0. The Python number 0 removes the term and its name from `hyper`.
      amsgrad: divide by the largest second moment so far.
      maximize: step along the gradient instead of against it.

    Raises:
      InvalidArgument: a number is outside its domain, or a tensor of several elements is not an entry of a mapping.
      InvalidType: an argument is not a number.

    Example:
      >>> opt = adam(lr=0.1)
      >>> params = {"w": torch.tensor([1.0, 1.0])}
      >>> new, state = opt.update({"w": torch.tensor([3.0, -0.5])}, opt.init(params), params, opt.hyper)
      >>> new["w"]
      tensor([0.9000, 1.1000])
    """
    return _adam(lr, betas, eps, weight_decay, amsgrad, maximize, decoupled=False)


def adamw(
    lr: Value = 1e-3,
    betas: tuple[Value, Value] = (0.9, 0.999),
    eps: Value = 1e-8,
    weight_decay: Value = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101).

    It is `adam`, but the decay shrinks the parameter and does not enter the moments:

        p = (1 - lr * weight_decay) * p                     # in place of g = g + weight_decay * p

    Arguments, errors and derivatives at kinks are those of `adam`.

    Example:
      >>> opt = adamw(lr=0.5, weight_decay=0.5)
      >>> params = {"w": torch.tensor([4.0])}
      >>> new, state = opt.update({"w": torch.tensor([0.0])}, opt.init(params), params, opt.hyper)
      >>> new["w"]
      tensor([3.])
    """
    return _adam(lr, betas, eps, weight_decay, amsgrad, maximize, decoupled=True)


def _adam(
    lr: Value, betas: tuple[Value, Value], eps: Value, weight_decay: Value, amsgrad: bool, maximize: bool, decoupled: bool
) -> Optimizer:
    hyper = checked_moments(lr, betas, eps)
    check_flags(amsgrad=amsgrad)

    def init(p: Tensor) -> AdamState:
        step = torch.zeros((), dtype=torch.int64, device=p.device)
        return AdamState(step, torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p) if amsgrad else ())

    def update(p: Tensor, g: Tensor, state: AdamState, h: Numbers) -> tuple[Tensor, AdamState]:
        lr, beta1, beta2 = double(h["lr"]), double(h["beta1"]), double(h["beta2"])
        step = state.step + 1
        m, v = average(state.exp_avg, g, beta1), average_square(state.exp_avg_sq, g, beta2)
        largest = torch.maximum(state.max_exp_avg_sq, v) if isinstance(state.max_exp_avg_sq, Tensor) else ()
        t = double(step)
        # In one expression, so that each operand is free before the next is made.
        d = m / (safe_sqrt(largest if isinstance(largest, Tensor) else v) / fit(sqrt(1 - beta2**t), p) + fit(h["eps"], p))
        return plus(p, -lr / (1 - beta1**t), d), AdamState(step, m, v, largest)

    return per_parameter(hyper, init, update, maximize, weight_decay=weight_decay, decoupled=decoupled)
