"""Random programs, with random changes between their calls: each number is that of an eager loop, or what writes is refused by its name."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_python_state import batch
from test_refusals import close, looped, unrolled
from torch import Tensor, nn

from adaptrt import CompiledUnroll
from adaptrt.errors import ModelChanged, NotTraceable
from tests import naive

SCALE = 1.0
TOTAL = [0.0]

Read = Callable[[Tensor], Tensor]
Change = Callable[[int], Any]


class World:
    """The Python state of a program: attributes, a closure, global names, containers in containers, and an object by two names.

    Attributes:
      reads: steps that compute with it, by name.
      writes: steps that change it and compute with what they change, by the name by which it is refused.
      caches: steps that change it, on which nothing depends.
      changes: what a user changes between calls.
      structural: changes of layers, which are refused.
    """

    def __init__(self, model: nn.Module) -> None:
        gain, calls = 1.0, 0
        self.config = types.SimpleNamespace(inner={"scales": [1.0, 2.0], "on": True}, note=None)
        self.one, self.other = types.SimpleNamespace(scale=1.0), types.SimpleNamespace(scale=2.0)
        self.active, self.order = self.one, {"a": 1.0, "b": 2.0}
        self.count, self.notes, self.seen, self.first = 0, {"calls": 0}, [], True
        self.mean: Any = None
        self.cache: dict[Any, Any] = {}
        self.last: Any = None
        config = self.config

        def set_gain(value: float) -> None:
            nonlocal gain
            gain = value

        def count_in_closure(y: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return y * calls

        def total(y: Tensor) -> Tensor:
            TOTAL[0] += 0.5
            return y + TOTAL[0]

        def is_first(y: Tensor) -> Tensor:
            first, self.first = self.first, False
            return y * 2 if first else y

        def running_mean(y: Tensor) -> Tensor:
            value = y.detach().mean()
            self.mean = value if self.mean is None else 0.5 * (self.mean + value)
            return y + self.mean

        def mask(y: Tensor) -> Tensor:
            if len(y) not in self.cache:
                self.cache[len(y)] = torch.linspace(1, 2, 3, dtype=torch.float64)
            return y * self.cache[len(y)]

        self.read_calls = lambda: calls
        self.reads: dict[str, Read] = {
            "closure": lambda y: y * gain,
            "global": lambda y: y * SCALE,
            "nested": lambda y: y * config.inner["scales"][1] if config.inner["on"] else y.sin(),
            "length": lambda y: y * len(config.inner["scales"]),
            "alias": lambda y: y * self.active.scale + self.one.scale,
            "order": lambda y: y * next(iter(self.order.values())),
            "default": lambda y: y * config.inner.get("late", 1.5),
            "presence": lambda y: y * 3.0 if hasattr(config, "late") else y,
            "mode": lambda y: y if model.training else y * 2.0,
            "identity": lambda y: y * 1.5 if self.active is self.one else y,
        }
        self.writes: dict[str, Read] = {
            "count": lambda y: setattr(self, "count", self.count + 1) or y * self.count,
            "notes": lambda y: self.notes.update(calls=self.notes["calls"] + 1) or y * self.notes["calls"],
            "seen": lambda y: self.seen.append(1.0) or y * len(self.seen),
            "calls": count_in_closure,
            "TOTAL": total,
            "first": is_first,
            "mean": running_mean,
        }
        self.caches: dict[str, Read] = {"mask": mask, "record": lambda y: setattr(self, "last", y) or y}
        self.changes: dict[str, Change] = {
            "closure": lambda n: set_gain(1.0 + n),
            "global": lambda n: globals().update(SCALE=1.0 + n),
            "nested": lambda n: config.inner["scales"].__setitem__(1, 2.0 + n),
            "flag": lambda n: config.inner.update(on=n % 2 == 0),
            "append": lambda n: config.inner["scales"].append(1.0 * n),
            "pop": lambda n: config.inner["scales"].pop() if len(config.inner["scales"]) > 2 else None,
            "add": lambda n: config.inner.update(late=2.0 + n),
            "delete": lambda n: config.inner.pop("late", None),
            "set": lambda n: setattr(config, "late", n),
            "unset": lambda n: vars(config).pop("late", None),
            "alias": lambda n: setattr(self, "active", self.other if self.active is self.one else self.one),
            "value of an alias": lambda n: setattr(self.active, "scale", 3.0 + n),
            "order": lambda n: self.order.update(a=self.order.pop("a")),
            "mode": lambda n: model.train(n % 2 == 0),
            "replace": lambda n: setattr(config, "inner", {"scales": [1.0, 3.0 + n], "on": True}),
        }
        self.structural: dict[str, Change] = {
            "a layer": lambda n: setattr(model, "linear", linear(1 + n)),
            "a parameter": lambda n: model.linear.weight.requires_grad_(n % 2 == 0),  # type: ignore[union-attr]
        }

    def state(self) -> str:
        return repr((self.config, self.active, self.order, self.count, self.notes, self.seen, self.first, self.read_calls(), TOTAL, SCALE))


def linear(seed: int) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(4, 3, dtype=torch.float64)


class Program(nn.Module):
    def __init__(self, steps: Sequence[str]) -> None:
        super().__init__()
        self.linear, self.steps = linear(0), steps
        self.world = World(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        known = {**self.world.reads, **self.world.writes, **self.world.caches}
        for step in self.steps:
            y = known[step](y)
        return y


_WORLD = World(nn.Module())
READS, WRITES, CACHES, CHANGES = (sorted(of) for of in (_WORLD.reads, _WORLD.writes, _WORLD.caches, _WORLD.changes))


def params_of(model: nn.Module) -> list[Tensor]:
    return [param for param in model.parameters() if param.requires_grad]


def assert_equal(model: Program, reference: Program, unroll: CompiledUnroll, seed: int) -> None:
    """Meta-loss, meta-gradients, and predictions in both modes, with a gradient in one."""
    support, query = batch(seed), batch(seed + 100)
    loop, start = looped(reference)
    start = start._replace(
        params={name: param for name, param in start.params.items() if param.requires_grad},
        frozen={name: param for name, param in start.params.items() if not param.requires_grad},
    )
    loss, wanted = unroll(support, query), naive.meta_loss(loop, start, support, query)
    close(loss, wanted)
    close(torch.autograd.grad(loss, params_of(model)), torch.autograd.grad(wanted, params_of(reference)))
    adapted, expected = unroll.adapt(support), naive.adapt(loop, start, support)

    def predict() -> tuple[Tensor, Tensor]:
        return adapted(query[0]), naive.call(reference, {**expected.frozen, **expected.params}, {}, query[0])[0]

    found, output = predict()
    close(found, output)
    gradients = [torch.autograd.grad(F.cross_entropy(of, query[1]), params_of(by)) for of, by in ((found, model), (output, reference))]
    close(*gradients)
    for one in (model, reference):
        one.train(not one.training)
    close(*predict())
    for one in (model, reference):
        one.train(not one.training)


def begin() -> None:
    globals()["SCALE"] = 1.0
    TOTAL[:] = [0.0]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*READS, *CACHES]), min_size=1, max_size=4), st.lists(st.sampled_from(CHANGES), min_size=1, max_size=3))
def test_a_program_that_reads_follows_every_change(steps: list[str], changes: list[str]) -> None:
    begin()
    model, reference = Program(steps), Program(steps)
    unroll = unrolled(model)
    assert_equal(model, reference, unroll, 0)
    for n, change in enumerate(changes):
        for one in (model, reference):
            one.world.changes[change](n)
        assert_equal(model, reference, unroll, n)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*READS, *CACHES]), max_size=3), st.lists(st.sampled_from(WRITES), min_size=1, max_size=2), st.randoms())
def test_a_program_that_writes_is_refused_by_name_and_put_back(others: list[str], writes: list[str], random: Any) -> None:
    begin()
    steps = [*others, *writes]
    random.shuffle(steps)
    model = Program(steps)
    before = model.world.state()
    with pytest.raises(NotTraceable) as refused:
        unrolled(model).adapt(batch())
    assert any(re.search(rf"\b{name}[\w.\[\]']* \(", str(refused.value)) for name in writes), str(refused.value)
    assert "buffer" in str(refused.value)
    assert model.world.state() == before and model.world.mean is None


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(READS), max_size=2), st.lists(st.sampled_from(sorted(_WORLD.structural)), min_size=1, max_size=2))
def test_a_change_of_layers_is_refused_and_a_new_unroll_is_right(steps: list[str], changes: list[str]) -> None:
    begin()
    model, reference = Program(steps), Program(steps)
    unroll = unrolled(model)
    assert_equal(model, reference, unroll, 0)
    for n, change in enumerate(changes, start=1):
        before = model.linear, model.linear.weight.requires_grad
        for one in (model, reference):
            one.world.structural[change](n)
        if (model.linear, model.linear.weight.requires_grad) != before:
            with pytest.raises(ModelChanged):
                unroll.adapt(batch())
        unroll = unrolled(model)
        assert_equal(model, reference, unroll, n)
