"""The implementations that compete, each written as its own documentation would have it.

A contestant takes the workload's model and data and offers three calls, each returning arrays in a fixed order once they are computed:
`adapt` the adapted parameters, `predict` the adapted model's output on the query inputs, `meta` the query loss's gradient in the parameters
that adapt.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import adaptrt
from benchmarks.suite.workloads import WORKLOADS, Batch, Workload

Call = Callable[[], Sequence[Any]]
Params = Mapping[str, Tensor]


class Contestant(NamedTuple):
    """One implementation on one workload, compiled already.

    Attributes:
      calls: by quantity ("adapt", "predict", "meta"); a missing one is not offered.
      compile_s: seconds that the first call of each took.
    """

    calls: Mapping[str, Call]
    compile_s: Mapping[str, float]


def first_calls(calls: Mapping[str, Call]) -> Contestant:
    """The contestant, after each of its calls was made once."""
    seconds: dict[str, float] = {}
    for quantity, call in calls.items():
        began = time.perf_counter()
        call()
        seconds[quantity] = time.perf_counter() - began
    return Contestant(calls, seconds)


# --- by hand


def _parts(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters that adapt, and all other tensors, by name."""
    adapted: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    others = {name: p for name, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())
    return adapted, others


def update(workload: Workload, params: Params, grads: Params, state: Any) -> tuple[dict[str, Tensor], Any]:
    """A step of SGD or Adam, written out; "adam, early eps" adds eps to the second moment's root before that is corrected for its bias."""
    lr = workload.numbers["lr"]
    if workload.optimizer == "sgd":
        return {name: p - lr * grads[name] for name, p in params.items()}, state
    t, first, second = state or (0, {}, {})
    t, b1, b2 = t + 1, 0.9, 0.999
    first = {name: (b1 * first[name] if first else 0.0) + (1 - b1) * g for name, g in grads.items()}
    second = {name: (b2 * second[name] if second else 0.0) + (1 - b2) * g * g for name, g in grads.items()}
    scale, correction, eps = lr / (1 - b1**t), (1 - b2**t) ** 0.5, workload.numbers["eps"]
    eps = eps / correction if workload.optimizer == "adam, early eps" else eps
    new = {name: p - scale * first[name] / (second[name].sqrt() / correction + eps) for name, p in params.items()}
    return new, (t, first, second)


