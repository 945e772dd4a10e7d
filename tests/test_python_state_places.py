"""Places of Python values that are easily missed: a change between calls is followed, or it is refused by name."""

from __future__ import annotations

import array
import collections
import contextlib
import contextvars
import datetime
import functools
import itertools
import logging
import operator
import os
import random
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from test_python_state import Net, assert_follows, batch, unrolled
from torch import Tensor, nn

from adaptrt.errors import NotTraceable
from adaptrt.inner import python_state, snapshot
from adaptrt.inner.executed import Executed, record_code

Change = Callable[[], object]


def scaled(scale: Callable[[], float]) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss that reads a number at each call."""
    return lambda output, target: F.cross_entropy(output, target) * scale()


def plain() -> Net:
    return Net(lambda self, x: self.linear(x))


# --- what a loss reads


def of_a_function() -> tuple[Any, Change]:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) * loss.scale  # type: ignore[attr-defined]

    loss.scale = 2.0  # type: ignore[attr-defined]
    return loss, lambda: setattr(loss, "scale", 3.0)


def of_a_function_of_a_default() -> tuple[Any, Change]:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) * getattr(loss, "scale", 2.0)

    return loss, lambda: setattr(loss, "scale", 3.0)


def behind(wrap: Callable[[Any], Any]) -> Callable[[], tuple[Any, Change]]:
    def make() -> tuple[Any, Change]:
        weights = {"scale": 2.0}
        loss = wrap(lambda output, target: F.cross_entropy(output, target) * weights["scale"])
        return loss, lambda: weights.update(scale=3.0)

    return make


def wrapped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def call(*args: Any) -> Tensor:
        return function(*args)

    return call


def per_example() -> tuple[Any, Change]:
    weights = {"scale": 2.0}
    each = torch.func.vmap(lambda output, target: F.cross_entropy(output, target) * weights["scale"])
    return lambda output, target: each(output, target).mean(), lambda: weights.update(scale=3.0)


def by_a_context_manager() -> tuple[Any, Change]:
    weights = {"scale": 2.0}

    @contextlib.contextmanager
    def scale() -> Iterator[float]:
        yield weights["scale"]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        with scale() as value:
            return F.cross_entropy(output, target) * value

    return loss, lambda: weights.update(scale=3.0)


def by_a_cached_function() -> tuple[Any, Change]:
    weights = {"scale": 2.0}
    scale = functools.lru_cache(lambda: weights["scale"])
    return scaled(scale), lambda: (weights.update(scale=3.0), scale.cache_clear())


def by_another_function_of_a_default() -> tuple[Any, Change]:
    def scale(value: float = 2.0) -> float:
        return value

    return scaled(scale), lambda: setattr(scale, "__defaults__", (3.0,))


def by_other_code() -> tuple[Any, Change]:
    """As tools do that load a file anew."""

    def scale() -> float:
        return 2.0

    return scaled(scale), lambda: setattr(scale, "__code__", (lambda: 3.0).__code__)


def in_a_backward() -> tuple[Any, Change]:
    """As in the reversal of gradients, whose weight is annealed."""
    weights = {"scale": 2.0}

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * weights["scale"]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(Scaled.apply(output), target)

    return loss, lambda: weights.update(scale=3.0)


class Settings:
    """A class of whose objects the attributes are read under computed names."""

    scale_1 = 2.0
    __slots__ = ("__dict__", "later")
    later: float

    def __call__(self) -> float:
        return self.scale_1

    def helper(self) -> float:
        return 2.0


def computed(read: Callable[[Any, int], float]) -> Callable[[], tuple[Any, Change]]:
    def make() -> tuple[Any, Change]:
        kept = types.SimpleNamespace(scale_1=2.0)
        return scaled(lambda: read(kept, 1)), lambda: setattr(kept, "scale_1", 3.0)

    return make


def of_an_object_by_a_getter() -> tuple[Any, Change]:
    kept, get = Settings(), operator.attrgetter("scale_1")
    return scaled(lambda: get(kept)), lambda: setattr(kept, "scale_1", 3.0)


def of_a_slot_that_was_empty() -> tuple[Any, Change]:
    kept = Settings()
    return scaled(lambda: kept.later if hasattr(kept, "later") else 2.0), lambda: setattr(kept, "later", 3.0)


class Kinds:
    """Classes that are derived from those of the standard library."""

    class Dict(dict[str, float]):
        scale = 2.0

    class List(list[float]):
        scale = 2.0

    class Str(str):
        scale = 2.0

    class Float(float):
        scale = 2.0

        def __repr__(self) -> str:
            return "a number"

    class Deque(collections.deque[float]):
        scale = 2.0


def of_a(kind: Callable[[], Any]) -> Callable[[], tuple[Any, Change]]:
    def make() -> tuple[Any, Change]:
        kept = kind()
        return scaled(lambda: kept.scale), lambda: setattr(kept, "scale", 3.0)

    return make


def numbers_in(kept: Callable[[], Any]) -> Callable[[], tuple[Any, Change]]:
    def make() -> tuple[Any, Change]:
        values = kept()
        return scaled(lambda: float(values[1])), lambda: operator.setitem(values, 1, 3)

    return make


def of_an_object_in_an_array() -> tuple[Any, Change]:
    kept = numpy.array([types.SimpleNamespace(scale=2.0)], dtype=object)
    return scaled(lambda: kept[0].scale), lambda: setattr(kept[0], "scale", 3.0)


def of_a_view() -> tuple[Any, Change]:
    weights = {"scale": 2.0}
    view = types.MappingProxyType(weights)
    return scaled(lambda: view["scale"]), lambda: weights.update(scale=3.0)


def by_another_module() -> tuple[Any, Change]:
    scope: dict[str, Any] = {"math": types.SimpleNamespace(pi=2.0)}
    first, second = types.ModuleType("torch.first"), types.ModuleType("torch.second")
    scope["math"], first.pi, second.pi = first, 2.0, 3.0  # type: ignore[attr-defined]
    exec("def scale(): return math.pi", scope)
    return scaled(scope["scale"]), lambda: scope.update(math=second)


def of_another_value(first: Any, second: Any, read: Callable[[Any], float] = float) -> Callable[[], tuple[Any, Change]]:
    def make() -> tuple[Any, Change]:
        kept = {"value": first() if callable(first) else first}
        return scaled(lambda: read(kept["value"])), lambda: kept.update(value=second() if callable(second) else second)

    return make


def by_executed_source() -> tuple[Any, Change]:
    scope: dict[str, Any] = {"F": F, "SCALE": 2.0}
    exec("def loss(output, target): return F.cross_entropy(output, target) * SCALE", scope)
    return scope["loss"], lambda: scope.update(SCALE=3.0)


def by_a_class_in_executed_source() -> tuple[Any, Change]:
    scope: dict[str, Any] = {"F": F}
    exec("class Scale:\n  def __init__(self): self.value = 2.0\nkept = Scale()\ndef scale(): return kept.value", scope)
    return scaled(scope["scale"]), lambda: setattr(scope["kept"], "value", 3.0)


def by_two_functions_of_one_source() -> tuple[Any, Change]:
    scopes: list[dict[str, Any]] = [{"SCALE": 1.0}, {"SCALE": 2.0}]
    for scope in scopes:
        exec("def scale(): return SCALE", scope)
    return scaled(lambda: scopes[0]["scale"]() * scopes[1]["scale"]()), lambda: scopes[1].update(SCALE=3.0)


def by_a_class_of_no_module() -> tuple[Any, Change]:
    kept: Any = type("Scale", (), {"__module__": "a_module_that_was_never_imported", "value": 2.0})()
    return scaled(lambda: kept.value), lambda: setattr(kept, "value", 3.0)


def by_a_global_of_a_computed_name() -> tuple[Any, Change]:
    scope: dict[str, Any] = {"SCALE_1": 2.0}
    exec("def scale(index=1): return globals()['SCALE_' + str(index)]", scope)
    return scaled(scope["scale"]), lambda: scope.update(SCALE_1=3.0)


VARIABLE: contextvars.ContextVar[float] = contextvars.ContextVar("VARIABLE", default=2.0)
LOCAL = threading.local()


def by_a_context_variable() -> tuple[Any, Change]:
    return scaled(VARIABLE.get), lambda: VARIABLE.set(3.0)


def of_a_thread() -> tuple[Any, Change]:
    LOCAL.scale = 2.0
    return scaled(lambda: LOCAL.scale), lambda: setattr(LOCAL, "scale", 3.0)


def by_the_environment() -> tuple[Any, Change]:
    os.environ["SCALE_OF_A_TEST"] = "2.0"
    return scaled(lambda: float(os.environ.get("SCALE_OF_A_TEST", "1"))), lambda: os.environ.update(SCALE_OF_A_TEST="3.0")


def of_a_distribution() -> tuple[Any, Change]:
    kept = torch.distributions.Normal(torch.tensor(2.0), torch.tensor(1.0))
    return scaled(lambda: kept.mean), lambda: setattr(kept, "loc", torch.tensor(3.0))  # type: ignore[arg-type]


def of_an_outer_optimiser() -> tuple[Any, Change]:
    outer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    return scaled(lambda: outer.param_groups[0]["lr"]), lambda: outer.param_groups[0].update(lr=3.0)


def of_a_scheduler() -> tuple[Any, Change]:
    outer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(outer, factor=0.5, total_iters=1)
    return scaled(lambda: float(schedule.get_last_lr()[0])), lambda: (outer.step(), schedule.step())


def of_a_library() -> tuple[Any, Change]:
    log = logging.getLogger("adaptrt.tests.level")
    log.setLevel(20)
    return scaled(lambda: log.level / 10), lambda: log.setLevel(30)


def of_a_long_chain() -> tuple[Any, Change]:
    last = kept = types.SimpleNamespace(next=None, scale=2.0)
    for _ in range(20):
        kept = types.SimpleNamespace(next=kept)

    def scale() -> float:
        found = kept
        while found.next is not None:
            found = found.next
        return found.scale

    return scaled(scale), lambda: setattr(last, "scale", 3.0)


class Teacher(nn.Module):
    """A frozen module that only the loss knows."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale), requires_grad=False)
        self.drop = nn.Dropout(1.0).eval()

    def forward(self) -> Tensor:
        return self.scale + self.drop(torch.ones(()))


