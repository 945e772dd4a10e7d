"""The table of optimisers: every class of `torch.optim` that is dense, with every flag, and numbers of which each one matters.

A case is a class, its pure counterpart and the arguments of both. `DERIVATIVES` says for some of them which derivatives are zero. Below the
tables are the few tools that all tests of optimisers share.

Known limits: `torch.optim` keeps NAdam's `mu_product` and ASGD's `eta` and `mu` in PyTorch's default dtype, so these two can be compared in
float64 only inside `exact_in(case)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from adaptrt import optim, tree
from adaptrt.optim.base import Hyper, Optimizer, State

Shapes = Mapping[str, tuple[int, ...]]

SHAPES: Shapes = {"scalar": (), "bias": (3,), "weight": (4, 3), "kernel": (2, 3, 2, 2), "empty": (0, 2)}
NOT_EMPTY: Shapes = {name: shape for name, shape in SHAPES.items() if name != "empty"}
MATRICES: Shapes = {"tall": (5, 3), "wide": (3, 6), "square": (4, 4), "column": (3, 1), "empty": (0, 2)}


@dataclass(frozen=True, eq=False)
class Family:
    """One class of `torch.optim`.

    Attributes:
      theirs: the class.
      ours: its pure counterpart, which takes the same arguments.
      whole: the hyperparameters that cannot have a value for each element.
      shapes: of parameters that the class can step.
      default_dtype: PyTorch's default dtype under which the class steps float64 parameters in float64.
      num_steps: as many as it takes until every term has come to bear.
    """

    theirs: type[torch.optim.Optimizer]
    ours: Callable[..., Optimizer]
    whole: frozenset[str] = frozenset()
    shapes: Shapes = field(default_factory=lambda: SHAPES)
    default_dtype: torch.dtype = torch.float32
    num_steps: int = 3

    def make_theirs(self, params: Iterable[Any], **settings: Any) -> torch.optim.Optimizer:
        """An instance for tensors or groups."""
        return self.theirs(list(params), **settings)


class Case(NamedTuple):
    family: Family
    settings: dict[str, Any]

    def make_theirs(self, params: Iterable[Tensor], **more: Any) -> torch.optim.Optimizer:
        return self.family.make_theirs(params, **self.settings, **more)

    def make_ours(self) -> Optimizer:
        return self.family.ours(**self.settings)

    def make_tensors(self, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return make_tensors(seed, dtype, self.family.shapes)

    def make_params(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        return make_params(seed, dtype, self.family.shapes)

    def __str__(self) -> str:
        return "-".join([self.family.theirs.__name__, *(f"{key}={value}" for key, value in self.settings.items() if key != "lr")])


def _product(common: Mapping[str, Any], *axes: Sequence[Mapping[str, Any]], **values: Sequence[Any]) -> list[dict[str, Any]]:
    """`common` with one entry of each axis and one of each key's values, in all combinations."""
    every = [*axes, *([{key: value} for value in of_key] for key, of_key in values.items())]
    return [dict(common) | {key: value for part in parts for key, value in part.items()} for parts in itertools.product(*every)]


def _adjustments() -> list[str | None]:
    """Those of Muon that the installed PyTorch has."""
    found: list[str | None] = [None, "original", "match_rms_adamw"]
    try:
        torch.optim.Muon([torch.zeros(1, 1)], adjust_lr_fn="spectral_unclamped")
    except ValueError:
        return found
    return [*found, "spectral_unclamped"]


_BOTH = (False, True)
_DECAYS = ({}, {"weight_decay": 0.2}, {"weight_decay": 0.2, "decoupled_weight_decay": True})

SGD = Family(torch.optim.SGD, optim.sgd)
ADAM = Family(torch.optim.Adam, optim.adam)
ADAMW = Family(torch.optim.AdamW, optim.adamw)
ADAMAX = Family(torch.optim.Adamax, optim.adamax)
NADAM = Family(torch.optim.NAdam, optim.nadam, whole=frozenset({"beta1", "momentum_decay"}), default_dtype=torch.float64)
RADAM = Family(torch.optim.RAdam, optim.radam, num_steps=7)
ADAGRAD = Family(torch.optim.Adagrad, optim.adagrad)
ADADELTA = Family(torch.optim.Adadelta, optim.adadelta)
ASGD = Family(torch.optim.ASGD, optim.asgd, default_dtype=torch.float64, num_steps=6)
RMSPROP = Family(torch.optim.RMSprop, optim.rmsprop)
RPROP = Family(torch.optim.Rprop, optim.rprop)
# PyTorch divides by the number of elements of a parameter, and so cannot step an empty one.
ADAFACTOR = Family(torch.optim.Adafactor, optim.adafactor, whole=frozenset({"beta2_decay", "eps1", "eps2", "d"}), shapes=NOT_EMPTY)
MUON = Family(torch.optim.Muon, optim.muon, whole=frozenset({"eps"}), shapes=MATRICES)

