"""Optimisers that do not fit, and selections of parameters that leave nothing to adapt, are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adaptrt
from adaptrt import FirstOrder, Replay, Unrolled
from adaptrt.errors import DeviceMismatch, InvalidArgument, InvalidType, NothingToAdapt, OptimizerMismatch, UnsupportedOptimizer
from tests.bad_input import Attempt, Case, attempt, check_refused, data, net, sgd


class Halves(torch.optim.SGD):
    """Steps half as far; a conversion that took it for SGD would be silently wrong."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None if p.grad is None else p.grad / 2
        return super().step(closure)


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


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


def attempt_after_compile(change: Callable[[torch.optim.Optimizer], Any]) -> Attempt:
    """The optimiser is changed after the unroll was made."""
    model = net()
    opt = sgd(model)
    unroll = adaptrt.compile_unroll(model, opt, 1, backend="eager")
    change(opt)
    support = data()
    return Attempt(lambda: unroll.adapt(support), (model, opt, support))


CASES: list[Case] = [
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
        DeviceMismatch,
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
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case) -> None:
    check_refused(case)