def of_another_teacher() -> tuple[Any, Change]:
    kept = {"teacher": Teacher(2.0)}
    return scaled(lambda: kept["teacher"]()), lambda: kept.update(teacher=Teacher(3.0))


def of_a_teacher_with_another_parameter() -> tuple[Any, Change]:
    teacher = Teacher(2.0)
    return scaled(teacher), lambda: setattr(teacher, "scale", nn.Parameter(torch.tensor(3.0), requires_grad=False))


def of_a_teacher_in_another_mode() -> tuple[Any, Change]:
    teacher = Teacher(2.0)
    return scaled(teacher), lambda: teacher.drop.train()


def of_a_descriptor() -> tuple[Any, Change]:
    class Scale:
        value = 2.0

        def __get__(self, owner: Any, kind: Any) -> float:
            return self.value

    class Owner:
        scale = Scale()

    kept = Owner()
    return scaled(lambda: kept.scale), lambda: setattr(vars(Owner)["scale"], "value", 3.0)


READ: dict[str, Callable[[], tuple[Any, Change]]] = {
    "an attribute of a function": of_a_function,
    "an attribute that a function gets later": of_a_function_of_a_default,
    "a closure behind enable_grad": behind(torch.enable_grad()),
    "a closure behind functools.wraps": behind(wrapped),
    "a closure behind a partial": behind(functools.partial),
    "a closure behind vmap": per_example,
    "a closure of a context manager": by_a_context_manager,
    "a closure of a cached function": by_a_cached_function,
    "the default of another function": by_another_function_of_a_default,
    "other code in a function": by_other_code,
    "a name computed for getattr": computed(lambda kept, index: getattr(kept, "scale_" + str(index))),
    "a name computed for vars": computed(lambda kept, index: vars(kept)[f"scale_{index}"]),
    "a name in an attrgetter": of_an_object_by_a_getter,
    "a slot that was empty": of_a_slot_that_was_empty,
    "an attribute of a dict": of_a(Kinds.Dict),
    "an attribute of a list": of_a(Kinds.List),
    "an attribute of a str": of_a(Kinds.Str),
    "an attribute of a float": of_a(Kinds.Float),
    "an attribute of a deque": of_a(Kinds.Deque),
    "an array of the standard library": numbers_in(lambda: array.array("d", [1.0, 2.0])),
    "a bytearray": numbers_in(lambda: bytearray([1, 2])),
    "an object in an array": of_an_object_in_an_array,
    "a UserDict": numbers_in(lambda: collections.UserDict({1: 2.0})),
    "a dict in a mappingproxy": of_a_view,
    "another module under a global name": by_another_module,
    "a number that says it is equal": of_another_value(Kinds.Float(2.0), Kinds.Float(3.0)),
    "an array in the place of another": of_another_value(numpy.array(2.0), numpy.array(3.0)),
    "code that was executed": by_executed_source,
    "a class in code that was executed": by_a_class_in_executed_source,
    "two functions of one source": by_two_functions_of_one_source,
    "a class of no module": by_a_class_of_no_module,
    "a global of a computed name": by_a_global_of_a_computed_name,
    "a context variable": by_a_context_variable,
    "a variable of a thread": of_a_thread,
    "the environment": by_the_environment,
    "a distribution": of_a_distribution,
    "a rate of an outer optimiser": of_an_outer_optimiser,
    "a scheduler": of_a_scheduler,
    "an attribute of an object of a library": of_a_library,
    "a long chain of objects": of_a_long_chain,
    "another teacher": of_another_teacher,
    "a teacher with another parameter": of_a_teacher_with_another_parameter,
    "a teacher in another mode": of_a_teacher_in_another_mode,
    "a descriptor": of_a_descriptor,
    "the backward pass of a function": in_a_backward,
}


