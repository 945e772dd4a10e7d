"""Optimisers that are made of another: anchored at the start, sharpness-aware, safe from numbers that are not finite, averaging.

Each returns an `Optimizer`, so they can be nested. `hyper` is a dict of the wrapper's own numbers, with the other optimiser's under
"optimizer".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.errors import InvalidArgument, InvalidType
from adaptrt.optim.arithmetic import average, fit, plus, read, safe_sqrt
from adaptrt.optim.base import Optimizer, Params, State, Value
from adaptrt.optim.checks import FRACTION, checked, scalar
from adaptrt.optim.schedule import scheduled


class ProximalState(NamedTuple):
    """The state of `proximal`: where the adaptation started, by name, and the other optimiser's state."""

    anchor: dict[str, Tensor]
    state: State


def proximal(opt: Optimizer, strength: Value, weights: Mapping[str, Tensor] | None = None) -> Optimizer:
    """Pulls the parameters back to where the adaptation started.

        g = g + strength * weights * (p - anchor)

    That is the gradient of `strength / 2 * sum(weights * (p - anchor)**2)`, as if that were added to the loss; the losses that are
    reported are without it. Without weights it is iMAML's regulariser (Rajeswaran et al. 2019) and L2-SP (Li et al. 2018); with Fisher
    information as weights it is EWC (Kirkpatrick et al. 2017). The anchor is part of the state: the parameters when the first call began,
    whatever start= later calls are given, and gradients flow to it. A parameter without a gradient stays as it is.

    Args:
      opt: makes the steps.
      strength: >= 0; a number, a schedule, or a mapping by parameter name.
      weights: for each parameter a tensor of its shape, or 0-dim. None: 1.
    Raises:
      InvalidArgument: a number is outside its domain; or, from `update`, a parameter has no weight, or one of another shape.
      InvalidType: `opt` is not an `Optimizer`.

    Example:
      >>> from adaptrt.optim import sgd
      >>> opt = proximal(sgd(lr=0.5), strength=1.0)
      >>> state = opt.init({"w": torch.tensor(1.0)})
      >>> opt.update({"w": torch.tensor(0.0)}, state, {"w": torch.tensor(3.0)}, opt.hyper)[0]["w"]
      tensor(2.)
    """
    _require_optimizer("proximal", opt)
    hyper = {
        "strength": checked("strength", strength),
        "weights": () if weights is None else checked("weights", dict(weights)),
        "optimizer": opt.hyper,
    }

    def init(params: Params) -> ProximalState:
        return ProximalState({name: value.clone() for name, value in params.items()}, opt.init(params))

    def update(grads: Params, state: ProximalState, params: Params, hyper: Mapping[str, Any]) -> tuple[dict[str, Tensor], ProximalState]:
        pulled: dict[str, Tensor] = {}
        for name, grad in grads.items():
            p = params[name]
            pull = p - state.anchor[name]
            if hyper["weights"] != ():
                pull = pull * fit(read(hyper, "weights", name, p), p)
            pulled[name] = plus(grad, read(hyper, "strength", name, p), pull)
        new, inner = opt.update(pulled, state.state, params, hyper["optimizer"])
        return new, ProximalState(state.anchor, inner)

    return scheduled(dataclasses.replace(opt, init=init, update=update, hyper=hyper, init_is_constant=False))


class SharpnessState(NamedTuple):
    """The state of `sharpness_aware`: whether the next update goes up, where it goes up from, and the other optimiser's state."""

    ascends: Tensor
    origin: dict[str, Tensor]
    state: State


def sharpness_aware(opt: Optimizer, radius: Value) -> Optimizer:
    """Steps by the gradient at the worst point near the parameters (SAM, Foret et al. 2021).

        q = p + radius * g(p) / |g(p)|;  p = opt(p, g(q))

    |g| is the joint norm of all gradients. A step takes two gradients, so buffers that forward changes are changed twice; the loss that is
    reported is that at p. The meta-gradient flows through both gradients. Where g(p) is zero, q is p.

    Args:
      opt: makes the step; one that takes one gradient a step.
      radius: >= 0; a number or a schedule.
    Raises:
      InvalidArgument: a number is outside its domain, or `opt` takes several gradients a step, as L-BFGS does.
      InvalidType: `opt` is not an `Optimizer`.
    """
    _require_optimizer("sharpness_aware", opt, one_update=True)
    hyper = {"radius": checked("radius", radius), "optimizer": opt.hyper}
    scalar(hyper, "radius")

    def init(params: Params) -> SharpnessState:
        device = next((value.device for value in params.values()), None)
        origin = {name: torch.zeros_like(value) for name, value in params.items()}
        return SharpnessState(torch.ones((), dtype=torch.bool, device=device), origin, opt.init(params))

    def update(grads: Params, state: SharpnessState, params: Params, hyper: Mapping[str, Any]) -> tuple[dict[str, Tensor], SharpnessState]:
        up = state.ascends
        wide = [grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads.values()]
        norm = safe_sqrt(torch.stack([torch.sum(grad * grad) for grad in wide]).sum()) if wide else torch.zeros(())
        factor = scalar(hyper, "radius") / torch.where(norm > 0, norm, 1.0)
        origin = {name: torch.where(up, value, state.origin[name]) for name, value in params.items()}
        # Zeros in the place of gradients that count for the ascent only: they may be anything to the other optimiser.
        down = {name: torch.where(up, 0.0, grad) for name, grad in grads.items()}
        new, inner = opt.update(down, state.state, origin, hyper["optimizer"])
        ascended = {name: value + fit(factor, value) * grads[name] if name in grads else value for name, value in params.items()}
        after = {name: torch.where(up, ascended[name], new[name]) for name in params}
        return after, SharpnessState(~up, origin, tree.where(up, state.state, inner))

    made = dataclasses.replace(opt, init=init, update=update, hyper=hyper, updates_per_step=2, remembers_step=True)
    return scheduled(made)


