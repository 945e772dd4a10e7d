"""Bad input: one table of what to do wrong, the error it must give, and what the message must say; nothing may be changed by any of it.

A message names the argument, what was expected, what was got and the next action. Each case is built first, then everything that it could
touch is photographed, then it is tried.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import adaptrt
from adaptrt import FirstOrder, Replay, Unrolled
from adaptrt.errors import (
    AdaptrtError,
    DataDependentControlFlow,
    DeviceMismatch,
    InvalidArgument,
    InvalidBatch,
    InvalidLoss,
    InvalidType,
    LabelOutOfRange,
    NonFiniteInput,
    NotDifferentiable,
    NothingToAdapt,
    NotTraceable,
    OptimizerMismatch,
    ShapeChanged,
    UnsupportedOptimizer,
    UnsupportedParameter,
    UnsupportedRandomness,
)

HERE = re.escape(__file__)


# --- what a case is, and what may not change


class Attempt(NamedTuple):
    """What to do, and everything that may not change: modules, optimisers and tensors."""

    run: Callable[[], Any]
    watched: tuple[Any, ...]


class Case(NamedTuple):
    """One wrong thing: its name, how to build it, the class of its error, and a pattern for the message (dots match line ends)."""

    name: str
    build: Callable[[], Attempt]
    error: type[Exception]
    message: str


def settings() -> dict[str, Any]:
    """Global state of PyTorch that a failed call could leave behind."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "attention fast path": torch.backends.mha.get_fastpath_enabled(),
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "attention kernels": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
        ),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "functorch": maybe_current_level(),
        "python dispatcher": torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY),
        "global hooks": (
            len(torch.nn.modules.module._global_forward_pre_hooks),
            len(torch.nn.modules.module._global_forward_hooks),
        ),
        "python random": random.getstate(),
    }


def _copy(value: Any) -> Any:
    """A deep copy that keeps tensors' identities beside their values."""
    if type(value).__module__ == "numpy":
        return _copy(torch.from_numpy(value))[-2:]
    if isinstance(value, Tensor):
        unreadable = value.is_meta or isinstance(value, nn.parameter.UninitializedParameter)
        values = None if unreadable else value.detach().to_dense().clone()
        return (
            "tensor",
            id(value),
            value.requires_grad,
            value._version,
            id(value.grad_fn),
            values,
            _copy(value.grad) if value.is_leaf else None,
        )
    if isinstance(value, Mapping):
        return {key: _copy(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(entry) for entry in value]
    return value


def photograph(thing: Any) -> Any:
    """All that belongs to a watched module, optimiser, generator or tensor."""
    if isinstance(thing, nn.Module):
        hooks = [
            (len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks), len(part._buffers))
            for part in thing.modules()
        ]
        plain = [
            {key: value for key, value in vars(part).items() if isinstance(value, Tensor | int | float | str)} for part in thing.modules()
        ]
        named = [*thing.named_parameters(remove_duplicate=False), *thing.named_buffers(remove_duplicate=False)]
        return _copy(named), [part.training for part in thing.modules()], hooks, _copy(plain)
    if isinstance(thing, torch.optim.Optimizer):
        return _copy(thing.param_groups), [(id(key), _copy(value)) for key, value in thing.state.items()]
    if isinstance(thing, torch.Generator):
        return thing.get_state()
    return _copy(thing)


def same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return before.dtype == after.dtype and torch.equal(torch.nan_to_num(before, 7.0), torch.nan_to_num(after, 7.0))
    if isinstance(before, dict):
        return before.keys() == after.keys() and all(same(value, after[key]) for key, value in before.items())
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(same, before, after))
    return bool(before == after)


class Untouched:
    """Photographs what a case could touch, and compares."""

    def __init__(self, attempt: Attempt) -> None:
        self.watched = attempt.watched
        self.photos = [photograph(thing) for thing in attempt.watched]
        self.random = torch.get_rng_state()
        self.settings = settings()

    def check(self) -> None:
        assert settings() == self.settings
        assert torch.equal(torch.get_rng_state(), self.random), "the global random state changed"
        for thing, photo in zip(self.watched, self.photos, strict=True):
            assert same(photo, photograph(thing)), f"{type(thing).__name__} changed"


# --- the usual model, optimiser and data


def net(width: int = 8) -> nn.Sequential:
    """Something to change everywhere: parameters, running statistics, randomness, two modes, filled gradients."""
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 3))
    model[2].eval()
    model(torch.randn(5, 4)).sum().backward()
    return model


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """An optimiser with state: it has stepped once where there is a gradient."""
    opt = torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})
    opt.step()
    return opt


