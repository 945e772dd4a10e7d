"""Python values that model, loss and optimiser read or write: a call follows them, or is refused; no number is silently old."""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import operator
import re
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt import CompiledUnroll, Replay, compile_unroll, optim
from adaptrt.errors import DataDependentControlFlow, ModelChanged, NotTraceable
from adaptrt.inner import python_state
from adaptrt.optim import Optimizer

LR, K = 0.1, 2
SCALE = 1.0
TABLE: dict[int, Tensor] = {}


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator, dtype=torch.float64), torch.randint(3, (6,), generator=generator)


class Settings:
    """An object of the user's, as a configuration is."""

    def __init__(self) -> None:
        self.temperature = 1.0
        self.is_never_read = 0


class Mode(enum.Enum):
    FAST = 1


class Slotted:
    """An object without a dict of attributes."""

    __slots__ = ("temperature",)

    def __init__(self) -> None:
        self.temperature = 1.0


class Net(nn.Module):
    """Has Python state of every kind for forward functions to use."""

    gain = 2.0
    shared = Settings()

    def __init__(self, forward: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3, dtype=torch.float64)
        self.drop = nn.Dropout(0.0)
        self.body = forward
        self.settings = Settings()
        self.temperature = 1.0
        self.flags: dict[str, Any] = {"on": True, "weights": [1.0, 2.0]}
        self.count = 0
        self.is_ready = False
        self.kept: Any = None
        self.seen: list[Any] = []
        self.table: dict[Any, Any] = {}
        self.slotted = Slotted()
        self.factors = numpy.ones(2)
        self.scales: dict[Any, float] = {Mode.FAST: 1.0, (1, "a"): 1.0, "{0}": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def eager(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """k steps of gradient descent, as anyone would write them."""
    params: dict[str, Tensor] = dict(model.named_parameters())
    for _ in range(K):
        value = loss(torch.func.functional_call(model, params, (data[0],)), data[1])
        grads = torch.autograd.grad(value, list(params.values()))
        params = {name: param - LR * grad for (name, param), grad in zip(params.items(), grads, strict=True)}
    return params


def unrolled(model: nn.Module, loss: Any = F.cross_entropy, **options: Any) -> CompiledUnroll:
    return compile_unroll(model, optim.sgd(lr=LR), K, loss=loss, **{"backend": "eager", **options})


def assert_follows(unroll: CompiledUnroll, model: nn.Module, loss: Any = F.cross_entropy, seed: int = 0) -> None:
    with torch.no_grad():
        found = unroll.adapt(batch(seed)).params
    for name, value in eager(model, loss, batch(seed)).items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def assert_follows_a_change(model: nn.Module, loss: Any, change: Callable[[], object]) -> None:
    """An unroll is right before a change and after it, and the change makes a difference."""
    unroll = unrolled(model, loss)
    assert_follows(unroll, model, loss)
    before = unroll.adapt(batch()).params["linear.weight"]
    change()
    assert_follows(unroll, model, loss)
    assert not torch.equal(unroll.adapt(batch()).params["linear.weight"], before)


# --- what is read


def reads_everything(self: Net, x: Tensor) -> Tensor:
    output = self.linear(x) / self.temperature * self.settings.temperature * self.gain * SCALE
    if self.flags["on"]:
        output = output * self.flags["weights"][1]
    output = output * self.slotted.temperature * float(self.factors[1]) * self.shared.temperature
    return self.drop(output * self.scales[Mode.FAST] * self.scales[1, "a"] * self.scales["{0}"] * self.scales.get("another", 1.0))


CHANGES: dict[str, Callable[[Net, dict[str, float], pytest.MonkeyPatch], object]] = {
    "a float attribute": lambda model, scope, patch: setattr(model, "temperature", 3.0),
    "an int in the place of an equal float": lambda model, scope, patch: setattr(model, "temperature", 1),
    "an attribute of an object": lambda model, scope, patch: setattr(model.settings, "temperature", 3.0),
    "another object": lambda model, scope, patch: setattr(model, "settings", type("Other", (), {"temperature": 5.0})()),
    "an attribute of the class": lambda model, scope, patch: patch.setattr(Net, "gain", 3.0),
    "an attribute that hides that of the class": lambda model, scope, patch: setattr(model, "gain", 3.0),
    "a flag in a dict": lambda model, scope, patch: model.flags.update(on=False),
    "a number in a list in a dict": lambda model, scope, patch: model.flags["weights"].__setitem__(1, 5.0),
    "a global name": lambda model, scope, patch: patch.setitem(globals(), "SCALE", 0.5),
    "an entry of a dict in the closure of the loss": lambda model, scope, patch: scope.update(weight=0.3),
    "an attribute in a slot": lambda model, scope, patch: setattr(model.slotted, "temperature", 3.0),
    "an array of NumPy's": lambda model, scope, patch: model.factors.__setitem__(1, 3.0),
    "an object of the class": lambda model, scope, patch: patch.setattr(Net.shared, "temperature", 3.0),
    "an entry under an enum": lambda model, scope, patch: model.scales.update({Mode.FAST: 3.0}),
    "an entry under a tuple": lambda model, scope, patch: model.scales.update({(1, "a"): 3.0}),
    "an entry under a name with braces": lambda model, scope, patch: model.scales.update({"{0}": 3.0}),
    "an entry that was not there": lambda model, scope, patch: model.scales.update(another=3.0),
    "the probability of dropout": lambda model, scope, patch: setattr(model.drop, "p", 1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_follows_what_is_changed_between_calls(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, scope = Net(reads_everything), {"weight": 1.0}

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) * scope["weight"]

    unroll = unrolled(model, loss)
    assert_follows(unroll, model, loss)
    CHANGES[change](model, scope, monkeypatch)
    assert_follows(unroll, model, loss)


def test_predictions_and_meta_gradients_follow_too() -> None:
    model = Net(lambda self, x: self.linear(x) / self.temperature)
    unroll = unrolled(model, adjoint=Replay())
    adapted = unroll.adapt(batch())
    adapted(batch()[0])
    unroll(batch(), batch(1))
    model.temperature = 4.0
    torch.testing.assert_close(adapted(batch()[0]), torch.func.functional_call(model, dict(adapted.params), (batch()[0],)))
    found = torch.autograd.grad(unroll(batch(), batch(1)), list(model.parameters()))
    expected = torch.autograd.grad(unrolled(model, adjoint=Replay())(batch(), batch(1)), list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_momentum_of_batch_norm_is_followed() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    unroll = unrolled(model)
    for momentum in (0.1, 0.5):
        model[1].momentum = momentum  # type: ignore[assignment]
        found = unroll.adapt(batch()).buffers["1.running_mean"]
        torch.testing.assert_close(found, unrolled(model).adapt(batch()).buffers["1.running_mean"])
    assert len(unroll.explain().adjoints) == 2


def test_a_value_that_comes_back_finds_its_programs() -> None:
    model = Net(reads_everything)
    unroll = unrolled(model)
    for temperature in (1.0, 2.0, 1.0, 2.0):
        model.temperature = temperature
        assert_follows(unroll, model)
    assert len(unroll.explain().adjoints) == 2


def test_a_new_object_with_equal_values_finds_the_programs() -> None:
    model = Net(reads_everything)
    unroll = unrolled(model)
    for _ in range(3):
        model.settings = Settings()
        model.flags = {"on": True, "weights": [1.0, 2.0]}
        assert_follows(unroll, model)
    assert len(unroll.explain().adjoints) == 1


def test_what_is_not_read_makes_no_programs() -> None:
    model = Net(reads_everything)
    unroll = unrolled(model)
    for value in range(3):
        model.settings.is_never_read = value
        model.count = value
        assert_follows(unroll, model)
    assert len(unroll.explain().adjoints) == 1


def test_values_that_keep_coming_are_named_by_one_warning() -> None:
    model = Net(reads_everything)
    unroll = unrolled(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(python_state.MAX_VALUES + 3):
            model.temperature = 1.0 + step
            unroll.adapt(batch())
    (warning,) = [str(entry.message) for entry in caught]
    assert re.search(r"model\.temperature .* Make it a buffer", warning)


def test_an_optimiser_of_ones_own_is_followed() -> None:
    rate = {"scale": 1.0}

    def update(grads: Any, state: Any, params: Any, hyper: Any) -> tuple[dict[str, Tensor], Any]:
        return {name: value - hyper["lr"] * rate["scale"] * grads[name] for name, value in params.items()}, state

    model = Net(lambda self, x: self.linear(x))
    opt = Optimizer(lambda params: (), update, {"lr": LR})
    unroll = compile_unroll(model, opt, K, loss=F.cross_entropy, backend="eager")
    assert_follows(unroll, model)
    rate["scale"] = 0.0
    assert torch.equal(unroll.adapt(batch()).params["linear.weight"], model.linear.weight)


# --- what is written


def counts(self: Net, x: Tensor) -> Tensor:
    self.count += 1
    return self.linear(x) * self.count


def counts_up_to_a_limit(self: Net, x: Tensor) -> Tensor:
    self.count += 1
    return self.linear(x) * (2 if self.count > 3 else 1)


def averages(self: Net, x: Tensor) -> Tensor:
    output = self.linear(x)
    mean = output.mean().detach()
    self.kept = mean if self.kept is None else 0.5 * (self.kept + mean)
    return output * self.kept


def appends(self: Net, x: Tensor) -> Tensor:
    self.seen.append(x.sum())
    return self.linear(x) * len(self.seen)


def counts_in_a_dict(self: Net, x: Tensor) -> Tensor:
    self.table["calls"] = self.table.get("calls", 0) + 1
    return self.linear(x) * self.table["calls"]


def does_otherwise_at_first(self: Net, x: Tensor) -> Tensor:
    output = self.linear(x) * (1 if self.is_ready else 2)
    self.is_ready = True
    return output


def begins_from_data(self: Net, x: Tensor) -> Tensor:
    if self.kept is None:
        self.kept = x.mean()
    return self.linear(x) * self.kept


def counts_in_a_tensor(self: Net, x: Tensor) -> Tensor:
    self.kept = torch.ones((), dtype=torch.float64) if self.kept is None else self.kept + 1
    return self.linear(x) * self.kept


def counts_in_an_object(self: Net, x: Tensor) -> Tensor:
    self.settings.temperature += 1
    return self.linear(x) * self.settings.temperature


def counts_in_a_global(self: Net, x: Tensor) -> Tensor:
    global SCALE
    SCALE += 1
    return self.linear(x) * SCALE


def counting_in_a_closure() -> Callable[[Net, Tensor], Tensor]:
    calls = 0

    def forward(self: Net, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return self.linear(x) * calls

    return forward


def by_an_iterator(numbers: Iterator[int]) -> Callable[[Net, Tensor], Tensor]:
    return lambda self, x: self.linear(x) * next(numbers)


def numbers() -> Iterator[int]:
    number = 0
    while True:
        number += 1
        yield number


def counts_in_a_constant(self: Net, x: Tensor) -> Tensor:
    self.count += 1
    return self.linear(x) * torch.tensor(float(self.count), dtype=torch.float64)


def counts_and_compares(self: Net, x: Tensor) -> Tensor:
    self.count += 1
    return self.linear(x) * (2 if self.count > 3 else 1)


def counts_and_compares_by_a_computed_name(self: Net, x: Tensor) -> Tensor:
    self.count += 1
    return self.linear(x) * (2 if getattr(self, "count"[:5]) > 3 else 1)


def counts_and_compares_by_a_getter(self: Net, x: Tensor) -> Tensor:
    self.count += 1
    return self.linear(x) * (2 if GET_COUNT(self) > 3 else 1)


GET_COUNT = operator.attrgetter("count")


WRITES: dict[str, tuple[Callable[[], Callable[[Net, Tensor], Tensor]], str]] = {
    "a counter": (lambda: counts, r"model\.count \(1 before, 2 after\).*test_python_state\.py:\d+"),
    "a counter in a constant": (lambda: counts_in_a_constant, r"model\.count"),
    "a counter with a limit": (lambda: counts_up_to_a_limit, r"model\.count"),
    "a counter that is compared": (lambda: counts_and_compares, r"model\.count"),
    "a counter that is read by a computed name": (lambda: counts_and_compares_by_a_computed_name, r"model\.count"),
    "a counter that is read by a getter": (lambda: counts_and_compares_by_a_getter, r"model\.count"),
    "an average in an attribute": (lambda: averages, r"model\.kept"),
    "a list": (lambda: appends, r"model\.seen"),
    "a dict": (lambda: counts_in_a_dict, r"model\.table"),
    "a flag": (lambda: does_otherwise_at_first, r"model\.is_ready"),
    "a value from data": (lambda: begins_from_data, r"model\.kept"),
    "a counter in a tensor": (lambda: counts_in_a_tensor, r"model\.kept"),
    "an object": (lambda: counts_in_an_object, r"model\.settings\.temperature"),
    "a global name": (lambda: counts_in_a_global, r"SCALE"),
    "a closure": (counting_in_a_closure, r"forward\.<closure>\.calls"),
    "a generator": (lambda: by_an_iterator(numbers()), r"<closure>\.numbers"),
    "an iterator": (lambda: by_an_iterator(itertools.count(1)), r"<closure>\.numbers"),
}


@pytest.mark.parametrize("kind", WRITES)
def test_state_that_changes_what_is_computed_is_refused_by_name(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    make, pattern = WRITES[kind]
    model = Net(make())
    before = dict(vars(model)), dict(vars(model.settings)), SCALE
    with pytest.raises(NotTraceable, match=f"{pattern}.*Make it a buffer"):
        unrolled(model).adapt(batch())
    assert (dict(vars(model)), dict(vars(model.settings)), SCALE) == before


def test_what_a_pass_wrote_is_undone_where_it_raises() -> None:
    def raises(self: Net, x: Tensor) -> Tensor:
        self.settings.temperature += 1
        return self.linear(x) if x.sum() > 0 else x

    model = Net(raises)
    with pytest.raises(DataDependentControlFlow):
        unrolled(model).adapt(batch())
    assert model.settings.temperature == 1.0


def test_state_of_the_loss_is_refused_by_name() -> None:
    calls = {"n": 0}

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls["n"] += 1
        return F.cross_entropy(output, target) * calls["n"]

    with pytest.raises(NotTraceable, match=r"loss\.<closure>\.calls\.n"):
        unrolled(Net(lambda self, x: self.linear(x)), loss).adapt(batch())
    assert calls == {"n": 0}


def test_state_in_a_prediction_is_refused_by_name() -> None:
    model = Net(lambda self, x: self.linear(x) if self.training else counts(self, x))
    adapted = unrolled(model).adapt(batch())
    model.eval()
    with pytest.raises(NotTraceable, match=r"model\.count"):
        adapted(batch()[0])


def keeps_for_others(self: Net, x: Tensor) -> Tensor:
    output = self.linear(x)
    self.kept = output.softmax(-1)
    self.count = x.shape[0]
    return output


def counts_what_nobody_reads(self: Net, x: Tensor) -> Tensor:
    self.count += 1
    self.settings.is_never_read += 2
    return self.linear(x)


def builds_a_mask_once(self: Net, x: Tensor) -> Tensor:
    if self.kept is None or self.count < x.shape[0]:
        self.count = x.shape[0]
        self.kept = torch.cos(torch.arange(self.count, dtype=torch.float64))
    return self.linear(x) * self.kept[: x.shape[0], None]


def keeps_by_length(self: Net, x: Tensor) -> Tensor:
    if x.shape[0] not in self.table:
        self.table[x.shape[0]] = torch.linspace(1, 2, 3, dtype=torch.float64)
    return self.linear(x) * self.table[x.shape[0]]


def keeps_in_a_global(self: Net, x: Tensor) -> Tensor:
    if x.shape[0] not in TABLE:
        TABLE[x.shape[0]] = torch.linspace(1, 2, 3, dtype=torch.float64)
    return self.linear(x) * TABLE[x.shape[0]]


@functools.lru_cache
def positions(length: int) -> Tensor:
    return torch.linspace(1, 2, length, dtype=torch.float64)


def uses_lru_cache(self: Net, x: Tensor) -> Tensor:
    return self.linear(x) * positions(3)


def collects_features(self: Net, x: Tensor) -> Tensor:
    self.seen = []
    output = self.linear(x)
    self.seen.append(output)
    return output + self.seen[0]


def keeps_beside_a_constant(self: Net, x: Tensor) -> Tensor:
    self.kept = self.linear(x) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    return self.kept


class MadeAtEachLookUp(dict[str, Any]):
    """Makes an object of the class that it holds, as registries of activation functions do."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


REGISTRY = MadeAtEachLookUp(tanh=nn.Tanh)


def looks_up(self: Net, x: Tensor) -> Tensor:
    return self.linear(x) + REGISTRY["tanh"](self.linear(x))


def test_dicts_that_make_their_values_stay_as_they_are() -> None:
    unroll = unrolled(Net(looks_up))
    for _ in range(2):
        unroll.adapt(batch())
    assert REGISTRY.get("tanh") is nn.Tanh


CACHES = [
    keeps_beside_a_constant,
    counts_what_nobody_reads,
    keeps_for_others,
    builds_a_mask_once,
    keeps_by_length,
    keeps_in_a_global,
    uses_lru_cache,
    collects_features,
]


@pytest.mark.parametrize(
    ("forward", "backend"), [*((forward, "eager") for forward in CACHES), (builds_a_mask_once, "inductor"), (collects_features, "inductor")]
)
def test_caches_and_records_keep_working(forward: Callable[[Net, Tensor], Tensor], backend: str) -> None:
    model = Net(forward)
    unroll = unrolled(model, backend=backend)
    adapted = unroll.adapt(batch())
    assert not any(isinstance(value, Tensor) for value in (*TABLE.values(), *vars(model).values(), *model.table.values()))
    assert positions.cache_info().currsize == 0
    assert_follows(unroll, model)
    torch.testing.assert_close(adapted(batch()[0]), torch.func.functional_call(model, dict(adapted.params), (batch()[0],)))
    assert type(positions(3)) is Tensor
    TABLE.clear()
    positions.cache_clear()


# --- layers


LAYERS: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    "replaced": (lambda model: model.__setitem__(2, nn.Linear(5, 3)), r"the layer 'model\.2' was replaced by a Linear"),
    "added": (lambda model: model.append(nn.Linear(3, 3)), r"the layer 'model\.3' was added"),
    "removed": (lambda model: model.__delitem__(2), r"the layer 'model\.2' was removed"),
    "a parameter added": (lambda model: model[0].register_parameter("extra", nn.Parameter(torch.ones(2))), r"parameter 'model\.0\.extra'"),
    "a buffer removed": (lambda model: model[1].__delattr__("running_mean"), r"buffer 'model\.1\.running_mean' was removed"),
}


@pytest.mark.parametrize("change", LAYERS)
def test_other_layers_than_before_are_refused_by_name(change: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    unroll = unrolled(model)
    adapted = unroll.adapt(batch())
    LAYERS[change][0](model)
    for call in (lambda: unroll.adapt(batch()), lambda: unroll(batch(), batch()), lambda: adapted(batch()[0])):
        with pytest.raises(ModelChanged, match=f"{LAYERS[change][1]}.* make a new unroll"):
            call()


def test_tied_weights_that_are_made_two_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    model[1].weight = model[0].weight
    unroll = unrolled(model)
    unroll.adapt(batch())
    model[0].weight = model[1].weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))  # still one
    unroll.adapt(batch())
    model[1].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(ModelChanged, match=r"'model\.1\.weight' and 'model\.0\.weight', which were one tensor"):
        unroll.adapt(batch())


def test_another_tensor_as_a_parameter_is_followed() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    unroll = unrolled(model)
    unroll.adapt(batch())
    model[0].weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    assert_follows(unroll, model)


def test_a_change_of_what_adapts_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    unroll, explicit = unrolled(model), unrolled(model, params="*")
    unroll.adapt(batch())
    model[0].weight.requires_grad_(False)
    with pytest.raises(ModelChanged, match=r"requires_grad of parameter '0\.weight' .* params="):
        unroll.adapt(batch())
    explicit.adapt(batch())
    model[0].weight.requires_grad_()
    unroll.adapt(batch())


# --- kinds that are easily missed


@dataclasses.dataclass(slots=True)
class Slots:
    scale: float = 2.0


class Global:
    """A class that is a namespace of settings."""

    scale = 2.0
    table = Settings()


class Color(enum.Enum):
    RED = 1


def reads(self: Net, x: Tensor) -> Tensor:
    return self.linear(x) * self.table["read"](self.kept)


PLACES: dict[str, tuple[Callable[[], Any], Callable[[Any], float], Callable[[Any], object]]] = {
    "an object with slots": (Slots, lambda kept: kept.scale, lambda kept: setattr(kept, "scale", 3.0)),
    "a SimpleNamespace": (lambda: types.SimpleNamespace(scale=2.0), lambda kept: kept.scale, lambda kept: setattr(kept, "scale", 3.0)),
    "a key that is an enum": (lambda: {Color.RED: 2.0}, lambda kept: kept[Color.RED], lambda kept: kept.update({Color.RED: 3.0})),
    "a key that is a tuple": (lambda: {(0, 1): 2.0}, lambda kept: kept[0, 1], lambda kept: kept.update({(0, 1): 3.0})),
    "a key with braces": (lambda: {"{x}": 2.0}, lambda kept: kept["{x}"], lambda kept: kept.update({"{x}": 3.0})),
}


@pytest.mark.parametrize("place", PLACES)
def test_values_are_found_in(place: str) -> None:
    make, read, change = PLACES[place]
    model = Net(reads)
    model.kept, model.table = make(), {"read": read}
    unroll = unrolled(model)
    assert_follows(unroll, model)
    change(model.kept)
    assert_follows(unroll, model)


def test_attributes_of_a_global_class_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(lambda self, x: self.linear(x) * Global.scale * Global.table.temperature)
    unroll = unrolled(model)
    assert_follows(unroll, model)
    monkeypatch.setattr(Global, "scale", 3.0)
    assert_follows(unroll, model)
    monkeypatch.setattr(Global.table, "temperature", 5.0)
    assert_follows(unroll, model)


def test_a_first_hook_and_a_forward_of_its_own_are_followed() -> None:
    model = Net(lambda self, x: self.linear(x))
    unroll = unrolled(model)
    assert_follows(unroll, model)
    model.linear.register_forward_hook(lambda module, args, output: output.mul(3.0))
    assert_follows(unroll, model)
    model.linear.forward = types.MethodType(lambda self, x: 2 * F.linear(x, self.weight, self.bias), model.linear)  # type: ignore[method-assign]
    assert_follows(unroll, model)


def test_equal_containers_make_no_programs() -> None:
    model = Net(lambda self, x: self.linear(x) * self.seen[0] * self.kept[0] * max(self.table["set"]) * self.temperature)
    model.table = {"set": {1.0}}
    unroll = unrolled(model)
    for step in range(6):
        model.seen, model.kept, model.temperature = [2.0], tuple([1.0, (2.0,)]), 1.0 + step % 2
        assert_follows(unroll, model)
    assert len(unroll.explain().adjoints) == 2


def test_a_class_counter_is_refused_and_put_back() -> None:
    def counted(self: Net, x: Tensor) -> Tensor:
        Global.scale += 1.0
        return self.linear(x) * Global.scale

    with pytest.raises(NotTraceable, match=r"Global\.scale"):
        unrolled(Net(counted)).adapt(batch())
    assert Global.scale == 2.0


def test_a_record_beside_a_literal_is_allowed() -> None:
    def recorded(self: Net, x: Tensor) -> Tensor:
        self.kept = self.linear(x)
        return self.kept * torch.tensor(2.0)

    model = Net(recorded)
    assert_follows(unrolled(model), model)


OTHER = 0


def count_others() -> None:
    global OTHER
    OTHER += 1


def test_what_other_threads_do_meanwhile_stays() -> None:
    """The model is traced; another thread sets its mode and an attribute, and a global name of the module of its code."""
    before = OTHER

    def slow(self: Net, x: Tensor) -> Tensor:
        other = threading.Thread(target=change)
        other.start()
        other.join()
        return self.linear(x)

    model = Net(slow)

    def change() -> None:
        model.eval()
        model.note = "set meanwhile"  # type: ignore[assignment]
        count_others()

    with pytest.raises(ModelChanged):  # the mode is part of what the program is for
        unrolled(model).adapt(batch())
    assert not model.training and model.note == "set meanwhile" and before + 2 <= OTHER


def test_a_buffer_that_was_none_is_refused_by_name() -> None:
    model = Net(lambda self, x: self.linear(x))
    model.register_buffer("scale", None)
    unroll = unrolled(model)
    unroll.adapt(batch())
    model.scale = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ModelChanged, match=r"model\.scale.* was set to a Tensor"):
        unroll.adapt(batch())


def test_a_program_that_is_captured_late_does_not_take_later_values() -> None:
    model = Net(lambda self, x: self.linear(x) / self.temperature)
    unroll = unrolled(model, adjoint=Replay())
    adapted = unroll.adapt(batch())
    model.temperature = 7.0
    with pytest.raises(ModelChanged, match=r"between a call and its first backward\(\)"):
        adapted.losses.sum().backward()
    model.temperature = 1.0
    found = torch.autograd.grad(unroll.adapt(batch()).losses.sum(), list(model.parameters()))
    expected = torch.autograd.grad(unrolled(model, adjoint=Replay()).adapt(batch()).losses.sum(), list(model.parameters()))
    assert all(map(torch.equal, found, expected))
