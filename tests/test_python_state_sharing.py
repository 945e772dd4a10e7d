"""Which object has which name, in which order, and what is not there: a change of these alone is followed, too."""

from __future__ import annotations

import builtins
import collections
import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from test_python_state import Net, assert_follows, assert_follows_a_change, batch, unrolled
from torch import Tensor, nn

from adaptrt.errors import ModelChanged

Case = tuple[nn.Module, Any, Callable[[], object]]
LOW: dict[str, float] = {"scale": 2.0}
HIGH: dict[str, float] = {"scale": 3.0}
CURRENT = LOW


def scaled(scale: Callable[[Any], float]) -> Net:
    """A model that reads a number from objects of the user's in each pass."""
    model = Net(lambda self, x: self.linear(x) * scale(self.kept))
    model.kept = types.SimpleNamespace()
    return model


def with_kept(scale: Callable[[Any], float], change: Callable[[Any], object], **kept: Any) -> Callable[[], Case]:
    def make() -> Case:
        model = scaled(scale)
        vars(model.kept).update(kept)
        return model, F.cross_entropy, lambda: change(model.kept)

    return make


class Preset:
    def __init__(self, scale: float) -> None:
        self.scale = scale


def times(factor: float) -> Callable[[float], float]:
    return lambda value: value * factor


def both(low: Any, high: Any, read: Callable[[Any], float]) -> Callable[[], Case]:
    """Two objects, both of which the model reads, and a third name for the first, then for the second."""
    return with_kept(
        lambda kept: read(kept.active) + 0 * read(kept.low) + 0 * read(kept.high),
        lambda kept: setattr(kept, "active", kept.high),
        low=low,
        high=high,
        active=low,
    )


def two_global_names() -> Case:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) * (CURRENT["scale"] + 0 * LOW["scale"] + 0 * HIGH["scale"])

    globals()["CURRENT"] = LOW
    return Net(lambda self, x: self.linear(x)), loss, lambda: globals().update(CURRENT=HIGH)


def moved(table: Any) -> None:
    first = next(iter(table))
    table[first] = table.pop(first)


def in_turn(functions: Any) -> float:
    value = 1.0
    for function in functions:
        value = function(value)
    return value


def add_one(value: float) -> float:
    return value + 1


def order(kind: Callable[..., Any]) -> Callable[[], Case]:
    return with_kept(lambda kept: in_turn(kept.steps.values()), lambda kept: moved(kept.steps), steps=kind(double=times(2.0), add=add_one))


def doubles(module: Any, args: Any, output: Tensor) -> Tensor:
    return output * 2


def order_of_hooks() -> Case:
    model = Net(lambda self, x: self.linear(x))
    model.linear.register_forward_hook(doubles)
    model.linear.register_forward_hook(lambda module, args, output: output.tanh())
    return model, F.cross_entropy, lambda: moved(model.linear._forward_hooks)


class Scaled(nn.Module):
    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3, dtype=torch.float64)
        self.unused = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale * getattr(self, "later", 1.0)


def another_attribute(name: str) -> Callable[[], Case]:
    def make() -> Case:
        model = Scaled()

        def change() -> None:
            del model.unused
            setattr(model, name, 3.0)

        return model, F.cross_entropy, change

    return make


class OfObject:
    scale = 2.0

    def __init__(self) -> None:
        self.unused = 1


def another_attribute_of_an_object() -> Case:
    model, kept = scaled(lambda kept: kept.scale), OfObject()
    model.kept = kept
    return model, F.cross_entropy, lambda: (delattr(kept, "unused"), setattr(kept, "scale", 3.0))


def another_attribute_of_a_class() -> Case:
    class Derived(OfObject):
        unused_by_all = 1

    model = scaled(lambda kept: kept.scale)
    model.kept = Derived()
    return model, F.cross_entropy, lambda: (delattr(Derived, "unused_by_all"), setattr(Derived, "scale", 3.0))