_SETTINGS: dict[Family, list[dict[str, Any]]] = {
    SGD: _product(
        {"lr": 0.1},
        ({}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.4}, {"momentum": 0.8, "nesterov": True}),
        weight_decay=(0.0, 0.3),
        maximize=_BOTH,
    ),
    ADAM: [
        *_product({"lr": 0.05, "betas": (0.9, 0.5)}, weight_decay=(0.0, 0.2), amsgrad=_BOTH, maximize=_BOTH),
        {"lr": 0.05},
        {"lr": 0.05, "betas": (0.5, 0.7), "eps": 1e-3},
        {"lr": 0.05, "betas": (0.0, 0.9)},
    ],
    ADAMW: [
        *_product({"lr": 0.05, "betas": (0.9, 0.5)}, weight_decay=(0.0, 0.2), amsgrad=_BOTH, maximize=_BOTH),
        {"lr": 0.05},
        {"lr": 0.05, "betas": (0.0, 0.9), "eps": 1e-3},
    ],
    ADAMAX: [
        *_product({"lr": 0.05, "betas": (0.8, 0.9), "eps": 0.1}, weight_decay=(0.0, 0.2), maximize=_BOTH),
        {"lr": 0.05},
    ],
    NADAM: [
        *_product({"lr": 0.05, "betas": (0.8, 0.9), "eps": 1e-3, "momentum_decay": 0.5}, _DECAYS, maximize=_BOTH),
        {"lr": 0.05},
    ],
    RADAM: [
        *_product({"lr": 0.05, "betas": (0.8, 0.93), "eps": 1e-3}, _DECAYS, maximize=_BOTH),  # adaptive from the 6th step on
        {"lr": 0.05, "betas": (0.5, 0.6)},  # never
        {"lr": 0.05},
    ],
    ADAGRAD: [
        *_product({"lr": 0.1, "eps": 1e-2}, lr_decay=(0.0, 0.1), weight_decay=(0.0, 0.2), initial_accumulator_value=(0.0, 0.5)),
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.2, "initial_accumulator_value": 0.5, "maximize": True},
        {"lr": 0.1},
    ],
    ADADELTA: [
        *_product({"lr": 0.7, "rho": 0.8, "eps": 1e-2}, weight_decay=(0.0, 0.2), maximize=_BOTH),
        {"lr": 0.7},
    ],
    ASGD: [
        # The average begins at the 5th step, and the large decay makes the rate fall at once.
        *_product({"lr": 0.2, "lambd": 0.5, "alpha": 0.6, "t0": 3.0}, weight_decay=(0.0, 0.2), maximize=_BOTH),
        {"lr": 0.2, "lambd": 0.5, "t0": 0.0},
        {"lr": 0.2},
    ],
    RMSPROP: [
        *_product({"lr": 0.02, "alpha": 0.8, "eps": 1e-2}, weight_decay=(0.0, 0.2), momentum=(0.0, 0.7), centered=_BOTH, maximize=_BOTH),
        {"lr": 0.02},
    ],
    RPROP: [
        # Both limits bind: two equal signs in a row exceed the larger, two changes the smaller.
        *_product({"lr": 0.1}, ({}, {"etas": (0.4, 1.3), "step_sizes": (0.03, 0.15)}), maximize=_BOTH),
        {"lr": 0.5, "step_sizes": (0.01, 0.2)},  # even the first size is too large
    ],
    ADAFACTOR: [
        *_product(
            {"lr": 0.05, "beta2_decay": -0.6},
            # A floor of 0.9 binds in some rows and elements; the second moments of the gradients are 1 on average.
            eps=((None, 1e-3), (0.9, 0.8)),
            d=(1.0, 1.3),
            weight_decay=(0.0, 0.2),
        ),
        {"lr": 0.5, "weight_decay": 0.2, "maximize": True},  # 1 / sqrt(t) is the smaller from the 5th step on
        {"lr": 0.05},
    ],
    MUON: [
        *_product({"lr": 0.1, "momentum": 0.9}, weight_decay=(0.0, 0.2), nesterov=_BOTH, adjust_lr_fn=_adjustments()),
        {"lr": 0.1, "ns_steps": 2, "ns_coefficients": (2.0, -1.5, 0.5)},
        {"lr": 0.1, "eps": 5.0, "momentum": 0.5},  # above some norms
        {"lr": 0.1, "momentum": 0.0},
    ],
}

