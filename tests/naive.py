"""The oracle: k inner steps as an eager loop over `torch.autograd.grad(create_graph=True)`, written to be checked by eye.

The optimisers' arithmetic stands here once more, as `torch.optim` documents it. The model is called through
`torch.func.functional_call`, as adaptrt calls it; what that call itself gets wrong, tests against `torch.optim` on the module must find.
Everything is an argument and stays in autograd, so `torch.autograd.grad` of what it returns is the meta-gradient of whatever the caller
marked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

Tensors: TypeAlias = Mapping[str, Tensor]
State: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Each parameter's optimiser state by name, under the keys of `torch.optim`; no entry before a parameter's first step."""
Rule: TypeAlias = Callable[..., tuple[Tensor, dict[str, Any]]]
"""(p, g, state of p, **hyperparameters) -> (p, state of p)."""
Noise: TypeAlias = Callable[[int], AbstractContextManager[Any]]
"""A block for each step, in which random operations return given values; index k is the query's."""


def sgd(
    p: Tensor,
    g: Tensor,
    state: Mapping[str, Any],
    lr: Any,
    momentum: Any = 0.0,
    dampening: Any = 0.0,
    weight_decay: Any = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    g = (-g if maximize else g) + weight_decay * p
    if momentum == 0:
        return p - lr * g, {}
    buffer = momentum * state["momentum_buffer"] + (1 - dampening) * g if state else g
    return p - lr * (g + momentum * buffer if nesterov else buffer), {"momentum_buffer": buffer}


def adam(
    p: Tensor,
    g: Tensor,
    state: Mapping[str, Any],
    lr: Any,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    g = -g if maximize else g
    if decoupled:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    zero = torch.zeros_like(p)
    state = state or {"step": 0, "exp_avg": zero, "exp_avg_sq": zero, "max_exp_avg_sq": zero}
    t = int(state["step"]) + 1
    m = betas[0] * state["exp_avg"] + (1 - betas[0]) * g
    v = betas[1] * state["exp_avg_sq"] + (1 - betas[1]) * g**2
    largest = torch.maximum(state["max_exp_avg_sq"], v) if amsgrad else v
    # Where every gradient so far was zero, m / (sqrt(v) + eps) is a function of g with slope 1 / eps; sqrt alone has none there.
    root = torch.where(largest > 0, torch.where(largest > 0, largest, 1.0).sqrt(), 0.0)
    p = p - lr * (m / (1 - betas[0] ** t)) / (root / (1 - betas[1] ** t) ** 0.5 + eps)
    return p, {"step": t, "exp_avg": m, "exp_avg_sq": v, **({"max_exp_avg_sq": largest} if amsgrad else {})}


def adamw(p: Tensor, g: Tensor, state: Mapping[str, Any], **hyper: Any) -> tuple[Tensor, dict[str, Any]]:
    return adam(p, g, state, decoupled=True, **hyper)


class Loop(NamedTuple):
    """What an unroll is made of; `hyper` values may be mappings by parameter name. `loss` takes (output, target) or (output)."""

    model: nn.Module
    loss: Callable[..., Tensor]
    rule: Rule
    hyper: Mapping[str, Any]
    k: int
    per_step: bool = False
    first_order: bool = False
    num_differentiated: int | None = None  # of the last steps; None for all


class Start(NamedTuple):
    """Where it begins: parameters that adapt, those that do not, buffers, optimiser state."""

    params: Tensors
    frozen: Tensors
    buffers: Tensors
    state: State


class Adapted(NamedTuple):
    params: dict[str, Tensor]
    frozen: Tensors
    buffers: dict[str, Tensor]
    state: dict[str, Mapping[str, Any]]
    losses: Tensor


def as_drawn(step: int) -> AbstractContextManager[None]:
    """Noise from the global generator, as plain eager code draws it."""
    del step
    return contextlib.nullcontext()


def adapt(loop: Loop, start: Start | Adapted, support: Sequence[Any], noise: Noise = as_drawn) -> Adapted:
    params, buffers, state = dict(start.params), dict(start.buffers), dict(start.state)
    losses: list[Tensor] = []
    for step in range(loop.k):
        if loop.num_differentiated is not None and step == loop.k - loop.num_differentiated:
            params, _, buffers, state, found = detached(Adapted(params, {}, buffers, state, torch.stack(losses)))
            losses = list(found)
        batch = tree_map(lambda value, step=step: value[step], support) if loop.per_step else support
        with noise(step):
            loss, buffers = evaluate(loop, {**start.frozen, **params}, buffers, batch)
        losses.append(loss)
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
        for name, grad in zip(list(params), grads, strict=True):
            if grad is not None:
                hyper = {key: value[name] if isinstance(value, Mapping) else value for key, value in loop.hyper.items()}
                grad = grad.detach() if loop.first_order else grad
                params[name], state[name] = loop.rule(params[name], grad, state.get(name, {}), **hyper)
    return Adapted(params, start.frozen, buffers, state, torch.stack(losses))


def detached(after: Adapted) -> Adapted:
    """The same values as constants."""
    constant = tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, after)
    return constant._replace(params={name: value.requires_grad_() for name, value in constant.params.items()})  # a step starts from them


def meta_loss(loop: Loop, start: Start | Adapted, support: Sequence[Any], query: Sequence[Any], noise: Noise = as_drawn) -> Tensor:
    after = adapt(loop, start, support, noise)
    with noise(loop.k):
        return evaluate(loop, {**after.frozen, **after.params}, after.buffers, query)[0]


def evaluate(loop: Loop, params: Tensors, buffers: Tensors, batch: Sequence[Any]) -> tuple[Tensor, dict[str, Tensor]]:
    output, buffers = call(loop.model, params, buffers, batch[0])
    return loop.loss(output, *batch[1:]), buffers


class WeightNorm(TorchFunctionMode):
    """`g * v / |v|`, the norm over all axes but one, in place of `torch._weight_norm`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch._weight_norm:  # pyright: ignore[reportPrivateImportUsage]
            return func(*args, **(kwargs or {}))
        v, g, dim = args
        axes = [axis for axis in range(v.dim()) if axis != dim % v.dim()] if dim != -1 else list(range(v.dim()))
        return g * v / v.square().sum(axes, keepdim=True).sqrt()


def call(model: nn.Module, params: Tensors, buffers: Tensors, inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """The model's output under these parameters and buffers, and the buffers afterwards."""
    values = {**params, **{name: value.clone() for name, value in buffers.items()}}
    first: dict[int, str] = {}
    for path, part in model.named_modules():
        for name, tensor in (*part.named_parameters(path, recurse=False), *part.named_buffers(path, recurse=False)):
            values[name] = values[first.setdefault(id(tensor), name)]  # a tied tensor goes by its first name
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    # The only attention kernel with a second derivative; and PyTorch's weight norm, whose second derivative is wrong.
    with sdpa_kernel(SDPBackend.MATH), WeightNorm():
        output = torch.func.functional_call(model, values, args, kwargs, tie_weights=False)
    return output, {name: values[name] for name in buffers}