@pytest.mark.parametrize("place", READ)
def test_a_loss_follows_what_it_reads(place: str) -> None:
    loss, change = READ[place]()
    model = plain()
    unroll = unrolled(model, loss)
    assert_follows(unroll, model, loss)
    before = unroll.adapt(batch()).params["linear.weight"]
    context = contextvars.copy_context()
    context.run(change)
    context.run(assert_follows, unroll, model, loss)
    assert not torch.equal(context.run(unroll.adapt, batch()).params["linear.weight"], before)


# --- large containers


def entries(number: int) -> list[Any]:
    return [2.0, {"scale": 1.0}, *map(float, range(number))]


LARGE: dict[str, tuple[Callable[[], Any], Callable[[Any], float], Callable[[Any], object]]] = {
    "an entry of a list": (lambda: entries(3000), lambda kept: kept[0], lambda kept: operator.setitem(kept, 0, 3.0)),
    "an equal entry of another type": (
        lambda: [1.0, *range(3000)],
        lambda kept: float(isinstance(kept[0], int)) + 1,
        lambda kept: operator.setitem(kept, 0, 1),
    ),
    "what is in an entry of a list": (lambda: entries(3000), lambda kept: kept[1]["scale"], lambda kept: kept[1].update(scale=3.0)),
    "an entry more": (lambda: entries(3000), lambda kept: len(kept), lambda kept: kept.append(1.0)),
    "an entry of a dict": (
        lambda: dict(enumerate(entries(3000))),
        lambda kept: kept[0],
        lambda kept: kept.update({0: 3.0}),
    ),
    "a key of a dict": (
        lambda: dict.fromkeys(range(3000), 1.0),
        lambda kept: float(max(kept)),
        lambda kept: (kept.pop(2999), kept.update({5000: 1.0})),
    ),
    "an entry of a deque": (lambda: collections.deque(entries(3000)), lambda kept: kept[0], lambda kept: operator.setitem(kept, 0, 3.0)),
    "an entry of a set": (lambda: set(range(3000)), lambda kept: float(max(kept)), lambda kept: kept.add(5000)),
    "an entry of a list that says it is empty": (
        lambda: type("Silent", (list,), {"__len__": lambda self: 0, "__iter__": lambda self: iter(())})([2.0]),
        lambda kept: kept[0],
        lambda kept: operator.setitem(kept, 0, 3.0),
    ),
}