def renamed(*others: str) -> Callable[[], Case]:
    """An entry that is None gets another name."""
    return with_kept(
        lambda kept: 3.0 if "noise" in kept.options else 2.0,
        lambda kept: (kept.options.pop("dropout"), kept.options.update(noise=None)),
        options={"dropout": None, **dict.fromkeys(others)},
    )


def in_a_scope(source: str, name: str, value: Any) -> Callable[[], Case]:
    def make() -> Case:
        scope: dict[str, Any] = {"F": F}
        exec(source, scope)
        return Net(lambda self, x: self.linear(x)), scope["loss"], lambda: scope.update({name: value})

    return make


LATE = """
def loss(output, target):
    try: scale = LATE
    except NameError: scale = 2.0
    return F.cross_entropy(output, target) * scale
"""
HIDDEN = "def loss(output, target): return F.cross_entropy(output, target) * max(1.0, 2.0)"

CASES: dict[str, Callable[[], Case]] = {
    "another of two objects": both(Preset(2.0), Preset(3.0), lambda preset: preset.scale),
    "another of two lists": both([2.0], [3.0], lambda preset: preset[0]),
    "another of two dicts": both({"scale": 2.0}, {"scale": 3.0}, lambda preset: preset["scale"]),
    "another of two tuples": both(([2.0],), ([3.0],), lambda preset: preset[0][0]),
    "another of two closures": both(times(2.0), times(3.0), lambda preset: preset(1.0)),
    "another of two partials": both(functools.partial(times(2.0)), functools.partial(times(3.0)), lambda preset: preset(1.0)),
    "another of two global dicts": two_global_names,
    "the order of a dict": order(dict),
    "the order of an OrderedDict": order(collections.OrderedDict),
    "the order of hooks": order_of_hooks,
    "an attribute that hides another in the place of a third": another_attribute("scale"),
    "an attribute with a default in the place of another": another_attribute("later"),
    "the same of an object": another_attribute_of_an_object,
    "the same of a class": another_attribute_of_a_class,
    "the only entry, None, renamed": renamed(),
    "one of several entries that are None renamed": renamed("another"),
    "a global name that was not there": in_a_scope(LATE, "LATE", 3.0),
    "a global name that hides a built-in function": in_a_scope(HIDDEN, "max", lambda *values: 3.0),
}


@pytest.mark.parametrize("what", CASES)
def test_a_change_is_followed(what: str) -> None:
    model, loss, change = CASES[what]()
    assert_follows_a_change(model, loss, change)
    assert builtins.max(1.0, 2.0) == 2.0


def moved_layer() -> tuple[nn.Module, Callable[[], object]]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, lambda: model._modules.update({"1": model._modules.pop("1")})


def moved_entry() -> tuple[nn.Module, Callable[[], object]]:
    layers = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Tanh()})
    model = nn.Sequential(collections.OrderedDict(layers=nn.Linear(4, 3))).double()
    model[0].layers = layers
    return model, lambda: layers.update({"a": layers.pop("a")})


@pytest.mark.parametrize("make", [moved_layer, moved_entry])
def test_another_order_of_layers_is_refused_by_name(make: Callable[[], tuple[nn.Module, Callable[[], object]]]) -> None:
    model, change = make()
    unroll = unrolled(model)
    unroll.adapt(batch())
    change()
    with pytest.raises(ModelChanged, match=r"put in another order.*make a new unroll"):
        unroll.adapt(batch())


EQUAL: dict[str, Callable[[], Any]] = {
    "a number of NumPy's": lambda: numpy.float32(2.0),
    "a slice": lambda: slice(0, 2),
    "a partial function": lambda: functools.partial(add_one, value=1.0),
    "a tuple with a list": lambda: ([2.0],),
    "an object": lambda: Preset(2.0),
}


@pytest.mark.parametrize("what", EQUAL)
def test_an_equal_value_makes_no_program(what: str) -> None:
    model = scaled(lambda kept: 2.0 if kept.value is not None else 1.0)
    model.kept.value = EQUAL[what]()
    unroll = unrolled(model)
    assert_follows(unroll, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):  # more than those after which a warning says that programs are made
            model.kept.value = EQUAL[what]()
            assert_follows(unroll, model)
