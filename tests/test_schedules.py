"""Hyperparameters as functions of the step, against `torch.optim.lr_scheduler` and against loops that set them by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import lr_scheduler

from adaptrt import optim, tree
from adaptrt.errors import InvalidArgument, InvalidType
from adaptrt.optim.base import Optimizer, Schedule, State
from adaptrt.optim.convert import convert, fingerprint, read_hyper, read_state
from adaptrt.optim.schedule import ScheduledState
from tests.optimizers import (
    ASGD,
    FAMILIES,
    NOT_EMPTY,
    RPROP,
    SHAPES,
    Case,
    Family,
    assert_same,
    default_dtype,
    detached,
    full_case,
    make_params,
    make_tensors,
    over_families,
    same_tree,
    step_theirs,
)
from tests.tolerances import STEPS, assert_close

NUM_STEPS = 20


def run(opt: Optimizer, params: dict[str, Tensor], num_steps: int = NUM_STEPS, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Any:
    """Parameters and state after steps with the gradients of `make_tensors`."""
    state = opt.init(params)
    for step in range(num_steps):
        params, state = opt.update(make_tensors(step, shapes=shapes), state, params, opt.hyper)
    return params, state


# --- torch.optim.lr_scheduler


class Scheduler(NamedTuple):
    """A scheduler of PyTorch, and the same as functions of the step by argument of the optimiser."""

    make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]
    lr: Schedule
    momentum: Schedule | None = None


def _cosine(start: float | Tensor, end: float | Tensor, share: Tensor) -> Tensor:
    return end + (start - end) / 2 * (1 + torch.cos(math.pi * share))


def _one_cycle(step: Tensor, low: float, high: float, last: float, peak: float) -> Tensor:
    """Up from `low` to `high` at step `peak`, and down to `last` at the final step."""
    return torch.where(step <= peak, _cosine(low, high, step / peak), _cosine(high, last, (step - peak) / (NUM_STEPS - 1 - peak)))


LR = 0.1
SCHEDULERS = {
    "LambdaLR": Scheduler(
        lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
        optim.schedule(lambda step, base: base / (1 + step), base=LR),
    ),
    "StepLR": Scheduler(
        lambda opt: lr_scheduler.StepLR(opt, step_size=6, gamma=0.3),
        optim.schedule(lambda step, gamma: LR * gamma ** torch.floor(step / 6), gamma=0.3),
    ),
    "ExponentialLR": Scheduler(
        lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.9),
        optim.schedule(lambda step, base, gamma: base * gamma**step, base=LR, gamma=0.9),
    ),
    "CosineAnnealingLR": Scheduler(
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=NUM_STEPS, eta_min=0.01),
        optim.schedule(lambda step, low: _cosine(LR, low, step / NUM_STEPS), low=0.01),
    ),
    "OneCycleLR": Scheduler(
        lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=LR, total_steps=NUM_STEPS, base_momentum=0.7, max_momentum=0.9),
        optim.schedule(_one_cycle, low=LR / 25, high=LR, last=LR / 25 / 1e4, peak=0.3 * NUM_STEPS - 1),
        optim.schedule(_one_cycle, low=0.9, high=0.7, last=0.9, peak=0.3 * NUM_STEPS - 1),
    ),
}


class Scheduled(NamedTuple):
    """An optimiser by its learning rate and momentum."""

    theirs: Callable[..., torch.optim.Optimizer]
    ours: Callable[[Any, Any], Optimizer]
    cycles: bool = True


MOMENTUM = 0.8
OPTIMIZERS = {
    "SGD": Scheduled(
        lambda params: torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, weight_decay=0.1),
        lambda lr, momentum: optim.sgd(lr=lr, momentum=momentum, weight_decay=0.1),
    ),
    "AdamW": Scheduled(
        lambda params: torch.optim.AdamW(params, lr=LR, betas=(MOMENTUM, 0.9), weight_decay=0.1),
        lambda lr, momentum: optim.adamw(lr=lr, betas=(momentum, 0.9), weight_decay=0.1),
    ),
    "NAdam": Scheduled(
        lambda params: torch.optim.NAdam(params, lr=LR, betas=(MOMENTUM, 0.9)),
        lambda lr, momentum: optim.nadam(lr=lr, betas=(momentum, 0.9)),
    ),
    "RMSprop": Scheduled(
        lambda params: torch.optim.RMSprop(params, lr=LR, alpha=0.8, momentum=MOMENTUM),
        lambda lr, momentum: optim.rmsprop(lr=lr, alpha=0.8, momentum=momentum),
    ),
    "Adafactor": Scheduled(
        lambda params: torch.optim.Adafactor(params, lr=LR, weight_decay=0.1),
        lambda lr, momentum: optim.adafactor(lr=lr, weight_decay=0.1),
        cycles=False,
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedule_is_a_scheduler_of_torch(name: str, optimizer: Scheduled) -> None:
    scheduler = SCHEDULERS[name]
    params = make_params(shapes=NOT_EMPTY)
    with default_dtype(torch.float64):  # NAdam
        theirs = optimizer.theirs(list(params.values()))
        if not optimizer.cycles and scheduler.momentum:
            with pytest.raises(ValueError, match="momentum"):
                scheduler.make(theirs)
            return
        schedule = scheduler.make(theirs)
        ours, mine = optimizer.ours(scheduler.lr, scheduler.momentum or MOMENTUM), detached(params)
        state = ours.init(mine)
        rates: list[float] = []
        for step in range(NUM_STEPS):
            grads = make_tensors(step, shapes=NOT_EMPTY)
            rates.append(theirs.param_groups[0]["lr"])
            step_theirs(theirs, params, grads)
            if step + 1 < NUM_STEPS:
                schedule.step()
            mine, state = ours.update(grads, state, mine, ours.hyper)
            assert_same(mine, params)
    assert len(set(rates)) > 3
    assert state.num_updates.item() == NUM_STEPS


# --- every hyperparameter of every optimiser


def scheduled_case(family: Family) -> Case:
    """With room for every number to fall by a fifth."""
    case = full_case(family)
    return Case(family, case.settings | {"d": 1.5, "lr": 0.5}) if "d" in case.settings else case


def _falling(step: Tensor, start: float) -> Tensor:
    return start * (1 - 0.01 * step)


def _fall(value: Any, step: int) -> Any:
    if isinstance(value, tuple):
        return tuple(None if entry is None else entry * (1 - 0.01 * step) for entry in value)
    return value * (1 - 0.01 * step)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family is not ASGD], ids=lambda family: family.theirs.__name__)
def test_every_hyperparameter_may_be_a_schedule(family: Family) -> None:
    # Not ASGD: PyTorch's answers to some of its numbers a step late.
    case = scheduled_case(family)
    numbers = {key: value for key, value in case.settings.items() if isinstance(value, float | tuple)}
    numbers.pop("initial_accumulator_value", None)  # read at the first step only
    numbers.pop("ns_coefficients", None)

    def scheduled(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(entry if entry is None else scheduled(entry) for entry in value)
        return optim.schedule(_falling, start=value)

    ours = family.ours(**case.settings | {key: scheduled(value) for key, value in numbers.items()})
    assert sum(isinstance(value, Schedule) for value in ours.hyper.values()) >= len(numbers)
    params = case.make_params()
    mine, state = detached(params), ours.init(params)
    with default_dtype(torch.float64):
        theirs = case.make_theirs(params.values())
        for step in range(NUM_STEPS):
            grads = case.make_tensors(step)
            theirs.param_groups[0].update({key: _fall(value, step) for key, value in numbers.items()})
            step_theirs(theirs, params, grads)
            mine, state = ours.update(grads, state, mine, ours.hyper)
            assert_same(mine, params)


@over_families
def test_schedule_is_a_loop_that_sets_the_number(family: Family) -> None:
    case = scheduled_case(family)
    plain = case.make_ours()
    for key in plain.hyper:
        hyper = dict(plain.hyper) | {key: optim.schedule(_falling, start=plain.hyper[key])}
        # Built with some schedule, it takes one in any place of `hyper`.
        opt = family.ours(**case.settings | {"lr": hyper["lr"] if key == "lr" else optim.schedule(lambda step: plain.hyper["lr"])})
        params, state = case.make_tensors(0), opt.init(case.make_tensors(0))
        expected, expected_state = params, plain.init(params)
        for step in range(family.num_steps):
            grads = case.make_tensors(step)
            params, state = opt.update(grads, state, params, hyper)
            now = {key: _falling(torch.tensor(float(step), dtype=torch.float64), plain.hyper[key])}
            expected, expected_state = plain.update(grads, expected_state, expected, dict(plain.hyper) | now)
        assert all(map(torch.equal, tree.leaves((params, state.state)), tree.leaves((expected, expected_state)))), key


def test_schedule_may_be_by_parameter_and_by_element() -> None:
    params = make_tensors(0)
    factors = {name: torch.rand(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    opt = optim.sgd(lr=optim.schedule(lambda step, factors: {name: f / (1 + step) for name, f in factors.items()}, factors=factors))
    new, _ = run(opt, params, num_steps=3)
    expected = {
        name: p - sum((factors[name] / (1 + step) * make_tensors(step)[name] for step in range(3)), start=torch.zeros_like(p))
        for name, p in params.items()
    }
    assert_same(new, expected)


def test_schedule_counts_updates_of_the_optimiser_not_of_a_parameter() -> None:
    # As lr_scheduler does: a parameter that had no gradient for two steps gets the rate of the third.
    opt = optim.sgd(lr=optim.schedule(lambda step: 10.0**step))
    params = {"a": torch.zeros(()), "b": torch.zeros(())}
    state = opt.init(params)
    for grads in ({"a": torch.ones(())}, {}, {"a": torch.ones(()), "b": torch.ones(())}):
        params, state = opt.update(grads, state, params, opt.hyper)
    assert params["a"].item() == -101.0 and params["b"].item() == -100.0


def test_step_is_exact_in_float64() -> None:
    seen: list[Tensor] = []

    def record(step: Tensor) -> Tensor:
        seen.append(step)
        return 0.999**step

    opt = optim.sgd(lr=optim.schedule(record))
    params = {"w": torch.zeros(2, dtype=torch.bfloat16)}
    state = opt.init(params)._replace(num_updates=torch.tensor(2**24 + 1))
    new, state = opt.update(params, state, params, opt.hyper)
    assert seen[0].dtype == torch.float64 and seen[0].shape == () and seen[0].item() == 2**24 + 1
    assert new["w"].dtype == torch.bfloat16 and state.num_updates.item() == 2**24 + 2


def test_schedules_in_compositions() -> None:
    params = make_tensors(0)
    rate = optim.schedule(lambda step: 0.1 * 0.5**step)
    chained = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(lr=rate))
    by_hand = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(lr=0.1), optim.scale_by_schedule(lambda step: 0.5**step))
    assert_same(run(chained, params)[0], run(by_hand, params)[0])
    labels = {name: "a" if name == "weight" else "b" for name in params}
    parts = optim.partition({"a": optim.sgd(lr=rate), "b": optim.adam()}, labels)
    new, _ = run(parts, params)
    assert_same({"weight": new["weight"]}, {"weight": run(optim.sgd(lr=rate), params)[0]["weight"]})
    assert_same({"bias": new["bias"]}, {"bias": run(optim.adam(), params)[0]["bias"]})


# --- per_step


@pytest.mark.parametrize("family", [family for family in FAMILIES if family is not RPROP], ids=lambda family: family.theirs.__name__)
def test_per_step_is_a_loop_that_sets_the_rate(family: Family) -> None:
    # Not Rprop, which reads its rate at the first step only.
    case = full_case(family)
    table = [0.1, 0.01, 0.3, 0.05]
    by_name = {name: [rate * (1 + index) for rate in table] for index, name in enumerate(family.shapes)}
    by_element = {
        name: torch.rand((len(table), *shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for name, shape in family.shapes.items()
    }
    for values in (table, torch.tensor(table, dtype=torch.float64), by_name, by_element):
        plain, opt = case.make_ours(), family.ours(**case.settings | {"lr": optim.per_step(values)})
        params, expected = case.make_tensors(0), case.make_tensors(0)
        state, expected_state = opt.init(params), plain.init(params)
        for step in range(6):
            grads = case.make_tensors(step)
            params, state = opt.update(grads, state, params, opt.hyper)
            row = min(step, len(table) - 1)  # the last entry goes on
            rate = {name: entries[row] for name, entries in values.items()} if isinstance(values, dict) else values[row]
            expected, expected_state = plain.update(grads, expected_state, expected, dict(plain.hyper) | {"lr": rate})
            assert_same(params, expected)


def test_tables_that_are_not_tables() -> None:
    for values, error, message in (
        ([], InvalidArgument, r"values must have an entry for each step along its first axis, got shape \[0\]"),
        (torch.tensor(0.1), InvalidArgument, r"got shape \[\]"),
        (0.1, InvalidType, "values must be a tensor or a sequence of finite numbers, got 0.1"),
        ([0.1, float("nan")], InvalidType, r"sequence of finite numbers, got \[0.1, nan\]"),
        ({"w": torch.zeros(0, 3)}, InvalidArgument, r"values\['w'\] must have an entry .* got shape \[0, 3\]"),
        (torch.tensor([1, 2]), InvalidType, "floating-point tensor, got torch.int64"),
        (["fast", "slow"], InvalidType, "values must be a tensor or a sequence of finite numbers, got "),
        ("0.1", InvalidType, "values must be a tensor or a sequence of finite numbers, got '0.1'"),
        ({"w": None}, InvalidType, r"values\['w'\] must be a tensor or a sequence of finite numbers, got None"),
        ([[0.1], [0.2, 0.3]], InvalidType, "values must be a tensor or a sequence of finite numbers, got "),
    ):
        wrong: Any = values
        with pytest.raises(error, match=message):
            optim.per_step(wrong)


def test_table_of_another_shape_than_its_parameter() -> None:
    params = {"w": torch.zeros(3)}
    opt = optim.sgd(lr=optim.per_step({"w": torch.ones(5, 2)}))
    with pytest.raises(InvalidArgument, match=r"lr for parameter 'w' must be a scalar or of the parameter's shape \[3\], got shape \[2\]"):
        opt.update(params, opt.init(params), params, opt.hyper)
    missing = optim.sgd(lr=optim.per_step({"v": [1.0]}))
    with pytest.raises(InvalidArgument, match="no value for parameter 'w'"):
        missing.update(params, missing.init(params), params, missing.hyper)


# --- hypergradients


def check_numbers(make: Callable[..., Optimizer], *numbers: Tensor, num_steps: int = 4) -> None:
    """Gradients of numbers against finite differences, and none of them zero everywhere."""
    params = {"w": make_tensors(0)["weight"][:2]}

    def adapt(*values: Tensor) -> Tensor:
        opt, new = make(*values), params
        state = opt.init(new)
        for step in range(num_steps):
            new, state = opt.update({"w": torch.cos(new["w"]) + step}, state, new, opt.hyper)
        return new["w"]

    inputs = tuple(number.detach().requires_grad_() for number in numbers)
    assert gradcheck(adapt, inputs)
    assert all(bool(grad.any()) for grad in torch.autograd.grad(adapt(*inputs).sum(), inputs))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_hypergradients_of_the_numbers_of_schedules() -> None:
    def decaying(base: Tensor, decay: Tensor) -> Schedule:
        return optim.schedule(lambda step, base, decay: base * decay**step, base=base, decay=decay)

    check_numbers(lambda base, decay: optim.sgd(lr=decaying(base, decay), momentum=0.9), number(0.1), number(0.7))
    check_numbers(lambda base, decay: optim.sgd(lr=0.1, momentum=decaying(base, decay)), number(0.9), number(0.7))
    check_numbers(lambda base, decay: optim.adamw(lr=decaying(base, decay), weight_decay=0.1), number(0.1), number(0.7))
    check_numbers(lambda base, decay: optim.adam(lr=0.1, betas=(decaying(base, decay), 0.9)), number(0.8), number(0.7))
    check_numbers(lambda base, decay: optim.adafactor(lr=decaying(base, decay)), number(0.1), number(0.7))
    check_numbers(lambda base, decay: optim.adadelta(rho=decaying(base, decay), eps=1e-2), number(0.9), number(0.7))
    muon = {"ns_dtype": torch.float64, "weight_decay": 0.2}
    check_numbers(lambda base, decay: optim.muon(lr=decaying(base, decay), **muon), number(0.1), number(0.7))


def test_hypergradients_of_tables() -> None:
    table = torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64)
    by_element = torch.rand(3, 2, 3, dtype=torch.float64)
    for make in (optim.sgd, optim.adam, optim.adafactor):
        check_numbers(lambda values, make=make: make(lr=optim.per_step(values)), table)
        check_numbers(lambda values, make=make: make(lr=optim.per_step({"w": values})), table)
        check_numbers(lambda values, make=make: make(lr=optim.per_step({"w": values})), by_element)
    # Each entry has the gradient of its step, the last of all that follow.
    values = table.clone().requires_grad_()
    opt = optim.sgd(lr=optim.per_step(values))
    params = {"w": torch.zeros((), dtype=torch.float64)}
    state = opt.init(params)
    for step in range(5):
        params, state = opt.update({"w": number(10.0**step)}, state, params, opt.hyper)
    assert torch.autograd.grad(params["w"], values)[0].tolist() == [-1.0, -10.0, -11100.0]


# --- traced and batched


def test_schedule_traces_without_its_numbers_as_constants() -> None:
    def decay(base: Tensor) -> Schedule:
        return optim.schedule(lambda step, base: base * 0.9**step, base=base)

    params, grads = make_tensors(0, torch.float32), make_tensors(1, torch.float32)
    for make, numbers in ((decay, torch.tensor(0.1)), (optim.per_step, torch.tensor([0.1, 0.2, 0.3]))):
        check_trace(make, numbers, params, grads)


def check_trace(make: Callable[[Tensor], Schedule], numbers: Tensor, params: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    def update(g: dict[str, Tensor], s: State, p: dict[str, Tensor], numbers: Tensor) -> list[Tensor]:
        opt = optim.adam(lr=make(numbers))
        return tree.leaves(opt.update(g, s, p, opt.hyper))

    state = optim.adam(lr=make(numbers)).init(params)
    graph = make_fx(update, tracing_mode="fake")(grads, state, params, numbers)
    assert not [node for node in graph.graph.nodes if node.op == "get_attr" or "_." in str(node.target)]
    for step in (0, 1, 7):
        later = state._replace(num_updates=torch.tensor(step))
        found, expected = graph(grads, later, params, numbers * 2), update(grads, later, params, numbers * 2)
        assert all(map(torch.equal, found, expected))


def test_vmap_over_tasks_with_a_table_each() -> None:
    # T = tasks.
    tables = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    params = {"w": torch.arange(12.0).reshape(3, 4)}

    def adapt(p: dict[str, Tensor], table: Tensor) -> Tensor:
        opt = optim.adam(lr=optim.per_step(table))
        state = opt.init(p)
        for _ in range(3):
            p, state = opt.update({"w": torch.cos(p["w"])}, state, p, opt.hyper)
        return p["w"]

    batched = torch.func.vmap(adapt)(params, tables)
    for t, table in enumerate(tables):
        assert_close(batched[t], adapt({"w": params["w"][t]}, table), STEPS)


# --- a live instance of torch.optim


def test_schedules_in_param_groups() -> None:
    params = make_params()
    opt = torch.optim.Adam(list(params.values()), lr=0.1, betas=(0.8, 0.9))
    for step in range(3):
        step_theirs(opt, params, make_tensors(step))
    state_of_three = read_state(opt, params)
    before = fingerprint(opt, params)
    rate, beta = optim.schedule(lambda step, base: base * 0.5**step, base=0.1), optim.per_step([0.8, 0.7])
    opt.param_groups[0]["lr"], opt.param_groups[0]["betas"] = rate, (beta, 0.9)
    assert fingerprint(opt, params) != before
    ours, hyper, state = convert(opt, params), read_hyper(opt, params), read_state(opt, params)
    assert hyper == ours.hyper and hyper["lr"] is rate and hyper["beta1"] is beta
    # The moments are those of the instance; the schedule begins anew.
    assert isinstance(state, ScheduledState) and same_tree(state, ours.init(params)) and state.num_updates.item() == 0
    assert all(map(torch.equal, tree.leaves(state.state), tree.leaves(state_of_three)))
    mine = detached(params)
    for step in range(4):
        grads = make_tensors(10 + step)
        opt.param_groups[0]["lr"], opt.param_groups[0]["betas"] = 0.1 * 0.5**step, (0.8 if step == 0 else 0.7, 0.9)
        step_theirs(opt, params, grads)
        mine, state = ours.update(grads, state, mine, hyper)
    assert_same(mine, params)


def test_schedules_in_some_groups() -> None:
    params = make_params()
    opt = torch.optim.SGD([{"params": [params["weight"]]}, {"params": [p for name, p in params.items() if name != "weight"]}], lr=0.1)
    opt.param_groups[0]["lr"] = optim.schedule(lambda step: 0.1 * 0.5**step)
    ours, state = convert(opt, params), read_state(opt, params)
    assert same_tree(state, ours.init(params))
    new, _ = run(ours, detached(params), num_steps=3)
    expected, _ = run(optim.sgd(lr=0.1), detached(params), num_steps=3)
    assert_same({"bias": new["bias"]}, {"bias": expected["bias"]})
    alone, _ = run(optim.sgd(lr=opt.param_groups[0]["lr"]), detached(params), num_steps=3)
    assert_same({"weight": new["weight"]}, {"weight": alone["weight"]})


def test_fingerprint_sees_the_function_and_the_tree_of_its_numbers_and_no_number() -> None:
    params = make_params()
    opt = torch.optim.SGD(list(params.values()), lr=0.1)

    def decay(step: Tensor, base: float = 0.1, by: float = 0.5) -> Tensor:
        return base * by**step

    def seen(lr: Schedule) -> object:
        opt.param_groups[0]["lr"] = lr
        found = fingerprint(opt, params)
        hash(found)
        return found

    assert seen(optim.schedule(decay, base=0.1)) == seen(optim.schedule(decay, base=torch.tensor(0.7)))
    assert seen(optim.schedule(decay)) != seen(optim.schedule(lambda step: 0.1))
    assert seen(optim.per_step([0.1, 0.2])) == seen(optim.per_step([0.3, 0.2, 0.1]))
    # Other trees of hyperparameters.
    assert seen(optim.schedule(decay, base=0.1)) != seen(optim.schedule(decay, by=0.1))
    assert seen(optim.per_step([0.1, 0.2])) != seen(optim.per_step({name: [0.1, 0.2] for name in params}))


# --- errors


def test_schedule_of_what_is_no_function() -> None:
    wrong: Any = 0.1
    with pytest.raises(InvalidType, match="schedule takes a hashable function of the step, got float"):
        optim.schedule(wrong)


@over_families
def test_schedule_for_an_optimiser_that_was_built_without_one(family: Family) -> None:
    opt = full_case(family).make_ours()
    params = {"w": torch.ones(2, 2)}
    for key in opt.hyper:
        hyper = dict(opt.hyper) | {key: optim.schedule(lambda step: 0.1)}
        with pytest.raises(InvalidArgument, match="built without one"):
            opt.update(params, opt.init(params), params, hyper)


def test_number_for_an_optimiser_that_was_built_with_a_schedule() -> None:
    params = make_tensors(0)
    opt, plain = optim.sgd(lr=optim.schedule(lambda step: 7.0)), optim.sgd(lr=0.1)
    new, _ = opt.update(params, opt.init(params), params, plain.hyper)
    assert_same(new, plain.update(params, plain.init(params), params, plain.hyper)[0])


def test_transforms_take_no_schedules() -> None:
    with pytest.raises(InvalidArgument, match="max_norm of a transform cannot be a schedule"):
        optim.clip_by_global_norm(optim.per_step([1.0, 2.0]))


def test_nesterov_takes_a_scheduled_momentum_and_no_scheduled_dampening() -> None:
    momentum = optim.per_step([0.9, 0.5])
    assert optim.sgd(lr=0.1, momentum=momentum, nesterov=True).hyper["momentum"] is momentum
    with pytest.raises(InvalidArgument, match="zero dampening"):
        optim.sgd(lr=0.1, momentum=0.9, dampening=momentum, nesterov=True)


def test_schedule_that_returns_what_is_no_number() -> None:
    params = {"w": torch.zeros(3)}
    for value, error, message in (
        (torch.ones(2), InvalidArgument, r"lr must be a scalar, got a tensor of shape \[2\]"),
        (
            {"w": torch.ones(2)},
            InvalidArgument,
            r"lr for parameter 'w' must be a scalar or of the parameter's shape \[3\], got shape \[2\]",
        ),
        ({"v": 0.1}, InvalidArgument, "no value for parameter 'w'"),
        (torch.ones((), dtype=torch.int64), InvalidType, "lr must be a floating-point tensor, got torch.int64"),
        ("0.1", InvalidType, "lr must be a float.*got str"),
        (None, InvalidType, "lr must be a float.*got NoneType"),
    ):
        opt = optim.sgd(lr=optim.schedule(lambda step, value=value: value))
        with pytest.raises(error, match=message):
            opt.update(params, opt.init(params), params, opt.hyper)