@pytest.mark.parametrize("what", LARGE)
def test_a_large_container_has_one_place(what: str) -> None:
    make, read, change = LARGE[what]
    kept = make()
    model, loss = plain(), scaled(lambda: read(kept))
    unroll = unrolled(model, loss)
    assert_follows(unroll, model, loss)
    before = unroll.adapt(batch()).params["linear.weight"]
    change(kept)
    assert_follows(unroll, model, loss)
    assert not torch.equal(unroll.adapt(batch()).params["linear.weight"], before)
    search = python_state._Search({"loss": loss}, executed_by(lambda: loss(torch.zeros(2, 3), torch.zeros(2).long())), set())
    assert len(search.places) < 30


def executed_by(call: Callable[[], object]) -> Executed:
    executed = Executed()
    with record_code(executed):
        call()
    return executed


def test_very_many_values_are_named_by_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_state, "_MANY_PLACES", 100)
    kept = [[float(index)] for index in range(100)]
    loss = scaled(lambda: 1 + sum(entry[0] for entry in kept))
    with pytest.warns(UserWarning, match=r"Python values are read .* most of them in .*<closure>\.(kept|read)") as caught:
        unrolled(plain(), loss).adapt(batch())
    assert caught[0].filename == __file__


def test_very_many_objects_are_told_by_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_MANY", 100)
    model = plain()
    model.kept = [[float(index)] for index in range(100)]
    with pytest.warns(UserWarning, match="more than 100 Python objects can be reached"):
        unrolled(model).adapt(batch())