def normal(*shape: int) -> Tensor:
    """Data that costs the global generator nothing, so that a case may make it while it runs."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def labels(*shape: int, high: int = 3) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(2))


def zeros(*shape: int) -> Tensor:
    """Labels that are all of class 0."""
    return torch.zeros(shape, dtype=torch.long)


def data(*shape: int) -> tuple[Tensor, Tensor]:
    shape = shape or (6, 4)
    return normal(*shape), labels(*shape[:1])


def anything(value: Any) -> Any:
    """The value, for arguments that a type checker would refuse."""
    return value


def attempt(
    model: Any = None,
    opt: Any = None,
    support: Any = None,
    query: Any = None,
    k: Any = 2,
    call: str = "adapt",
    vmap: bool = False,
    **options: Any,
) -> Attempt:
    """Compile, and unless call is "compile" adapt (or form the meta-loss, if there is a query)."""
    model = net() if model is None else model
    opt = sgd(model) if opt is None else opt
    support = data() if support is None else support
    options = {"backend": "eager", **options}

    def run() -> None:
        unroll = adaptrt.compile_unroll(model, opt, k, **options)
        unroll = unroll.vmap() if vmap else unroll
        if call == "adapt":
            unroll.adapt(support)
        elif call == "meta":
            unroll(support, query)

    return Attempt(run, (model, opt, support, query, options.get("loss")))


def warm(*shapes: Any, then: Callable[[adaptrt.CompiledUnroll], Any]) -> Attempt:
    """An unroll under "error" that has seen `shapes`; `then` calls it with others."""
    model = net()
    opt = sgd(model)
    unroll = adaptrt.compile_unroll(model, opt, 1, backend="eager", on_new_shape="error")
    if shapes:
        unroll.warmup(*shapes)
    return Attempt(lambda: then(unroll), (model, opt))


def new_prediction_shape() -> Attempt:
    model = net()
    unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(0.1), 1, backend="eager", on_new_shape="error").warmup(data(), data(7, 4))
    result = unroll.adapt(data())
    return Attempt(lambda: result(normal(5, 4)), (model, result.params))


def adapted(then: Callable[[adaptrt.CompiledUnroll, adaptrt.Adapted], Any], vmap: bool = False) -> Attempt:
    """Something to do with a result of `adapt`."""
    model = net()
    opt = adaptrt.optim.sgd(0.1, momentum=0.9)
    unroll = adaptrt.compile_unroll(model, opt, 1, backend="eager")
    unroll = unroll.vmap() if vmap else unroll
    result = unroll.adapt((normal(2, 6, 4), zeros(2, 6)) if vmap else data())
    return Attempt(lambda: then(unroll, result), (model, result.params, result.opt_state, result.buffers))


def fresh(then: Callable[[adaptrt.CompiledUnroll], Any]) -> Attempt:
    """Something to do with an unroll that was not called yet."""
    model = net()
    unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(0.1), 1, backend="eager")
    return Attempt(lambda: then(unroll), (model,))


def mse_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 1))


def squares(output: Tensor, target: Tensor) -> Tensor:
    """A loss that broadcasts whatever it is given."""
    return ((output - target) ** 2).mean()


def poisoned(value: float, index: int = 0) -> tuple[Tensor, Tensor]:
    x, y = data()
    x[index, 1] = value
    return x, y


class Forward(nn.Module):
    """A layer and a function of (module, input) after it."""

    def __init__(self, fn: Callable[[Forward, Tensor], Any], **attributes: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.fn = fn
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.fn(self, self.layer(x))


def branch(module: Forward, h: Tensor) -> Tensor:
    if h.sum() > 0:  # the line to be named: branch
        return h
    return -h


def read_item(module: Forward, h: Tensor) -> Tensor:
    return h * h.max().item()  # the line to be named: item


def read_float(module: Forward, h: Tensor) -> Tensor:
    return h * float(h.mean())  # the line to be named: float


def read_list(module: Forward, h: Tensor) -> Tensor:
    return h * sum(h[0].tolist())  # the line to be named: list


def read_numpy(module: Forward, h: Tensor) -> Tensor:
    return h * h.detach().numpy().max()  # the line to be named: numpy


def loop(module: Forward, h: Tensor) -> Tensor:
    while h.norm() > 1:  # the line to be named: loop
        h = h / 2
    return h


def mask(module: Forward, h: Tensor) -> Tensor:
    return h[h > 0].sum() + h  # the line to be named: mask


def where(module: Forward, h: Tensor) -> Tensor:
    return h + h.nonzero().sum()  # the line to be named: nonzero


def branching_loss(output: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(output, target)
    return loss if loss > 1 else loss**2  # the line to be named: loss


def line(tag: str) -> str:
    """`file:line: code` of the line above that ends with the tag, as a pattern."""
    with open(__file__, encoding="utf-8") as file:
        numbers = [number for number, text in enumerate(file, 1) if text.rstrip().endswith(f"# the line to be named: {tag}")]
    assert len(numbers) == 1
    return rf"{HERE}:{numbers[0]}: .* depends on the value of a tensor.*Use torch\.where"


class Margins(nn.Module):
    def __init__(self, p: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 4))
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        # An operation that no supported version of PyTorch differentiates twice; torch.cdist is one up to 2.14.
        scores = x @ self.centres.mT
        return scores - F.multi_margin_loss(scores, torch.zeros(len(x), dtype=torch.int64), p=self.p, reduction="none")[:, None]


class Alignment(nn.Module):
    """A loss: connectionist temporal classification."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        frames = output.log_softmax(-1).unsqueeze(1).repeat(1, 2, 1)
        lengths = torch.tensor([6, 6]), torch.tensor([1, 1])
        return F.ctc_loss(frames, target.view(2, 3) + 1, *lengths)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(10, 4, mode="max")
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.words(tokens))


class CubeOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return 3 * x * x * grad


def cube_once(module: Forward, h: Tensor) -> Tensor:
    return CubeOnce.apply(h)  # type: ignore[return-value]


def multinomial(module: Forward, h: Tensor) -> Tensor:
    return h + torch.multinomial(h.softmax(-1), 3)


def own_generator(module: Forward, h: Tensor) -> Tensor:
    return h + torch.rand(h.shape, generator=anything(module.generator))


def own_generator_inplace(module: Forward, h: Tensor) -> Tensor:
    return h + torch.empty_like(h).normal_(generator=anything(module.generator))


def own_generator_case(fn: Callable[[Forward, Tensor], Tensor]) -> Attempt:
    generator = torch.Generator().manual_seed(3)
    made = attempt(Forward(fn, generator=generator))
    return made._replace(watched=(*made.watched, generator))


class Halves(torch.optim.SGD):
    """Steps half as far; a conversion that took it for SGD would be silently wrong."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None if p.grad is None else p.grad / 2
        return super().step(closure)


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def detached(module: Forward, h: Tensor) -> Tensor:
    return h.detach()


def beside(name: str, value: Any) -> nn.Module:
    """A good model with an additional parameter."""
    model = Forward(lambda module, h: h)
    setattr(model, name, value)
    return model


def changing(update: Callable[[Tensor], Tensor]) -> adaptrt.optim.Optimizer:
    """A user's optimiser whose update does this to every parameter."""
    return adaptrt.optim.Optimizer(
        lambda params: (), lambda grads, state, params, hyper: ({name: update(p) for name, p in params.items()}, state)
    )


def growing_state() -> adaptrt.optim.Optimizer:
    return adaptrt.optim.Optimizer(
        lambda params: [torch.zeros(1)], lambda grads, state, params, hyper: (dict(params), [*state, torch.zeros(1)])
    )


def wrong_state() -> Attempt:
    model = net()
    opt = sgd(model)
    opt.state[opt.param_groups[0]["params"][0]]["momentum_buffer"] = torch.zeros(2)
    return attempt(model, opt, call="adapt")


def two_devices() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3, device="meta"))


