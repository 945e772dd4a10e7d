"""Adadelta, with the arithmetic of `torch.optim.Adadelta`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaptrt.optim.arithmetic import average_square, fit, plus, safe_sqrt
from adaptrt.optim.base import Optimizer, Value
from adaptrt.optim.checks import Domain, checked
from adaptrt.optim.per_parameter import Numbers, per_parameter


class AdadeltaState(NamedTuple):
    """Of one parameter, with its shape and dtype."""

    square_avg: Tensor
    acc_delta: Tensor


def adadelta(
    lr: Value = 1.0,
    rho: Value = 0.9,
    eps: Value = 1e-6,
    weight_decay: Value = 0.0,
    maximize: bool = False,
) -> Optimizer:
    """Steps of the size of past steps, relative to that of past gradients (Zeiler 2012, arXiv 1212.5701).

    For each parameter p with gradient g, all of one shape:

        g = g + weight_decay * p                            # -g first, if maximize
        v = rho * v + (1 - rho) * g**2
        d = sqrt(u + eps) / sqrt(v + eps) * g
        u = rho * u + (1 - rho) * d**2
        p = p - lr * d

    The update is smooth for eps > 0, so meta-gradients and hypergradients are exact everywhere. The derivative of sqrt at 0, which only
    eps = 0 reaches, is taken as 0.

    Numbers may be of the same kinds as in `sgd`, and have their arguments' names in `hyper`.

    Args:
      lr: factor of the step, >= 0.
      rho: decay of both means of squares, in [0, 1].
      eps: added under the roots, >= 0.
      weight_decay: L2 penalty's factor, >= 0. The Python number 0 removes the term and its name from `hyper`.
      maximize: ascend.

    Raises:
      InvalidArgument: a number outside its domain, or a tensor of several elements outside a mapping.
      InvalidType: an argument that is no number.

    Example:
      >>> opt = adadelta(lr=1.0, eps=1e-2)
      >>> params = {"w": torch.tensor([1.0, 1.0])}
      >>> new, state = opt.update({"w": torch.tensor([3.0, -0.5])}, opt.init(params), params, opt.hyper)
      >>> new["w"]
      tensor([0.6855, 1.2673])
    """
    hyper = {"lr": checked("lr", lr), "rho": checked("rho", rho, Domain(0.0, 1.0)), "eps": checked("eps", eps)}

    def init(p: Tensor) -> AdadeltaState:
        return AdadeltaState(torch.zeros_like(p), torch.zeros_like(p))

    def update(p: Tensor, g: Tensor, state: AdadeltaState, h: Numbers) -> tuple[Tensor, AdadeltaState]:
        eps = fit(h["eps"], p)
        v = average_square(state.square_avg, g, h["rho"])
        root = torch.sqrt if isinstance(eps, float) and eps > 0 else safe_sqrt  # of nothing that is zero
        d = root(state.acc_delta + eps) / root(v + eps) * g
        return plus(p, -h["lr"], d), AdadeltaState(v, average_square(state.acc_delta, d, h["rho"]))

    return per_parameter(hyper, init, update, maximize, weight_decay=weight_decay)