# --- code that is replaced


class Layer(nn.Module):
    """Computes by way of methods of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3, dtype=torch.float64)
        self.kept = Settings()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.helper() * self.of_class() * self.static() * self.number * self.kept.helper() * self.kept() * scale()

    def helper(self) -> float:
        return 2.0

    @classmethod
    def of_class(cls) -> float:
        return 2.0

    @staticmethod
    def static() -> float:
        return 2.0

    @property
    def number(self) -> float:
        return 2.0


class Mixin:
    """May get methods that hide those of the other base of a class."""


class Derived(Mixin, Layer):
    """Has all methods of another class."""


def scale() -> float:
    return 2.0


REPLACED: dict[str, tuple[object, str, Any]] = {
    "forward": (Layer, "forward", lambda self, x: self.linear(x)),
    "forward of a derived class": (Derived, "forward", lambda self, x: self.linear(x)),
    "forward of a class of PyTorch's": (nn.Linear, "forward", lambda self, x: F.linear(x, self.weight, 2 * self.bias)),
    "a method": (Layer, "helper", lambda self: 3.0),
    "a method of a derived class": (Derived, "helper", lambda self: 3.0),
    "a method of a base that had none": (Mixin, "helper", lambda self: 3.0),
    "a method of a class": (Layer, "of_class", classmethod(lambda cls: 3.0)),
    "a static method": (Layer, "static", staticmethod(lambda: 3.0)),
    "a property": (Layer, "number", property(lambda self: 3.0)),
    "a method of another object": (Settings, "helper", lambda self: 3.0),
    "a method that is not named": (Settings, "__call__", lambda self: 3.0),
    "a global function": (sys.modules[__name__], "scale", lambda: 3.0),
}


@pytest.mark.parametrize("what", REPLACED)
def test_code_that_is_replaced_is_followed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Derived()
    unroll = unrolled(model)
    assert_follows(unroll, model)
    before = unroll.adapt(batch()).params["linear.weight"]
    monkeypatch.setattr(*REPLACED[what], raising=False)
    assert_follows(unroll, model)
    assert not torch.equal(unroll.adapt(batch()).params["linear.weight"], before)


def test_another_class_of_an_object_is_followed() -> None:
    class Other(Settings):
        __slots__ = ()

        def helper(self) -> float:
            return 3.0

    model = Derived()
    unroll = unrolled(model)
    assert_follows(unroll, model)
    model.kept.__class__ = Other
    assert_follows(unroll, model)


def test_each_thread_has_its_own_values() -> None:
    """Threads that call by turns, each with its own value of a variable, get their own programs."""
    model, loss = plain(), scaled(lambda: LOCAL.scale)
    LOCAL.scale = 2.0
    unroll = unrolled(model, loss)
    assert_follows(unroll, model, loss)
    failed: list[BaseException] = []

    def other() -> None:
        try:
            LOCAL.scale = 3.0
            assert_follows(unroll, model, loss)
        except BaseException as error:
            failed.append(error)

    for _ in range(2):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert_follows(unroll, model, loss)
    assert not failed and len(unroll.explain().adjoints) == 2


def test_literal_names_for_getattr_read_nothing_else() -> None:
    kept = types.SimpleNamespace(scale=2.0, calls=0)
    loss = scaled(lambda: getattr(kept, "scale", 1.0) * hasattr(kept, "scale"))
    model = plain()
    unroll = unrolled(model, loss)
    for calls in range(3):
        kept.calls = calls
        assert_follows(unroll, model, loss)
    assert len(unroll.explain().adjoints) == 1


# --- what is written in places that are easily missed


def counting_function() -> Callable[[], float]:
    def count() -> float:
        count.calls += 1  # type: ignore[attr-defined]
        return count.calls  # type: ignore[attr-defined]

    count.calls = 0  # type: ignore[attr-defined]
    return count


def counting_module() -> Callable[[], float]:
    module = types.ModuleType("a_module_of_a_test")
    scope: dict[str, Any] = {"other": module}
    module.COUNT = 0  # type: ignore[attr-defined]
    exec("def count():\n  other.COUNT += 1\n  return other.COUNT", scope)
    return scope["count"]


def counting_array() -> Callable[[], float]:
    counts = array.array("q", [0])

    def count() -> float:
        counts[0] += 1
        return counts[0]

    return count


def drawing(draw: Callable[[Any], Any], generator: Any) -> Callable[[], float]:
    return lambda: float(draw(generator))


def counting_behind_a_wrapper() -> Callable[[], float]:
    counts = {"calls": 0}

    @torch.no_grad()
    def count() -> float:
        counts["calls"] += 1
        return counts["calls"]

    return count


def going_round() -> Callable[[], float]:
    numbers = itertools.cycle([1.0, 1.0, 1.0, 5.0])
    return lambda: next(numbers)


def appending_by_a_method_at_hand() -> Callable[[], float]:
    counts: list[int] = []
    add, size = counts.append, counts.__len__

    def count() -> float:
        add(1)
        return size()

    return count


def counting_in_a_slot() -> Callable[[], float]:
    kept = Settings()
    kept.later = 0.0

    def count() -> float:
        kept.later += 1
        return kept.later

    return count


WRITTEN: dict[str, tuple[Callable[[], Callable[[], float]], str]] = {
    "an attribute of a function": (counting_function, r"\.calls \(0 before|calls \(1 before"),
    "a name of another module": (counting_module, r"a_module_of_a_test\.COUNT"),
    "an array of the standard library": (counting_array, r"counts"),
    "a generator of NumPy's": (lambda: drawing(lambda rng: rng.normal(), numpy.random.default_rng(0)), r"generator"),
    "a generator of old of NumPy's": (lambda: drawing(lambda rng: rng.normal(), numpy.random.RandomState(0)), r"generator"),
    "a generator of Python's": (lambda: drawing(lambda rng: rng.random(), random.Random(0)), r"generator"),
    "a closure behind no_grad": (counting_behind_a_wrapper, r"calls"),
    "a list that a method at hand appends to": (appending_by_a_method_at_hand, r"<closure>\.add"),
    "a slot": (counting_in_a_slot, r"kept\.later"),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_state_that_a_pass_changes_is_refused_by_name(kind: str) -> None:
    make, pattern = WRITTEN[kind]
    with pytest.raises(NotTraceable, match=f"({pattern}).*Make it a buffer"):
        unrolled(plain(), scaled(make())).adapt(batch())


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python does not tell the position")
def test_a_cycle_of_equal_numbers_is_refused_by_name() -> None:
    with pytest.raises(NotTraceable, match="numbers"):
        unrolled(plain(), scaled(going_round())).adapt(batch())


SOURCES: dict[str, tuple[Callable[[], float], str]] = {
    "a clock": (time.time, r"time\.time"),
    "a clock by a function": (lambda: time.perf_counter() % 7, r"time\.perf_counter"),
    "the date": (lambda: datetime.datetime.now().timestamp(), r"datetime\.now"),
    "random bytes": (lambda: float(os.urandom(4)[0] + 256 * os.urandom(4)[1]), r"urandom"),
    "a generator that is new each time": (lambda: numpy.random.default_rng().normal(), r"urandom"),
    "the system's random numbers": (lambda: random.SystemRandom().random(), r"urandom"),
}


@pytest.mark.parametrize("source", SOURCES)
def test_clocks_and_entropy_are_refused_by_name(source: str) -> None:
    ask, pattern = SOURCES[source]
    with pytest.raises(NotTraceable, match=f"depends on .*{pattern}.*pass the value in"):
        unrolled(plain(), scaled(lambda: ask())).adapt(batch())


def test_a_model_that_only_measures_and_logs_time_works() -> None:
    log = logging.getLogger("adaptrt.tests.time")

    def forward(self: Net, x: Tensor) -> Tensor:
        start = time.perf_counter()
        output = self.linear(x)
        log.warning("took %s s", time.perf_counter() - start)
        return output

    log.propagate, model = False, Net(forward)
    log.addHandler(logging.NullHandler())
    assert_follows(unrolled(model), model)
