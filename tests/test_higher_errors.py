"""Misuse of `adaptrt.higher`: the original's type of exception, or one below it, with words that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.higher_cases import batch, loss_of, make, ours, over_both, quietly, theirs

pytestmark = pytest.mark.usefixtures("double")


class Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.1)


def adam(net: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(net.parameters(), lr=0.1)


def loop(package: Any, **settings: Any) -> tuple[Any, Any]:
    net = make("mlp")
    return package.innerloop_ctx(net, sgd(net), **settings).__enter__()


def stepped(package: Any, **settings: Any) -> None:
    fmodel, diffopt = loop(package)
    diffopt.step(loss_of(fmodel, 1), **settings)


def empty_handle(package: Any) -> Any:
    """A handle without fast weights."""
    return package.patch.make_functional(make("mlp"))


def step_on_an_empty_handle(package: Any) -> None:
    net = make("mlp")
    package.get_diff_optim(sgd(net), net.parameters(), fmodel=package.patch.make_functional(net)).step(loss_of(net, 1))


def step_on_nothing(package: Any) -> None:
    net = make("mlp")
    package.get_diff_optim(sgd(net), net.parameters()).step(loss_of(net, 1))


def step_on_a_vector(package: Any) -> None:
    fmodel, diffopt = loop(package)
    diffopt.step(fmodel(batch(1)[0]))


def step_with_few_params(package: Any) -> None:
    fmodel, diffopt = loop(package)
    diffopt.step(loss_of(fmodel, 1), params=list(fmodel.parameters())[:2])


def step_with_all_frozen(package: Any) -> None:
    net = make("mlp").requires_grad_(False)
    fmodel, diffopt = package.innerloop_ctx(net, sgd(net)).__enter__()
    diffopt.step(loss_of(fmodel, 1))


def create_from_an_instance(package: Any) -> None:
    net = make("mlp")
    package.create_diff_optim(sgd(net), {"lr": 0.1}, params=list(net.parameters()))


def assign(package: Any, name: str, value: Any, make_handle: str = "monkeypatch") -> None:
    setattr(getattr(package.patch, make_handle)(Weight()), name, value)


def apply(package: Any, override: Any, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd) -> None:
    package.optim.apply_trainable_opt_params(make_optimizer(make("mlp")), override)


def traced() -> Any:
    return quietly(lambda: torch.jit.trace(make("mlp"), batch(1)[0]))


class Misuse(NamedTuple):
    """Ours raises what the original does, or `type` where the original's is an accident of its code."""

    run: Callable[[Any], Any]
    says: str
    type: type[Exception] | None = None


