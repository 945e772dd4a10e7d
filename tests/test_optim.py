"""`adaptrt.optim` against `torch.optim`, and its derivatives against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from adaptrt import optim
from adaptrt.errors import InvalidArgument, InvalidType, OptimizerMismatch, UnsupportedOptimizer
from adaptrt.optim.base import Hyper, Optimizer, State, is_off, safe_sqrt
from adaptrt.optim.convert import SUPPORTED, convert, fingerprint, read_hyper, read_state

SHAPES: dict[str, tuple[int, ...]] = {"scalar": (), "bias": (3,), "weight": (4, 3), "empty": (0, 2)}
NAMES = tuple(SHAPES)


class Case(NamedTuple):
    theirs: type[torch.optim.Optimizer]
    ours: Callable[..., Optimizer]
    settings: dict[str, Any]


_SGD = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.3},
    {"lr": 0.1, "maximize": True, "weight_decay": 0.3},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.2},
    {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.2},
    {"lr": 0.1, "momentum": 0.8, "nesterov": True, "maximize": True},
]
_ADAM = [
    {"lr": 0.05},
    {"lr": 0.05, "betas": (0.5, 0.7), "eps": 1e-3},
    {"lr": 0.05, "betas": (0.0, 0.9)},
    {"lr": 0.05, "weight_decay": 0.2},
    {"lr": 0.05, "weight_decay": 0.0, "amsgrad": True, "betas": (0.9, 0.5)},
    {"lr": 0.05, "weight_decay": 0.2, "amsgrad": True, "maximize": True, "betas": (0.9, 0.5)},
]
CASES = [
    *(Case(torch.optim.SGD, optim.sgd, settings) for settings in _SGD),
    *(Case(torch.optim.Adam, optim.adam, settings) for settings in _ADAM),
    *(Case(torch.optim.AdamW, optim.adamw, settings) for settings in _ADAM),
]


def case_id(case: object) -> str:
    assert isinstance(case, Case)
    return "-".join([case.theirs.__name__, *(f"{key}={value}" for key, value in case.settings.items() if key != "lr")])


over_cases = pytest.mark.parametrize("case", CASES, ids=case_id)


def make_tensors(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}


def make_params(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: tensor.requires_grad_() for name, tensor in make_tensors(seed, dtype).items()}


def make_opt(case: Case, params: Mapping[str, Tensor], **more: Any) -> torch.optim.Optimizer:
    make: Callable[..., torch.optim.Optimizer] = case.theirs
    return make(list(params.values()), **case.settings, **more)


def step_theirs(opt: torch.optim.Optimizer, params: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
    for name, p in params.items():
        p.grad = grads[name].clone() if name in grads else None
    opt.step()


def detached(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in params.items()}


def leaves(tree: State) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    values = list(tree.values()) if isinstance(tree, dict) else list(tree or ())
    return [leaf for value in values for leaf in leaves(value)]


def same_tree(a: State, b: State) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_tree(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same_tree, a, b)) if isinstance(a, tuple) else True


# Relative and absolute. Ours and theirs round in another order; parameters are of order one, so the absolute one is a few last places.
TOLERANCES = {torch.float64: (1e-12, 1e-14), torch.float32: (1e-5, 1e-6), torch.bfloat16: (0.02, 0.02)}


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        rtol, atol = TOLERANCES[expected.dtype]
        torch.testing.assert_close(ours[name], expected.detach(), rtol=rtol, atol=atol)


def as_tensors(hyper: Hyper) -> Hyper:
    """Every float as a 0-dim float64 tensor, as a compiled program passes them."""
    if isinstance(hyper, tuple):
        return tuple(as_tensors(value) for value in hyper)
    if isinstance(hyper, Mapping):
        return {key: as_tensors(value) for key, value in hyper.items()}
    return hyper if isinstance(hyper, Tensor) else torch.tensor(hyper, dtype=torch.float64)


# --- equal to torch.optim


@pytest.mark.parametrize("kind", ["float", "tensor"])
@over_cases
def test_twenty_steps_equal_torch_optim(case: Case, kind: str) -> None:
    params = make_params()
    theirs, ours = make_opt(case, params), case.ours(**case.settings)
    hyper = ours.hyper if kind == "float" else as_tensors(ours.hyper)
    mine: dict[str, Tensor] = detached(params)
    state = ours.init(mine)
    for step in range(20):
        grads = make_tensors(100 + step)
        if step in (0, 7):  # the first step of a parameter need not be the first step of the optimiser
            del grads["bias"]
        step_theirs(theirs, params, grads)
        mine, state = ours.update(grads, state, mine, hyper)
        assert_same(mine, params)


@over_cases
def test_conversion_goes_on_where_torch_optim_stands(case: Case) -> None:
    params = make_params()
    theirs = make_opt(case, params, foreach=False)
    for step in range(3):
        grads = make_tensors(step)
        del grads["weight"]  # has no state yet
        step_theirs(theirs, params, grads)
    ours, hyper, state, mine = convert(theirs, params), read_hyper(theirs, params), read_state(theirs, params), detached(params)
    assert hyper == ours.hyper
    assert same_tree(state, ours.init(params))
    kept = [leaf.clone() for leaf in leaves(state)]
    assert not any(leaf.requires_grad for leaf in kept)
    for step in range(20):
        grads = make_tensors(50 + step)
        step_theirs(theirs, params, grads)
        mine, state = ours.update(grads, state, mine, hyper)
    assert_same(mine, params)
    for before, after in zip(kept, leaves(read_state(theirs, params)), strict=True):
        assert before.shape == after.shape and before.dtype == after.dtype


@over_cases
def test_read_state_is_a_copy(case: Case) -> None:
    params = make_params()
    theirs = make_opt(case, params)
    step_theirs(theirs, params, make_tensors(1))
    state = read_state(theirs, params)
    before = [leaf.clone() for leaf in leaves(state)]
    step_theirs(theirs, params, make_tensors(2))
    for old, now in zip(before, leaves(state), strict=True):
        torch.testing.assert_close(old, now, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("theirs", "first", "second"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"lr": 0.3, "weight_decay": 0.1, "maximize": True}),
        (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}, {"lr": 0.2, "betas": (0.5, 0.6), "weight_decay": 0.1}),
        (torch.optim.AdamW, {"lr": 0.1, "maximize": True}, {"lr": 0.2, "weight_decay": 0.0, "eps": 1e-2}),
    ],
)
def test_two_groups_with_different_flags(
    theirs: Callable[..., torch.optim.Optimizer], first: dict[str, Any], second: dict[str, Any]
) -> None:
    params = make_params()
    head, body = ("bias", "empty"), ("scalar", "weight")
    foreign = torch.zeros(2, requires_grad=True)
    groups = [{"params": [params[n] for n in head], **first}, {"params": [foreign]}, {"params": [params[n] for n in body], **second}]
    opt = theirs(groups, lr=1.0)
    step_theirs(opt, params, make_tensors(1))
    ours, hyper, state, mine = convert(opt, params), read_hyper(opt, params), read_state(opt, params), detached(params)
    assert list(hyper) == ["0", "2"] and hyper == ours.hyper
    assert same_tree(state, ours.init(params))
    for step in range(20):
        grads = make_tensors(10 + step)
        step_theirs(opt, params, grads)
        mine, state = ours.update(grads, state, mine, hyper)
    assert_same(mine, params)

    only = {name: params[name] for name in body}
    assert read_hyper(opt, only) == convert(opt, only).hyper and read_hyper(opt, only)["lr"] == second["lr"]


def test_adam_with_decoupled_weight_decay_is_adamw() -> None:
    params = make_params()
    opt = torch.optim.Adam(list(params.values()), weight_decay=0.3, decoupled_weight_decay=True)
    ours, mine = convert(opt, params), detached(params)
    state = ours.init(mine)
    for step in range(3):
        grads = make_tensors(step)
        step_theirs(opt, params, grads)
        mine, state = ours.update(grads, state, mine, ours.hyper)
    assert_same(mine, params)


# --- derivatives

_HYPERS = [
    (optim.sgd, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.2}, {}),
    (optim.sgd, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}, {"nesterov": True}),
    (optim.adam, {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-2, "weight_decay": 0.2}, {}),
    (optim.adam, {"lr": 0.1, "beta1": 0.8, "beta2": 0.6, "eps": 1e-2}, {"amsgrad": True}),
    (optim.adamw, {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-2, "weight_decay": 0.2}, {}),
]


def build(make: Callable[..., Optimizer], values: dict[str, Any], flags: dict[str, Any]) -> Optimizer:
    """The constructors take betas as a pair and `hyper` has them apart."""
    values = dict(values)
    if "beta1" in values:
        values["betas"] = (values.pop("beta1"), values.pop("beta2"))
    return make(**values, **flags)


@pytest.mark.parametrize("shaped", [False, True], ids=["scalar", "per-element"])
@pytest.mark.parametrize(("make", "values", "flags"), _HYPERS)
def test_gradients_of_hyperparameters_parameters_and_gradients(
    make: Callable[..., Optimizer], values: dict[str, float], flags: dict[str, bool], shaped: bool
) -> None:
    keys = list(values)
    params = make_tensors(0)["weight"][:2]

    def value_of(key: str) -> Tensor:
        return torch.full(params.shape if shaped else (), values[key], dtype=torch.float64).requires_grad_()

    hypers = [value_of(key) for key in keys]
    opt = build(make, {key: {"w": leaf} if shaped else leaf for key, leaf in zip(keys, hypers, strict=True)}, flags)
    assert set(opt.hyper) >= set(keys)

    def run(p: Tensor, g: Tensor, *leaves_: Tensor) -> Tensor:
        hyper = dict(opt.hyper) | {key: {"w": leaf} if shaped else leaf for key, leaf in zip(keys, leaves_, strict=True)}
        new, state = {"w": p}, opt.init({"w": p})
        for step in range(3):
            new, state = opt.update({"w": g * (1 + step) + torch.sin(new["w"])}, state, new, hyper)
        return new["w"]

    inputs = (params.clone().requires_grad_(), make_tensors(1)["weight"][:2].requires_grad_(), *hypers)
    assert gradcheck(run, inputs)
    grads = torch.autograd.grad(run(*inputs).sum(), inputs)
    assert all(bool((grad != 0).any()) for grad in grads)  # else gradcheck would hold of a constant


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@over_cases
def test_derivatives_are_finite_at_zero_gradients(case: Case, dtype: torch.dtype) -> None:
    opt = case.ours(**case.settings)
    params, zeros = make_params(dtype=dtype), {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
    hyper = {key: torch.tensor(value, dtype=torch.float64, requires_grad=True) for key, value in opt.hyper.items()}
    grads = {name: (zero * params[name]) for name, zero in zeros.items()}
    new, state = opt.update(grads, opt.init(params), params, hyper)
    new, state = opt.update({name: zero * new[name] for name, zero in zeros.items()}, state, new, hyper)
    total = torch.stack([value.sum() for value in new.values()]).sum()
    found = torch.autograd.grad(total, [*params.values(), *hyper.values()], allow_unused=True, materialize_grads=True)
    assert all(bool(torch.isfinite(grad).all()) for grad in found)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_has_its_true_derivative_at_zero_gradient(amsgrad: bool) -> None:
    lr, eps = 0.1, 1e-2
    opt = optim.adam(lr=lr, eps=eps, amsgrad=amsgrad)
    params, g = {"w": torch.ones(2, dtype=torch.float64)}, torch.zeros(2, dtype=torch.float64, requires_grad=True)
    new, _ = opt.update({"w": g}, opt.init(params), params, opt.hyper)
    (found,) = torch.autograd.grad(new["w"].sum(), g)
    torch.testing.assert_close(found, torch.full_like(g, -lr / eps))


def test_safe_sqrt() -> None:
    x = torch.tensor([0.0, 4.0], requires_grad=True)
    y = safe_sqrt(x)
    assert y.tolist() == [0.0, 2.0]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0.0, 0.25]


def test_second_derivatives() -> None:
    opt = optim.adam(lr=0.1, eps=1e-2)
    state = opt.init({"w": torch.zeros(2, dtype=torch.float64)})

    def run(p: Tensor) -> Tensor:
        return opt.update({"w": p.cos()}, state, {"w": p}, opt.hyper)[0]["w"]

    assert torch.autograd.gradgradcheck(run, (torch.tensor([0.3, -1.0], dtype=torch.float64, requires_grad=True),))


# --- dtypes, missing gradients, purity


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@over_cases
def test_dtype_is_kept(case: Case, dtype: torch.dtype) -> None:
    params = make_params(dtype=dtype)
    theirs, ours, mine = make_opt(case, params), case.ours(**case.settings), detached(params)
    hyper, state = as_tensors(ours.hyper), ours.init(mine)
    shapes = [(leaf.shape, leaf.dtype) for leaf in leaves(state)]
    for step in range(5):
        grads = make_tensors(step, dtype)
        step_theirs(theirs, params, grads)
        mine, state = ours.update(grads, state, mine, hyper)
    assert all(p.dtype == dtype for p in mine.values())
    assert [(leaf.shape, leaf.dtype) for leaf in leaves(state)] == shapes
    assert_same(mine, params)


def test_bias_correction_is_as_exact_as_python_floats() -> None:
    # A correction in float32 would be wrong in the fifth digit: 1 - float32(0.999) = 0.00099998713.
    opt = optim.adam(lr=1.0, betas=(0.0, 0.999), eps=0.0)
    params = {"w": torch.zeros(1)}
    new, _ = opt.update({"w": torch.ones(1)}, opt.init(params), params, opt.hyper)
    assert abs(new["w"].item() + 1.0) < 3e-7


@pytest.mark.parametrize("clip", [False, True], ids=["plain", "chained"])
@over_cases
def test_parameters_without_gradient_pass_through(case: Case, clip: bool) -> None:
    opt = case.ours(**case.settings)
    if clip:
        opt = optim.chain(optim.clip_by_global_norm(1.0), opt, optim.clip_by_global_norm(1.0))
    params = make_tensors(0)
    before, state = opt.update(make_tensors(1), opt.init(params), params, opt.hyper)
    grads = make_tensors(2)
    del grads["weight"]
    after, later = opt.update(grads, state, before, opt.hyper)
    assert after["weight"] is before["weight"] and after["bias"] is not before["bias"]
    old, new = (state[1], later[1]) if clip else (state, later)
    for was, now in zip(old, new, strict=True):
        assert not was or (now["weight"] is was["weight"] and now["bias"] is not was["bias"])
    assert opt.update({}, state, before, opt.hyper)[0].keys() == before.keys()


@over_cases
def test_update_changes_none_of_its_arguments(case: Case) -> None:
    opt, params, grads = case.ours(**case.settings), make_tensors(0), make_tensors(1)
    _, state = opt.update(grads, opt.init(params), params, opt.hyper)
    tensors = [*params.values(), *grads.values(), *leaves(state)]
    values, containers = [tensor.clone() for tensor in tensors], [dict(field) for field in state]
    opt.update(grads, state, params, opt.hyper)
    assert all(map(torch.equal, tensors, values))
    assert all(
        field.keys() == kept.keys() and all(field[k] is kept[k] for k in kept) for field, kept in zip(state, containers, strict=True)
    )


# --- traced and batched


@over_cases
def test_vmap_over_tasks_is_a_loop(case: Case) -> None:
    # T = tasks. A hyperparameter may differ between tasks too.
    num_tasks = 3
    opt = case.ours(**case.settings)
    params, grads = ([make_tensors(seed + t, torch.float32) for t in range(num_tasks)] for seed in (0, 10))
    hypers = [{key: torch.tensor(value * (1 - 0.1 * t), dtype=torch.float64) for key, value in opt.hyper.items()} for t in range(num_tasks)]

    def adapt(p: dict[str, Tensor], g: dict[str, Tensor], hyper: Hyper) -> tuple[dict[str, Tensor], State]:
        state = opt.init(p)
        for _ in range(2):
            p, state = opt.update(g, state, p, hyper)
        return p, state

    def stack(trees: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.stack([tree[key] for tree in trees]) for key in trees[0]}

    batched, batched_state = torch.func.vmap(adapt)(stack(params), stack(grads), stack(hypers))
    for t in range(num_tasks):
        single, single_state = adapt(params[t], grads[t], hypers[t])
        for found, expected in zip(leaves((batched, batched_state)), leaves((single, single_state)), strict=True):
            torch.testing.assert_close(found[t], expected, rtol=1e-5, atol=1e-6)


@over_cases
def test_traces_with_fake_tensors_to_out_of_place_ops(case: Case) -> None:
    inner = case.ours(**case.settings)
    opt = optim.chain(optim.clip_by_global_norm(1.0), inner, optim.scale_by_schedule(lambda step: 0.9**step))
    params, grads = make_tensors(0, torch.float32), make_tensors(1, torch.float32)
    state, hyper = opt.init(params), as_tensors(opt.hyper)

    def run(g: dict[str, Tensor], s: State, p: dict[str, Tensor], h: Hyper) -> list[Tensor]:
        return leaves(opt.update(g, s, p, h))

    graph = make_fx(run, tracing_mode="fake")(grads, state, params, hyper)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets
    assert not [target for target in targets if "_." in str(target)]  # aten.add_.Tensor and its like
    assert not [node for node in graph.graph.nodes if node.op == "get_attr"]  # no constant baked in
    other = {name: 2 * g for name, g in grads.items()}
    for found, expected in zip(graph(other, state, params, hyper), run(other, state, params, hyper), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- transforms


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 100.0, 0.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_equals_clip_grad_norm(max_norm: float, dtype: torch.dtype) -> None:
    params, grads = make_params(dtype=dtype), make_tensors(1, dtype)
    for name, p in params.items():
        p.grad = grads[name].clone()
    torch.nn.utils.clip_grad_norm_(params.values(), max_norm)
    clip = optim.clip_by_global_norm(max_norm)
    ours, _ = clip.update(grads, clip.init(params), params, clip.hyper)
    expected = {name: p.grad for name, p in params.items() if p.grad is not None}
    assert all(u.dtype == dtype for u in ours.values())
    assert_same(ours, expected)


def test_clip_has_a_finite_derivative_at_zero_norm_and_a_right_one_elsewhere() -> None:
    clip = optim.clip_by_global_norm(0.5)

    def run(u: Tensor, max_norm: Tensor) -> Tensor:
        return clip.update({"a": u, "b": 2 * u}, (), {}, dict(clip.hyper) | {"max_norm": max_norm})[0]["a"]

    zero, max_norm = torch.zeros(2, dtype=torch.float64, requires_grad=True), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(run(zero, max_norm).sum(), zero)
    assert found.tolist() == [1.0, 1.0]
    assert gradcheck(run, (torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True), max_norm))


def test_clip_in_half_precision_does_not_overflow() -> None:
    clip = optim.clip_by_global_norm(1.0)
    u, _ = clip.update({"w": torch.full((4,), 1000.0, dtype=torch.float16)}, (), {}, clip.hyper)
    torch.testing.assert_close(u["w"], torch.full((4,), 0.5, dtype=torch.float16))


def test_chain_clips_before_and_schedules_after_as_in_a_torch_loop() -> None:
    params = make_params()
    theirs = torch.optim.SGD(list(params.values()), lr=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: 0.8**step)
    ours = optim.chain(optim.clip_by_global_norm(0.3), optim.sgd(lr=0.5, momentum=0.9), optim.scale_by_schedule(lambda step: 0.8**step))
    mine = detached(params)
    state = ours.init(mine)
    for step in range(10):
        grads = make_tensors(step)
        for name, p in params.items():
            p.grad = grads[name].clone()
        torch.nn.utils.clip_grad_norm_(params.values(), 0.3)
        theirs.step()
        scheduler.step()
        mine, state = ours.update(grads, state, mine, ours.hyper)
    assert_same(mine, params)


def test_a_chain_of_one_is_its_optimiser_to_the_bit() -> None:
    # The new values lie in (-1, -0.5) and the steps beyond -1, with one digit less: params + (new - params) would not always be new.
    params, grads, opt = {"w": torch.linspace(0.2, 0.3, 101)}, {"w": torch.linspace(1.1, 1.2, 101)}, optim.adamw(lr=1.1, weight_decay=0.1)
    alone, _ = opt.update(grads, opt.init(params), params, opt.hyper)
    chained = optim.chain(opt)
    for name, value in chained.update(grads, chained.init(params), params, chained.hyper)[0].items():
        torch.testing.assert_close(value, alone[name], rtol=0, atol=0)


def test_schedule_may_look_a_tensor_up() -> None:
    table = torch.tensor([1.0, 10.0], requires_grad=True)
    opt = optim.chain(optim.scale_by_schedule(lambda step: table[step.long()]), optim.sgd(lr=1.0))
    params, grads = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    state = opt.init(params)
    for _ in range(2):
        params, state = opt.update(grads, state, params, opt.hyper)
    assert params["w"].tolist() == [-11.0, -11.0]
    assert torch.autograd.grad(params["w"].sum(), table)[0].tolist() == [-2.0, -2.0]


def test_partition_is_its_parts_side_by_side() -> None:
    params, grads = make_tensors(0), make_tensors(1)
    parts = {"s": optim.sgd(lr=0.1), "a": optim.adam(lr=0.2)}
    labels = {"scalar": "s", "bias": "a", "weight": "s", "empty": "a"}
    opt = optim.partition(parts, labels)
    new, state = opt.update(grads, opt.init(params), params, opt.hyper)
    assert list(new) == list(params) and list(state) == ["s", "a"]
    for label, part in parts.items():
        own = {name: p for name, p in params.items() if labels[name] == label}
        alone, _ = part.update({name: grads[name] for name in own}, part.init(own), own, part.hyper)
        for name, value in alone.items():
            torch.testing.assert_close(new[name], value, rtol=0, atol=0)


# --- hyperparameters in param_groups


def test_param_groups_may_hold_tensors_and_mappings() -> None:
    params = make_params()
    opt = torch.optim.SGD(list(params.values()), lr=torch.tensor([0.1]), momentum=0.5)
    one = read_hyper(opt, params)["lr"]
    assert isinstance(one, Tensor) and one.shape == ()
    by_name = {name: torch.full(shape, 0.1, dtype=torch.float64, requires_grad=True) for name, shape in SHAPES.items()}
    opt.param_groups[0]["lr"] = by_name | {"unrelated": 3.0}
    hyper = read_hyper(opt, params)
    assert set(hyper["lr"]) == set(NAMES) and hyper["lr"]["weight"] is by_name["weight"]
    ours, grads = convert(opt, params), make_tensors(1)
    new, _ = ours.update(grads, ours.init(params), params, hyper)
    (found,) = torch.autograd.grad(new["weight"].sum(), by_name["weight"])
    torch.testing.assert_close(found, -grads["weight"])


def test_momentum_switched_off_later_switches_nesterov_off_as_in_torch() -> None:
    params = make_params()
    opt = torch.optim.SGD(list(params.values()), lr=0.1, momentum=0.9, nesterov=True)
    opt.param_groups[0]["momentum"] = 0.0
    ours, mine, grads = convert(opt, params), detached(params), make_tensors(1)
    step_theirs(opt, params, grads)
    assert_same(ours.update(grads, ours.init(mine), mine, read_hyper(opt, params))[0], params)


def test_structure_is_what_is_on() -> None:
    tensor_zero = torch.tensor(0.0)
    assert is_off(0) and is_off(0.0) and not is_off(tensor_zero) and not is_off(1e-9)
    assert set(optim.sgd(lr=0.1).hyper) == {"lr"}
    assert set(optim.sgd(lr=0.1, momentum=0.9).hyper) == {"lr", "momentum", "dampening"}
    assert set(optim.sgd(lr=0.1, weight_decay=tensor_zero).hyper) == {"lr", "weight_decay"}
    assert set(optim.adam().hyper) == {"lr", "beta1", "beta2", "eps"}
    assert set(optim.adamw().hyper) == {"lr", "beta1", "beta2", "eps", "weight_decay"}
    assert leaves(optim.sgd(lr=0.1).init(make_tensors(0))) == []


def test_fingerprint_changes_with_structure_and_not_with_numbers() -> None:
    params = make_params()
    opt = torch.optim.SGD(list(params.values()), lr=0.1, momentum=0.9)
    group = opt.param_groups[0]
    seen = {fingerprint(opt, params)}
    for key, value in (("lr", 3.0), ("lr", torch.tensor(0.5)), ("momentum", 0.1), ("foreach", True), ("dampening", 0.5)):
        group[key] = value
        seen.add(fingerprint(opt, params))
    assert len(seen) == 1
    changes = [("momentum", 0.0), ("weight_decay", 0.1), ("maximize", True), ("lr", dict.fromkeys(NAMES, 0.1)), ("momentum", 0.5)]
    for count, (key, value) in enumerate(changes, start=2):
        group[key] = value
        seen.add(fingerprint(opt, params))
        assert len(seen) == count, key
    group["dampening"], group["nesterov"] = 0.0, True
    seen.add(fingerprint(opt, params))
    moved = group["params"].pop()
    opt.add_param_group({"params": [moved], "lr": 0.1})
    seen.add(fingerprint(opt, params))
    assert len(seen) == len(changes) + 3
    others = {fingerprint(kind(list(params.values())), params) for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)}
    assert len(others) == 3
    assert others & seen == {fingerprint(torch.optim.SGD(list(params.values())), params)}  # as when momentum was set to zero


def test_fingerprint_does_not_see_what_makes_no_difference() -> None:
    params, foreign = make_params(), torch.zeros(1, requires_grad=True)
    values = list(params.values())
    adam, adamw = torch.optim.Adam(values), torch.optim.AdamW(values, weight_decay=0.0)
    assert fingerprint(adam, params) == fingerprint(adamw, params)
    second = torch.optim.Adam([{"params": [foreign]}, {"params": values}])
    assert fingerprint(adam, params) == fingerprint(second, params)


# --- errors

_NAN = float("nan")
BAD_ARGUMENTS: list[tuple[Callable[..., object], dict[str, Any], type[Exception], str]] = [
    (optim.sgd, {"lr": -0.1}, InvalidArgument, "lr must be at least 0"),
    (optim.sgd, {"lr": _NAN}, InvalidArgument, "lr must be at least 0"),
    (optim.sgd, {"lr": "0.1"}, InvalidType, "lr must be a float.*got str"),
    (optim.sgd, {"lr": True}, InvalidType, "lr must be a float.*got bool"),
    (optim.sgd, {"lr": torch.tensor(1)}, InvalidType, "lr must be a floating-point tensor"),
    (optim.sgd, {"lr": torch.ones(2)}, InvalidArgument, r"lr must be a scalar, got a tensor of shape \[2\]"),
    (optim.sgd, {"lr": {"w": -1.0}}, InvalidArgument, r"lr\['w'\] must be at least 0"),
    (optim.sgd, {"lr": 0.1, "momentum": -1.0}, InvalidArgument, "momentum must be at least 0"),
    (optim.sgd, {"lr": 0.1, "weight_decay": -1.0}, InvalidArgument, "weight_decay must be at least 0"),
    (optim.sgd, {"lr": 0.1, "nesterov": True}, InvalidArgument, "nesterov=True needs a momentum"),
    (optim.sgd, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "nesterov": True}, InvalidArgument, "zero dampening"),
    (optim.adam, {"lr": -0.1}, InvalidArgument, "lr must be at least 0"),
    (optim.adam, {"eps": -1.0}, InvalidArgument, "eps must be at least 0"),
    (optim.adam, {"betas": (1.0, 0.9)}, InvalidArgument, r"betas\[0\] must be at least 0.0 and below 1.0, got 1.0"),
    (optim.adamw, {"betas": (0.9, -0.1)}, InvalidArgument, r"betas\[1\] must be"),
    (optim.adamw, {"weight_decay": -0.1}, InvalidArgument, "weight_decay must be"),
    (optim.clip_by_global_norm, {"max_norm": -1.0}, InvalidArgument, "max_norm must be at least 0"),
    (optim.clip_by_global_norm, {"max_norm": {"w": 1.0}}, InvalidArgument, "one number for all parameters"),
    (optim.partition, {"optimizers": {}, "labels": {"w": "a"}}, InvalidArgument, r"labels\['w'\] is 'a'"),
    (optim.partition, {"optimizers": {"a": torch.optim.SGD}, "labels": {}}, InvalidType, r"optimizers\['a'\] must be"),
]


@pytest.mark.parametrize(("make", "arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(make: Callable[..., object], arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**arguments)


def test_bad_chains() -> None:
    clip, sgd = optim.clip_by_global_norm(1.0), optim.sgd(lr=0.1)
    for parts in ((), (clip,), (sgd, clip, sgd)):
        with pytest.raises(InvalidArgument, match="exactly one optimiser"):
            optim.chain(*parts)
    wrong: Any = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    with pytest.raises(InvalidType, match=r"chain takes .* got SGD"):
        optim.chain(wrong)


def test_bad_inputs_of_update() -> None:
    opt, params = optim.sgd(lr=0.1), make_tensors(0)
    state, grads = opt.init(params), make_tensors(1)
    with pytest.raises(OptimizerMismatch, match="grads has 'other'"):
        opt.update({"other": grads["bias"]}, state, params, opt.hyper)
    with pytest.raises(OptimizerMismatch, match=r"shape \[4, 3\], got \[3\]"):
        opt.update({"weight": grads["bias"]}, state, params, opt.hyper)
    with pytest.raises(InvalidArgument, match="hyper has no 'lr'"):
        opt.update(grads, state, params, {})
    with pytest.raises(InvalidArgument, match="no value for parameter 'scalar'"):
        opt.update(grads, state, params, {"lr": {"bias": 0.1}})
    with pytest.raises(InvalidArgument, match="lr for parameter 'weight' must be a scalar or"):
        opt.update({"weight": grads["weight"]}, state, params, {"lr": {"weight": torch.ones(3)}})
    with pytest.raises(InvalidArgument, match="Parameter 'scalar' has no label"):
        optim.partition({"a": opt}, {}).init(params)


def test_conversion_takes_exact_classes_only() -> None:
    class Subclass(torch.optim.SGD):
        pass

    params = make_params()
    for kind in (Subclass, torch.optim.RMSprop):
        opt = make_opt(Case(kind, optim.sgd, {"lr": 0.1}), params)
        for function in (convert, read_hyper, read_state, fingerprint):
            with pytest.raises(UnsupportedOptimizer, match="SGD, Adam, AdamW"):
                function(opt, params)
    assert SUPPORTED == ("SGD", "Adam", "AdamW")


def test_conversion_errors() -> None:
    params = make_params()
    opt = torch.optim.Adam(list(params.values()))
    stranger = torch.zeros(1, requires_grad=True)
    with pytest.raises(OptimizerMismatch, match="Parameter 'stranger' is in none of the optimiser's 1 groups"):
        convert(opt, params | {"stranger": stranger})
    with pytest.raises(OptimizerMismatch, match="params is empty"):
        convert(opt, {})
    step_theirs(opt, params, make_tensors(1))
    opt.param_groups[0]["amsgrad"] = True
    with pytest.raises(OptimizerMismatch, match="has no 'max_exp_avg_sq'"):
        read_state(opt, params)
    opt.param_groups[0]["amsgrad"] = False
    opt.state[params["weight"]]["exp_avg"] = torch.zeros(7)
    with pytest.raises(OptimizerMismatch, match=r"'exp_avg' for parameter 'weight' must have shape \[4, 3\], got \[7\]"):
        read_state(opt, params)
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(InvalidArgument, match="lr must be at least 0"):
        convert(opt, params)