FAMILIES: list[Family] = list(_SETTINGS)
CASES: list[Case] = [Case(family, settings) for family, every in _SETTINGS.items() for settings in every]

over_families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.theirs.__name__)
over_cases = pytest.mark.parametrize("case", CASES, ids=str)


def cases_of(family: Family) -> list[Case]:
    return [case for case in CASES if case.family is family]


def full_case(family: Family) -> Case:
    """One with as many hyperparameters on as the family has, and as many given."""
    return max(cases_of(family), key=lambda case: (len(case.make_ours().hyper), len(case.settings)))


class Derivative(NamedTuple):
    """A case whose derivatives are compared with finite differences.

    Attributes:
      case: the optimiser.
      zero: "params", "grads" or names of hyperparameters along which the new parameters do not change; along all others they do.
      shape: of its one parameter.
      num_steps: long enough that everything has come to bear.
    """

    case: Case
    zero: frozenset[str] = frozenset()
    shape: tuple[int, ...] = (2, 3)
    num_steps: int = 4

    def __str__(self) -> str:
        return f"{self.case}-{list(self.shape)}"


def _derivative(
    family: Family, zero: Sequence[str] = (), shape: tuple[int, ...] = (2, 3), num_steps: int = 4, **settings: Any
) -> Derivative:
    return Derivative(Case(family, settings), frozenset(zero), shape, num_steps)


_ADAMS: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.2}
_AMSGRAD: dict[str, Any] = {**_ADAMS, "betas": (0.8, 0.6), "amsgrad": True}
_FACTORS: dict[str, Any] = {"beta2_decay": -0.6, "weight_decay": 0.2}
_MUON: dict[str, Any] = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.2, "ns_dtype": torch.float64}