ONE = torch.tensor(0.1)
TABLE: dict[str, Misuse] = {
    "step without weights": Misuse(step_on_nothing, "step needs params"),
    "step, handle without weights": Misuse(step_on_an_empty_handle, "step needs params"),
    "step, loss without a graph": Misuse(lambda h: loop(h)[1].step(torch.tensor(1.0)), "does not require grad"),
    "step, loss of several numbers": Misuse(step_on_a_vector, "scalar outputs"),
    "step, loss no tensor": Misuse(lambda h: loop(h)[1].step(1.0), "loss"),
    "step, too few params": Misuse(step_with_few_params, "params"),
    "step, all frozen": Misuse(step_with_all_frozen, "does not require grad"),
    "step, callback drops gradients": Misuse(lambda h: stepped(h, grad_callback=lambda g: g[:1]), "grad_callback"),
    "step, callback returns nothing": Misuse(lambda h: stepped(h, grad_callback=lambda g: None), "grad_callback"),
    "override, two values": Misuse(lambda h: loop(h, override={"lr": [0.1, 0.2]}), "override of 'lr' has 2 values: give one"),
    "override, no values": Misuse(lambda h: loop(h, override={"lr": []}), "override of 'lr' has 0 values: give one"),
    "override in a step": Misuse(lambda h: stepped(h, override={"lr": [1.0, 2.0, 3.0]}), "override of 'lr' has 3 values: give one"),
    "override, a number": Misuse(lambda h: loop(h, override={"lr": 0.1}), "override of 'lr'"),
    "override, a 0-dim tensor": Misuse(lambda h: loop(h, override={"lr": ONE}), "override of 'lr'"),
    "unsupported optimiser": Misuse(
        lambda h: h.get_diff_optim(torch.optim.LBFGS(make("mlp").parameters()), []),
        "LBFGS .* Add one by register_optim",
    ),
    "unsupported class": Misuse(
        lambda h: h.create_diff_optim(torch.optim.LBFGS, params=[ONE]),
        "LBFGS .* Add one by register_optim",
    ),
    "no optimiser": Misuse(
        lambda h: h.innerloop_ctx(make("mlp"), 0.1).__enter__(),
        "float has no differentiable version",
    ),
    "instance for a class": Misuse(create_from_an_instance, "SGD"),
    "create without weights": Misuse(lambda h: h.create_diff_optim(torch.optim.SGD, {"lr": 0.1}), "needs params or fmodel"),
    "create with no weights": Misuse(
        lambda h: h.create_diff_optim(torch.optim.SGD, {"lr": 0.1}, params=[]), "empty parameter list", ValueError
    ),
    "create, empty handle": Misuse(
        lambda h: h.create_diff_optim(torch.optim.SGD, {"lr": 0.1}, fmodel=empty_handle(h)), "call update_params first"
    ),
    "create, unknown setting": Misuse(lambda h: h.create_diff_optim(torch.optim.SGD, {"rate": 0.1}, params=[ONE]), "rate"),
    "abstract": Misuse(lambda h: h.optim.DifferentiableOptimizer(sgd(make("mlp")), []), "abstract"),
    "another model's optimiser": Misuse(
        lambda h: h.innerloop_ctx(make("mlp"), sgd(make("mlp"))).__enter__(), r"shape \[5, 3\], is not among the reference parameters"
    ),
    "patched already": Misuse(lambda h: h.monkeypatch(h.monkeypatch(make("mlp"))), "patch the original"),
    "part patched already": Misuse(lambda h: h.monkeypatch(nn.Sequential(h.monkeypatch(make("mlp")))), "patch the original"),
    "patch a function": Misuse(lambda h: h.monkeypatch(torch.tanh), "module must be a torch.nn.Module", TypeError),
    "patch a class": Misuse(lambda h: h.monkeypatch(nn.Linear), "module must be a torch.nn.Module", TypeError),
    "patch a script": Misuse(
        lambda h: h.monkeypatch(quietly(lambda: torch.jit.script(make("mlp")))), "script .* patch the module it was made from"
    ),
    "patch a trace": Misuse(lambda h: h.monkeypatch(traced()), "script .* patch the module it was made from"),
    "patch with a traced part": Misuse(lambda h: h.monkeypatch(nn.Sequential(traced())), "script .* patch the module it was made from"),
    "patch a lazy module": Misuse(lambda h: h.monkeypatch(nn.LazyLinear(2)), "Call `forward` with a dummy batch"),
    "call without params": Misuse(lambda h: empty_handle(h)(batch(1)[0]), "params must be given"),
    "call a part without params": Misuse(lambda h: empty_handle(h)[0](batch(1)[0]), "params must be given", ValueError),
    "call with few params": Misuse(lambda h: empty_handle(h)(batch(1)[0], params=[ONE]), "params has 1 tensors: give one for each"),
    "call with numbers": Misuse(lambda h: empty_handle(h)(batch(1)[0], params=[1.0] * 4), "params must be tensors"),
    "call with names": Misuse(lambda h: empty_handle(h)(batch(1)[0], params=make("mlp").state_dict()), "params must be tensors"),
    "update with few": Misuse(lambda h: loop(h)[0].update_params([ONE]), "params has 1 tensors: give one for each"),
    "late time": Misuse(lambda h: loop(h)[0].parameters(time=1), "time=1: there were 0 updates"),
    "early time": Misuse(lambda h: loop(h)[0].parameters(time=-2), "time=-2: there were 0 updates"),
    "time without tracking": Misuse(lambda h: loop(h, track_higher_grads=False)[0].parameters(time=1), "leave time out"),
    "beginning without tracking": Misuse(lambda h: loop(h, track_higher_grads=False)[0].init_fast_params, "track_higher_grads is on"),
    "beginning of an empty handle": Misuse(lambda h: empty_handle(h).init_fast_params, "call update_params first", ValueError),
    "parameters of an empty handle": Misuse(lambda h: empty_handle(h).parameters(), "call update_params first"),
    "tracking, an int": Misuse(lambda h: setattr(loop(h)[0], "track_higher_grads", 1), "must be a bool, got int; give True or False"),
    "tracking, None": Misuse(lambda h: h.monkeypatch(make("mlp"), track_higher_grads=None), "must be a bool, got NoneType"),
    "buffers of another model": Misuse(
        lambda h: h.patch.buffer_sync(make("mlp"), h.monkeypatch(nn.Sequential(nn.Tanh()))), "submodule '1'"
    ),
    "weight, a number": Misuse(lambda h: assign(h, "w", 1.0), "a fast weight must be a tensor, got float for 'w'"),
    "weight, None": Misuse(lambda h: assign(h, "w", None), "a fast weight must be a tensor, got NoneType for 'w'"),
    "weight of an empty handle": Misuse(lambda h: assign(h, "w", ONE, "make_functional"), "call update_params first", ValueError),
    "part, a tensor": Misuse(lambda h: setattr(h.monkeypatch(make("shared")), "first", ONE), "cannot assign .* as child module 'first'"),
    "apply, two values": Misuse(lambda h: apply(h, {"lr": [ONE, ONE]}), "override of 'lr' has 2 values: give one"),
    "apply, a vector": Misuse(lambda h: apply(h, {"lr": [torch.zeros(3)]}), "override of 'lr': expected a number", ValueError),
    "apply, a nest for a number": Misuse(lambda h: apply(h, {"lr": [(ONE, ONE)]}), "expected a number"),
    "apply, a number for a nest": Misuse(lambda h: apply(h, {"betas": [ONE]}, adam), "expected 2 numbers"),
    "apply, unknown setting": Misuse(lambda h: apply(h, {"learning_rate": [ONE]}), "learning_rate"),
}


