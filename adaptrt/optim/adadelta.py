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
    """The state of one parameter: tensors of its shape and dtype."""

    square_avg: Tensor
    acc_delta: Tensor


def adadelta(
    lr: Value = 1.0,
    rho: Value = 0.9,
    eps: Value = 1e-6,
    weight_decay: Value = 0.0,
    maximize: bool = False,
) -> Optimizer:
    """Adadelta: scales each gradient by the size of past steps over the size of past gradients (Zeiler 2012, arXiv 1212.5701).

    For each parameter p with gradient g, all of one shape:

        g = g + weight_decay * p                            # if maximize, g is negated first
        v = rho * v + (1 - rho) * g**2
        d = sqrt(u + eps) / sqrt(v + eps) * g
        u = rho * u + (1 - rho) * d**2
        p = p - lr * d

    The update is smooth for eps > 0, so meta-gradients and hypergradients are exact everywhere. With eps = 0 a square root of 0 may occur;
    its derivative is taken as 0.

    Each number may be of the kinds that `sgd` takes. In `hyper` it has the name of its argument.

    Args:
      lr: factor of the step, >= 0.
      rho: share of both means of squares that is kept at a step, in [0, 1].
      eps: added under both square roots, >= 0.
      weight_decay: factor of the L2 penalty, >= 0. The Python number 0 removes the term and its name from `hyper`.
      maximize: step along the gradient instead of against it.

    Raises:
      InvalidArgument: a number is outside its domain, or a tensor of several elements is not an entry of a mapping.
      InvalidType: an argument is not a number.

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
        root = torch.sqrt if isinstance(eps, float) and eps > 0 else safe_sqrt  # the argument is never zero
        d = root(state.acc_delta + eps) / root(v + eps) * g
        return plus(p, -h["lr"], d), AdadeltaState(v, average_square(state.acc_delta, d, h["rho"]))

    return per_parameter(hyper, init, update, maximize, weight_decay=weight_decay)
