"""State that a pass writes by ways that its code does not spell out: it is refused by name and put back, whoever else runs."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from test_python_state import Net, assert_follows, batch, unrolled
from torch import Tensor

from adaptrt.errors import NotTraceable

TABLE: dict[str, Any] = {}
NUMBERS = numpy.zeros(2)


class Record:
    """Keeps its attributes in a dict of its own."""

    def __init__(self, **kept: Any) -> None:
        self.__dict__["kept"] = dict(kept)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["kept"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["kept"][name] = value


class Options:
    def __init__(self, **kept: Any) -> None:
        self.__dict__.update(kept)


def with_state(**kept: Any) -> Callable[[Callable[[Any], float]], Net]:
    """A model with objects of the user's, scaled by what a function makes of them in each pass."""

    def make(step: Callable[[Any], float]) -> Net:
        model = Net(lambda self, x: self.linear(x) * step(self.kept))
        model.kept = types.SimpleNamespace(**kept)
        return model

    return make


def nested(kept: Any) -> float:
    scale = 2.0 if TABLE["inner"]["first"] else 1.0
    TABLE["inner"]["first"] = False
    return scale


def in_each(kept: Any) -> float:
    scale = 2.0 if TABLE["inner"]["first"] else 1.0
    for table in TABLE.values():
        table["first"] = False
    return scale


def counted(kept: Any) -> float:
    TABLE["inner"]["count"] += 1
    return TABLE["inner"]["count"]


def in_a_default(kept: Any, memory: dict[str, bool] = {"first": True}) -> float:  # noqa: B006
    scale = 2.0 if memory["first"] else 1.0
    memory["first"] = False
    return scale


def in_a_record(kept: Any) -> float:
    scale = 2.0 if kept.record.first else 1.0
    kept.record.first = False
    return scale


def unpacked(kept: Any) -> float:
    (values,) = kept.table.values()
    values[0] += 1
    return values[0]


def by_the_class(kept: Any) -> float:
    list.append(kept.items, 1)
    return len(kept.items)


def by_the_class_of_a_dict(kept: Any) -> float:
    dict.update(kept.table, count=kept.table.get("count", 0) + 1)
    return kept.table["count"]


def by_a_method_of_a_name(kept: Any) -> float:
    getattr(kept.items, "append")(1)  # noqa: B009
    return len(kept.items)


def by_a_caller(kept: Any) -> float:
    operator.methodcaller("append", 1)(kept.items)
    return len(kept.items)


def by_an_argument(kept: Any) -> float:
    numpy.add(NUMBERS, 1, out=NUMBERS)
    return float(NUMBERS[0])


def by_a_constructor(kept: Any) -> float:
    scale = 2.0 if kept.options.first else 1.0
    kept.options.__init__(first=False)
    return scale


STEPS: dict[str, tuple[Callable[[Any], float], str]] = {
    "a dict in a dict": (nested, r"TABLE\['inner'\]\.first"),
    "each dict in a dict": (in_each, r"TABLE\['inner'\]\.first"),
    "a counter in a dict in a dict": (counted, r"TABLE\['inner'\]\.count"),
    "a default": (in_a_default, r"__defaults__\[0\]\.first"),
    "an object that keeps its attributes in a dict": (in_a_record, r"record\.kept\.first"),
    "the only value of a dict": (unpacked, r"kept\.table"),
    "by the method of a class": (by_the_class, r"kept\.items"),
    "by the method of the class of a dict": (by_the_class_of_a_dict, r"kept\.table"),
    "by a method that is looked up": (by_a_method_of_a_name, r"kept\.items"),
    "by operator.methodcaller": (by_a_caller, r"kept\.items"),
    "by the argument out": (by_an_argument, r"NUMBERS"),
    "by calling the constructor again": (by_a_constructor, r"options\.first"),
}


def model_of(step: Callable[[Any], float]) -> Net:
    TABLE.clear()
    TABLE.update(inner={"first": True, "count": 0}, other={"first": True})
    NUMBERS[:] = 0
    return with_state(record=Record(first=True), table={"x": [0]}, items=[], options=Options(first=True))(step)


def state_of(model: Net) -> str:
    kept = model.kept
    return repr((TABLE, NUMBERS, kept.record.kept, kept.table, kept.items, vars(kept.options), in_a_default.__defaults__))


@pytest.mark.parametrize("way", STEPS)
def test_state_is_refused_by_name_and_put_back(way: str, company: None) -> None:
    step, pattern = STEPS[way]
    model = model_of(step)
    before = state_of(model)
    unroll = unrolled(model)
    for _ in range(2):
        with pytest.raises(NotTraceable, match=f"({pattern}).*Make it a buffer"):
            unroll.adapt(batch())
        assert state_of(model) == before


def test_a_cache_in_a_dict_in_a_dict_is_allowed_and_emptied(company: None) -> None:
    def forward(self: Net, x: Tensor) -> Tensor:
        table = TABLE["inner"]
        if x.shape not in table:
            table[x.shape] = torch.linspace(1, 2, x.shape[1] - 1, dtype=torch.float64)
        return self.linear(x) * table[x.shape]

    model = model_of(lambda kept: 1.0)
    model.body = forward
    assert_follows(unrolled(model), model)
    assert all(type(value) is not torch._subclasses.FakeTensor for value in TABLE["inner"].values())
