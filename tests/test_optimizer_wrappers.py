"""Optimisers made of another, against eager loops in float64: values, states and meta-gradients, by every adjoint, and by task."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Generator, Tensor, nn

from adaptrt import Adjoint, FirstOrder, Replay, Stash, Truncated, Unrolled, compile_unroll, optim
from adaptrt.errors import AdaptrtError, InvalidArgument, InvalidType
from tests.gradients import gradients
from tests.models import normal, regress
from tests.pairs import SINGLE_AND_TASKS, by_name, over_pairs
from tests.tolerances import assert_near

K, T = 3, 2
ADJOINTS: list[Adjoint] = [Unrolled(), Replay(), Stash(), FirstOrder(), Truncated(2)]


class Numbers(NamedTuple):
    """What is learned besides the model."""

    lr: Tensor
    own: Tensor
    weights: dict[str, Tensor]


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def numbers() -> Numbers:
    generator = Generator().manual_seed(2)
    weights = {name: normal(generator, *value.shape).abs().requires_grad_() for name, value in model().named_parameters()}
    lr, own = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.2, 0.6))
    return Numbers(lr, own, weights)


def batch(*lead: int) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(1)
    return normal(generator, *lead, 5, 3), normal(generator, *lead, 5, 2)


Gradient = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def sgd_step(p: dict[str, Tensor], g: dict[str, Tensor], moments: dict[str, Tensor], lr: Tensor) -> dict[str, Tensor]:
    """A step with momentum 0.5, which changes `moments`."""
    for name, grad in g.items():
        moments[name] = 0.5 * moments[name] + grad if name in moments else grad
    return {name: value - lr * moments[name] for name, value in p.items()}


def eager(name: str, start: dict[str, Tensor], gradient: Gradient, n: Numbers, constant: int) -> tuple[dict[str, Tensor], Any]:
    """Parameters after the steps, and what else there is to compare."""
    params, moments, extra = dict(start), dict[str, Tensor](), dict[str, Tensor]()
    anchor = dict(start)
    average = dict(start)
    for step in range(K):
        g = gradient(params)
        if name == "proximal":
            g = {key: grad + n.own * n.weights[key] * (params[key] - anchor[key]) for key, grad in g.items()}
        if name == "sharpness_aware":
            norm = torch.stack([grad.square().sum() for grad in g.values()]).sum().sqrt()
            g = gradient({key: value + n.own * g[key] / norm for key, value in params.items()})
        params = sgd_step(params, g, moments, n.lr)
        average = {key: n.own * average[key] + (1 - n.own) * value for key, value in params.items()}
        if step < constant:
            params, average, anchor = ({k: v.detach().requires_grad_() for k, v in part.items()} for part in (params, average, anchor))
            moments = {key: value.detach() for key, value in moments.items()}
    if name == "ema":
        extra = average
    return params, extra


OURS: dict[str, Callable[[Numbers], optim.Optimizer]] = {
    "proximal": lambda n: optim.proximal(optim.sgd(lr=n.lr, momentum=0.5), n.own, n.weights),
    "sharpness_aware": lambda n: optim.sharpness_aware(optim.sgd(lr=n.lr, momentum=0.5), n.own),
    "skip_not_finite": lambda n: optim.skip_not_finite(optim.sgd(lr=n.lr, momentum=0.5)),
    "ema": lambda n: optim.ema(optim.sgd(lr=n.lr, momentum=0.5), n.own),
}


@over_pairs(name=by_name(OURS), adjoint=by_name(ADJOINTS), tasks=SINGLE_AND_TASKS)
def test_numbers(name: str, adjoint: Adjoint, tasks: bool) -> None:
    check(name, adjoint, tasks, "eager")


def test_numbers_compiled() -> None:
    """Of the one that has two gradients. `proximal` is compiled in the tests of implicit gradients."""
    check("sharpness_aware", Replay(), True, "inductor")


def check(name: str, adjoint: Adjoint, tasks: bool, backend: str) -> None:
    net, n = model(), numbers()
    x, y = batch(*([T] if tasks else []))
    unroll = compile_unroll(net, OURS[name](n), K, loss=regress, adjoint=adjoint, backend=backend)
    adapted = (unroll.vmap() if tasks else unroll).adapt((x, y))
    start: dict[str, Tensor] = dict(net.named_parameters())
    leaves = {"lr": n.lr, "own": n.own, **{f"weight of {key}": value for key, value in n.weights.items()}, **start}
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    for task in range(T) if tasks else [None]:
        one = adapted if task is None else adapted[task]
        a, b = (value if task is None else value[task] for value in (x, y))

        def gradient(params: dict[str, Tensor], a: Tensor = a, b: Tensor = b) -> dict[str, Tensor]:
            loss = regress(torch.func.functional_call(net, params, (a,)), b)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            return {key: grad.detach() if adjoint.detach_gradient else grad for key, grad in zip(params, grads, strict=True)}

        params, extra = eager(name, start, gradient, n, adjoint.num_constant_steps(K))
        assert_near({key: value.detach() for key, value in one.params.items()}, {k: v.detach() for k, v in params.items()}, torch.float64)
        ours.append(torch.stack([value.sin().sum() for value in one.params.values()]).sum())
        theirs.append(torch.stack([value.sin().sum() for value in params.values()]).sum())
        if extra:
            ours.append(torch.stack([value.cos().sum() for value in one.opt_state.average.values()]).sum())
            theirs.append(torch.stack([value.cos().sum() for value in extra.values()]).sum())

    assert_near(gradients(torch.stack(ours).sum(), leaves), gradients(torch.stack(theirs).sum(), leaves), torch.float64)


def test_the_anchor_is_where_the_first_call_started() -> None:
    net = model()
    unroll = compile_unroll(net, optim.proximal(optim.sgd(lr=0.1), 1e6), 1, loss=regress, backend="eager")
    first = unroll.adapt(batch())
    second = unroll.adapt(batch(), start=first)
    for state in (first, second):
        for name, value in net.named_parameters():
            assert torch.equal(state.opt_state.anchor[name], value)
    other = unroll.start(params={"2.bias": torch.ones(2, dtype=torch.float64)})
    assert other.opt_state.anchor["2.bias"].tolist() == [1.0, 1.0]


def test_weights_and_strengths_by_name_and_none() -> None:
    params, grads = {"w": torch.tensor([3.0, 5.0])}, {"w": torch.zeros(2)}
    anchor = {"w": torch.tensor([1.0, 1.0])}
    for opt, wanted in (
        (optim.proximal(optim.sgd(lr=1.0), 0.5), [2.0, 3.0]),
        (optim.proximal(optim.sgd(lr=1.0), {"w": 0.25}), [2.5, 4.0]),
        (optim.proximal(optim.sgd(lr=1.0), 0.5, {"w": torch.tensor([1.0, 0.0])}), [2.0, 5.0]),
        (optim.proximal(optim.sgd(lr=1.0), optim.schedule(lambda step: 0.5 + step)), [2.0, 3.0]),
    ):
        assert opt.update(grads, opt.init(anchor), params, opt.hyper)[0]["w"].tolist() == wanted


def test_a_step_without_a_direction_is_that_of_the_other_optimizer() -> None:
    """Zero gradients: nothing to go up by, and no NaN in the derivative."""
    opt = optim.sharpness_aware(optim.sgd(lr=0.5), 0.1)
    params = {"w": torch.ones(2, dtype=torch.float64, requires_grad=True)}
    grads = {"w": 0.0 * params["w"]}
    up, state = opt.update(grads, opt.init(params), params, opt.hyper)
    assert torch.equal(up["w"], params["w"])
    down, state = opt.update({"w": torch.ones(2, dtype=torch.float64)}, state, up, opt.hyper)
    assert down["w"].tolist() == [0.5, 0.5] and bool(state.ascends)
    (grad,) = torch.autograd.grad(down["w"].sum(), params["w"])
    assert grad.isfinite().all()


@pytest.mark.parametrize("tasks", [False, True], ids=["single", "vmap"])
def test_steps_that_are_not_finite(tasks: bool) -> None:
    """The state stays as it is, by task, the other optimiser's included, and later steps go on."""
    unroll = compile_unroll(
        model(),
        optim.skip_not_finite(optim.adam(lr=0.1)),
        K,
        loss=regress,
        adjoint=Replay(),
        backend="eager",
        per_step=True,
        nonfinite="ignore",
    )
    x, y = (value.unsqueeze(-3).repeat(*([1] if tasks else []), K, 1, 1) for value in batch(*([T] if tasks else [])))
    broken = y.clone()
    (broken[1] if tasks else broken)[1] = torch.nan  # in the second of three steps
    adapted = (unroll.vmap() if tasks else unroll).adapt((x, broken)).detach()
    kept = [0, 2]
    two = compile_unroll(model(), optim.adam(lr=0.1), 2, loss=regress, adjoint=Replay(), backend="eager", per_step=True)
    wanted = two.adapt(((x[1] if tasks else x)[kept], (y[1] if tasks else y)[kept])).detach()
    one = adapted[1] if tasks else adapted
    assert_near(dict(one.params), dict(wanted.params), torch.float64)
    assert int(one.opt_state.num_skipped) == 1
    assert int(one.opt_state.state["0.weight"].step) == 2
    if tasks:
        assert int(adapted[0].opt_state.num_skipped) == 0


