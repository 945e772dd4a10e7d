"""docs/optimisers.md against the code: its blocks run, and every name, byte and error in its tables is true."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from adaptrt import errors, optim, tree
from adaptrt.errors import InvalidArgument
from adaptrt.optim.base import Optimizer
from adaptrt.optim.convert import SUPPORTED
from tests.test_readme import python_blocks

PAGE = Path(__file__).parents[1] / "docs" / "optimisers.md"
TEXT = PAGE.read_text()
CODE = re.compile(r"`([^`]+)`")

PAIRS = {
    "betas": ("beta1", "beta2"),
    "eps": ("eps1", "eps2"),
    "etas": ("eta_minus", "eta_plus"),
    "step_sizes": ("step_size_min", "step_size_max"),
}
"""How `hyper` names the numbers of an argument that is a pair."""

ON: Mapping[str, float] = {"beta2_decay": -0.8, "d": 1.5, "eta_plus": 1.2}
"""Values inside the domain, and not off, of the numbers that cannot be 0.5."""


# --- what the page says


class Row(NamedTuple):
    """One row of the table of optimisers. A variant is "" for what always holds, or the words before a colon.

    Attributes:
      function: in `adaptrt.optim`.
      kind: the class in `torch.optim`.
      flags: constants of a program.
      numbers: in `hyper`, by the group in brackets that they are in: its first number, or "" outside brackets.
      whole: those marked †.
      state: field names by variant.
      num_bytes: expressions by variant.
    """

    function: str
    kind: str
    flags: tuple[str, ...]
    numbers: dict[str, str]
    whole: frozenset[str]
    state: dict[str, tuple[str, ...]]
    num_bytes: dict[str, str]

    @property
    def make(self) -> Callable[..., Optimizer]:
        return getattr(optim, self.function)

    @property
    def torch_class(self) -> Callable[..., torch.optim.Optimizer]:
        return getattr(torch.optim, self.kind)


def table(header: str) -> list[list[str]]:
    """The cells below the table row that begins with `header`."""
    lines = TEXT.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def variants(cell: str) -> dict[str, str]:
    """`a; with b: c` as {"": a, "with b": c}."""
    parts = [part.rpartition(":") for part in cell.split(";")]
    return {variant.strip(): value.strip() for variant, _, value in parts}


def read_row(cells: list[str]) -> Row:
    names, flags, numbers, state, num_bytes, _ = cells
    groups = {name: "" for name in CODE.findall(re.sub(r"\[[^]]*\]", "", numbers))}
    for inside in re.findall(r"\[([^]]*)\]", numbers):
        members = CODE.findall(inside)
        groups |= dict.fromkeys(members, members[0])
    function, kind = CODE.findall(names)
    return Row(
        function,
        kind,
        tuple(CODE.findall(flags)),
        groups,
        frozenset(re.findall(r"`(\w+)`†", numbers)),
        {variant: tuple(CODE.findall(fields)) for variant, fields in variants(state).items()},
        variants(num_bytes),
    )


ROWS = [read_row(cells) for cells in table("optimiser")]
over_rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.function)


def differences() -> dict[str, set[str]]:
    """By function, what its bullet under "What differs from torch.optim" names; under "" what the paragraph before says of all."""
    section = TEXT.split("## What differs from torch.optim\n")[1].split("\n## ")[0]
    common, *bullets = section.split("\n- ")
    found = {"": set(CODE.findall(common))}
    for bullet in bullets:
        name, *mentioned = CODE.findall(bullet)
        found[name] = set(mentioned)
    return found


# --- what the code says


def arguments(row: Row) -> dict[str, bool]:
    """The constructor's arguments, and whether each is a number: annotated as a `Value` or a pair of them."""
    return {name: "Value" in str(argument.annotation) for name, argument in inspect.signature(row.make).parameters.items()}