class SkippingState(NamedTuple):
    """The state of `skip_not_finite`: how many updates were skipped (0-dim int64), and the other optimiser's state."""

    num_skipped: Tensor
    state: State


def skip_not_finite(opt: Optimizer) -> Optimizer:
    """Leaves parameters and the other optimiser's state as they are where a gradient is NaN or infinite, as `GradScaler` does.

    Decided for all parameters together, in the program, and by task. Buffers that forward has changed stay changed. A meta-gradient through
    the loss of such a step is still NaN; guards (`adapt(keep="finite")`) and `reduction="none"` show which tasks are concerned.

    Args:
      opt: makes the steps.
    Raises:
      InvalidType: `opt` is not an `Optimizer`.
    """
    _require_optimizer("skip_not_finite", opt)

    def init(params: Params) -> SkippingState:
        device = next((value.device for value in params.values()), None)
        return SkippingState(torch.zeros((), dtype=torch.int64, device=device), opt.init(params))

    def update(grads: Params, state: SkippingState, params: Params, hyper: Mapping[str, Any]) -> tuple[dict[str, Tensor], SkippingState]:
        if not grads:
            return dict(params), state
        good = torch.stack([torch.isfinite(grad).all() for grad in grads.values()]).all()
        # Zeros first, so that what follows, and its derivative, has finite numbers only.
        new, inner = opt.update({n: torch.where(good, grad, 0.0) for n, grad in grads.items()}, state.state, params, hyper["optimizer"])
        after = {name: torch.where(good, new[name], value) for name, value in params.items()}
        return after, SkippingState(state.num_skipped + ~good, tree.where(good, inner, state.state))

    return dataclasses.replace(opt, init=init, update=update, hyper={"optimizer": opt.hyper})


class AveragingState(NamedTuple):
    """The state of `ema`: the average of the parameters, by name, and the other optimiser's state."""

    average: dict[str, Tensor]
    state: State


def ema(opt: Optimizer, decay: Value) -> Optimizer:
    """Keeps an exponential moving average of the parameters beside them, as the mean teacher (Tarvainen & Valpola 2017).

        average = decay * average + (1 - decay) * p, after each step; the first average is the start

    The average is `adapted.opt_state.average`; `adapted.replace(params=adapted.opt_state.average)` predicts with it.

    Args:
      opt: makes the steps; one that takes one gradient a step. For the average of a sharpness-aware optimiser write
        `sharpness_aware(ema(opt, decay), radius)`.
      decay: from 0 to below 1; a number, a schedule, or a mapping by parameter name.
    Raises:
      InvalidArgument: a number is outside its domain, or `opt` takes several gradients a step.
      InvalidType: `opt` is not an `Optimizer`.
    """
    _require_optimizer("ema", opt, one_update=True)
    hyper = {"decay": checked("decay", decay, FRACTION), "optimizer": opt.hyper}

    def init(params: Params) -> AveragingState:
        return AveragingState({name: value.clone() for name, value in params.items()}, opt.init(params))

    def update(grads: Params, state: AveragingState, params: Params, hyper: Mapping[str, Any]) -> tuple[dict[str, Tensor], AveragingState]:
        new, inner = opt.update(grads, state.state, params, hyper["optimizer"])
        means = {name: average(old, new[name], read(hyper, "decay", name, old)) for name, old in state.average.items()}
        return new, AveragingState(means, inner)

    return scheduled(dataclasses.replace(opt, init=init, update=update, hyper=hyper, init_is_constant=False))


def _require_optimizer(name: str, opt: object, one_update: bool = False) -> None:
    if not isinstance(opt, Optimizer):
        raise InvalidType(f"{name} takes an adaptrt.optim.Optimizer such as adaptrt.optim.sgd(lr=0.1), got {type(opt).__name__}.")
    if one_update and opt.updates_per_step != 1:
        raise InvalidArgument(
            f"{name} takes an optimiser with one gradient a step; this one takes {opt.updates_per_step}. Put {name} within it, or leave it "
            "out."
        )
