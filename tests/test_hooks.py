"""Hooks of one module and of all modules: they run in every step, and those that are added or removed between calls are followed."""

from __future__ import annotations

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