def transposed(module: Forward, h: Tensor) -> Tensor:
    raise KeyError("the model's own trouble")  # the line to be named: own


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(normal(10, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.table, sparse=True)


def attempt_after_compile(change: Callable[[torch.optim.Optimizer], Any]) -> Attempt:
    """The optimiser is changed after the unroll was made."""
    model = net()
    opt = sgd(model)
    unroll = adaptrt.compile_unroll(model, opt, 1, backend="eager")
    change(opt)
    support = data()
    return Attempt(lambda: unroll.adapt(support), (model, opt, support))


def start_for(model: nn.Module, opt: adaptrt.optim.Optimizer, vmap: bool = False) -> Attempt:
    """A result of the usual unroll, handed to one of another model or optimiser."""
    other = adaptrt.compile_unroll(model, opt, 1, backend="eager")
    return adapted(lambda unroll, result: other.adapt(data(), start=result), vmap)


def branch_when_evaluated() -> Attempt:
    model = Forward(lambda module, h: h if module.training else branch(module, h))
    opt = adaptrt.optim.sgd(0.1)
    result = adaptrt.compile_unroll(model, opt, 1, backend="eager").adapt(data())
    model.eval()
    return Attempt(lambda: result(torch.ones(6, 4)), (model, result.params))


def backward_of_adapt(model: nn.Module) -> Attempt:
    result = adaptrt.compile_unroll(model, adaptrt.optim.sgd(0.1), 2, backend="eager").adapt(data())
    return Attempt(lambda: result.params["layer.weight"].sum().backward(), (model, result.params))


def penalty() -> Attempt:
    """A penalty on the meta-gradient, beside a term that can be differentiated: without an error the penalty would be dropped."""
    model = nn.Linear(4, 1)
    loss = adaptrt.compile_unroll(model, adaptrt.optim.sgd(0.1), 1, backend="eager")(
        (normal(6, 4), normal(6, 1)), (normal(6, 4), normal(6, 1))
    )

    def run() -> None:
        (grad,) = torch.autograd.grad(loss, [model.weight], create_graph=True)
        torch.autograd.grad(grad.square().sum() + model.weight.square().sum(), [model.weight])

    return Attempt(run, (model,))


CE = F.cross_entropy

CASES: list[Case] = [
    # --- the model
    Case(
        "model: not a module",
        lambda: attempt(model=lambda x: x, opt=adaptrt.optim.sgd(0.1)),
        InvalidType,
        r"model must be a torch\.nn\.Module, got function",
    ),
    Case("model: without parameters", lambda: attempt(nn.ReLU(), adaptrt.optim.sgd(0.1)), InvalidArgument, r"model has no parameters"),
    Case(
        "model: parameters on two devices",
        lambda: attempt(two_devices(), adaptrt.optim.sgd(0.1)),
        DeviceMismatch,
        r"0\.weight on cpu.*1\.weight on meta",
    ),
    Case(
        "model: complex parameter",
        lambda: attempt(beside("phase", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))),
        UnsupportedParameter,
        r"parameter 'phase' is of torch\.complex64; only real floating-point",
    ),
    Case(
        "model: integer parameter",
        lambda: attempt(beside("count", nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False))),
        UnsupportedParameter,
        r"parameter 'count' is of torch\.int64; only real floating-point.*Make it a buffer",
    ),
    Case(
        "model: sparse parameter",
        lambda: attempt(beside("links", nn.Parameter(torch.eye(3).to_sparse())), adaptrt.optim.sgd(0.1), call="compile"),
        UnsupportedParameter,
        r"parameter 'links' has layout torch\.sparse_coo; only dense",
    ),
    Case(
        "model: sparse embedding",
        lambda: attempt(nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3)), adaptrt.optim.sgd(0.1), (zeros(6),) * 2),
        UnsupportedParameter,
        r"module '0' was built with sparse=True.*Build it with sparse=False",
    ),
    Case(
        "model: functional sparse embedding",
        lambda: attempt(Lookup(), adaptrt.optim.sgd(0.1), (zeros(6),) * 2),
        UnsupportedParameter,
        r"'table'.*sparse gradient.*sparse=False",
    ),
    Case(
        "model: lazy module",
        lambda: attempt(nn.Sequential(nn.LazyLinear(3)), adaptrt.optim.sgd(0.1)),
        UnsupportedParameter,
        r"parameter '0\.weight' is not initialised.*run the model once",
    ),
    Case(
        "model: plain tensor attribute that requires grad",
        lambda: attempt(
            Forward(lambda module, h: h * anything(module.scale), scale=torch.ones(3, requires_grad=True)), query=data(), call="meta"
        ),
        UnsupportedParameter,
        r"tensor attribute 'scale' requires grad and is no parameter.*Make it an nn\.Parameter",
    ),
    Case(
        "loss: closed-over tensor that requires grad",
        lambda: (lambda scale: attempt(loss=lambda output, target: CE(output * scale, target)))(torch.ones(3, requires_grad=True)),
        UnsupportedParameter,
        r"shape \[3\] .*requires grad and is no parameter.*nn\.Parameter",
    ),
    # --- k and the options
    *[
        Case(f"k: {k!r}", lambda k=k: attempt(k=k), error, rf"k must be {wanted}, got {got}")
        for k, error, wanted, got in (
            (0, InvalidArgument, "at least 1", "0"),
            (-3, InvalidArgument, "at least 1", "-3"),
            (True, InvalidType, "an int", "bool"),
            (2.0, InvalidType, "an int", "float"),
            ("2", InvalidType, "an int", "str"),
            (None, InvalidType, "an int", "NoneType"),
        )
    ],
    Case("cache_size: 0", lambda: attempt(cache_size=0), InvalidArgument, r"cache_size must be at least 1, got 0"),
    Case(
        "adjoint: unknown string", lambda: attempt(adjoint="replay"), InvalidArgument, r"adjoint must be .*'auto'.*Replay\(.*got 'replay'"
    ),
    Case(
        "adjoint: not one",
        lambda: attempt(adjoint=Replay),
        InvalidType,
        r"adjoint must be 'auto', Unrolled\(\), Replay\(every=n\).*got <class",
    ),
    Case(
        "adjoint: Replay(every=0)",
        lambda: Attempt(lambda: Replay(every=0), ()),
        InvalidArgument,
        r"Replay\(every=0\): every must be an int of at least 1",
    ),
    Case(
        "adjoint: Replay(every=1.5)",
        lambda: Attempt(lambda: Replay(every=anything(1.5)), ()),
        InvalidArgument,
        r"Replay\(every=1\.5\): every must be an int",
    ),
    Case(
        "backend: unknown string",
        lambda: attempt(backend="tvm"),
        InvalidArgument,
        r"backend must be one of 'auto', 'eager', 'inductor', 'cudagraph', got 'tvm'",
    ),
    Case("backend: not one", lambda: attempt(backend=3), AdaptrtError, r"backend must be .*'eager'.*got 3"),
    Case(
        "on_new_shape: unknown",
        lambda: attempt(on_new_shape="warn"),
        InvalidArgument,
        r"on_new_shape must be one of 'compile', 'error', got 'warn'",
    ),
    Case(
        "nonfinite: unknown", lambda: attempt(nonfinite="warn"), InvalidArgument, r"nonfinite must be one of 'error', 'ignore', got 'warn'"
    ),
    Case("loss: not callable", lambda: attempt(loss="cross_entropy"), InvalidType, r"loss must be a function, a module or None, got str"),
    Case("vmap: twice", lambda: fresh(lambda unroll: unroll.vmap().vmap()), InvalidArgument, r"vmap\(\).*has a task axis already"),
    # --- the optimiser and what adapts
    Case(
        "opt: foreign parameters",
        lambda: attempt(opt=sgd(nn.Linear(7, 5))),
        OptimizerMismatch,
        r"opt holds 2 parameters that the model does not have.*\[5, 7\].*parameters\(\)",
    ),
    Case("opt: neither kind", lambda: attempt(opt=0.1), InvalidType, r"opt must be an adaptrt\.optim\.Optimizer.*SGD.*got float"),
    Case("opt: class, not instance", lambda: attempt(opt=torch.optim.SGD), InvalidType, r"opt must be.*instance of.*SGD"),
    Case(
        "opt: class without counterpart",
        lambda: (lambda model: attempt(model, torch.optim.SparseAdam(model.parameters())))(net()),
        UnsupportedOptimizer,
        r"opt must be.*SGD, Adam, AdamW.*got torch\.optim\.sparse_adam\.SparseAdam.*Use one of them",
    ),
    Case(
        "opt: subclass of SGD",
        lambda: (lambda model: attempt(model, Halves(model.parameters(), lr=0.1)))(net()),
        UnsupportedOptimizer,
        r"opt must be.*SGD, Adam, AdamW.*got .*Halves.*may step differently",
    ),
    Case(
        "opt: state of another model",
        wrong_state,
        OptimizerMismatch,
        r"'momentum_buffer' for parameter '0\.weight' must have shape \[8, 4\], got \[2\].*clear opt\.state",
    ),
    Case(
        "opt: lr became negative",
        lambda: attempt_after_compile(lambda opt: opt.param_groups[0].update(lr=-1.0)),
        InvalidArgument,
        r"lr must be at least 0.*got -1",
    ),
    Case(
        "opt: lr became a string",
        lambda: attempt_after_compile(lambda opt: opt.param_groups[0].update(lr="big")),
        InvalidType,
        r"lr must be a float.*got str",
    ),
    Case(
        "opt: lr of a wrong shape",
        lambda: attempt_after_compile(
            lambda opt: opt.param_groups[0].update(lr={name: torch.ones(2) for name, _ in net().named_parameters()})
        ),
        InvalidArgument,
        r"lr for parameter '0\.weight' must be a scalar or of the parameter's shape \[8, 4\], got shape \[2\]",
    ),
    Case(
        "opt: lr on another device",
        lambda: attempt_after_compile(lambda opt: opt.param_groups[0].update(lr=torch.tensor(0.1, device="meta"))),
        AdaptrtError,
        r"optimiser's lr is on meta, the model on cpu; call \.to\('cpu'\)",
    ),
    Case(
        "opt: update changes a shape",
        lambda: attempt(opt=changing(lambda p: p.sum())),
        InvalidArgument,
        r"keep.*shapes.*params\.0\.weight: float32\[8, 4\] expected, got float32\[\]",
    ),
    *[
        Case(
            f"opt: update changes a shape, {adjoint}",
            lambda adjoint=adjoint: attempt(opt=changing(lambda p: p.sum()), adjoint=adjoint),
            InvalidArgument,
            r"keep.*shapes.*params\.0\.weight: float32\[8, 4\] expected, got float32\[\]",
        )
        for adjoint in (Unrolled(), Replay(), FirstOrder())
    ],
    Case(
        "opt: update changes a dtype",
        lambda: attempt(opt=changing(lambda p: p.double())),
        InvalidArgument,
        r"dtypes.*params\.0\.weight: float32\[8, 4\] expected, got float64\[8, 4\]",
    ),
    Case(
        "opt: update grows its state",
        lambda: attempt(opt=growing_state()),
        InvalidArgument,
        r"keep the structure.*opt_state\.1: nothing expected, got float32\[1\]",
    ),
    Case(
        "params: all frozen",
        lambda: attempt(frozen(net()), adaptrt.optim.sgd(0.1)),
        NothingToAdapt,
        r"no parameter to adapt: none requires grad",
    ),
    Case(
        "params: all of opt's frozen",
        lambda: (lambda model: attempt(frozen(model), sgd(model)))(net()),
        NothingToAdapt,
        r"no parameter to adapt: none that requires grad is in opt",
    ),
    Case(
        "params: glob that matches nothing",
        lambda: attempt(params="head.*"),
        NothingToAdapt,
        r"params='head\.\*' matches none of 0\.weight, 0\.bias",
    ),
    Case("params: empty list", lambda: attempt(params=[]), NothingToAdapt, r"params=\[\] matches none"),
    Case(
        "params: predicate that selects nothing",
        lambda: attempt(params=lambda name, param: False),
        NothingToAdapt,
        r"no parameter to adapt.*0\.weight",
    ),
    Case("params: neither form", lambda: attempt(params=3), InvalidType, r"params must be a glob, a list of globs or a predicate.*got 3"),
    Case(
        "params: asks for more than opt holds",
        lambda: (lambda model: attempt(model, torch.optim.SGD(model[4].parameters(), lr=0.1), params="*"))(net()),
        OptimizerMismatch,
        r"params=.*0\.bias, 0\.weight.*opt does not hold.*parameter group",
    ),
    # --- the loss
    Case(
        "loss: not a scalar",
        lambda: attempt(loss=lambda output, target: CE(output, target, reduction="none")),
        InvalidLoss,
        r"loss must be a floating-point scalar.*got float32\[6\].*\.mean\(\)",
    ),
    Case(
        "loss: shape [1]",
        lambda: attempt(loss=lambda output, target: CE(output, target)[None]),
        InvalidLoss,
        r"loss must be a floating-point scalar.*got float32\[1\]",
    ),
    Case(
        "loss: integer",
        lambda: attempt(loss=lambda output, target: output.argmax(-1).sum()),
        InvalidLoss,
        r"loss must be a floating-point scalar.*got int64\[\]",
    ),
    Case(
        "loss: complex",
        lambda: attempt(loss=lambda output, target: output.sum() * 1j),
        InvalidLoss,
        r"loss must be a floating-point scalar.*got complex64\[\]",
    ),
    Case("loss: a number", lambda: attempt(loss=lambda output, target: 1.0), InvalidLoss, r"loss must return a tensor, got float"),
    Case(
        "loss: a tuple",
        lambda: attempt(loss=lambda output, target: (CE(output, target), output)),
        InvalidLoss,
        r"loss must return a tensor, got tuple",
    ),
    Case("loss: nothing", lambda: attempt(loss=lambda output, target: None), InvalidLoss, r"loss must return a tensor, got NoneType"),
    Case(
        "loss: scalar on support, not on query",
        lambda: attempt(loss=lambda o, t: CE(o, t, reduction="none") if o.shape[0] == 5 else CE(o, t), query=data(5, 4), call="meta"),
        InvalidLoss,
        r"float32\[5\]",
    ),
    Case(
        "loss: detached",
        lambda: attempt(Forward(detached)),
        NothingToAdapt,
        r"support loss does not depend on the adapted parameters: check `params=`",
    ),
    Case("loss: constant", lambda: attempt(loss=lambda output, target: torch.ones(())), NothingToAdapt, r"support loss does not depend"),
    Case(
        "loss: does not use what adapts",
        lambda: attempt(beside("unused", nn.Parameter(torch.ones(2))), adaptrt.optim.sgd(0.1), params="unused"),
        NothingToAdapt,
        r"support loss does not depend.*\(unused\)|support loss does not depend.*params=",
    ),
    Case(
        "loss=None: no target",
        lambda: attempt(support=(normal(6, 4),)),
        InvalidLoss,
        r"batch has no target and the output \(float32\[6, 3\]\).*pass \(inputs, target\) or loss=",
    ),
    Case(
        "loss=None: boolean target",
        lambda: attempt(support=(normal(6, 4), torch.ones(6, 3, dtype=torch.bool))),
        InvalidLoss,
        r"no default loss for a target of torch\.bool; pass loss=",
    ),
    Case(
        "loss=None: output without loss",
        lambda: attempt(Forward(lambda module, h: {"logits": h})),
        InvalidLoss,
        r"loss=None needs a model that returns a tensor or has a `\.loss`, got dict",
    ),
    Case(
        "loss: no label for a loss of two",
        lambda: attempt(support=(normal(6, 4),), loss=CE),
        InvalidBatch,
        r"the loss takes \(output, target\), but the batch has no target; pass \(inputs, target\)",
    ),
    # --- support and query
    *[
        Case(
            f"support: {name}",
            lambda support=support: attempt(support=support),
            InvalidType,
            rf"support must be a tuple \(inputs, target\).*got {got}",
        )
        for name, support, got in (
            ("a tensor", torch.ones(6, 4), "Tensor"),
            ("a dict", {"x": torch.ones(6, 4)}, "dict"),
            ("three entries", (torch.ones(6, 4),) * 3, "tuple of 3"),
            ("nothing", (), "tuple of 0"),
            ("a number", 3, "int"),
        )
    ],
    Case("support: None", lambda: fresh(lambda unroll: unroll.adapt(None)), InvalidType, r"support must be a tuple.*got NoneType"),
    Case(
        "support: lists of numbers",
        lambda: attempt(support=([[0.0] * 4] * 6, [0] * 6)),
        InvalidType,
        r"support inputs must be a tensor.*got list",
    ),
    Case(
        "support: NumPy inputs",
        lambda: attempt(support=(torch.ones(6, 4).numpy(), zeros(6))),
        InvalidType,
        r"support (inputs|target) is a numpy\.ndarray; pass a tensor",
    ),
    Case(
        "support: NumPy target",
        lambda: attempt(support=(torch.ones(6, 4), zeros(6).numpy())),
        InvalidType,
        r"support (inputs|target) is a numpy\.ndarray; pass a tensor",
    ),
    Case(
        "support: a NumPy array among tensors",
        lambda: attempt(support=((torch.ones(6, 4), torch.ones(6, 4).numpy()), zeros(6))),
        InvalidType,
        r"support .*tensor.*ndarray",
    ),
    Case(
        "support: a sparse tensor",
        lambda: attempt(support=(torch.eye(6, 4).to_sparse(), zeros(6))),
        AdaptrtError,
        r"support input 0.*(sparse|dense)",
    ),
    Case(
        "query: a tensor",
        lambda: attempt(query=torch.ones(6, 4), call="meta"),
        InvalidType,
        r"query must be a tuple \(inputs, target\).*got Tensor",
    ),
    Case("query: None", lambda: attempt(query=None, call="meta"), InvalidType, r"query must be a tuple \(inputs, target\).*got NoneType"),
    Case(
        "support: wrong rank",
        lambda: attempt(support=data(6, 2, 2, 4)),
        InvalidBatch,
        r"support batch.*float32\[6, 2, 2, 4\].*Check shapes",
    ),
    Case(
        "support: wrong features",
        lambda: attempt(support=data(6, 5)),
        InvalidBatch,
        r"support batch.*6.* 5.*4.* 8.*float32\[6, 5\].*Check shapes",
    ),
    Case(
        "query: wrong rank",
        lambda: attempt(query=data(6, 2, 2, 4), call="meta"),
        InvalidBatch,
        r"query batch.*float32\[6, 2, 2, 4\].*Check shapes",
    ),
    Case(
        "support: float64 for float32",
        lambda: attempt(support=(normal(6, 4).double(), zeros(6))),
        InvalidBatch,
        r"support batch.*float64\[6, 4\].*dtypes",
    ),
    Case(
        "support: integers for floats",
        lambda: attempt(support=(torch.ones(6, 4, dtype=torch.long), zeros(6))),
        InvalidBatch,
        r"support batch.*int64\[6, 4\].*dtypes",
    ),
    Case(
        "support: float labels",
        lambda: attempt(support=(normal(6, 4), torch.zeros(6)), loss=CE),
        InvalidBatch,
        r"support batch.*target: float32\[6\]",
    ),
    Case(
        "query: float64 for float32",
        lambda: attempt(query=(normal(6, 4).double(), zeros(6)), call="meta"),
        InvalidBatch,
        r"query batch.*float64\[6, 4\].*dtypes",
    ),
    Case("support: too few arguments", lambda: attempt(nn.Bilinear(4, 4, 3)), InvalidBatch, r"support batch: TypeError.*input2"),
    Case(
        "support: unknown keyword",
        lambda: attempt(support=({"pixels": torch.ones(6, 4)}, zeros(6))),
        InvalidBatch,
        r"support batch: TypeError.*pixels",
    ),
    Case(
        "support: the model raises",
        lambda: attempt(Forward(transposed)),
        InvalidBatch,
        rf"support batch: KeyError at {HERE}:\d+: raise KeyError.*own trouble",
    ),
    Case(
        "support inputs: another device",
        lambda: attempt(support=(torch.ones(6, 4, device="meta"), zeros(6))),
        DeviceMismatch,
        r"support input 0 is on meta, the model on cpu; call \.to\('cpu'\)",
    ),
    Case(
        "support target: another device",
        lambda: attempt(support=(torch.ones(6, 4), torch.zeros(6, dtype=torch.long, device="meta"))),
        DeviceMismatch,
        r"support target 0 is on meta, the model on cpu",
    ),
    Case(
        "query inputs: another device",
        lambda: attempt(query=(torch.ones(6, 4, device="meta"), zeros(6)), call="meta"),
        DeviceMismatch,
        r"query input 0 is on meta",
    ),
    Case(
        "support: empty",
        lambda: attempt(support=data(0, 4)),
        InvalidBatch,
        r"support input 0 is empty \(float32\[0, 4\]\).*at least one example",
    ),
    Case(
        "support: empty target",
        lambda: attempt(support=(torch.ones(6, 4), zeros(0))),
        InvalidBatch,
        r"support target 0 is empty \(int64\[0\]\)",
    ),
    Case("query: empty", lambda: attempt(query=data(0, 4), call="meta"), InvalidBatch, r"query input 0 is empty \(float32\[0, 4\]\)"),
    Case(
        "support: cross-entropy, fewer targets",
        lambda: attempt(support=(normal(6, 4), zeros(5))),
        InvalidBatch,
        r"support target 0 has 5 rows.*inputs.*6.*one target for each example",
    ),
    Case(
        "support: mean squared error, fewer targets",
        lambda: attempt(mse_net(), support=(normal(6, 4), normal(5, 1))),
        InvalidBatch,
        r"support target 0 has 5 rows.*6",
    ),
    Case(
        "support: mean squared error, other shape",
        lambda: attempt(mse_net(), support=(normal(6, 4), normal(6))),
        InvalidBatch,
        r"output float32\[6, 1\] against target float32\[6\]: the shapes must be equal",
    ),
    Case(
        "support: broadcasting loss, one target",
        lambda: attempt(mse_net(), loss=squares, support=(normal(6, 4), normal(1, 1))),
        InvalidBatch,
        r"support target 0 has 1 rows.*6",
    ),
    Case(
        "support: broadcasting loss, as many targets as features",
        lambda: attempt(mse_net(), loss=squares, support=(normal(6, 4), normal(4))),
        InvalidBatch,
        r"support target 0 has 4 rows.*6",
    ),
    Case(
        "query: broadcasting loss, more targets",
        lambda: attempt(mse_net(), loss=squares, support=(normal(6, 4), normal(6, 1)), query=(normal(6, 4), normal(9)), call="meta"),
        InvalidBatch,
        r"query target 0 has 9 rows.*6",
    ),
    Case(
        "support: two inputs of different length",
        lambda: attempt(nn.Bilinear(4, 4, 3), support=((normal(6, 4), normal(5, 4)), zeros(6))),
        InvalidBatch,
        r"support batch.*float32\[6, 4\], float32\[5, 4\]",
    ),
    Case(
        "support: negative label",
        lambda: attempt(support=(normal(6, 4), torch.tensor([0, 1, -1, 0, 0, 0]))),
        LabelOutOfRange,
        r"support target holds -1; the model's class labels are 0 to 2",
    ),
    Case(
        "support: label too large",
        lambda: attempt(support=(normal(6, 4), torch.tensor([0, 1, 3, 0, 0, 0]))),
        LabelOutOfRange,
        r"support target holds 3; the model's class labels are 0 to 2",
    ),
    Case(
        "support: label too large beside an ignored one",
        lambda: attempt(support=(normal(6, 4), torch.tensor([0, -100, 3, 0, 0, 0]))),
        LabelOutOfRange,
        r"support target holds 3; the model's class labels are 0 to 2",
    ),
    Case(
        "support: -100 where another index is ignored",
        lambda: attempt(loss=nn.CrossEntropyLoss(ignore_index=2), support=(normal(6, 4), torch.tensor([0, -100, 1, 0, 0, 0]))),
        LabelOutOfRange,
        r"support target holds -100; the model's class labels are 0 to 2",
    ),
    Case(
        "query: label too large",
        lambda: attempt(query=(normal(6, 4), torch.full((6,), 3)), call="meta"),
        LabelOutOfRange,
        r"query target holds 3; the model's class labels are 0 to 2",
    ),
    Case(
        "support: label too large, 32-bit",
        lambda: attempt(support=(normal(6, 4), torch.full((6,), 7, dtype=torch.int32))),
        LabelOutOfRange,
        r"support target holds 7; the model's class labels are 0 to 2",
    ),
    Case(
        "support: label too large in one task",
        lambda: attempt(vmap=True, support=(normal(2, 6, 4), torch.tensor([[0] * 6, [0] * 5 + [3]]))),
        LabelOutOfRange,
        r"support target holds 3; the model's class labels are 0 to 2",
    ),
    Case(
        "support: label too large in one step",
        lambda: attempt(per_step=True, support=(normal(2, 6, 4), torch.tensor([[0] * 6, [0] * 5 + [3]]))),
        LabelOutOfRange,
        r"support target holds 3; the model's class labels are 0 to 2",
    ),
    Case(
        "support: pixel label too large",
        lambda: attempt(nn.Conv2d(1, 3, 1), adaptrt.optim.sgd(0.1), (normal(2, 1, 4, 4), torch.full((2, 4, 4), 3))),
        LabelOutOfRange,
        r"support target holds 3; the model's class labels",
    ),
    Case(
        "support: label too large for a loss module",
        lambda: attempt(loss=nn.NLLLoss(), support=(normal(6, 4), torch.full((6,), 3))),
        LabelOutOfRange,
        r"support target holds 3; the model's class labels are 0 to 2",
    ),
    Case(
        "support: label too large, smoothed",
        lambda: attempt(loss=nn.CrossEntropyLoss(label_smoothing=0.1), support=(normal(6, 4), torch.full((6,), 3))),
        LabelOutOfRange,
        r"support target holds 3; the model's class labels are 0 to 2",
    ),
    Case(
        "support: token out of range",
        lambda: attempt(
            nn.Sequential(nn.Embedding(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)),
            adaptrt.optim.sgd(0.1),
            (torch.tensor([0, 1, 2, 3, 4, 5]), zeros(6)),
        ),
        AdaptrtError,
        r"support input.*5",
    ),
    Case(
        "support: NaN",
        lambda: attempt(support=poisoned(float("nan"))),
        NonFiniteInput,
        r'support input 0 holds nan at \[0, 1\].*nonfinite="ignore"',
    ),
    Case("support: infinity", lambda: attempt(support=poisoned(float("inf"), 3)), NonFiniteInput, r"support input 0 holds inf at \[3, 1\]"),
    Case(
        "support: both infinities",
        lambda: attempt(support=(lambda x: (x[0].index_fill(0, torch.tensor(2), float("-inf")), x[1]))(poisoned(float("inf"), 3))),
        NonFiniteInput,
        r"support input 0 holds -inf at \[2, 0\]",
    ),
    Case(
        "support: NaN in the target",
        lambda: attempt(mse_net(), support=(normal(6, 4), torch.full((6, 1), float("nan")))),
        NonFiniteInput,
        r"support target 0 holds nan at \[0, 0\]",
    ),
    Case("query: NaN", lambda: attempt(query=poisoned(float("nan")), call="meta"), NonFiniteInput, r"query input 0 holds nan at \[0, 1\]"),
    Case(
        "prediction: NaN", lambda: adapted(lambda unroll, result: result(poisoned(float("nan"))[0])), NonFiniteInput, r"input 0 holds nan"
    ),
    Case("prediction: empty", lambda: adapted(lambda unroll, result: result(torch.ones(0, 4))), InvalidBatch, r"input 0 is empty"),
    Case(
        "prediction: another device",
        lambda: adapted(lambda unroll, result: result(torch.ones(6, 4, device="meta"))),
        DeviceMismatch,
        r"input 0 is on meta, the model on cpu",
    ),
    Case(
        "prediction: wrong rank",
        lambda: adapted(lambda unroll, result: result(torch.ones(6, 5))),
        InvalidBatch,
        r"input batch.*float32\[6, 5\]",
    ),
    Case(
        "prediction: positional and keyword",
        lambda: adapted(lambda unroll, result: result(torch.ones(6, 4), input=torch.ones(6, 4))),
        InvalidType,
        r"all by position or all by keyword",
    ),
    Case("prediction: nothing", lambda: adapted(lambda unroll, result: result()), InvalidType, r"input.*must be a tensor"),
    Case(
        "prediction: no task axis",
        lambda: adapted(lambda unroll, result: result(torch.ones(6, 4)), vmap=True),
        InvalidBatch,
        r"input tensor 0.*must have 2 tasks along axis 0, got 6",
    ),
    # --- tasks and steps
    Case(
        "vmap: support disagrees with itself",
        lambda: attempt(vmap=True, support=(normal(2, 6, 4), zeros(3, 6))),
        InvalidBatch,
        r"support tensor 1.*must have 2 tasks along axis 0, got 3",
    ),
    Case(
        "vmap: query disagrees with support",
        lambda: attempt(vmap=True, support=(normal(2, 6, 4), zeros(2, 6)), query=(normal(3, 6, 4), zeros(3, 6)), call="meta"),
        InvalidBatch,
        r"query tensor 0.*must have 2 tasks along axis 0, got 3",
    ),
    Case(
        "vmap: no task axis",
        lambda: attempt(vmap=True, support=(torch.tensor(1.0), torch.tensor(1.0))),
        InvalidBatch,
        r"support tensor 0 \(float32\[\]\) needs an axis 0 of tasks",
    ),
    Case(
        "vmap: batch sizes differ",
        lambda: attempt(vmap=True, support=(normal(2, 6, 4), zeros(2, 5))),
        InvalidBatch,
        r"support target 0 has 5 rows.*6",
    ),
    Case(
        "per_step: too few batches",
        lambda: attempt(per_step=True, support=(normal(3, 6, 4), zeros(3, 6))),
        InvalidBatch,
        r"support tensor 0.*must have 2 inner steps along axis 0, got 3",
    ),
    Case(
        "per_step: target without the axis",
        lambda: attempt(per_step=True, support=(normal(2, 6, 4), zeros(6))),
        InvalidBatch,
        r"support tensor 1.*must have 2 inner steps along axis 0, got 6",
    ),
    Case(
        "per_step and vmap: wrong axis",
        lambda: attempt(per_step=True, vmap=True, support=(normal(5, 3, 6, 4), zeros(5, 3, 6))),
        InvalidBatch,
        r"support tensor 0.*must have 2 inner steps along axis 1, got 3",
    ),
    # --- start
    Case(
        "start: wrong kind",
        lambda: adapted(lambda unroll, result: unroll.adapt(data(), start=anything(result.params))),
        InvalidType,
        r"start must be what adapt\(\) returned, got dict",
    ),
    Case(
        "start: of another optimiser",
        lambda: start_for(net(), adaptrt.optim.adam()),
        OptimizerMismatch,
        r"start was adapted with another model or optimiser",
    ),
    Case(
        "start: of another model",
        lambda: start_for(mse_net(), adaptrt.optim.sgd(0.1, momentum=0.9)),
        OptimizerMismatch,
        r"start was adapted with another model or optimiser",
    ),
    Case("start: same names, other shapes", lambda: start_for(net(9), adaptrt.optim.sgd(0.1, momentum=0.9)), OptimizerMismatch, r"start"),
    Case(
        "start: with tasks, support without",
        lambda: start_for(net(), adaptrt.optim.sgd(0.1, momentum=0.9), vmap=True),
        InvalidArgument,
        r"start holds 2 tasks, the support batch no task axis",
    ),
    Case(
        "start: other number of tasks",
        lambda: adapted(lambda unroll, result: unroll.adapt((normal(3, 6, 4), zeros(3, 6)), start=result), vmap=True),
        InvalidArgument,
        r"start holds 2 tasks, the support batch 3",
    ),
    # --- shapes under on_new_shape="error"
    Case(
        "new shape: nothing warm",
        lambda: warm(then=lambda unroll: unroll.adapt(data())),
        ShapeChanged,
        r"support float32\[6, 4\], int64\[6\]: nothing was compiled yet.*warmup\(\)",
    ),
    Case(
        "new shape: support",
        lambda: warm(data(), then=lambda unroll: unroll.adapt(data(5, 4))),
        ShapeChanged,
        r"support tensor 0 was traced as float32\[6, 4\], got float32\[5, 4\].*warmup\(\).*pad",
    ),
    Case(
        "new shape: query",
        lambda: warm(data(), data(7, 4), then=lambda unroll: unroll(data(), data(5, 4))),
        ShapeChanged,
        r"query tensor 0 was traced as float32\[7, 4\], got float32\[5, 4\].*warmup\(\)",
    ),
    Case(
        "new shape: prediction",
        new_prediction_shape,
        ShapeChanged,
        r"input tensor 0 was traced as float32\[7, 4\], got float32\[5, 4\].*warmup\(\)",
    ),
    Case(
        "new shape: dtype of the target",
        lambda: warm(data(), then=lambda unroll: unroll.adapt((normal(6, 4), torch.zeros(6, dtype=torch.int32)))),
        ShapeChanged,
        r"support tensor 1 was traced as int64\[6\], got int32\[6\]",
    ),
    Case(
        "new shape: query, none warm",
        lambda: warm(data(), then=lambda unroll: unroll(data(), data())),
        ShapeChanged,
        r"query.*nothing was compiled yet.*warmup\(\)",
    ),
    Case(
        "new shape: no target where there was one",
        lambda: warm(data(), then=lambda unroll: unroll.adapt((normal(6, 4),))),
        ShapeChanged,
        r"support.*(target|structure)",
    ),
    # --- what cannot be traced
    Case("trace: branch on a value", lambda: attempt(Forward(branch)), DataDependentControlFlow, line("branch")),
    Case("trace: item()", lambda: attempt(Forward(read_item)), DataDependentControlFlow, line("item")),
    Case("trace: float()", lambda: attempt(Forward(read_float)), DataDependentControlFlow, line("float")),
    Case("trace: tolist()", lambda: attempt(Forward(read_list)), DataDependentControlFlow, line("list")),
    Case("trace: numpy()", lambda: attempt(Forward(read_numpy)), DataDependentControlFlow, line("numpy")),
    Case("trace: while on a value", lambda: attempt(Forward(loop)), DataDependentControlFlow, line("loop")),
    Case("trace: boolean-mask indexing", lambda: attempt(Forward(mask)), DataDependentControlFlow, line("mask")),
    Case("trace: nonzero", lambda: attempt(Forward(where)), DataDependentControlFlow, line("nonzero")),
    Case("trace: branch in the loss", lambda: attempt(loss=branching_loss), DataDependentControlFlow, line("loss")),
    Case("trace: branch in prediction only", lambda: branch_when_evaluated(), DataDependentControlFlow, line("branch")),
    Case(
        "trace(): branch on a value",
        lambda: (lambda model, x: Attempt(lambda: adaptrt.trace(model, x), (model, x)))(Forward(branch), torch.ones(6, 4)),
        DataDependentControlFlow,
        line("branch"),
    ),
    Case(
        "trace: an operation without fake kernel",
        lambda: attempt(loss=Alignment(), support=(normal(6, 4), labels(6, high=2))),
        NotTraceable,
        rf"{HERE}:\d+: .*ctc_loss\(.*_ctc_loss",
    ),
    Case(
        "random: multinomial",
        lambda: attempt(Forward(multinomial)),
        UnsupportedRandomness,
        r"'multinomial'.*cannot be drawn before.*Draw it outside the model.*bernoulli",
    ),
    Case("random: own generator, factory", lambda: own_generator_case(own_generator), UnsupportedRandomness, r"generator"),
    Case(
        "random: own generator, in place",
        lambda: own_generator_case(own_generator_inplace),
        UnsupportedRandomness,
        r"generator of its own.*pass generator=",
    ),
    # --- no second derivative
    *[
        Case(
            f"second derivative: margin p={p}, {adjoint}",
            lambda p=p, adjoint=adjoint: attempt(nn.Sequential(nn.Identity(), Margins(p)), query=data(), call="meta", adjoint=adjoint),
            NotDifferentiable,
            r"'multi_margin_loss_backward', called in module '1' \(Margins\).*adjoint=FirstOrder\(\)",
        )
        for p in (2, 1)
        for adjoint in (Unrolled(), Replay())
    ],
    *[
        Case(
            f"second derivative: behind dropout, {adjoint}",
            lambda adjoint=adjoint: attempt(nn.Sequential(nn.Dropout(0.5), Margins(2)), query=data(), call="meta", adjoint=adjoint),
            NotDifferentiable,
            r"'multi_margin_loss_backward', called in module '1' \(Margins\)",
        )
        for adjoint in (Unrolled(), Replay())
    ],
    Case(
        "second derivative: embedding_bag max",
        lambda: attempt(
            Bag(), support=(labels(6, 2, high=10), labels(6, high=3)), query=(labels(6, 2, high=10), labels(6, high=3)), call="meta"
        ),
        NotDifferentiable,
        r"'_embedding_bag\w*_backward', called in module 'words' \(EmbeddingBag\)",
    ),
    Case(
        "second derivative: custom function",
        lambda: attempt(Forward(cube_once), query=data(), call="meta"),
        NotDifferentiable,
        r"once_differentiable \(CubeOnce\).*adjoint=FirstOrder\(\)",
    ),
    Case(
        "second derivative: custom function, through adapt",
        lambda: backward_of_adapt(Forward(cube_once)),
        NotDifferentiable,
        r"once_differentiable \(CubeOnce\)",
    ),
    Case("second derivative: of the meta-gradient", penalty, RuntimeError, r"once_differentiable|differentiate"),
]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_and_nothing_changes(case: Case) -> None:
    made = case.build()
    untouched = Untouched(made)
    with pytest.raises(Exception) as caught:
        made.run()
    untouched.check()
    assert isinstance(caught.value, case.error), f"{type(caught.value).__name__}: {caught.value}"
    assert re.search(case.message, str(caught.value), re.DOTALL), str(caught.value)


