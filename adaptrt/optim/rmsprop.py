"""RMSprop, with the arithmetic of `torch.optim.RMSprop`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaptrt.optim.arithmetic import average, average_square, fit, plus, safe_sqrt
from adaptrt.optim.base import Absent, Optimizer, Value
from adaptrt.optim.checks import check_flags, checked, is_off
from adaptrt.optim.per_parameter import Numbers, per_parameter


class RMSpropState(NamedTuple):
    """The state of one parameter: tensors of its shape and dtype."""

    square_avg: Tensor
    momentum_buffer: Tensor | Absent
    """Absent without momentum."""
    grad_avg: Tensor | Absent
    """Absent unless `centered`."""


def rmsprop(
    lr: Value = 1e-2,
    alpha: Value = 0.99,
    eps: Value = 1e-8,
    weight_decay: Value = 0.0,
    momentum: Value = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """RMSprop: divides gradients by the root of a mean of their squares (Hinton 2012, lecture 6e; centered: Graves 2013, arXiv 1308.0850).

    For each parameter p with gradient g, all of one shape:

        g = g + weight_decay * p                            # if maximize, g is negated first
        v = alpha * v + (1 - alpha) * g**2
        a = alpha * a + (1 - alpha) * g                     # if centered
        d = g / (sqrt(v - a**2 if centered else v) + eps)
        b = momentum * b + d                                # d without momentum
        p = p - lr * b

    Meta-gradients at kinks: the derivative of sqrt at 0 is taken as 0. v = 0 means that every gradient so far was zero, and for eps > 0
    this makes the derivative of the update exact there. If rounding makes the variance v - a**2 negative, it counts as 0, and its root has
    derivative 0; PyTorch gets NaN from its square root.

    Each number may be of the kinds that `sgd` takes. In `hyper` it has the name of its argument.

    Args:
      lr: step size, >= 0.
      alpha: share of both means that is kept at a step, >= 0.
      eps: added to the denominator, >= 0.
      weight_decay: factor of the L2 penalty, >= 0. The Python number 0 removes the term and its name from `hyper`.
      momentum: share of the last step that is kept, >= 0. The Python number 0 removes the buffer, and the name in `hyper`.
      centered: divide by the standard deviation of gradients instead.
      maximize: step along the gradient instead of against it.

    Raises:
      InvalidArgument: a number is outside its domain, or a tensor of several elements is not an entry of a mapping.
      InvalidType: an argument is not a number.

    Example:
      >>> opt = rmsprop(lr=0.1, alpha=0.75)
      >>> params = {"w": torch.tensor([1.0, 1.0])}
      >>> new, state = opt.update({"w": torch.tensor([3.0, -0.5])}, opt.init(params), params, opt.hyper)
      >>> new["w"]
      tensor([0.8000, 1.2000])
    """
    check_flags(centered=centered)
    hyper = {"lr": checked("lr", lr), "alpha": checked("alpha", alpha), "eps": checked("eps", eps)}
    with_momentum = not is_off(momentum)
    if with_momentum:
        hyper["momentum"] = checked("momentum", momentum)

    def init(p: Tensor) -> RMSpropState:
        return RMSpropState(torch.zeros_like(p), torch.zeros_like(p) if with_momentum else (), torch.zeros_like(p) if centered else ())

    def update(p: Tensor, g: Tensor, state: RMSpropState, h: Numbers) -> tuple[Tensor, RMSpropState]:
        v, a, b = average_square(state.square_avg, g, h["alpha"]), state.grad_avg, state.momentum_buffer
        spread = v
        if isinstance(a, Tensor):
            a = average(a, g, h["alpha"])
            spread = torch.clamp(v - a * a, min=0.0)
        d = g / (safe_sqrt(spread) + fit(h["eps"], p))
        if isinstance(b, Tensor):
            d = b = plus(d, h["momentum"], b)
        return plus(p, -h["lr"], d), RMSpropState(v, b, a)

    return per_parameter(hyper, init, update, maximize, weight_decay=weight_decay)
