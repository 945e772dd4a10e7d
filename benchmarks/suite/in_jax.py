"""The workloads in JAX: models on parameters named as the PyTorch model names them, optax's optimisers, `jit`."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from jax import lax

from benchmarks.suite import workloads
from benchmarks.suite.workloads import Workload

Array = Any
Params = Mapping[str, Array]


if jax.default_backend() != "cpu":  # float32 means float32: else products and convolutions are in TF32 on a GPU
    jax.config.update("jax_default_matmul_precision", "highest")


def calls(workload: Workload, dtype: torch.dtype) -> dict[str, Callable[[], list[Array]]]:
    """Compiled at their first call; each returns when its results are there."""
    with jax.enable_x64(dtype is torch.float64):
        return _calls(workload, dtype)


def _calls(workload: Workload, dtype: torch.dtype) -> dict[str, Callable[[], list[Array]]]:
    model = workload.model(dtype)
    held = {name: jnp.asarray(p.detach().cpu().numpy()) for name, p in (*model.named_parameters(), *model.named_buffers())}
    start = {name: held[name] for name, p in model.named_parameters() if p.requires_grad}
    others = {name: value for name, value in held.items() if name not in start}
    support, query = ((_array(x), _array(y)) for x, y in workload.batches(dtype))
    apply, loss_of = MODELS[workload.make], LOSSES[workload.loss]
    optimizer = {"sgd": optax.sgd, "adam": optax.adam}[workload.optimizer](workload.numbers["lr"], **_rest(workload))

    def loss(params: Params, others: Params, batch: Any) -> Array:
        return loss_of(apply({**others, **params}, batch[0]), batch[1])

    def adapt(params: Any, others: Params, support: Any, query: Any) -> Params:
        del query
        state = optimizer.init(params)
        for _ in range(workload.k):
            updates, state = optimizer.update(jax.grad(loss)(params, others, support), state, params)
            params = optax.apply_updates(params, updates)
        return params

    def predict(params: Params, others: Params, support: Any, query: Any) -> Array:
        return apply({**others, **adapt(params, others, support, query)}, query[0])

    def objective(params: Params, others: Params, support: Any, query: Any) -> Array:
        return loss(adapt(params, others, support, query), others, query)

    if workload.num_tasks is None:
        functions = {"adapt": adapt, "predict": predict, "meta": jax.grad(objective)}
    else:
        over = (None, None, 0, 0)

        def mean(*args: Any) -> Array:
            return jax.vmap(objective, over)(*args).mean()

        functions = {"adapt": jax.vmap(adapt, over), "predict": jax.vmap(predict, over), "meta": jax.grad(mean)}

    def call(function: Callable[..., Any]) -> Callable[[], list[Array]]:
        compiled = jax.jit(function)

        def run() -> list[Array]:
            if dtype is torch.float64:
                with jax.enable_x64(True):
                    found = jax.block_until_ready(compiled(start, others, support, query))
            else:
                found = jax.block_until_ready(compiled(start, others, support, query))
            return [found[name] for name in start] if isinstance(found, dict) else [found]

        return run

    return {quantity: call(function) for quantity, function in functions.items()}


def _array(value: Any) -> Array:
    array = value.cpu().numpy()
    return jnp.asarray(array.astype(np.int32) if array.dtype == np.int64 else array)


def _rest(workload: Workload) -> dict[str, float]:
    return {name: value for name, value in workload.numbers.items() if name != "lr"}


# --- layers


def linear(p: Params, name: str, x: Array) -> Array:
    y = x @ p[f"{name}.weight"].T
    bias = p.get(f"{name}.bias")
    return y if bias is None else y + bias


def conv(x: Array, weight: Array, stride: int = 1, padding: int = 1) -> Array:
    pads = [(padding, padding)] * 2
    return lax.conv_general_dilated(x, weight, (stride, stride), pads, dimension_numbers=("NCHW", "OIHW", "NCHW"))


def max_pool(x: Array, size: int, stride: int, padding: int = 0) -> Array:
    pads = [(0, 0), (0, 0), (padding, padding), (padding, padding)]
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, size, size), (1, 1, stride, stride), pads)


def normalised(p: Params, name: str, x: Array, mean: Array, variance: Array, shape: tuple[int, ...]) -> Array:
    scale = p[f"{name}.weight"] * lax.rsqrt(variance + 1e-5)
    return (x - mean.reshape(shape)) * scale.reshape(shape) + p[f"{name}.bias"].reshape(shape)


def layer_norm(p: Params, name: str, x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


# --- models


def sine_mlp(p: Params, x: Array) -> Array:
    for name in ("0", "2"):
        x = jax.nn.relu(linear(p, name, x))
    return linear(p, "4", x)


def conv4(p: Params, x: Array) -> Array:
    for block in range(4):
        x = conv(x, p[f"{4 * block}.weight"])
        x = normalised(p, str(4 * block + 1), x, x.mean((0, 2, 3)), x.var((0, 2, 3)), (1, -1, 1, 1))
        x = max_pool(jax.nn.relu(x), 2, 2)
    return linear(p, "17", x.reshape(x.shape[0], -1))


def encoder(p: Params, x: Array) -> Array:
    for layer in range(4):
        at = f"layers.{layer}."
        parts = linear(p, at + "qkv", layer_norm(p, at + "norm1", x))
        q, k, v = jnp.moveaxis(parts.reshape(*x.shape[:2], 3, 4, -1), (2, 3), (0, 2))  # each [N, H, L, D]
        weights = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2) / q.shape[-1] ** 0.5, -1)
        x = x + linear(p, at + "out", jnp.swapaxes(weights @ v, 1, 2).reshape(x.shape))
        x = x + linear(p, at + "down", jax.nn.gelu(linear(p, at + "up", layer_norm(p, at + "norm2", x)), approximate=True))
    return linear(p, "head", x.mean(-2))


def recurrent(p: Params, x: Array) -> Array:
    bias = p["lstm.bias_ih_l0"] + p["lstm.bias_hh_l0"]

    def step(carry: tuple[Array, Array], row: Array) -> tuple[tuple[Array, Array], None]:
        h, c = carry
        i, f, g, o = jnp.split(row @ p["lstm.weight_ih_l0"].T + h @ p["lstm.weight_hh_l0"].T + bias, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    zeros = jnp.zeros((x.shape[0], p["lstm.weight_hh_l0"].shape[1]))
    (h, _), _ = lax.scan(step, (zeros, zeros), jnp.swapaxes(x, 0, 1))
    return linear(p, "head", h)


def resnet18(p: Params, x: Array) -> Array:
    def norm(name: str, x: Array) -> Array:
        return normalised(p, name, x, p[f"{name}.running_mean"], p[f"{name}.running_var"], (1, -1, 1, 1))

    x = max_pool(jax.nn.relu(norm("bn", conv(x, p["conv.weight"], 2, 3))), 3, 2, 1)
    for block in range(8):
        at = f"blocks.{block}."
        stride = 2 if block in (2, 4, 6) else 1
        out = norm(at + "bn1", conv(x, p[at + "conv1.weight"], stride))
        out = norm(at + "bn2", conv(jax.nn.relu(out), p[at + "conv2.weight"]))
        shortcut = p.get(at + "shortcut.weight")
        x = jax.nn.relu(out + (x if shortcut is None else conv(x, shortcut, stride, 0)))
    return linear(p, "head", x.mean((-1, -2)))


def adapters(p: Params, x: Array) -> Array:
    for name in ("0", "2", "4"):
        x = linear(p, f"{name}.base", x) + x @ p[f"{name}.a"].T @ p[f"{name}.b"].T
        x = jnp.tanh(x) if name != "4" else x
    return x


MODELS: dict[Callable[..., Any], Callable[[Params, Array], Array]] = {
    workloads.sine_mlp: sine_mlp,
    workloads.conv4: conv4,
    workloads.Encoder: encoder,
    workloads.Recurrent: recurrent,
    workloads.head_only: resnet18,
    workloads.adapters: adapters,
}
LOSSES: dict[Callable[..., Any], Callable[[Array, Array], Array]] = {
    F.mse_loss: lambda output, target: ((output - target) ** 2).mean(),
    F.cross_entropy: lambda output, target: optax.softmax_cross_entropy_with_integer_labels(output, target).mean(),
}
