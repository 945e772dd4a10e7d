"""From `torch.optim` instances to pure optimisers: structure, numbers and state as they stand, and what is refused."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptrt import optim, tree
from adaptrt.errors import InvalidArgument, InvalidType, OptimizerMismatch, UnsupportedOptimizer
from adaptrt.optim.base import Optimizer
from adaptrt.optim.convert import SUPPORTED, convert, fingerprint, read_hyper, read_state
from adaptrt.optim.source import TorchSource
from tests.optimizers import (
    CASES,
    FAMILIES,
    MUON,
    SGD,
    SHAPES,
    Case,
    Family,
    assert_same,
    assert_same_state,
    cases_of,
    default_dtype,
    detached,
    full_case,
    make_params,
    make_tensors,
    over_cases,
    over_families,
    same_tree,
    step_theirs,
)
from tests.optimizers import exact as exact  # a fixture

# --- equal to the instance from here on


@over_cases
def test_conversion_goes_on_where_torch_optim_stands(case: Case, exact: None) -> None:
    params = case.make_params()
    theirs = case.make_theirs(params.values())
    late = list(params)[2]
    for step in range(4):
        grads = case.make_tensors(step)
        del grads[late]  # has no state yet
        step_theirs(theirs, params, grads)
    ours, hyper, state, mine = convert(theirs, params), read_hyper(theirs, params), read_state(theirs, params), detached(params)
    assert hyper == ours.hyper == case.make_ours().hyper
    assert same_tree(state, ours.init(params)) and same_tree(state, case.make_ours().init(params))
    assert not any(leaf.requires_grad for leaf in tree.leaves(state))
    for step in range(20):
        grads = case.make_tensors(50 + step)
        step_theirs(theirs, params, grads)
        mine, state = ours.update(grads, state, mine, hyper)
    assert_same(mine, params)
    assert_same_state(state, read_state(theirs, params))


# Each case beside the next of its family.
PAIRS = [
    (case, cases_of(family)[(index + 1) % len(cases_of(family))]) for family in FAMILIES for index, case in enumerate(cases_of(family))
]


@pytest.mark.parametrize(("case", "other"), PAIRS, ids=str)
def test_two_groups_with_different_flags_and_numbers(case: Case, other: Case, exact: None) -> None:
    params = case.make_params()
    head, body = list(params)[1::2], list(params)[::2]
    foreign = torch.zeros(2, 2, requires_grad=True)
    groups = [
        {"params": [params[name] for name in head], **case.settings},
        {"params": [foreign]},
        {"params": [params[name] for name in body], **other.settings},
    ]
    opt = case.family.make_theirs(groups, lr=1.0)
    first = case.make_tensors(1)
    del first[head[-1]], first[body[-1]]
    step_theirs(opt, params, first)
    ours, hyper, state, mine = convert(opt, params), read_hyper(opt, params), read_state(opt, params), detached(params)
    assert list(hyper) == ["0", "2"] and hyper == ours.hyper
    for label, settings in (("0", case.make_ours().hyper), ("2", other.make_ours().hyper)):
        # PyTorch does not read a group's initial_accumulator_value; see the test of Adagrad below.
        assert hyper[label].keys() == settings.keys()
        assert all(hyper[label][key] == value for key, value in settings.items() if key != "initial_accumulator_value")
    assert same_tree(state, ours.init(params))
    for step in range(10):
        grads = case.make_tensors(10 + step)
        step_theirs(opt, params, grads)
        mine, state = ours.update(grads, state, mine, hyper)
    assert_same(mine, params)
    assert_same_state(state, read_state(opt, params))

    only = {name: params[name] for name in body}
    assert read_hyper(opt, only) == convert(opt, only).hyper == hyper["2"]
    assert list(read_state(opt, only)) == body


@over_families
def test_defaults_are_those_of_torch_optim(family: Family) -> None:
    params = make_params(shapes=family.shapes)
    opt = family.make_theirs(params.values())
    ours = family.ours(lr=1e-3) if family is SGD else family.ours()
    assert read_hyper(opt, params) == ours.hyper
    assert same_tree(convert(opt, params).init(params), ours.init(params))


@over_families
def test_choices_of_implementation_make_no_difference(family: Family) -> None:
    # Some of them round to the default dtype where the plain loop does not.
    with default_dtype(torch.float64):
        for flag in ("foreach", "fused", "differentiable", "capturable"):
            if flag in inspect.signature(family.theirs).parameters:
                check_choice(full_case(family), flag)


def check_choice(case: Case, flag: str) -> None:
    # Without requires_grad: what requires it may not be written to with differentiable=True.
    params = case.make_tensors(0)
    plain, opt = case.make_theirs(params.values()), case.make_theirs(params.values(), **{flag: True})
    assert fingerprint(opt, params) == fingerprint(plain, params), flag
    assert read_hyper(opt, params) == read_hyper(plain, params), flag
    if flag == "capturable":  # PyTorch steps it on accelerators only
        return
    step_theirs(opt, params, case.make_tensors(1))
    ours, state, mine = convert(opt, params), read_state(opt, params), detached(params)
    assert same_tree(state, ours.init(params))
    for step in range(8):
        grads = case.make_tensors(10 + step)
        step_theirs(opt, params, grads)
        mine, state = ours.update(grads, state, mine, ours.hyper)
    assert_same(mine, params)


def test_adam_with_decoupled_weight_decay_is_adamw() -> None:
    params = make_params()
    opt = torch.optim.Adam(list(params.values()), weight_decay=0.3, decoupled_weight_decay=True)
    ours, mine = convert(opt, params), detached(params)
    assert fingerprint(opt, params) == fingerprint(torch.optim.AdamW(list(params.values()), weight_decay=0.1), params)
    state = ours.init(mine)
    for step in range(3):
        grads = make_tensors(step)
        step_theirs(opt, params, grads)
        mine, state = ours.update(grads, state, mine, ours.hyper)
    assert_same(mine, params)


def test_momentum_switched_off_later_switches_nesterov_off_as_in_torch() -> None:
    params = make_params()
    opt = torch.optim.SGD(list(params.values()), lr=0.1, momentum=0.9, nesterov=True)
    opt.param_groups[0]["momentum"] = 0.0
    ours, mine, grads = convert(opt, params), detached(params), make_tensors(1)
    step_theirs(opt, params, grads)
    assert_same(ours.update(grads, ours.init(mine), mine, read_hyper(opt, params))[0], params)


def test_adagrad_starts_from_the_sum_that_the_instance_holds() -> None:
    # PyTorch fills it when the instance is made, from the constructor's argument: that of a group, or a later one, is never read.
    params = make_params()
    names = list(params)
    groups = [
        {"params": [params[name] for name in names[:2]], "initial_accumulator_value": 5.0},
        {"params": [params[n] for n in names[2:]]},
    ]
    opt = torch.optim.Adagrad(groups, initial_accumulator_value=0.5)
    opt.param_groups[1]["initial_accumulator_value"] = 7.0
    ours, state, mine, grads = convert(opt, params), read_state(opt, params), detached(params), make_tensors(1)
    step_theirs(opt, params, grads)
    assert_same(ours.update(grads, state, mine, read_hyper(opt, params))[0], params)


# --- state


@over_cases
def test_read_state_is_a_copy(case: Case) -> None:
    params = case.make_params()
    theirs = case.make_theirs(params.values())
    step_theirs(theirs, params, case.make_tensors(1))
    state = read_state(theirs, params)
    before = [leaf.clone() for leaf in tree.leaves(state)]
    step_theirs(theirs, params, case.make_tensors(2))
    assert all(map(torch.equal, before, tree.leaves(state)))
    # Nor does what is done to it come back.
    again = [leaf.clone() for leaf in tree.leaves(read_state(theirs, params))]
    for leaf in tree.leaves(read_state(theirs, params)):
        leaf.zero_()
    assert all(map(torch.equal, again, tree.leaves(read_state(theirs, params))))


@over_families
def test_state_before_the_first_step_is_the_initial_one(family: Family) -> None:
    case = full_case(family)
    params = case.make_params()
    opt = case.make_theirs(params.values())
    ours, mine, grads = convert(opt, params), detached(params), case.make_tensors(1)
    read, fresh = read_state(opt, params), ours.init(params)
    assert same_tree(read, fresh)
    found, expected = (ours.update(grads, state, mine, ours.hyper) for state in (read, fresh))
    assert all(map(torch.equal, tree.leaves(found), tree.leaves(expected)))


@over_families
def test_state_survives_a_checkpoint(family: Family) -> None:
    case = full_case(family)
    params = case.make_params()
    opt, loaded = case.make_theirs(params.values()), family.make_theirs(params.values(), lr=1.0)
    for step in range(3):
        step_theirs(opt, params, case.make_tensors(step))
    loaded.load_state_dict(opt.state_dict())
    assert read_hyper(loaded, params) == read_hyper(opt, params) and fingerprint(loaded, params) == fingerprint(opt, params)
    assert all(map(torch.equal, tree.leaves(read_state(loaded, params)), tree.leaves(read_state(opt, params))))


@over_families
def test_state_that_does_not_fit(family: Family) -> None:
    case = full_case(family)
    params = case.make_params()
    opt = case.make_theirs(params.values())
    step_theirs(opt, params, case.make_tensors(1))
    name = list(params)[2]
    held, fields = opt.state[params[name]], read_state(opt, params)[name]._asdict()
    assert any(isinstance(value, Tensor) for value in fields.values())
    for key in (key for key, value in fields.items() if isinstance(value, Tensor) and key in held):
        kept = held[key]
        held[key] = torch.zeros(7)
        message = f"'{key}' for parameter '{name}' must have shape {list(fields[key].shape)}, got [7]"
        with pytest.raises(OptimizerMismatch, match=re.escape(message)):
            read_state(opt, params)
        del held[key]
        if key != "step" and held:
            with pytest.raises(OptimizerMismatch, match=rf"state for parameter '{name}' has no '{key}', only .* made under other settings"):
                read_state(opt, params)
        held[key] = kept
    read_state(opt, params)


def test_settings_that_the_state_was_not_made_under() -> None:
    params = make_params()
    for theirs, key, value, missing in (
        (torch.optim.Adam, "amsgrad", True, "max_exp_avg_sq"),
        (torch.optim.RMSprop, "centered", True, "grad_avg"),
        (torch.optim.RMSprop, "momentum", 0.9, "momentum_buffer"),
    ):
        opt = theirs(list(params.values()))
        step_theirs(opt, params, make_tensors(1))
        opt.param_groups[0][key] = value
        with pytest.raises(OptimizerMismatch, match=f"has no '{missing}'"):
            read_state(opt, params)


# --- hyperparameters in param_groups


def test_param_groups_may_hold_tensors_and_mappings() -> None:
    params = make_params()
    opt = torch.optim.SGD(list(params.values()), lr=torch.tensor([0.1]), momentum=0.5)
    one = read_hyper(opt, params)["lr"]
    assert isinstance(one, Tensor) and one.shape == ()
    by_name = {name: torch.full(shape, 0.1, dtype=torch.float64, requires_grad=True) for name, shape in SHAPES.items()}
    opt.param_groups[0]["lr"] = by_name | {"unrelated": 3.0}
    hyper = read_hyper(opt, params)
    assert set(hyper["lr"]) == set(SHAPES) and hyper["lr"]["weight"] is by_name["weight"]
    ours, grads = convert(opt, params), make_tensors(1)
    new, _ = ours.update(grads, ours.init(params), params, hyper)
    (found,) = torch.autograd.grad(new["weight"].sum(), by_name["weight"])
    torch.testing.assert_close(found, -grads["weight"])


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if any(isinstance(v, tuple) for v in full_case(family).settings.values())]
)
def test_tuples_in_param_groups_may_be_lists_and_hold_tensors_and_mappings(family: Family) -> None:
    params = make_params(shapes=family.shapes)
    plain = full_case(family).make_theirs(params.values())
    opt = full_case(family).make_theirs(params.values())
    group = opt.param_groups[0]
    pairs = {key: value for key, value in group.items() if isinstance(value, tuple) and key != "ns_coefficients"}
    group.update({key: list(value) for key, value in pairs.items()})
    assert read_hyper(opt, params) == read_hyper(plain, params) and fingerprint(opt, params) == fingerprint(plain, params)
    number = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for key, value in pairs.items():
        group[key] = (number, *value[1:])
        assert any(value is number for value in read_hyper(opt, params).values())
        assert fingerprint(opt, params) == fingerprint(plain, params)
        group[key] = (value[0], {name: number for name in params})
        assert any(isinstance(value, dict) for value in read_hyper(opt, params).values())
        assert fingerprint(opt, params) != fingerprint(plain, params)
        group[key] = value


# --- fingerprints


def test_equal_fingerprints_mean_equal_arithmetic() -> None:
    # The pure optimiser of one case must do for all that share its fingerprint, with their numbers.
    first: dict[object, tuple[Case, Optimizer]] = {}
    for case in CASES:
        params = case.make_params()
        opt = case.make_theirs(params.values())
        ours, hyper, state = convert(opt, params), read_hyper(opt, params), read_state(opt, params)
        other, representative = first.setdefault(fingerprint(opt, params), (case, ours))
        assert other.family.ours is case.family.ours or {other.family.ours, case.family.ours} == {optim.adam, optim.adamw}
        expected, found = (o.update(case.make_tensors(1), state, params, hyper) for o in (ours, representative))
        assert all(map(torch.equal, tree.leaves(found), tree.leaves(expected))), f"{other} has the fingerprint of {case}"
        assert list(representative.hyper) == list(hyper)
    assert len(FAMILIES) < len(first) < len(CASES)


@over_cases
def test_fingerprint_does_not_see_numbers(case: Case) -> None:
    params = case.make_params()
    opt = case.make_theirs(params.values())
    before = fingerprint(opt, params)
    hash(before)
    for key, value in opt.param_groups[0].items():
        if isinstance(value, float) and value:
            opt.param_groups[0][key] = value * 1.1
        if isinstance(value, tuple) and key != "ns_coefficients":
            opt.param_groups[0][key] = tuple(None if entry is None else entry * 0.9 for entry in value)
    opt.param_groups[0]["lr"] = torch.tensor(0.5)
    assert fingerprint(opt, params) == before
    opt.param_groups[0]["lr"] = dict.fromkeys(params, 0.1)
    assert fingerprint(opt, params) != before


@over_families
def test_fingerprint_sees_flags(family: Family) -> None:
    params = make_params(shapes=family.shapes)
    case = full_case(family)
    opt = case.make_theirs(params.values())
    group, before = opt.param_groups[0], fingerprint(opt, params)
    ignored = {"foreach", "fused", "differentiable", "capturable"}
    flags = [key for key, value in group.items() if isinstance(value, bool) and key not in ignored]
    assert "maximize" in flags or family is MUON
    seen = {before}
    for key in flags:
        if key == "nesterov" and family is SGD:  # needs zero dampening, which the full case has not
            continue
        group[key] = not group[key]
        seen.add(fingerprint(opt, params))
        group[key] = not group[key]
    assert len(seen) == 1 + len(flags) - (family is SGD)
    assert fingerprint(opt, params) == before


def test_fingerprint_sees_the_constants_of_muon() -> None:
    params = make_params(shapes=MUON.shapes)
    opt = torch.optim.Muon(list(params.values()))
    group = opt.param_groups[0]
    seen = {fingerprint(opt, params)}
    group["ns_coefficients"] = list(group["ns_coefficients"])
    hash(fingerprint(opt, params))
    seen.add(fingerprint(opt, params))
    assert len(seen) == 1
    for key, value in (("ns_coefficients", [1.5, -0.5, 0.0]), ("ns_steps", 3), ("adjust_lr_fn", "match_rms_adamw"), ("weight_decay", 0.0)):
        group[key] = value
        seen.add(fingerprint(opt, params))
    assert len(seen) == 5


def test_ns_coefficients_as_a_list() -> None:
    params = make_params(shapes=MUON.shapes)
    coefficients: Any = [2.0, -1.5, 0.5]
    opt = torch.optim.Muon(list(params.values()), lr=0.1, ns_coefficients=coefficients)
    ours, mine, grads = convert(opt, params), detached(params), make_tensors(1, shapes=MUON.shapes)
    step_theirs(opt, params, grads)
    assert_same(ours.update(grads, ours.init(mine), mine, ours.hyper)[0], params)


def test_fingerprint_changes_with_structure_and_not_with_numbers() -> None:
    params = make_params()
    opt = torch.optim.SGD(list(params.values()), lr=0.1, momentum=0.9)
    group = opt.param_groups[0]
    seen = {fingerprint(opt, params)}
    for key, value in (("lr", 3.0), ("lr", torch.tensor(0.5)), ("momentum", 0.1), ("foreach", True), ("dampening", 0.5)):
        group[key] = value
        seen.add(fingerprint(opt, params))
    assert len(seen) == 1
    changes = [("momentum", 0.0), ("weight_decay", 0.1), ("maximize", True), ("lr", dict.fromkeys(SHAPES, 0.1)), ("momentum", 0.5)]
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


def test_fingerprint_does_not_see_what_makes_no_difference() -> None:
    params, foreign = make_params(), torch.zeros(1, requires_grad=True)
    values = list(params.values())
    adam, adamw = torch.optim.Adam(values), torch.optim.AdamW(values, weight_decay=0.0)
    assert fingerprint(adam, params) == fingerprint(adamw, params)
    second = torch.optim.Adam([{"params": [foreign]}, {"params": values}])
    assert fingerprint(adam, params) == fingerprint(second, params)
    for kind in (torch.optim.NAdam, torch.optim.RAdam):
        assert fingerprint(kind(values, decoupled_weight_decay=True), params) == fingerprint(kind(values), params)


# --- errors


def test_every_supported_class_is_in_the_table() -> None:
    assert (*(family.theirs.__name__ for family in FAMILIES), "LBFGS") == SUPPORTED


class Custom(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})


@pytest.mark.parametrize(
    "kind",
    [type("Subclass", (family.theirs,), {}) for family in FAMILIES] + [torch.optim.SparseAdam, Custom],
    ids=lambda kind: f"{kind.__base__.__name__}-{kind.__name__}",
)
def test_conversion_takes_exact_classes_only(kind: Any) -> None:
    matrix = {"w": torch.zeros(2, 2, requires_grad=True)}
    opt = kind(list(matrix.values()))
    for function in (convert, read_hyper, read_state, fingerprint):
        with pytest.raises(UnsupportedOptimizer, match=rf"{', '.join(SUPPORTED)} from torch.optim, got .*{kind.__name__}"):
            function(opt, matrix)


def test_parameters_that_the_instance_has_not() -> None:
    params = make_params()
    opt = torch.optim.Adam(list(params.values()))
    stranger = torch.zeros(1, requires_grad=True)
    for function in (convert, read_hyper, read_state, fingerprint):
        with pytest.raises(OptimizerMismatch, match="Parameter 'stranger' is in none of the optimiser's 1 groups"):
            function(opt, params | {"stranger": stranger})
        with pytest.raises(OptimizerMismatch, match="params is empty"):
            function(opt, {})


@over_families
def test_numbers_outside_their_domain(family: Family) -> None:
    params = make_params(shapes=family.shapes)
    for value, error, message in (
        (-1.0, InvalidArgument, "lr must be at least 0"),
        ("fast", InvalidType, "lr must be a float"),
        ({name: -1.0 for name in params}, InvalidArgument, r"lr\['\w+'\] must be at least 0"),
    ):
        opt = full_case(family).make_theirs(params.values())
        opt.param_groups[0]["lr"] = value
        functions: list[Callable[..., object]] = [convert, read_hyper]
        for function in functions:
            with pytest.raises(error, match=message):
                function(opt, params)


def test_what_changes_in_place_is_read_anew() -> None:
    """A source reads groups once for the objects in them; a flag as a tensor, or numbers in a list, may change and stay the same object."""
    w = torch.zeros(2, requires_grad=True)
    opt = torch.optim.Adam([w])
    flag, betas = torch.tensor(False), [0.9, 0.99]
    opt.param_groups[0]["maximize"] = flag
    read = TorchSource(opt, {"w": w})
    structure = read.structure()
    flag.fill_(True)
    assert read.structure() != structure
    opt.param_groups[0].update(maximize=True, betas=betas)
    assert read.hyper()["beta1"] == 0.9
    betas[0] = 0.5
    assert read.hyper()["beta1"] == 0.5
