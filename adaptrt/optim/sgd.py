"""Stochastic gradient descent, with the arithmetic of `torch.optim.SGD`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaptrt.errors import InvalidArgument
from adaptrt.optim.arithmetic import choose, double, fit, plus
from adaptrt.optim.base import Absent, Count, Optimizer, Value
from adaptrt.optim.checks import REAL, check_flags, checked, is_off
from adaptrt.optim.per_parameter import Numbers, per_parameter


class SGDState(NamedTuple):
    """The state of one parameter, of its shape and dtype unless noted. Both fields are absent without momentum."""

    momentum_buffer: Tensor | Absent
    step: Count | Absent
    """Only whether it is zero matters: the first step sets the buffer."""


def sgd(
    lr: Value,
    momentum: Value = 0.0,
    dampening: Value = 0.0,
    weight_decay: Value = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Optimizer:
    """Gradient descent with momentum and weight decay (Sutskever et al. 2013, in the form of `torch.optim.SGD`).

    For each parameter p with gradient g, all of one shape:

        g = g + weight_decay * p                            # if maximize, g is negated first
        b = g at the first step, else momentum * b + (1 - dampening) * g
        d = g + momentum * b if nesterov else b
        p = p - lr * d

    The update is smooth in every input, so meta-gradients and hypergradients are exact everywhere. At the first step the hypergradients of
    `momentum` (without `nesterov`) and `dampening` are zero, because the first gradient becomes the buffer as it is.

    Each number may be a float, a 0-dim tensor, or a mapping from parameter name to a float, a 0-dim tensor or a tensor of the parameter's
    shape. All numbers are inputs of `update`, and a tensor that requires grad gets its hypergradient.

    Args:
      lr: step size, >= 0.
      momentum: share of the buffer that is kept, >= 0. The Python number 0 removes the buffer, and `momentum` and `dampening` from `hyper`.
      dampening: share of a gradient that is kept out of the buffer, from the second step on.
      weight_decay: factor of the L2 penalty, >= 0. The Python number 0 removes the term and its name from `hyper`.
      nesterov: look ahead along the buffer; needs momentum and the Python number 0 as dampening.
      maximize: step along the gradient instead of against it.

    Raises:
      InvalidArgument: a number is outside its domain, a tensor of several elements is not an entry of a mapping, or `nesterov` is on
        without what it needs.
      InvalidType: an argument is not a number.

    Example:
      >>> opt = sgd(lr=0.5)
      >>> params = {"w": torch.tensor([1.0, 2.0])}
      >>> new, state = opt.update({"w": torch.tensor([2.0, 0.0])}, opt.init(params), params, opt.hyper)
      >>> new["w"]
      tensor([0., 2.])
    """
    check_flags(nesterov=nesterov)
    hyper: dict[str, Value] = {"lr": checked("lr", lr)}
    with_momentum = not is_off(momentum)
    if with_momentum:
        hyper["momentum"] = checked("momentum", momentum)
        hyper["dampening"] = checked("dampening", dampening, REAL)
    if nesterov and not (with_momentum and is_off(dampening)):
        raise InvalidArgument(f"nesterov=True needs a momentum and zero dampening, got momentum={momentum}, dampening={dampening}.")

    def init(p: Tensor) -> SGDState:
        if not with_momentum:
            return SGDState((), ())
        return SGDState(torch.zeros_like(p), torch.zeros((), dtype=torch.int64, device=p.device))

    def update(p: Tensor, g: Tensor, state: SGDState, h: Numbers) -> tuple[Tensor, SGDState]:
        if isinstance(state.momentum_buffer, Tensor) and isinstance(state.step, Count):
            # Not a zero buffer plus (1 - dampening) * g: torch.optim.SGD starts the buffer with the undamped gradient.
            first = state.step == 0
            later = g if first is True else plus(state.momentum_buffer * fit(h["momentum"], p), 1 - double(h["dampening"]), g)
            buffer = choose(first, g, later)
            g = plus(g, h["momentum"], buffer) if nesterov else buffer
            state = SGDState(buffer, state.step + 1)
        return plus(p, -h["lr"], g), state

    return per_parameter(hyper, init, update, maximize, weight_decay=weight_decay)