def test_they_can_be_nested() -> None:
    """And a sum of their effects is there: an average within a sharpness-aware step within a guard against NaN."""
    inner = optim.ema(optim.proximal(optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(lr=0.1)), 0.1), 0.9)
    opt = optim.skip_not_finite(optim.sharpness_aware(inner, 0.05))
    assert opt.updates_per_step == 2
    adapted = compile_unroll(model(), opt, 2, loss=regress, adjoint=Replay(), backend="eager").adapt(batch())
    average = adapted.opt_state.state.state.average
    assert adapted.replace(params=average)(batch()[0]).shape == (5, 2)
    with pytest.raises(InvalidArgument, match="Nothing may follow"):
        optim.chain(opt, optim.clip_by_global_norm(1.0))


def test_prediction_with_the_average() -> None:
    adapted = compile_unroll(model(), optim.ema(optim.sgd(lr=0.1), 0.5), K, loss=regress, backend="eager").adapt(batch()).detach()
    averaged = adapted.replace(params=adapted.opt_state.average)
    wanted = torch.func.functional_call(model(), dict(adapted.opt_state.average), (batch()[0],))
    assert_near({"output": averaged(batch()[0])}, {"output": wanted}, torch.float64)


WRONG: dict[str, tuple[Callable[[], Any], type[AdaptrtError], str]] = {
    "torch.optim": (lambda: optim.proximal(torch.optim.SGD(model().parameters(), 0.1), 1.0), InvalidType, "got SGD"),  # type: ignore[arg-type]
    "strength": (lambda: optim.proximal(optim.sgd(lr=0.1), -1.0), InvalidArgument, "strength must be at least 0"),
    "weight": (
        lambda: (o := optim.proximal(optim.sgd(lr=0.1), 1.0, {"v": torch.ones(1)})).update(P, o.init(P), P, o.hyper),
        InvalidArgument,
        "no value for parameter 'w'",
    ),
    "weight's shape": (
        lambda: (o := optim.proximal(optim.sgd(lr=0.1), 1.0, {"w": torch.ones(3)})).update(P, o.init(P), P, o.hyper),
        InvalidArgument,
        "of the parameter's shape",
    ),
    "radius": (lambda: optim.sharpness_aware(optim.sgd(lr=0.1), -0.1), InvalidArgument, "radius must be at least 0"),
    "radii": (lambda: optim.sharpness_aware(optim.sgd(lr=0.1), {"w": 0.1}), InvalidArgument, "radius"),
    "lbfgs": (lambda: optim.sharpness_aware(optim.lbfgs(lr=0.1), 0.1), InvalidArgument, "one gradient a step"),
    "order": (lambda: optim.ema(optim.sharpness_aware(optim.sgd(lr=0.1), 0.1), 0.9), InvalidArgument, "Put ema within it"),
    "decay": (lambda: optim.ema(optim.sgd(lr=0.1), 1.0), InvalidArgument, "decay must be at least 0.0 and below 1.0"),
    "number": (lambda: optim.skip_not_finite(0.1), InvalidType, "got float"),  # type: ignore[arg-type]
}
P = {"w": torch.ones(2)}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    run, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        run()


