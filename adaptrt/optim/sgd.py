"""Stochastic gradient descent, with the arithmetic of `torch.optim.SGD`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from adaptrt.errors import InvalidArgument
from adaptrt.optim.base import Optimizer, Params, Value, check_grads, checked, fit, is_off, read


class SGDState(NamedTuple):
    """Both empty where momentum is off."""

    momentum_buffer: dict[str, Tensor]
    step: dict[str, Tensor]
    """0-dim int64. Only zero or not matters: the first step of each parameter starts its buffer."""


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

        g = g + weight_decay * p                            # -g first, if maximize
        b = g at the first step, else momentum * b + (1 - dampening) * g
        d = g + momentum * b if nesterov else b
        p = p - lr * d

    The update is smooth in every input, so meta-gradients and hypergradients are exact everywhere. At the first step those of
    `momentum` (without `nesterov`) and `dampening` are zero, because the buffer starts as the gradient.

    Each number may be a float, a 0-dim tensor, or a mapping from parameter name to a float, a 0-dim tensor or a tensor of the parameter's
    shape. All of them are inputs of `update`, and a tensor that requires grad gets its hypergradient.

    Args:
      lr: step size, >= 0.
      momentum: share of the buffer that is kept, >= 0. The Python number 0 removes the buffer, and `momentum` and `dampening` from `hyper`.
      dampening: share of a gradient that is kept out of the buffer, from the second step on.
      weight_decay: L2 penalty's factor, >= 0. The Python number 0 removes the term and its name from `hyper`.
      nesterov: look ahead along the buffer; needs momentum and the Python number 0 as dampening.
      maximize: ascend.

    Raises:
      InvalidArgument: a number outside its domain, a tensor of several elements outside a mapping, or `nesterov` without its needs.
      InvalidType: an argument that is no number.

    Example:
      >>> opt = sgd(lr=0.5)
      >>> params = {"w": torch.tensor([1.0, 2.0])}
      >>> new, state = opt.update({"w": torch.tensor([2.0, 0.0])}, opt.init(params), params, opt.hyper)
      >>> new["w"]
      tensor([0., 2.])
    """
    hyper = live(
        lr=checked("lr", lr),
        momentum=checked("momentum", momentum),
        dampening=checked("dampening", dampening, low=float("-inf")),
        weight_decay=checked("weight_decay", weight_decay),
    )
    if nesterov and ("momentum" not in hyper or not is_off(dampening)):
        raise InvalidArgument(f"nesterov=True needs a momentum and zero dampening, got momentum={momentum}, dampening={dampening}.")
    with_momentum, with_decay = "momentum" in hyper, "weight_decay" in hyper

    def init(params: Params) -> SGDState:
        if not with_momentum:
            return SGDState({}, {})
        return SGDState(
            momentum_buffer={name: torch.zeros_like(p) for name, p in params.items()},
            step={name: torch.zeros((), dtype=torch.int64, device=p.device) for name, p in params.items()},
        )

    def update(grads: Params, state: SGDState, params: Params, hyper: Mapping[str, Value]) -> tuple[dict[str, Tensor], SGDState]:
        check_grads(grads, params)
        new, buffers, steps = dict(params), dict(state.momentum_buffer), dict(state.step)
        for name, grad in grads.items():
            p = params[name]
            g = -grad if maximize else grad
            if with_decay:
                g = g + p * fit(read(hyper, "weight_decay", name, p), p)
            if with_momentum:
                mu = fit(read(hyper, "momentum", name, p), p)
                kept = fit(1 - read(hyper, "dampening", name, p), p)
                # Not a zero buffer plus (1 - dampening) * g: torch.optim.SGD starts the buffer with the undamped gradient.
                buffer = torch.where(steps[name] == 0, g, buffers[name] * mu + g * kept)
                g = g + buffer * mu if nesterov else buffer
                buffers[name], steps[name] = buffer, steps[name] + 1
            new[name] = p - g * fit(read(hyper, "lr", name, p), p)
        return new, SGDState(buffers, steps)

    return Optimizer(init, update, hyper)


def live(*, lr: Value, momentum: Value, dampening: Value, weight_decay: Value) -> dict[str, Value]:
    """The hyperparameters that SGD reads: without those of the terms that are off."""
    hyper: dict[str, Value] = {"lr": lr}
    if not is_off(momentum):
        hyper["momentum"], hyper["dampening"] = momentum, dampening
    if not is_off(weight_decay):
        hyper["weight_decay"] = weight_decay
    return hyper