def raised(run: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:
        quietly(run)
    return caught.value


@pytest.mark.parametrize("name", TABLE)
def test_same_type_of_error(name: str) -> None:
    misuse = TABLE[name]
    original = raised(lambda: misuse.run(theirs))
    with pytest.raises(misuse.type or type(original), match=misuse.says):
        misuse.run(ours)
    if misuse.type is not None:
        assert not issubclass(misuse.type, type(original)), "then the original's type would do"


@over_both
def test_an_error_in_forward_leaves_the_handle_usable(package: Any) -> None:
    fmodel: Any = package.monkeypatch(make("mlp"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fmodel(torch.zeros(2, 7))
    x = batch(1)[0]
    torch.testing.assert_close(fmodel(x), make("mlp")(x))


def test_numbers_missing_in_a_nest_are_an_error() -> None:
    """The original drops what has no counterpart: Adam would be left with one beta."""
    quietly(lambda: apply(theirs, {"betas": [(ONE,)]}, adam))
    with pytest.raises(ValueError, match="expected 2 numbers in place of"):
        apply(ours, {"betas": [(ONE,)]}, adam)


def test_plain_numbers_are_applied() -> None:
    """At which the original raises."""
    opt = sgd(make("mlp"))
    ours.optim.apply_trainable_opt_params(opt, {"lr": [0.3]})
    assert opt.param_groups[0]["lr"] == 0.3
    with pytest.raises(ValueError):
        quietly(lambda: apply(theirs, {"lr": [0.3]}))
