"""Compositions of optimisers: one after transforms and before others, and several side by side, each for some of the parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from adaptrt.errors import InvalidArgument, InvalidType
from adaptrt.optim.arithmetic import fit, safe_sqrt, smaller
from adaptrt.optim.base import Hyper, Number, Optimizer, Params, State, Transform, Value
from adaptrt.optim.checks import checked, scalar


class ScheduleState(NamedTuple):
    """The state of `scale_by_schedule`."""

    step: Tensor
    """0-dim int64: the number of updates so far."""


def chain(*parts: Transform | Optimizer) -> Optimizer:
    """Makes one optimiser of an optimiser and transforms.

    Transforms before the optimiser act on the gradients. Transforms after it act on its step, which is new params - params. A parameter
    without a gradient takes no part in either.

    Args:
      parts: any number of transforms and exactly one optimiser, in the order in which they apply.

    Returns:
      An optimiser whose `hyper` and whose state are tuples with one entry for each part.

    Raises:
      InvalidArgument: there is not exactly one optimiser among `parts`, or something follows an optimiser that remembers its step (L-BFGS).
      InvalidType: a part is neither a transform nor an optimiser.

    Example:
      >>> from adaptrt.optim import sgd
      >>> opt = chain(clip_by_global_norm(1.0), sgd(lr=1.0))
      >>> params = {"w": torch.tensor([0.0, 0.0])}
      >>> new, state = opt.update({"w": torch.tensor([30.0, 40.0])}, opt.init(params), params, opt.hyper)
      >>> new["w"]
      tensor([-0.6000, -0.8000])
    """
    for part in parts:
        _check_part(part)
    middles = [index for index, part in enumerate(parts) if isinstance(part, Optimizer)]
    if len(middles) != 1:
        raise InvalidArgument(f"chain needs exactly one optimiser among its parts, got {len(middles)} among {len(parts)}.")
    middle = middles[0]

    def init(params: Params) -> tuple[State, ...]:
        return tuple(part.init(params) for part in parts)

    def update(
        grads: Params, state: tuple[State, ...], params: Params, hyper: tuple[Hyper, ...]
    ) -> tuple[dict[str, Tensor], tuple[State, ...]]:
        new, updates = dict(params), dict(grads)
        states: list[State] = []
        for index, (part, part_state, part_hyper) in enumerate(zip(parts, state, hyper, strict=True)):
            result, part_state = part.update(updates, part_state, params, part_hyper)
            states.append(part_state)
            if index == middle:
                # Where nothing follows, `new` is the optimiser's own result: params + (new - params) would round once more.
                new = result
                updates = {} if index + 1 == len(parts) else {name: result[name] - params[name] for name in updates}
            else:
                updates = result
        return new | {name: params[name] + step for name, step in updates.items()}, tuple(states)

    optimizer = parts[middle]
    assert isinstance(optimizer, Optimizer)
    if optimizer.remembers_step and middle + 1 < len(parts):
        raise InvalidArgument(
            "Nothing may follow this optimiser in a chain: its state holds the step that it made, which a transform would change."
        )
    return dataclasses.replace(
        optimizer,
        init=init,
        update=update,
        hyper=tuple(part.hyper for part in parts),
        init_is_constant=all(part.init_is_constant for part in parts),
    )


def clip_by_global_norm(max_norm: Value, eps: Value = 1e-6) -> Transform:
    """Scales all updates by one factor so that their joint L2 norm is at most `max_norm` (Pascanu et al. 2013, arXiv 1211.5063).

        norm = sqrt(sum over parameters of sum(u**2))
        u = u * min(max_norm / (norm + eps), 1)

    This is the formula of `torch.nn.utils.clip_grad_norm_`, whose eps is 1e-6. The meta-gradient flows through the factor. Where nothing is
    clipped, it is the meta-gradient of the identity; so it is at zero norm, where the derivative of the norm is taken as 0. At the very
    threshold it is that of the clipped side. The norm is computed in float32 or wider.

    Args:
      max_norm: largest norm, >= 0; a float or a 0-dim tensor.
      eps: keeps the quotient finite, >= 0; a float or a 0-dim tensor.

    Raises:
      InvalidArgument: a number is negative, or is given as a mapping although there is one norm for all parameters.
    """
    hyper = {"max_norm": checked("max_norm", max_norm), "eps": checked("eps", eps)}
    for key in hyper:
        scalar(hyper, key)

    def init(params: Params) -> tuple[()]:
        del params
        return ()

    def update(updates: Params, state: tuple[()], params: Params, hyper: Mapping[str, Value]) -> tuple[dict[str, Tensor], tuple[()]]:
        del params
        if not updates:
            return {}, state
        wide = [u.to(torch.promote_types(u.dtype, torch.float32)) for u in updates.values()]
        norm = safe_sqrt(sum((torch.sum(u * u) for u in wide[1:]), start=torch.sum(wide[0] * wide[0])))
        factor = smaller(scalar(hyper, "max_norm") / (norm + scalar(hyper, "eps")), 1.0)
        return {name: u * fit(factor, u) for name, u in updates.items()}, state

    return Transform(init, update, hyper, init_is_constant=True)


def scale_by_schedule(fn: Callable[[Tensor], Number]) -> Transform:
    """Multiplies all updates by a function of the number of updates so far.

        u = u * fn(step); step = step + 1

    After an optimiser whose step is proportional to its `lr`, this is `torch.optim.lr_scheduler.LambdaLR`.

    Args:
      fn: a function from a 0-dim float64 tensor, which is 0 at the first update, to the factor: a float or a 0-dim tensor. It is traced,
        so it must not branch on the value; use `torch.where`. To look a factor up, write `lambda step: table[step.long()]`.

    Example:
      >>> from adaptrt.optim import sgd
      >>> opt = chain(sgd(lr=1.0), scale_by_schedule(lambda step: 0.5**step))
      >>> params, grads = {"w": torch.tensor(0.0)}, {"w": torch.tensor(1.0)}
      >>> state = opt.init(params)
      >>> for _ in range(3):
      ...     params, state = opt.update(grads, state, params, opt.hyper)
      >>> params["w"]
      tensor(-1.7500)
    """

    def init(params: Params) -> ScheduleState:
        device = next((p.device for p in params.values()), None)
        return ScheduleState(torch.zeros((), dtype=torch.int64, device=device))

    def update(updates: Params, state: ScheduleState, params: Params, hyper: Hyper) -> tuple[dict[str, Tensor], ScheduleState]:
        del params, hyper
        # As float64, because a float to the power of an int64 tensor would be float32.
        factor = fn(state.step.to(torch.float64))
        return {name: u * fit(factor, u) for name, u in updates.items()}, ScheduleState(state.step + 1)

    return Transform(init, update, init_is_constant=True)


def partition(optimizers: Mapping[str, Optimizer], labels: Mapping[str, str]) -> Optimizer:
    """Makes one optimiser that treats different parameters by different optimisers, as parameter groups do in `torch.optim`.

    Args:
      optimizers: the optimisers by label.
      labels: the label of each parameter by the parameter's name.

    Returns:
      An optimiser whose `hyper` and whose state are dicts by label.

    Raises:
      InvalidArgument: no optimiser has one of the labels, or the optimisers have different `updates_per_step`; or, from `init` and
        `update`, a parameter has no label.
      InvalidType: one of `optimizers` is not an `Optimizer`.

    Example:
      >>> from adaptrt.optim import adam, sgd
      >>> opt = partition(
      ...     {"body": sgd(lr=0.1), "head": adam(lr=0.01)}, {"conv.weight": "body", "fc.weight": "head"}
      ... )
      >>> opt.hyper["body"]
      {'lr': 0.1}
    """
    optimizers, labels = dict(optimizers), dict(labels)
    for label, optimizer in optimizers.items():
        if not isinstance(optimizer, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidType(f"optimizers['{label}'] must be an adaptrt.optim.Optimizer, got {type(optimizer).__name__}.")
    for name, label in labels.items():
        if label not in optimizers:
            raise InvalidArgument(f"labels['{name}'] is '{label}', but there are optimisers for {sorted(optimizers)} only.")

    def split(tensors: Params) -> dict[str, dict[str, Tensor]]:
        parts: dict[str, dict[str, Tensor]] = {label: {} for label in optimizers}
        for name, tensor in tensors.items():
            if name not in labels:
                raise InvalidArgument(f"Parameter '{name}' has no label in partition(..., labels). Add it; known: {sorted(labels)}.")
            parts[labels[name]][name] = tensor
        return parts

    def init(params: Params) -> dict[str, State]:
        parts = split(params)
        return {label: optimizer.init(parts[label]) for label, optimizer in optimizers.items()}

    def update(
        grads: Params, state: Mapping[str, State], params: Params, hyper: Mapping[str, Hyper]
    ) -> tuple[dict[str, Tensor], dict[str, State]]:
        grad_parts, param_parts = split(grads), split(params)
        new, states = dict(params), dict(state)
        for label, optimizer in optimizers.items():
            part, states[label] = optimizer.update(grad_parts[label], state[label], param_parts[label], hyper[label])
            new.update(part)
        return new, states

    counts = {label: optimizer.updates_per_step for label, optimizer in optimizers.items()}
    if len(set(counts.values())) > 1:
        raise InvalidArgument(f"The optimisers of a partition must make equally many updates a step, got {counts}.")
    return Optimizer(
        init,
        update,
        {label: optimizer.hyper for label, optimizer in optimizers.items()},
        next(iter(counts.values()), 1),
        any(optimizer.remembers_step for optimizer in optimizers.values()),
        all(optimizer.init_is_constant for optimizer in optimizers.values()),
        tuple([module for optimizer in optimizers.values() for module in optimizer.modules]),
    )


def _check_part(part: object) -> None:
    if not isinstance(part, Optimizer | Transform):
        raise InvalidType(
            f"chain takes adaptrt.optim.Transform and Optimizer objects, got {type(part).__name__}. "
            "Build the optimiser with adaptrt.optim, for example sgd(lr=0.1)."
        )
