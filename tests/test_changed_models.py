"""What is changed in a model after `compile_unroll` is followed, or refused for the true reason."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from adaptrt.errors import DeviceMismatch, InvalidBatch, InvalidType, ModelChanged, UnsupportedParameter
from tests import naive
from tests.bad_input import Attempt, Case, check_refused
from tests.test_refusals import close, double, looped, unrolled


class Normed(nn.Module):
    """Two layers of one shape, frozen and adapted parameters, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3)
        self.norm, self.other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.second(self.norm(self.first(x)).tanh()))


def replaced(module: nn.Module, name: str, value: Any) -> None:
    setattr(module, name, value)


def parameter(*shape: int, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape, dtype=dtype), **options)


CHANGES: dict[str, tuple[Callable[[Normed], Any], type[Exception], str]] = {
    "a bias set to None": (lambda m: replaced(m.first, "bias", None), ModelChanged, r"parameter 'model\.first\.bias' was set to None"),
    "a buffer set to None": (lambda m: replaced(m.norm, "running_mean", None), ModelChanged, r"buffer 'model\.norm\.running_mean' was set"),
    "a layer set to None": (lambda m: replaced(m, "norm", None), ModelChanged, r"layer 'model\.norm' was replaced by None"),
    "parameters tied": (
        lambda m: replaced(m.other, "bias", m.second.bias),
        ModelChanged,
        r"'model\.second\.bias' and 'model\.other\.bias', which were two tensors, were made one",
    ),
    "buffers tied": (
        lambda m: replaced(m.other, "running_var", m.norm.running_var),
        ModelChanged,
        r"'model\.norm\.running_var' and 'model\.other\.running_var', which were two tensors",
    ),
    "frozen": (lambda m: m.first.weight.requires_grad_(False), ModelChanged, r"requires_grad of parameter 'first\.weight' was changed"),
    "replaced by one that is frozen": (
        lambda m: replaced(m.second, "weight", parameter(3, 3, requires_grad=False)),
        ModelChanged,
        r"requires_grad of parameter 'second\.weight' was changed",
    ),
    "of another shape": (
        lambda m: replaced(m.second, "weight", parameter(5, 3)),
        InvalidBatch,
        r"'model\.second\.weight' was float64\[3, 3\] when compile_unroll was called, and is float64\[5, 3\] now",
    ),
    "of another dtype": (
        lambda m: replaced(m.second, "weight", parameter(3, 3, dtype=torch.float32)),
        InvalidBatch,
        r"'model\.second\.weight' was float64\[3, 3\] when compile_unroll was called, and is float32",
    ),
    "half": (lambda m: m.half(), InvalidBatch, r"model\.float\(\).*was float64\[3, 4\] when compile_unroll was called, and is float16"),
    "a buffer of another dtype": (lambda m: replaced(m.norm, "running_var", torch.ones(3)), InvalidType, r"dtype.*model\.float\(\)"),
    "on another device": (lambda m: m.to("meta"), UnsupportedParameter, r"on the meta device"),
    "one on another device": (
        lambda m: replaced(m.second, "weight", nn.Parameter(torch.ones(3, 3, device="meta"))),
        DeviceMismatch,
        r"first\.weight on cpu, second\.weight on meta",
    ),
    "sparse": (
        lambda m: replaced(m.second, "weight", nn.Parameter(torch.eye(3).double().to_sparse())),
        UnsupportedParameter,
        r"'second\.weight' has layout",
    ),
    "a parametrization": (
        lambda m: parametrizations.weight_norm(m.second),
        ModelChanged,
        r"layer 'model\.second\.parametrizations' was added",
    ),
    "an adapter": (lambda m: replaced(m, "second", nn.Sequential(m.second)), ModelChanged, r"layer 'model\.second' was replaced by a Seq"),
}


def changed(change: Callable[[Normed], Any]) -> Attempt:
    model = Normed()
    unroll = unrolled(model)
    unroll.adapt(double())
    change(model)
    batch = double()
    return Attempt(lambda: unroll.adapt(batch), (model, batch))


def test_a_change_of_requires_grad_says_what_may_have_changed_it() -> None:
    message = r"peft's set_adapter and disable_adapter change it, too.*make a new unroll, or say which parameters adapt by params="
    check_refused(Case("frozen", lambda: changed(lambda m: m.first.weight.requires_grad_(False)), ModelChanged, message))


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_a_model_are_refused_for_the_true_reason(name: str) -> None:
    change, error, message = CHANGES[name]
    check_refused(Case(name, lambda: changed(change), error, message))


def doubles_output(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return 2.0 * output


SEEN: dict[str, Callable[[Normed], Any]] = {
    "eval": lambda m: m.eval(),
    "eval of a part": lambda m: m.other.eval(),
    "another parameter": lambda m: replaced(m.second, "weight", parameter(3, 3)),
    "other values": lambda m: m.load_state_dict({name: value + 1 for name, value in m.state_dict().items()}, assign=True),
    "a forward hook": lambda m: m.first.register_forward_hook(doubles_output),
    "a hook before forward": lambda m: m.second.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2.0,)),
    "a forward of its own": lambda m: replaced(m.norm, "forward", lambda x: x.sin()),
}


@pytest.mark.parametrize("name", SEEN)
def test_other_changes_are_seen(name: str) -> None:
    model = Normed()
    unroll, batch = unrolled(model), double()
    unroll(batch, batch)
    SEEN[name](model)
    close(unroll(batch, batch), naive.meta_loss(*looped(model), batch, batch))
    adapted = naive.adapt(*looped(model), batch)
    close(unroll.adapt(batch)(batch[0]), naive.call(model, adapted.params, adapted.buffers, batch[0])[0])


# --- a forward that was replaced


def compiled_in_place(model: nn.Module) -> None:
    model.forward = torch.compile(model.forward)


def partial(model: nn.Module) -> None:
    model.forward = functools.partial(type(model).forward, model)


class Held(nn.Linear):
    """It holds what was compiled from one of its methods."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.run = torch.compile(self.part)

    def part(self, x: Tensor) -> Tensor:
        return nn.Linear.forward(self, x)

    def forward(self, input: Tensor) -> Tensor:
        return self.run(input)


REPLACED: dict[str, Callable[[nn.Module], None]] = {
    "compiled": compiled_in_place,
    "excluded from compiling": lambda model: replaced(model, "forward", torch.compiler.disable(model.forward)),
    "partial": partial,
    "partial method": lambda model: replaced(model, "forward", functools.partial(model.forward)),
}


@pytest.mark.parametrize("name", [*REPLACED, "held"])
def test_a_forward_that_was_replaced_runs_on_the_adapted_weights(name: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model = copy.deepcopy(plain)
    if name == "held":
        model[2] = Held(4, 3).double()
        model.load_state_dict(plain.state_dict())
    else:
        for part in model:
            REPLACED[name](part)
    batch = double()
    found = unrolled(model)(batch, batch)
    wanted = naive.meta_loss(*looped(plain), batch, batch)
    close(found, wanted)
    close(torch.autograd.grad(found, list(model.parameters())), torch.autograd.grad(wanted, list(plain.parameters())))