def numbers_of(row: Row, argument: str) -> tuple[str, ...]:
    """The names in `hyper` of what is given as `argument`. `eps` is a pair in one optimiser only."""
    is_pair = argument in PAIRS and (argument != "eps" or row.function == "adafactor")
    return PAIRS[argument] if is_pair else (argument,)


def given(row: Row, argument: str, **values: float | None) -> Any:
    """A number, or the pair of numbers, to pass as `argument`: those in `values`, the others on."""
    names = numbers_of(row, argument)
    found = [values.get(name, ON.get(name, 0.5)) for name in names]
    return found[0] if names == (argument,) else tuple(found)


def build(row: Row, **some: Any) -> Optimizer:
    """The optimiser with its flags at their defaults and its numbers on, but for the arguments in `some`."""
    return row.make(**{argument: given(row, argument) for argument, is_number in arguments(row).items() if is_number} | some)


def fields(opt: Optimizer, param: Tensor) -> dict[str, Any]:
    """The named tuple of state that `opt` makes for one parameter, as a dict."""
    state: Any = opt.init({"w": param})
    return (state["w"] if isinstance(state, dict) else state)._asdict()


class Variant(NamedTuple):
    """A state that a row describes.

    Attributes:
      opt: that makes it.
      param: for which.
      sizes: what expressions for bytes may name.
      words: the variants of the row that hold.
    """

    opt: Optimizer
    param: Tensor
    sizes: dict[str, Any]
    words: tuple[str, ...]

    def total(self, num_bytes: Mapping[str, str]) -> float:
        """The bytes that a row's expressions give for one element of the parameter."""
        expressions = [num_bytes[word].lstrip("+ ").replace("×", "*").replace("`", "") for word in self.words if word in num_bytes]
        return sum(eval(expression, {"__builtins__": {}}, self.sizes) for expression in expressions)


def state_variants(row: Row) -> Iterator[Variant]:
    """All combinations of what the row's state depends on."""
    conditions = [word for word in row.state if word.startswith("with ")]
    switches = [CODE.findall(condition)[0] for condition in conditions]
    counts = [{"history_size": 3}, {"history_size": 7}] if "history_size" in row.flags else [{}]
    shapes = [(64, 64), (64, 32)] if row.function == "muon" else [(64, 64), (64, 32), (3, 64, 32), (64,)]
    for chosen, count, shape in itertools.product(itertools.product((False, True), repeat=len(conditions)), counts, shapes):
        some = {name: on if name in row.flags else 0.5 * on for name, on in zip(switches, chosen, strict=True)}
        words = [condition for condition, on in zip(conditions, chosen, strict=True) if on]
        sizes = count | dict(zip("RC", shape[-2:], strict=len(shape) > 1))
        axes = "two axes or more" if len(shape) > 1 else "fewer"
        yield Variant(build(row, **some, **count), torch.zeros(shape), sizes, ("", *words, axes))


# --- the table of optimisers


def test_every_optimiser_has_a_row_and_no_other() -> None:
    assert sorted(row.kind for row in ROWS) == sorted(SUPPORTED)
    counterparts = {kind.lower() for kind in dir(torch.optim) if inspect.isclass(getattr(torch.optim, kind))}
    assert {row.function for row in ROWS} == set(optim.__all__) & counterparts
    assert all(row.function == row.kind.lower() for row in ROWS)


@over_rows
def test_flags_are_the_arguments_that_are_no_numbers(row: Row) -> None:
    assert set(row.flags) == {name for name, is_number in arguments(row).items() if not is_number}


@over_rows
def test_numbers_are_the_keys_of_hyper(row: Row) -> None:
    assert set(build(row).hyper) == set(row.numbers)
    named = {name for argument, is_number in arguments(row).items() if is_number for name in numbers_of(row, argument)}
    assert named == set(row.numbers)


def test_the_names_of_pairs_are_given() -> None:
    for argument, names in PAIRS.items():
        assert f"{argument}=({', '.join(names)})" in TEXT


