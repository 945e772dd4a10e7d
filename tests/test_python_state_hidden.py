"""Values and state that are reached by unusual ways, and objects that do not answer: followed, refused by name, or left alone."""

from __future__ import annotations

import collections
import dataclasses
import os
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy
import pytest
from test_python_state import Net, assert_follows, assert_follows_a_change, batch, unrolled
from test_python_state_sharing import Case, scaled, with_kept
from torch import Tensor

from adaptrt.errors import NotTraceable


@dataclasses.dataclass
class Weights:
    gain: float = 2.0


class Kind(type):
    gain = 2.0


class OfKind(metaclass=Kind):
    pass


def of_a_metaclass() -> Case:
    Kind.gain = 2.0
    model, loss, _ = with_kept(lambda kept: OfKind.gain, id)()
    return model, loss, lambda: setattr(Kind, "gain", 3.0)


def of_a_view() -> Case:
    table = {"scale": 2.0}
    return *with_kept(lambda kept: sum(kept.view), id, view=table.values())()[:2], lambda: table.update(scale=3.0)


def behind_a_weak_reference() -> Case:
    weights = Weights()
    model, loss, _ = with_kept(lambda kept: kept.to().gain, id, to=weakref.ref(weights))()
    return model, loss, lambda: setattr(weights, "gain", 3.0)


def reshaped(kept: Any) -> None:
    kept.values.shape = (2, 3)


READS: dict[str, Callable[[], Case]] = {
    "dataclasses.astuple": with_kept(
        lambda kept: dataclasses.astuple(kept.weights)[0], lambda kept: setattr(kept.weights, "gain", 3.0), weights=Weights()
    ),
    "dataclasses.asdict": with_kept(
        lambda kept: sum(dataclasses.asdict(kept.weights).values()), lambda kept: setattr(kept.weights, "gain", 3.0), weights=Weights()
    ),
    "dataclasses.fields": with_kept(
        lambda kept: float(len(dataclasses.fields(kept.weights)) + sum(kept.weights.__dict__.values())),
        lambda kept: setattr(kept.weights, "gain", 3.0),
        weights=Weights(),
    ),
    "a format": with_kept(lambda kept: float(f"{kept.weights.gain}"), lambda kept: setattr(kept.weights, "gain", 3.0), weights=Weights()),
    "a view of a dict": of_a_view,
    "a metaclass": of_a_metaclass,
    "the shape of an array": with_kept(lambda kept: float(kept.values.shape[0]), reshaped, values=numpy.arange(6.0)),
    "a weak reference": behind_a_weak_reference,
}


@pytest.mark.parametrize("way", READS)
def test_a_value_is_followed(way: str) -> None:
    model, loss, change = READS[way]()
    assert_follows_a_change(model, loss, change)


def puts_into_a_queue(kept: Any) -> float:
    kept.queue.put(1)
    return float(kept.queue.qsize())


def sets_an_event(kept: Any) -> float:
    scale = 2.0 if kept.event.is_set() else 1.0
    kept.event.set()
    return scale


def counts_by_a_weak_key(kept: Any) -> float:
    kept.table[kept.key] = kept.table.get(kept.key, 0.0) + 1
    return float(kept.table[kept.key])


def counts_behind_a_weak_reference(kept: Any) -> float:
    kept.to().gain += 1
    return kept.to().gain


def counts_in_the_environment(kept: Any) -> float:
    os.environ["ADAPTRT_TEST_OF_STATE"] = str(int(os.environ.get("ADAPTRT_TEST_OF_STATE", "0")) + 1)
    return float(os.environ["ADAPTRT_TEST_OF_STATE"])


WEIGHTS = Weights()
STATE: dict[str, tuple[Callable[[Any], float], str]] = {
    "a queue": (puts_into_a_queue, "queue"),
    "an event": (sets_an_event, "event"),
    "a dict of weak references": (counts_by_a_weak_key, "table"),
    "a weak reference": (counts_behind_a_weak_reference, "gain"),
    "the environment": (counts_in_the_environment, "ADAPTRT_TEST_OF_STATE"),
}


@pytest.mark.parametrize("place", STATE)
def test_state_is_refused_by_name_and_put_back(place: str, company: None, monkeypatch: pytest.MonkeyPatch) -> None:
    step, pattern = STATE[place]
    monkeypatch.delenv("ADAPTRT_TEST_OF_STATE", raising=False)
    model = scaled(step)
    model.kept.queue, model.kept.event, model.kept.key = queue.Queue(), threading.Event(), Weights
    model.kept.table, model.kept.to = weakref.WeakKeyDictionary(), weakref.ref(WEIGHTS)
    with pytest.raises(NotTraceable, match=f"{pattern}.*Make it a buffer"):
        unrolled(model).adapt(batch())
    assert (model.kept.queue.qsize(), model.kept.event.is_set(), len(model.kept.table), WEIGHTS.gain) == (0, False, 0, 2.0)
    assert "ADAPTRT_TEST_OF_STATE" not in os.environ


def counts(self: Net, x: Tensor) -> Tensor:
    self.count += 1
    return self.linear(x)


def multiplies(self: Net, x: Tensor) -> Tensor:
    return self.linear(x) * self.count


@pytest.mark.parametrize("is_read_first", [False, True])
def test_a_counter_that_another_mode_reads_is_refused_by_name(is_read_first: bool) -> None:
    model = Net(lambda self, x: counts(self, x) if self.training else multiplies(self, x))
    model.count = 2
    unroll = unrolled(model)
    model.train(not is_read_first)
    unroll.adapt(batch())
    model.train(is_read_first)
    for _ in range(2):
        with pytest.raises(NotTraceable, match=r"counts up 'count'.*Make it a buffer"):
            unroll.adapt(batch())
    assert model.count == 2


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """A class whose objects refuse to be written to, and which writes to them all the same."""

    base: float
    kept: Any

    def scale(self) -> float:
        if self.kept is None:
            object.__setattr__(self, "kept", self.base * 2)
        return self.__getattribute__("kept")


class Deaf:
    """Refuses every question."""

    __slots__ = ("value",)

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("not now")


class WithoutDict:
    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("not now")


class Key:
    def __repr__(self) -> str:
        raise RuntimeError("not now")


def test_what_a_pass_writes_to_a_frozen_object_is_put_back() -> None:
    model = scaled(lambda kept: kept.frozen.scale())
    model.kept.frozen = Frozen(1.0, None)
    assert_follows(unrolled(model), model)
    model.kept.frozen = Frozen(1.0, None)
    unrolled(model).adapt(batch())
    assert model.kept.frozen.kept is None


SILENT: dict[str, Callable[[], Any]] = {
    "an object that refuses every question": Deaf,
    "an object that has none of its attributes": WithoutDict,
    "a key without a name": lambda: {Key(): 1.0},
    "a key without a name of a list": lambda: {Key(): [1.0]},
    "such an object in a list": lambda: [Deaf()],
    "such an object in a deque": lambda: collections.deque([WithoutDict()]),
}


@pytest.mark.parametrize("what", SILENT)
def test_an_object_that_does_not_answer_and_that_nobody_uses_is_left_alone(what: str) -> None:
    kept = SILENT[what]()
    model = scaled(lambda kept: 2.0 if kept.unused is not None else 1.0)
    model.kept.unused = kept
    assert_follows(unrolled(model), model)
