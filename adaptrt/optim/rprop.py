"""Resilient backpropagation, with the arithmetic of `torch.optim.Rprop`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from adaptrt.optim.arithmetic import choose, fit, larger, smaller
from adaptrt.optim.base import Count, Optimizer, Value
from adaptrt.optim.checks import Domain, checked, entries
from adaptrt.optim.per_parameter import Numbers, per_parameter


class RpropState(NamedTuple):
    """The state of one parameter: tensors of its shape and dtype unless noted."""

    step: Count
    """Only whether it is zero matters: the first step sets `step_size`."""
    prev: Tensor
    """The last gradient, with zeros where its sign had changed."""
    step_size: Tensor


def rprop(
    lr: Value = 1e-2,
    etas: tuple[Value, Value] = (0.5, 1.2),
    step_sizes: tuple[Value, Value] = (1e-6, 50.0),
    maximize: bool = False,
) -> Optimizer:
    """Rprop: steps by the sign of the gradient; an element's step grows while its sign stays (Riedmiller & Braun 1993).

    For each parameter p with gradient g, all of one shape, where s is `lr` and `prev` is zero before the first step:

        s = s * (eta_plus if g * prev > 0 else eta_minus if g * prev < 0 else 1), clamped to [step_size_min, step_size_max]
        g = 0 where g * prev < 0                            # if maximize, g is negated first
        p = p - s * sign(g);  prev = g

    Meta-gradients: as a function of g the update is constant, except that it jumps where a sign changes. So its derivative along g is zero:
    the meta-gradient with respect to the initial weights is that of the identity, and data get none. Hypergradients of `lr`, `etas` and
    `step_sizes` are exact. Nothing is singular at equal signs or at a zero gradient. Where a size equals a limit, the derivative is that of
    the size.

    Each number may be of the kinds that `sgd` takes. In `hyper` they are named `lr`, `eta_minus`, `eta_plus`, `step_size_min` and
    `step_size_max`.

    Args:
      lr: size of the first step of every element, >= 0.
      etas: factor of the size where the sign changes, in (0, 1), and factor where it stays, above 1.
      step_sizes: smallest and largest size, each >= 0.
      maximize: step along the gradient instead of against it.

    Raises:
      InvalidArgument: a number is outside its domain, or a tensor of several elements is not an entry of a mapping.
      InvalidType: an argument is not a number.

    Example:
      >>> opt = rprop(lr=0.1)
      >>> params = {"w": torch.tensor([1.0, 1.0])}
      >>> new, state = opt.update({"w": torch.tensor([3.0, -0.5])}, opt.init(params), params, opt.hyper)
      >>> new["w"]
      tensor([0.9000, 1.1000])
    """
    (eta_minus, eta_plus), (smallest, largest) = entries("etas", etas, 2), entries("step_sizes", step_sizes, 2)
    hyper = {
        "lr": checked("lr", lr),
        "eta_minus": checked("etas[0]", eta_minus, Domain(0.0, 1.0, with_low=False, with_high=False)),
        "eta_plus": checked("etas[1]", eta_plus, Domain(1.0, with_low=False)),
        "step_size_min": checked("step_sizes[0]", smallest),
        "step_size_max": checked("step_sizes[1]", largest),
    }

    def init(p: Tensor) -> RpropState:
        return RpropState(torch.zeros((), dtype=torch.int64, device=p.device), torch.zeros_like(p), torch.zeros_like(p))

    def update(p: Tensor, g: Tensor, state: RpropState, h: Numbers) -> tuple[Tensor, RpropState]:
        agreement = g * state.prev
        size = choose(state.step == 0, torch.zeros_like(p) + fit(h["lr"], p), state.step_size)
        grown = torch.where(agreement > 0, size * fit(h["eta_plus"], p), size)
        size = torch.where(agreement < 0, size * fit(h["eta_minus"], p), grown)
        size = smaller(larger(size, h["step_size_min"]), h["step_size_max"])
        g = torch.where(agreement < 0, 0.0, g)
        return p - size * torch.sign(g), RpropState(state.step + 1, g, size)

    return per_parameter(hyper, init, update, maximize)