@over_rows
def test_brackets_hold_what_zero_removes(row: Row) -> None:
    for argument, is_number in arguments(row).items():
        for name in numbers_of(row, argument) if is_number else ():
            off = None if name == "eps1" else 0.0
            try:
                left = set(build(row, **{argument: given(row, argument, **{name: off})}).hyper)
            except InvalidArgument:  # zero is outside its domain
                left = set(row.numbers)
            assert set(row.numbers) - left == {member for member, group in row.numbers.items() if group == name}


@over_rows
def test_a_dagger_means_no_value_for_each_element(row: Row) -> None:
    opt, params = build(row), {"w": torch.ones(3, 2)}
    refused = set[str]()
    for name, value in opt.hyper.items():
        hyper = dict(opt.hyper) | {name: {"w": torch.full((3, 2), value)}}
        try:
            opt.update({"w": torch.ones(3, 2)}, opt.init(params), params, hyper)
        except InvalidArgument:
            refused.add(name)
    assert refused == row.whole


@over_rows
def test_state_has_these_fields(row: Row) -> None:
    for variant in state_variants(row):
        found = fields(variant.opt, variant.param)
        assert set(found) == {name for names in row.state.values() for name in names}
        # An absent tensor is an empty tuple.
        present = {name for name, value in found.items() if isinstance(value, Tensor)}
        assert present == {name for word in variant.words for name in row.state.get(word, ())}


def test_fields_without_axes() -> None:
    found = {
        name
        for row in ROWS
        for name, value in fields(build(row), torch.zeros(4, 3)).items()
        if isinstance(value, Tensor) and not value.dim()
    }
    sentence = re.search(r"\*State\*.*?\. (.*?)\s+have\s+no\s+axes", TEXT, re.DOTALL)
    assert sentence is not None
    assert found == set(CODE.findall(sentence.group(1)))


@over_rows
def test_bytes_are_what_init_allocates(row: Row) -> None:
    assert set(row.num_bytes) <= {"", *row.state}
    for variant in state_variants(row):
        tensors = [leaf for leaf in tree.leaves(variant.opt.init({"w": variant.param})) if leaf.dim()]
        assert variant.total(row.num_bytes) * variant.param.numel() == sum(leaf.nbytes for leaf in tensors)


# --- what differs from torch.optim


@over_rows
def test_arguments_are_those_of_torch_optim_but_for_what_is_named(row: Row) -> None:
    ours, theirs = inspect.signature(row.make).parameters, inspect.signature(row.torch_class).parameters
    ignored = {"foreach", "fused", "capturable", "differentiable"}
    assert ignored <= differences()[""]
    differ = {name for name in set(ours) & set(theirs) if ours[name].default != theirs[name].default}
    differ |= set(ours) ^ (set(theirs) - ignored - {"params"})
    assert differ <= differences().get(row.function, set())


@over_rows
def test_states_are_those_of_torch_optim_but_for_what_is_named(row: Row) -> None:
    param = torch.zeros(4, 4, requires_grad=True)
    flags = {"amsgrad": True, "centered": True, "momentum": 0.5, "tolerance_grad": 0.0, "tolerance_change": 0.0}
    known = inspect.signature(row.torch_class).parameters
    theirs: Any = row.torch_class([param], lr=0.1, **{key: value for key, value in flags.items() if key in known})

    def closure() -> Tensor:
        theirs.zero_grad()
        loss = ((param - 1) ** 2).sum()
        loss.backward()
        return loss

    theirs.step(closure)
    opt = build(row, **{name: True for name in row.flags if name in ("amsgrad", "centered")})
    ours = {name for name, value in fields(opt, param).items() if isinstance(value, Tensor)}
    assert ours ^ set(theirs.state[param]) <= differences().get(row.function, set())


