"""Makes an optimiser from what it does to one parameter: a function of the parameter, its gradient and its state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.errors import InvalidArgument, OptimizerMismatch
from adaptrt.optim.arithmetic import double, fit, plus, read
from adaptrt.optim.base import Number, Optimizer, Params, Value
from adaptrt.optim.checks import check_flags, check_grads, checked, is_off
from adaptrt.optim.schedule import scheduled

S = TypeVar("S")
"""The state of one parameter: a NamedTuple of tensors, whose fields have the names that `torch.optim` gives them."""

Numbers = Mapping[str, Number]
"""The hyperparameters of one parameter, by name: floats, or tensors that are 0-dim or of the parameter's shape."""


def per_parameter(
    hyper: Mapping[str, Value],
    init: Callable[[Tensor], S],
    update: Callable[[Tensor, Tensor, S, Numbers], tuple[Tensor, S]],
    maximize: bool = False,
    scalar: Collection[str] = (),
    weight_decay: Value = 0.0,
    decoupled: bool = False,
) -> Optimizer:
    """Returns the optimiser that applies `update` to every parameter that has a gradient. Its state is a dict by parameter name.

    Args:
      hyper: hyperparameters by name.
      init: parameter -> state before the first step.
      update: (parameter, gradient, state, numbers) -> (new parameter, new state), out of place.
      maximize: pass the negative gradient to `update`.
      scalar: names of hyperparameters that cannot have a value for each element, because what they enter has no axes.
      weight_decay: factor of an L2 penalty, whose derivative is added to the gradient. The Python number 0 removes the term and its name
        from `hyper`.
      decoupled: multiply the parameter by 1 - lr * weight_decay instead.
    """

    check_flags(maximize=maximize)
    with_decay = not is_off(weight_decay)
    if with_decay:
        hyper = {**hyper, "weight_decay": checked("weight_decay", weight_decay)}
    keys = tuple(hyper)
    forms: dict[tuple[int, ...], Any] = {}

    def form_for(p: Tensor) -> Any:
        if p.shape not in forms:
            forms[p.shape] = _form(init(torch.empty(p.shape, dtype=p.dtype, device="meta")))
        return forms[p.shape]

    def init_all(params: Params) -> dict[str, S]:
        state = {name: init(p) for name, p in params.items()}
        for name, p in params.items():
            forms.setdefault(p.shape, _form(state[name]))
        return state

    def update_all(
        grads: Params, state: Mapping[str, S], params: Params, hyper: Mapping[str, Value]
    ) -> tuple[dict[str, Tensor], dict[str, S]]:
        check_grads(grads, params)
        new, after = dict(params), dict(state)
        shared = {key: hyper[key] for key in keys if isinstance(hyper.get(key), float)}
        for name, grad in grads.items():
            if name not in state:
                raise OptimizerMismatch(f"state has no entry for parameter '{name}', only for {sorted(state)}. Make it by init(params).")
            p, old = params[name], state[name]
            # A state of another shape would be broadcast, and one made under other flags decide in their place.
            if _form(old) != form_for(p):
                raise OptimizerMismatch(
                    f"The state of parameter '{name}' must be like init(params)'s, {_describe(init(p))}; got {_describe(old)}. It was made "
                    "for other parameters, by another optimiser or under other flags."
                )
            numbers = cast("Numbers", shared) if len(shared) == len(keys) else {key: read(hyper, key, name, p) for key in keys}
            for key in scalar:
                number = numbers.get(key)
                if isinstance(number, Tensor) and number.dim():
                    raise InvalidArgument(f"{key} for parameter '{name}' must be one number, got a tensor of shape {list(number.shape)}.")
            g = -grad if maximize else grad
            if with_decay:
                decay = double(numbers["weight_decay"])
                if decoupled:
                    p = p * fit(1 - double(numbers["lr"]) * decay, p)
                else:
                    g = plus(g, decay, p)
            new[name], after[name] = update(p, g, old, numbers)
        return new, after

    return scheduled(Optimizer(init_all, update_all, hyper, init_is_constant=True))


def _describe(state: Any) -> str:
    return f"{type(state).__name__} of {tree.describe(state)}"


_SCALAR = torch.Size(())


def _form(state: Any) -> Any:
    """The type and the shapes of one parameter's state. A count of steps has the same form as an int and as a tensor."""
    if not isinstance(state, tuple):
        return None
    fields = cast("tuple[Any, ...]", state)
    kind: Any = type(fields)
    return kind, [field.shape if isinstance(field, Tensor) else _SCALAR if isinstance(field, int) else None for field in fields]