# --- what stands beside the table


class Accepted(NamedTuple):
    """What looks like a case of the table and is none."""

    name: str
    build: Callable[[], Attempt]


ACCEPTED: list[Accepted] = [
    Accepted("ignored labels", lambda: attempt(support=(normal(6, 4), torch.tensor([0, 1, -100, 2, -100, 0])))),
    Accepted(
        "ignored labels of another index",
        lambda: attempt(loss=nn.CrossEntropyLoss(ignore_index=7), support=(normal(6, 4), torch.tensor([0, 1, 7, 2, 7, 0]))),
    ),
    Accepted("ignored labels in the query", lambda: attempt(query=(normal(6, 4), torch.tensor([0, 1, -100, 2, -100, 0])), call="meta")),
    Accepted("labels of 8 bits", lambda: attempt(support=(normal(6, 4), labels(6).to(torch.uint8)))),
    Accepted(
        "a target without axes",
        lambda: attempt(loss=lambda output, target: CE(output, zeros_like(output)) * target, support=(normal(6, 4), torch.tensor(0.5))),
    ),
    Accepted("soft labels", lambda: attempt(loss=CE, support=(normal(6, 4), normal(6, 3).softmax(-1)))),
    Accepted("sequences first", lambda: attempt(Recurrent(), loss=CE, support=(normal(7, 5, 4), labels(5)))),
    Accepted(
        "tokens first", lambda: attempt(nn.Sequential(nn.Embedding(9, 4), Recurrent()), loss=CE, support=(labels(7, 5, high=9), labels(5)))
    ),
    Accepted(
        "attention", lambda: attempt(Attention(), query=(normal(2, 5, 4), labels(2)), support=(normal(2, 5, 4), labels(2)), call="meta")
    ),
    Accepted("margin to first order", lambda: attempt(Margins(2), query=data(), call="meta", adjoint=FirstOrder())),
    Accepted("custom function to first order", lambda: attempt(Forward(cube_once), query=data(), call="meta", adjoint=FirstOrder())),
    Accepted("finite values whose sum is not", lambda: attempt(mse_net(), support=(torch.full((6, 4), 1e38), normal(6, 1)))),
    Accepted("a support list", lambda: attempt(support=list(data()))),
]


