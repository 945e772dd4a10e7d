"""Hooks of one module and of all modules: they run in every step, and those that are added or removed between calls are followed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_python_state import Net, assert_follows, batch, unrolled
from test_refusals import close, looped
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from adaptrt.errors import NotTraceable
from tests import naive

COUNTS = {"calls": 0}


def doubles_everything(module: nn.Module, args: Any) -> Any:
    return tuple([arg * 2 if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in args])


def is_last(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.out_features == 3


def doubled(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 2 if is_last(module) else None


def doubled_before(module: nn.Module, args: Any) -> Any:
    return (args[0] * 2,) if is_last(module) else None


REGISTER: dict[str, Callable[[Net], RemovableHandle]] = {
    "forward": lambda model: model.linear.register_forward_hook(doubled),
    "before forward": lambda model: model.linear.register_forward_pre_hook(doubled_before),
    "backward": lambda model: model.linear.register_full_backward_hook(lambda module, grads, of_output: (grads[0] * 2,)),
    "before backward": lambda model: model.linear.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 2,)),
    "forward of all": lambda model: register_module_forward_hook(doubled),
    "before forward of all": lambda model: register_module_forward_pre_hook(doubled_before),
    "backward of all": lambda model: register_module_full_backward_hook(
        lambda module, grads, of_output: (grads[0] * 2,) if is_last(module) else None
    ),
    "before backward of all": lambda model: register_module_full_backward_pre_hook(
        lambda module, grads: (grads[0] * 2,) if is_last(module) else None
    ),
}


def two_layers() -> Net:
    model = Net(lambda self, x: self.linear(self.get_submodule("first")(x).tanh()))
    model.add_module("first", nn.Linear(4, 4, dtype=torch.float64))
    return model


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the data of the whole model need no gradient
@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_are_followed(kind: str) -> None:
    model = two_layers()
    unroll = unrolled(model)
    before = unroll.adapt(batch()).params
    handle = REGISTER[kind](model)
    try:
        assert_follows(unroll, model)
        assert_follows(unrolled(model), model)
        with_hook = unroll.adapt(batch()).params
    finally:
        handle.remove()
    assert not torch.equal(before["first.weight"], with_hook["first.weight"])
    assert_follows(unroll, model)


def test_a_hook_for_all_modules_sees_only_the_models() -> None:
    handle = register_module_forward_pre_hook(doubles_everything)
    try:
        model = two_layers()
        unroll = unrolled(model)
        assert_follows(unroll, model)
        assert_follows(unroll, model, seed=1)
        support, query = batch(), batch(1)
        found = torch.autograd.grad(unroll(support, query), list(model.parameters()))
        expected = torch.autograd.grad(naive.meta_loss(*looped(model), support, query), list(model.parameters()))
        close(found, expected)
    finally:
        handle.remove()


def counting(module: nn.Module, args: object, output: Any) -> Any:
    if not is_last(module):
        return None
    COUNTS["calls"] += 1
    return output * COUNTS["calls"]


def test_state_of_a_hook_for_all_modules_is_refused_by_name() -> None:
    handle = register_module_forward_hook(counting)
    try:
        with pytest.raises(NotTraceable, match=r"COUNTS\.calls"):
            unrolled(two_layers(), F.cross_entropy).adapt(batch())
    finally:
        handle.remove()
    assert COUNTS == {"calls": 0}


NAMES: dict[Any, str] = {}


class Recogniser:
    """An object whose methods are hooks, as in a library that extracts features."""

    def __init__(self, model: Net) -> None:
        self.last = model.linear
        self.names: dict[Any, str] = {model.linear: "last"}
        self.outputs: dict[Any, Any] = {}

    def compares(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output * 2 if module == self.last else None

    def looks_up(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output * 2 if self.names.get(module) == "last" else None

    def records(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, nn.Linear) and output.shape[-1] == self.last.out_features:
            self.outputs[type(module).__name__] = output


def looks_up_globally(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 2 if NAMES.get(module) == "last" else None


def looks_up_ids(ids: set[int], module: nn.Module, args: Any, output: Any) -> Any:
    return output * 2 if id(module) in ids else None


RECOGNISE: dict[str, Callable[[Net], Any]] = {
    "by a closure": lambda model: lambda module, args, output: output * 2 if module is model.linear else None,
    "by a default": lambda model: lambda module, args, output, last=model.linear: output * 2 if module is last else None,
    "by a global table": lambda model: looks_up_globally,
    "by a table of ids": lambda model: functools.partial(looks_up_ids, {id(model.linear)}),
    "by an attribute": lambda model: Recogniser(model).compares,
    "by a table in an attribute": lambda model: Recogniser(model).looks_up,
}


@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("way", RECOGNISE)
def test_a_hook_that_recognises_a_module_is_refused(way: str, of_all: bool) -> None:
    model = two_layers()
    NAMES.clear()
    NAMES[model.linear] = "last"
    hook = RECOGNISE[way](model)
    handle = register_module_forward_hook(hook) if of_all else model.linear.register_forward_hook(hook)
    try:
        with pytest.raises(NotTraceable, match=r"holds .*'linear'|holds the model"):
            unrolled(model).adapt(batch())
    finally:
        handle.remove()


def test_a_hook_that_holds_a_module_and_does_not_ask_which_it_is_given_is_allowed() -> None:
    model = two_layers()

    def holds(module: nn.Module, args: Any, output: Any) -> Any:
        return output if model.count else None

    handles = [model.linear.register_forward_hook(hook) for hook in (Recogniser(model).records, holds)]
    try:
        assert_follows(unrolled(model), model)
    finally:
        for handle in handles:
            handle.remove()