def test_what_is_said_to_differ_exists() -> None:
    found = differences()
    assert len(found) > 5
    of_page = {name for row in ROWS for name in (row.function, f"torch.optim.{row.kind}", *itertools.chain(*row.state.values()))}
    for row in ROWS:
        source = inspect.getsource(inspect.getmodule(row.torch_class) or torch.optim)
        for name in found.pop(row.function, set()) - of_page - set(arguments(row)):
            assert re.search(rf"\b{name}\b", source), f"{name} of {row.function}"
    assert set(found) == {""}


# --- the blocks, and the table of errors


# What needs the page's blocks run; they capture a program each.
runs_the_page = pytest.mark.slow


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the page's blocks define, run one after the other as a reader would paste them."""
    namespace: dict[str, Any] = {"__name__": "optimisers"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for line, source in python_blocks(TEXT):
            # The line numbers of a traceback are those of the page.
            exec(compile("\n" * line + source, str(PAGE), "exec"), namespace)
    return namespace


@runs_the_page
def test_every_number_that_requires_grad_is_learned(page: dict[str, Any]) -> None:
    learned = {name: tensors for name, value in page.items() if (tensors := _wanting_grad(value))}
    expected = "lr log_lr by_parameter by_element by_step head_lr body_lr peak gamma width rule max_norm muon_lr strength rates model"
    assert set(learned) == set(expected.split())
    for name, tensors in learned.items():
        for tensor in tensors:
            assert tensor.grad is not None, name
            assert bool(torch.isfinite(tensor.grad).all()) and bool((tensor.grad != 0).any()), name


def _wanting_grad(value: Any) -> list[Tensor]:
    if isinstance(value, nn.Module):
        return list(value.parameters())
    values = value.values() if isinstance(value, dict) else [value]
    return [entry for entry in values if isinstance(entry, Tensor) and entry.requires_grad and entry.is_leaf]


@runs_the_page
@pytest.mark.parametrize(
    ("name", "numbers", "scheduler", "theirs"),
    [
        ("step_lr", {"lr": 0.2, "gamma": 0.5, "step_size": 3.0}, torch.optim.lr_scheduler.StepLR, {"step_size": 3, "gamma": 0.5}),
        ("cosine", {"lr": 0.2, "eta_min": 0.05, "t_max": 12.0}, torch.optim.lr_scheduler.CosineAnnealingLR, {"T_max": 12, "eta_min": 0.05}),
        ("warm_up", {"lr": 0.2, "num_steps": 5.0}, torch.optim.lr_scheduler.LinearLR, {"start_factor": 1 / 5, "total_iters": 4}),
    ],
)
def test_schedules_are_those_of_pytorch(
    page: dict[str, Any],
    name: str,
    numbers: dict[str, float],
    scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler],
    theirs: dict[str, Any],
) -> None:
    params = {"w": torch.zeros((), dtype=torch.float64)}
    opt = optim.sgd(lr=optim.schedule(page[name], **{key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}))
    state = opt.init(params)
    reference = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=numbers["lr"])
    schedule = scheduler(reference, **theirs)
    rates = list[float]()
    for _ in range(12):
        new, state = opt.update({"w": torch.ones((), dtype=torch.float64)}, state, params, opt.hyper)
        rates.append(params["w"].item() - new["w"].item())
        assert rates[-1] == pytest.approx(reference.param_groups[0]["lr"], rel=1e-12)
        params = new
        reference.step()
        schedule.step()
    assert len(set(rates)) > 3


@runs_the_page
@pytest.mark.parametrize(("what", "error", "why"), table("what"), ids=lambda cell: cell.strip("`")[:60])
def test_errors_are_raised(page: dict[str, Any], what: str, error: str, why: str) -> None:
    assert why
    with pytest.raises(errors.AdaptrtError) as raised:
        eval(what.strip("`"), dict(page))
    assert type(raised.value) is getattr(errors, error.strip("`"))
