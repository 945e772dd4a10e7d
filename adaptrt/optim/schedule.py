"""Hyperparameters that are functions of the step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from adaptrt.errors import InvalidArgument, InvalidType
from adaptrt.optim.base import Hyper, Optimizer, Params, PerTask, Schedule, State, Value
from adaptrt.optim.checks import REAL, checked


class ScheduledState(NamedTuple):
    """The state of an optimiser that has schedules among its hyperparameters."""

    num_updates: Tensor
    """0-dim int64: the number of updates so far."""
    state: State
    """The state of the optimiser without schedules."""


def schedule(fn: Callable[..., Any], **numbers: Any) -> Schedule:
    """Makes a hyperparameter that is a function of the step, for any argument of any optimiser; see also `torch.optim.lr_scheduler`.

    Args:
      fn: `fn(step, **numbers)` returns the value: a float, a 0-dim tensor, or a mapping from parameter name to those or to tensors of the
        parameter's shape. `step` is a 0-dim float64 tensor, 0 at the first step of an adaptation. `fn` is traced, so it must not branch on
        the value of `step`; use `torch.where`.
      numbers: what else `fn` reads: floats, tensors of any shape, or mappings of those. They are inputs of the program, as all
        hyperparameters are, and a tensor that requires grad is meta-learned. A number that stands in `fn` itself is a constant.

    Raises:
      InvalidType: `fn` cannot be called or hashed, or one of `numbers` is not a number.

    Example:
      >>> from adaptrt.optim import sgd
      >>> decay = torch.tensor(0.5, requires_grad=True)
      >>> opt = sgd(lr=schedule(lambda step, base, decay: base * decay**step, base=1.0, decay=decay))
      >>> params, grads = {"w": torch.tensor(0.0)}, {"w": torch.tensor(1.0)}
      >>> state = opt.init(params)
      >>> for _ in range(3):
      ...     params, state = opt.update(grads, state, params, opt.hyper)
      >>> params["w"].detach()
      tensor(-1.7500)
    """
    if not callable(fn) or not isinstance(fn, Hashable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidType(f"schedule takes a hashable function of the step, got {type(fn).__name__}.")
    return Schedule(fn, {key: _number(key, value) for key, value in numbers.items()})


def per_step(values: Tensor | PerTask | Sequence[float] | Mapping[str, Tensor | PerTask | Sequence[float]]) -> Schedule:
    """Makes a hyperparameter that has a value for each step, for any argument of any optimiser.

    If `lr` is a mapping with such a table for each parameter, this is LSLR, the learning rates per layer and step of MAML++ (Antoniou et
    al. 2019, arXiv 1810.09502).

    Args:
      values: k floats or a tensor [k]; or a mapping from parameter name to k floats, a tensor [k], or a tensor [k, *parameter's shape].
        Steps beyond the last entry use the last entry.

    Raises:
      InvalidArgument: a table is empty or a tensor without axes.
      InvalidType: a table is neither a floating-point tensor nor a sequence of numbers.

    Example:
      >>> from adaptrt.optim import sgd
      >>> rates = {"w": torch.tensor([1.0, 0.1], requires_grad=True)}
      >>> opt = sgd(lr=per_step(rates))
      >>> params, grads = {"w": torch.tensor(0.0)}, {"w": torch.tensor(1.0)}
      >>> state = opt.init(params)
      >>> for _ in range(2):
      ...     params, state = opt.update(grads, state, params, opt.hyper)
      >>> torch.autograd.grad(params["w"], rates["w"])[0]
      tensor([-1., -1.])
    """
    if isinstance(values, Mapping):
        return Schedule(_look_up, {"values": {name: _table(f"values['{name}']", value) for name, value in values.items()}})
    return Schedule(_look_up, {"values": _table("values", values)})


def per_task(values: Tensor) -> PerTask:
    """Makes a hyperparameter that has a value for each task of a call of `vmap()`, for any argument of any optimiser here.

    A `torch.optim` instance takes it in its `param_groups`, not in its constructor.

    Args:
      values: [T], or [T, *parameter's shape] in a mapping by parameter name, or in `per_step` [T, k].

    Raises:
      InvalidType: not a floating-point tensor.
      InvalidArgument: a tensor without axes.

    Example:
      >>> import adaptrt
      >>> rates = torch.tensor([0.0, 0.1], requires_grad=True)
      >>> model = torch.nn.Linear(2, 1)
      >>> opt = adaptrt.optim.sgd(lr=per_task(rates))
      >>> unroll = adaptrt.compile_unroll(model, opt, k=1, backend="eager").vmap()
      >>> support = torch.ones(2, 5, 2), torch.zeros(2, 5, 1)
      >>> adapted = unroll.adapt(support)
      >>> (
      ...     torch.equal(adapted.params["weight"][0], model.weight),
      ...     torch.equal(adapted.params["weight"][1], model.weight),
      ... )
      (True, False)
      >>> unroll(support, support).backward()
      >>> rates.grad.shape
      torch.Size([2])
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():  # pyright: ignore[reportUnnecessaryIsInstance]
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidType(f"per_task takes a floating-point tensor, one value for each task, got {found}.")
    if not values.dim() or not len(values):
        raise InvalidArgument(f"per_task takes a tensor with a value for each task along its first axis, got shape {list(values.shape)}.")
    return PerTask(values)


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _number(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _number(f"{key}['{name}']", entry) for name, entry in cast("Mapping[str, Any]", value).items()}
    if isinstance(value, PerTask) or (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    if not _is_number(value):
        raise InvalidType(f"schedule: {key} must be a finite number, a floating-point tensor or a mapping of those, got {value!r}.")
    return float(value)


def _table(name: str, value: object) -> Tensor | PerTask:
    if isinstance(value, PerTask):
        if value.values.dim() < 2:
            raise InvalidArgument(
                f"per_step: {name} must have an entry for each task and step, shape [T, k], got shape {list(value.values.shape)}."
            )
        return value
    if not isinstance(value, Tensor):
        entries = cast("Sequence[object]", value) if isinstance(value, Sequence) else [None]
        if not all(map(_is_number, entries)):
            raise InvalidType(f"per_step: {name} must be a tensor or a sequence of finite numbers, got {value!r}.")
        value = torch.tensor(entries, dtype=torch.float64, device="cpu")
    if not value.is_floating_point():
        raise InvalidType(f"per_step: {name} must be a floating-point tensor, got {value.dtype}.")
    if not value.dim() or not len(value):
        raise InvalidArgument(f"per_step: {name} must have an entry for each step along its first axis, got shape {list(value.shape)}.")
    return value


def _look_up(step: Tensor, values: Tensor | Mapping[str, Tensor]) -> Value:
    if isinstance(values, Mapping):
        return {name: cast("Tensor", _look_up(step, table)) for name, table in values.items()}
    # An index beyond the table would read foreign memory in compiled code.
    index = step.long().clamp(max=len(values) - 1)
    return values.index_select(0, index.reshape(1)).squeeze(0)


def _evaluate(key: str, value: Schedule, step: Tensor) -> Value:
    # Any number: a schedule's result is a tensor as a rule, and the values of tensors are not looked at.
    return checked(key, value.fn(step, **value.numbers), REAL)


def scheduled(optimizer: Optimizer) -> Optimizer:
    """Returns `optimizer` with the schedules among its hyperparameters evaluated at every update, or itself if there are none.

    The optimisers of this package call it. An optimiser of your own takes schedules if you make it by
    `scheduled(Optimizer(init, update, hyper))`.

    Raises:
      InvalidType: the hyperparameters of `optimizer` are not a mapping.
    """
    hyper: Any = optimizer.hyper
    if not isinstance(hyper, Mapping):
        raise InvalidType("scheduled takes an optimiser whose hyper is a mapping; give the schedules to the parts of a chain.")
    if not any(isinstance(value, Schedule) for value in cast("Mapping[str, Any]", hyper).values()):
        return optimizer

    def init(params: Params) -> ScheduledState:
        device = next((p.device for p in params.values()), None)
        return ScheduledState(torch.zeros((), dtype=torch.int64, device=device), optimizer.init(params))

    def update(grads: Params, state: ScheduledState, params: Params, hyper: Hyper) -> tuple[dict[str, Tensor], ScheduledState]:
        # As float64, because a float to the power of an int64 tensor would be float32.
        step = torch.div(state.num_updates, optimizer.updates_per_step, rounding_mode="floor").to(torch.float64)
        now = {key: _evaluate(key, value, step) if isinstance(value, Schedule) else value for key, value in hyper.items()}
        new, inner = optimizer.update(grads, state.state, params, now)
        return new, ScheduledState(state.num_updates + 1, inner)

    return dataclasses.replace(optimizer, init=init, update=update)