DERIVATIVES: list[Derivative] = [
    _derivative(SGD, lr=0.1, weight_decay=0.2),
    _derivative(SGD, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.2),
    _derivative(SGD, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    _derivative(ADAM, **_ADAMS),
    _derivative(ADAM, **_AMSGRAD, maximize=True),
    _derivative(ADAMW, **_ADAMS),
    _derivative(ADAMW, **_AMSGRAD),
    _derivative(ADAMAX, **_ADAMS),
    _derivative(ADAMAX, **_ADAMS, maximize=True),
    _derivative(NADAM, **_ADAMS, momentum_decay=0.5),
    _derivative(NADAM, **_ADAMS, momentum_decay=0.5, decoupled_weight_decay=True, maximize=True),
    _derivative(RADAM, num_steps=7, **_ADAMS),
    _derivative(RADAM, num_steps=7, **_ADAMS, decoupled_weight_decay=True, maximize=True),
    _derivative(RADAM, ["beta2", "eps"], **_ADAMS),  # not adaptive yet
    _derivative(ADAGRAD, lr=0.1, lr_decay=0.2, weight_decay=0.2, initial_accumulator_value=0.3, eps=1e-2),
    _derivative(ADAGRAD, lr=0.1, lr_decay=0.2, initial_accumulator_value=0.3, eps=1e-2, maximize=True),
    _derivative(ADADELTA, lr=0.7, rho=0.8, eps=1e-2, weight_decay=0.2),
    _derivative(ADADELTA, lr=0.7, rho=0.8, eps=1e-2, maximize=True),
    # t0 is about the average only, which is in the state.
    _derivative(ASGD, ["t0"], lr=0.2, lambd=0.5, alpha=0.6, t0=1.5, weight_decay=0.2),
    _derivative(ASGD, ["t0"], lr=0.2, lambd=0.5, alpha=0.6, t0=1.5, maximize=True),
    _derivative(RMSPROP, lr=0.1, alpha=0.8, eps=1e-2, weight_decay=0.2),
    _derivative(RMSPROP, lr=0.1, alpha=0.8, eps=1e-2, momentum=0.7, centered=True, maximize=True),
    # The update jumps or stays along the gradient. Both limits bind.
    _derivative(RPROP, ["grads"], lr=0.1, etas=(0.5, 1.2), step_sizes=(0.055, 0.15)),
    _derivative(RPROP, ["grads"], lr=0.1, etas=(0.5, 1.2), step_sizes=(0.055, 0.115), maximize=True),
    # Floors of 0.9 bind in some rows and elements, 1e-3 does not bind, and 5 does.
    _derivative(ADAFACTOR, ["eps2"], lr=0.1, eps=(None, 1e-3), **_FACTORS),
    _derivative(ADAFACTOR, lr=0.1, eps=(0.9, 5.0), **_FACTORS),
    _derivative(ADAFACTOR, ["eps2"], lr=5.0, eps=(0.9, 1e-3), **_FACTORS),
    _derivative(ADAFACTOR, shape=(4,), lr=0.1, eps=(0.9, 5.0), **_FACTORS),
    _derivative(ADAFACTOR, ["d"], shape=(), lr=0.1, eps=(0.5, 5.0), d=1.5, **_FACTORS),
    _derivative(ADAFACTOR, ["eps2"], shape=(2, 2, 3), lr=0.1, eps=(0.9, 1e-3), maximize=True, **_FACTORS),
    _derivative(MUON, ["eps"], **_MUON),
    _derivative(MUON, ["eps"], shape=(3, 2), nesterov=False, **_MUON),
    _derivative(MUON, shape=(2, 2), eps=20.0, **_MUON),
]

over_derivatives = pytest.mark.parametrize("entry", DERIVATIVES, ids=str)


# --- tools


def make_tensors(seed: int, dtype: torch.dtype = torch.float64, shapes: Shapes = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def make_params(seed: int = 0, dtype: torch.dtype = torch.float64, shapes: Shapes = SHAPES) -> dict[str, Tensor]:
    return {name: tensor.requires_grad_() for name, tensor in make_tensors(seed, dtype, shapes).items()}


def detached(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in params.items()}


def step_theirs(opt: torch.optim.Optimizer, params: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> None:
    for name, p in params.items():
        p.grad = grads[name].clone() if name in grads else None
    opt.step()


def as_tensors(hyper: Hyper) -> Hyper:
    """Every float as a 0-dim float64 tensor, as a compiled program passes them."""
    if isinstance(hyper, tuple):
        return tuple(as_tensors(value) for value in hyper)
    if isinstance(hyper, Mapping):
        return {key: as_tensors(value) for key, value in hyper.items()}
    return hyper if isinstance(hyper, Tensor) else torch.tensor(hyper, dtype=torch.float64)


def per_element(hyper: Mapping[str, float], family: Family, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Every float as a mapping to tensors of the parameters' shapes, but where the family needs one number."""

    def spread(value: float) -> dict[str, Tensor]:
        return {name: torch.full(shape, value, dtype=dtype) for name, shape in family.shapes.items()}

    return {key: torch.tensor(value, dtype=dtype) if key in family.whole else spread(value) for key, value in hyper.items()}


def same_tree(a: State, b: State) -> bool:
    """Equal but for the values of tensors."""
    (leaves_a, structure_a), (leaves_b, structure_b) = tree.flatten(a), tree.flatten(b)
    return structure_a == structure_b and [tree.Spec.of(leaf) for leaf in leaves_a] == [tree.Spec.of(leaf) for leaf in leaves_b]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def exact(request: pytest.FixtureRequest) -> Iterator[None]:
    """The default dtype under which `torch.optim` steps float64 parameters of the test's `case` in float64."""
    with default_dtype(request.getfixturevalue("case").family.default_dtype):
        yield


# Relative and absolute. Ours and theirs round in another order; parameters are of order one, so the absolute one is a few last places.
TOLERANCES = {torch.float64: (1e-12, 1e-14), torch.float32: (1e-5, 1e-6), torch.bfloat16: (0.02, 0.02)}


def assert_same_state(ours: State, theirs: State) -> None:
    """Equal trees, and floating-point leaves within the tolerance of their dtype; the count of SGD's steps is not PyTorch's."""
    assert same_tree(ours, theirs)
    for found, expected in zip(tree.leaves(ours), tree.leaves(theirs), strict=True):
        if expected.is_floating_point():
            rtol, atol = TOLERANCES[expected.dtype]
            torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], as_exact_as: torch.dtype | None = None) -> None:
    """Equal names, dtypes and shapes, and values within the tolerance of their dtype, or of `as_exact_as`."""
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        rtol, atol = TOLERANCES[as_exact_as or expected.dtype]
        torch.testing.assert_close(ours[name], expected.detach(), rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