def loop(workload: Workload, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """The loop that one writes by hand over `torch.autograd.grad`; in float64 it is the oracle."""
    if workload.num_tasks is not None:
        return _loop_over_tasks(workload, dtype)
    model = workload.model(dtype)
    support, query = workload.batches(dtype)
    return _one_task(workload, model, support, query)


def loop_in_bfloat16(workload: Workload, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """The same with model and loss under autocast."""
    support, query = workload.batches(dtype)
    return _one_task(workload, workload.model(dtype), support, query, torch.bfloat16)


def _one_task(workload: Workload, model: nn.Module, support: Batch, query: Batch, precision: torch.dtype | None = None) -> dict[str, Call]:
    adapted, _ = _parts(model)

    def autocast() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(workload.device, precision) if precision is not None else contextlib.nullcontext()

    def output(params: Params, x: Tensor) -> Tensor:
        with autocast():
            return torch.func.functional_call(model, dict(params), (x,))

    def loss_of(params: Params, batch: Batch) -> Tensor:
        with autocast():
            return workload.loss(output(params, batch[0]), batch[1])

    def run(create_graph: bool) -> Params:
        params, state = adapted, None
        for _ in range(workload.k):
            loss = loss_of(params, support)
            found = torch.autograd.grad(loss, list(params.values()), create_graph=create_graph)
            params, state = update(workload, params, dict(zip(params, found, strict=True)), state)
            if not create_graph:
                params = {name: p.detach().requires_grad_() for name, p in params.items()}
        return params

    def adapt() -> list[Tensor]:
        return [p.detach() for p in run(False).values()]

    def predict() -> list[Tensor]:
        params = run(False)
        with torch.no_grad():
            return [output(params, query[0])]

    def meta() -> Sequence[Tensor]:
        return torch.autograd.grad(loss_of(run(True), query), list(adapted.values()))

    return {"adapt": adapt, "predict": predict, "meta": meta}


def _loop_over_tasks(workload: Workload, dtype: torch.dtype) -> dict[str, Call]:
    model = workload.model(dtype)
    support, query = workload.batches(dtype)
    assert workload.num_tasks is not None
    tasks = [_one_task(workload, model, (support[0][t], support[1][t]), (query[0][t], query[1][t])) for t in range(workload.num_tasks)]

    def stacked(quantity: str) -> Call:
        return lambda: [torch.stack(rows) for rows in zip(*(task[quantity]() for task in tasks), strict=True)]

    return {"adapt": stacked("adapt"), "predict": stacked("predict"), "meta": lambda: [rows.mean(0) for rows in stacked("meta")()]}


# --- torch.func


def functions(workload: Workload, dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """The three quantities as pure functions of (adapted parameters, support, query), by `torch.func`; vmapped over tasks."""
    model = workload.model(dtype)
    _, others = _parts(model)

    def output(params: Params, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, {**others, **params}, (x,))

    def loss(params: Params, batch: Batch) -> Tensor:
        return workload.loss(output(params, batch[0]), batch[1])

    def adapt(params: Params, support: Batch, query: Batch) -> Params:
        del query
        state = None
        for _ in range(workload.k):
            params, state = update(workload, params, torch.func.grad(loss)(params, support), state)
        return params

    def predict(params: Params, support: Batch, query: Batch) -> Tensor:
        return output(adapt(params, support, query), query[0])

    def objective(params: Params, support: Batch, query: Batch) -> Tensor:
        return loss(adapt(params, support, query), query)

    if workload.num_tasks is None:
        return {"adapt": adapt, "predict": predict, "meta": torch.func.grad(objective)}

    def over_tasks(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.func.vmap(function, in_dims=(None, 0, 0))

    def mean(params: Params, support: Batch, query: Batch) -> Tensor:
        return over_tasks(objective)(params, support, query).mean()

    return {"adapt": over_tasks(adapt), "predict": over_tasks(predict), "meta": torch.func.grad(mean)}


def _torch_func(workload: Workload, dtype: torch.dtype, transform: Callable[[Any], Any]) -> dict[str, Call]:
    params = {name: p.detach() for name, p in _parts(workload.model(dtype))[0].items()}
    support, query = workload.batches(dtype)

    def call(function: Callable[..., Any]) -> Call:
        def run() -> Sequence[Tensor]:
            with torch.no_grad():
                found = function(params, support, query)
            return list(found.values()) if isinstance(found, Mapping) else [found]

        return run

    return {quantity: call(transform(function)) for quantity, function in functions(workload, dtype).items()}


def torch_func(workload: Workload, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """`torch.func.grad`, eager; `torch.func.vmap` over tasks."""
    return _torch_func(workload, dtype, lambda function: function)


def torch_compile(workload: Workload, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """The same under `torch.compile`."""
    return _torch_func(workload, dtype, torch.compile)


# --- libraries


def _optimizer(workload: Workload, params: Any) -> torch.optim.Optimizer:
    kind: Any = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[workload.optimizer]
    return kind(params, **workload.numbers)


def _higher(package: str, workload: Workload, dtype: torch.dtype) -> dict[str, Call]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        higher: Any = importlib.import_module(package)
    model = workload.model(dtype)
    support, query = workload.batches(dtype)
    adapted = [p for p in model.parameters() if p.requires_grad]
    inner = _optimizer(workload, adapted)

    def run(query_of: Callable[[Any], Any], **flags: bool) -> Any:
        # The optimiser holds the weights that adapt; the frozen ones are part of the handle all the same.
        with higher.innerloop_ctx(model, inner, **flags) as (fast, differentiable):
            for _ in range(workload.k):
                differentiable.step(workload.loss(fast(support[0]), support[1]))
            return query_of(fast)

    def weights(fast: Any) -> list[Tensor]:
        return [p.detach() for p, own in zip(fast.parameters(), model.parameters(), strict=True) if own.requires_grad]

    def predicted(fast: Any) -> list[Tensor]:
        with torch.no_grad():
            return [fast(query[0])]

    def gradient(fast: Any) -> Sequence[Tensor]:
        return torch.autograd.grad(workload.loss(fast(query[0]), query[1]), adapted)

    return {
        "adapt": lambda: run(weights, track_higher_grads=False),
        "predict": lambda: run(predicted, track_higher_grads=False),
        "meta": lambda: run(gradient, copy_initial_weights=False),
    }


def higher_original(workload: Workload, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """`higher` 0.2.1."""
    return _higher("higher", workload, dtype)


def torchopt(workload: Workload, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """TorchOpt's differentiable optimisers on the module itself, whose weights are put back after every call."""
    library: Any = importlib.import_module("torchopt")
    model = workload.model(dtype)
    support, query = workload.batches(dtype)
    kind = {"sgd": library.MetaSGD, "adam": library.MetaAdam}[workload.optimizer]
    adapting = model.get_submodule(workload.part)
    start = library.extract_state_dict(adapting, by="reference")
    own = [p for p in model.parameters() if p.requires_grad]

    def run(result: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        inner = kind(adapting, **workload.numbers)
        for _ in range(workload.k):
            inner.step(workload.loss(model(support[0]), support[1]))
        found = result()
        library.recover_state_dict(adapting, start)
        return found

    adapted = [name for name, p in model.named_parameters() if p.requires_grad]

    def weights() -> list[Tensor]:
        # The module holds plain tensors by then, which get_parameter refuses.
        return [getattr(model.get_submodule(path), name).detach() for path, _, name in (full.rpartition(".") for full in adapted)]

    def predicted() -> list[Tensor]:
        with torch.no_grad():
            return [model(query[0])]

    return {
        "adapt": lambda: run(weights),
        "predict": lambda: run(predicted),
        "meta": lambda: run(lambda: torch.autograd.grad(workload.loss(model(query[0]), query[1]), own)),
    }


def ours(workload: Workload, in_dtype: torch.dtype, **options: Any) -> dict[str, Call]:
    """adaptrt with these options of `compile_unroll`."""
    model = workload.model(in_dtype)
    support, query = workload.batches(in_dtype)
    adapted = [p for p in model.parameters() if p.requires_grad]
    unroll = adaptrt.compile_unroll(model, _optimizer(workload, adapted), workload.k, loss=workload.loss, **options)
    if workload.num_tasks is not None:
        unroll = unroll.vmap()

    def adapt() -> list[Tensor]:
        with torch.inference_mode():
            return list(unroll.adapt(support).params.values())

    def predict() -> list[Tensor]:
        with torch.inference_mode():
            return [unroll.adapt(support)(query[0])]

    return {"adapt": adapt, "predict": predict, "meta": lambda: torch.autograd.grad(unroll(support, query), adapted)}


def compiled(workload: Workload, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """adaptrt as the README shows it."""
    return ours(workload, dtype)


def uncompiled(workload: Workload, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """adaptrt on its eager backend."""
    return ours(workload, dtype, backend="eager")


def compiled_in_bfloat16(workload: Workload, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """adaptrt in mixed precision."""
    return ours(workload, dtype, dtype=torch.bfloat16)


def jax(workload: Workload, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """JAX `jit` with optax's optimisers, on models that are written in JAX (`in_jax.py`)."""
    return importlib.import_module("benchmarks.suite.in_jax").calls(workload, dtype)


class Entrant(NamedTuple):
    """What may compete.

    Attributes:
      make: the calls on a workload in a dtype.
      needs: the package without which it stays away.
      except_for: the workloads from which it stays away, with the reason.
      adam: the form of Adam that it has (`update`).
      in_bfloat16: whether it computes in mixed precision, and so has an error of its own kind.
      elsewhere: what is wrong with the device that it would compute on, None if nothing is.
    """

    make: Callable[[Workload, torch.dtype], Mapping[str, Call]]
    needs: str | None = None
    except_for: Mapping[str, str] = {}
    adam: str = "adam"
    in_bfloat16: bool = False
    elsewhere: Callable[[Workload], str | None] = lambda workload: None

    def reason_against(self, workload: Workload) -> str | None:
        """Why it does not compete, None if it does."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return self.except_for.get(workload.name) or self.elsewhere(workload)

    def oracle(self, workload: Workload) -> dict[str, Call]:
        """The loop by hand in float64."""
        return loop(workload._replace(optimizer=self.adam) if workload.optimizer == "adam" else workload, torch.float64)


def _jax_elsewhere(workload: Workload) -> str | None:
    place = importlib.import_module("jax").default_backend()
    wanted = "gpu" if workload.device == "cuda" else workload.device
    return None if place == wanted else f"JAX is on the {place}, the models on {workload.device}"


_SLOW = {name: "compiles for many minutes" for name in WORKLOADS if name not in ("sine", "sine-tasks")}
_ONE_TASK = {"sine-tasks": "has no task axis", "conv4-tasks": "has no task axis"}
_NOT_MIXED = {name: "no work for mixed precision" for name in ("sine", "sine-tasks", "lstm", "adapters", "conv4-tasks")}
_NOT_MIXED["conv4-1shot"] = "autocast itself is off by half where BatchNorm sees so few images"
ENTRANTS: dict[str, Entrant] = {
    "eager loop": Entrant(loop),
    "torch.func": Entrant(torch_func),
    "torch.compile(torch.func)": Entrant(torch_compile, except_for=_SLOW),
    "higher": Entrant(higher_original, "higher", _ONE_TASK, adam="adam, early eps"),
    "TorchOpt": Entrant(torchopt, "torchopt", {**_ONE_TASK, "adapters": "steps all parameters of a module"}),
    "JAX jit + optax": Entrant(jax, "jax", elsewhere=_jax_elsewhere),
    "adaptrt, eager backend": Entrant(uncompiled),
    "adaptrt": Entrant(compiled),
    "eager loop, bfloat16": Entrant(loop_in_bfloat16, except_for=_NOT_MIXED, in_bfloat16=True),
    "adaptrt, bfloat16": Entrant(compiled_in_bfloat16, except_for=_NOT_MIXED, in_bfloat16=True),
}