def test_a_state_follows_parameters_that_are_replaced() -> None:
    """The anchor is where an adaptation starts, whichever tensors the model holds."""
    net = model()
    opt = optim.proximal(optim.sgd(lr=0.1), strength=0.5)
    unroll = compile_unroll(net, opt, K, loss=regress, backend="eager")
    unroll.adapt(batch())
    net[0].weight = nn.Parameter(net[0].weight.detach() + 1)  # type: ignore[index]
    found, fresh = (made.adapt(batch()) for made in (unroll, compile_unroll(net, opt, K, loss=regress, backend="eager")))
    assert_near(dict(found.detach().params), dict(fresh.detach().params), torch.float64)
    assert torch.equal(found.opt_state.anchor["0.weight"], net[0].weight)  # type: ignore[index]


class Rule(nn.Module):
    """A learned rule with a learned initial state."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
        self.first = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def initial_state(self, param: Tensor) -> Tensor:
        return self.first * torch.ones_like(param)

    def forward(self, grad: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = 0.5 * state + grad if self.training else 0.25 * state + grad
        return -self.rate * state, state


@pytest.mark.parametrize("around", [lambda opt: opt, lambda opt: optim.ema(optim.proximal(opt, 0.1), 0.5)], ids=["alone", "wrapped"])
def test_a_copy_has_a_rule_of_its_own(around: Callable[[Any], Any]) -> None:
    net, rule = model(), Rule()
    unroll = compile_unroll(net, around(optim.learned(rule)), K, loss=regress, backend="eager")
    before = unroll(batch(), batch()).detach()
    copied = copy.deepcopy(unroll)
    own = next(part for part in copied._settings.source.optimizer().modules if isinstance(part, Rule))
    copied(batch(), batch()).backward()
    assert own is not rule and own.first.grad is not None and bool(own.first.grad != 0) and rule.first.grad is None
    with torch.no_grad():
        own.first.add_(1.0)
    own.eval()
    assert torch.equal(unroll(batch(), batch()).detach(), before)
    changed = compile_unroll(net, around(optim.learned(own)), K, loss=regress, backend="eager")
    assert_near({"loss": copied(batch(), batch()).detach()}, {"loss": changed(batch(), batch()).detach()}, torch.float64)