def zeros_like(output: Tensor) -> Tensor:
    return torch.zeros(output.shape[0], dtype=torch.long)


class Recurrent(nn.Module):
    """Takes sequences with the batch as second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][-1]


class Attention(nn.Module):
    """Fused attention has no second derivative; it is traced as matmul and softmax, not refused."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.name)
def test_what_is_no_bad_input_is_accepted(case: Accepted) -> None:
    made = case.build()
    before = settings()
    photos = [photograph(thing) for thing in made.watched]
    made.run()
    assert settings() == before
    assert all(same(photo, photograph(thing)) for photo, thing in zip(photos, made.watched, strict=True))


@pytest.mark.parametrize("part", ["support", "query"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_data_is_passed_on_when_asked_to(part: str, value: float) -> None:
    model = net()
    unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(0.1), 1, backend="eager", nonfinite="ignore")
    bad = poisoned(value)
    if part == "support":
        assert not torch.isfinite(unroll.adapt(bad).losses).all()
    else:
        assert not torch.isfinite(unroll(data(), bad))
        assert not torch.isfinite(unroll.adapt(data())(bad[0])).all()


def test_ignored_labels_count_for_nothing() -> None:
    """Not only accepted: the step is that of the other examples."""
    model = nn.Linear(4, 3)
    x, y = data()
    y[2:] = -100
    unroll = adaptrt.compile_unroll(model, adaptrt.optim.sgd(0.1), 2, backend="eager")
    whole, part = unroll.adapt((x, y)), unroll.adapt((x[:2], y[:2]))
    for name, value in whole.params.items():
        torch.testing.assert_close(value, part.params[name])


WRONG_DATA: list[tuple[str, Any]] = [
    ("label", (normal(6, 4), torch.full((6,), 3))),
    ("NaN", poisoned(float("nan"))),
    ("empty", data(0, 4)),
    ("features", data(6, 5)),
    ("device", (torch.ones(6, 4, device="meta"), zeros(6))),
]


@pytest.mark.parametrize("wrong", [support for _, support in WRONG_DATA], ids=[name for name, _ in WRONG_DATA])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "inference"])
def test_the_unroll_still_works_after_an_error(wrong: Any, grad: bool) -> None:
    model = net()
    made = [adaptrt.compile_unroll(model, adaptrt.optim.sgd(0.1), 2, backend="eager") for _ in range(2)]
    losses: list[Tensor] = []
    for index, unroll in enumerate(made):
        torch.manual_seed(5)
        with torch.set_grad_enabled(grad), torch.inference_mode(not grad):
            if index:
                with pytest.raises(AdaptrtError):
                    unroll.adapt(wrong)
                with pytest.raises(AdaptrtError):
                    unroll(data(), wrong)
            losses.append(unroll(data(), data()).detach())
    assert torch.equal(*losses)


def test_an_error_leaves_the_callers_generator_alone() -> None:
    unroll = adaptrt.compile_unroll(
        nn.Sequential(nn.Dropout(0.5), Margins(2)), adaptrt.optim.sgd(0.1), 2, adjoint=Replay(), backend="eager"
    )
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(NotDifferentiable):
        unroll(data(), data(), generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_every_error_is_ours() -> None:
    """Handlers for PyTorch's own errors keep working, and one handler gets all."""
    for case in CASES:
        assert issubclass(case.error, AdaptrtError) or case.error is RuntimeError
