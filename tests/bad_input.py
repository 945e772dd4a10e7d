"""What a case of bad input is, how it is checked, and the model, optimiser and data that the cases of all files are built from.

A message names the argument, what was expected, what was got and the next action. Each case is built first, then everything that it could
touch is photographed, then it is tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptrt
from adaptrt.errors import AdaptrtError
from tests.photographs import Untouched


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


def check_refused(case: Case) -> None:
    """Tries what the case does. Its error must be of exactly the expected class, and nothing may have changed."""
    assert issubclass(case.error, AdaptrtError), "one handler must get all errors"
    made = case.build()
    untouched = Untouched(made.watched)
    with pytest.raises(Exception) as caught:
        made.run()
    untouched.check()
    assert type(caught.value) is case.error, f"{type(caught.value).__name__}: {caught.value}"
    assert re.search(case.message, str(caught.value), re.DOTALL), str(caught.value)


# --- the usual model, optimiser and data


CE = F.cross_entropy


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


def poisoned(value: float, index: int = 0) -> tuple[Tensor, Tensor]:
    x, y = data()
    x[index, 1] = value
    return x, y


def anything(value: Any) -> Any:
    """The value, for arguments that a type checker would refuse."""
    return value


def mse_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 1))


def squares(output: Tensor, target: Tensor) -> Tensor:
    """A loss that broadcasts whatever it is given."""
    return ((output - target) ** 2).mean()


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


def beside(name: str, value: Any) -> nn.Module:
    """A good model with an additional parameter."""
    model = Forward(lambda module, h: h)
    setattr(model, name, value)
    return model


class Margins(nn.Module):
    def __init__(self, p: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 4))
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        # An operation that no supported version of PyTorch differentiates twice; torch.cdist is one up to 2.14.
        scores = x @ self.centres.mT
        return scores - F.multi_margin_loss(scores, torch.zeros(len(x), dtype=torch.int64), p=self.p, reduction="none")[:, None]


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


# --- the usual ways to fail


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


def warm(*shapes: Any, then: Callable[[adaptrt.CompiledUnroll], Any]) -> Attempt:
    """An unroll under "error" that has seen `shapes`; `then` calls it with others."""
    model = net()
    opt = sgd(model)
    unroll = adaptrt.compile_unroll(model, opt, 1, backend="eager", on_new_shape="error")
    if shapes:
        unroll.warmup(*shapes)
    return Attempt(lambda: then(unroll), (model, opt))
