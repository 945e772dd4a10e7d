"""Parameters and modules that are added to a handle, replaced or frozen after steps, as libraries of adapters do.

What is added keeps weights of its own, which are leaves of the graph. What takes the place of a fast weight is one from then on. Where
neither is possible, the error has a name.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptrt.errors import AdaptrtError, CannotBePickled, ModelChanged, NotALeaf
from tests.higher_cases import adapted_by_hand, adapted_by_handle, assert_same, batch, make, ours

pytestmark = pytest.mark.usefixtures("double")

LR = 0.3


class Adapted(nn.Module):
    """A layer with any number of adapters, of which one is active."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.low, self.high = nn.ModuleDict(), nn.ModuleDict()
        self.active: str | None = None

    def update_layer(self, name: str) -> None:
        self.low[name] = nn.Linear(self.base_layer.in_features, 2, bias=False)
        self.high[name] = nn.Linear(2, self.base_layer.out_features, bias=False)

    def set_adapter(self, name: str | None) -> None:
        """Chooses the active adapter, and freezes the others if they are leaves."""
        self.active = name
        for table in (self.low, self.high):
            for key, part in table.items():
                for p in part.parameters():
                    if p.is_leaf:
                        p.requires_grad_(key == name)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y if self.active is None else y + self.high[self.active](self.low[self.active](x))


class Model(nn.Module):
    def __init__(self, *adapters: str) -> None:
        super().__init__()
        self.first, self.last = Adapted(nn.Linear(3, 4)), Adapted(nn.Linear(4, 2))
        for name in adapters:
            self.add_adapter(name)
        self.requires_grad_(True)

    def layers(self) -> list[Adapted]:
        return [part for part in self.modules() if isinstance(part, Adapted)]

    def add_adapter(self, name: str) -> None:
        """Adds an adapter, and then gives the parameters that were there before their flags back."""
        flags = [(p, p.requires_grad) for p in self.parameters()]
        for layer in self.layers():
            layer.update_layer(name)
        for p, flag in flags:
            p.requires_grad = flag

    def set_adapter(self, name: str | None) -> None:
        for layer in self.layers():
            layer.set_adapter(name)

    def freezing(self) -> Any:
        yield 1
        self.first.base_layer.weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def built(*adapters: str) -> Any:
    torch.manual_seed(3)
    return Model(*adapters)


def switched(model: Any, x: Tensor) -> Tensor:
    """A loss that uses both adapters and none."""
    losses = []
    for name in ("a", None, "b", "a"):
        model.set_adapter(name)
        losses.append(model(x).square().mean())
    return losses[0] + 2 * losses[1] + 3 * losses[2] * losses[3]


def test_adapters_of_the_original_are_switched_between_steps() -> None:
    mine, wanted = adapted_by_handle(built("a", "b"), switched), adapted_by_hand(built("a", "b"), switched)
    assert_same(mine, wanted)
    assert all(bool(grad.any()) for grad in mine[1:])


@pytest.mark.parametrize("which", [lambda handle: handle, lambda handle: handle.first])
def test_a_handle_that_is_to_be_pickled_is_refused(which: Callable[[Any], Any]) -> None:
    """What the message advises works."""
    handle, _ = stepped(built("a"))
    with pytest.raises(CannotBePickled, match=r"save its state_dict\(\)"):
        pickle.dumps(which(handle))
    other = built("a")
    other.load_state_dict(pickle.loads(pickle.dumps(handle.state_dict())))
    assert_same([other(batch(1)[0])], [handle(batch(1)[0])], 1e-14)


# --- what is added


def stepped(net: nn.Module, steps: int = 1, copied: bool = False) -> tuple[Any, Any]:
    opt = torch.optim.SGD(net.parameters(), lr=LR)
    handle, diffopt = ours.innerloop_ctx(net, opt, copy_initial_weights=copied).__enter__()
    for step in range(steps):
        diffopt.step(handle(batch(step)[0]).square().mean())
    return handle, diffopt


def linear(seed: int, inputs: int, outputs: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs)


def add_a_module(handle: Any) -> list[Tensor]:
    """As `update_layer` does: into a table of a part."""
    for layer in handle.layers():
        torch.manual_seed(5)
        layer.update_layer("new")
        layer.active = "new"
    return [p for name, p in handle.named_parameters() if ".new." in name]


def add_a_wrapper(handle: Any) -> list[Tensor]:
    """In the place of a part, with the part inside."""
    base = handle.first
    handle.first = nn.Sequential(linear(5, 3, 3), base)
    return list(handle.first[0].parameters())


def replace_a_part(handle: Any) -> list[Tensor]:
    handle.last = linear(5, 4, 2)
    return list(handle.last.parameters())


CHANGES: list[Callable[[Any], list[Tensor]]] = [add_a_module, add_a_wrapper, replace_a_part]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_added_after_a_step_joins_as_leaves(change: Callable[[Any], list[Tensor]]) -> None:
    """The steps go on with the fast weights, and gradients reach the new parameters."""
    x = batch(9)[0]
    net = built()
    handle, diffopt = stepped(net)
    handle(x)
    new = change(handle)
    assert new and all(p.is_leaf and p.requires_grad for p in new)
    for step in (1, 2):
        diffopt.step(handle(batch(step)[0]).square().mean())
    loss = handle(x).square().mean()
    mine = [loss, *torch.autograd.grad(loss, [*net.parameters(), *new])]

    weights = dict(net.named_parameters())
    changed = built()
    before = {id(p): name for name, p in changed.named_parameters()}

    def loss_of(x: Tensor) -> Tensor:
        named = {name: weights[before[id(p)]] if id(p) in before else p for name, p in changed.named_parameters()}
        return torch.func.functional_call(changed, named, (x,)).square().mean()

    added: list[Tensor] = []
    for step in range(3):
        if step == 1:
            added = change(changed)
        grads = torch.autograd.grad(loss_of(batch(step)[0]), list(weights.values()), create_graph=True, allow_unused=True)
        weights = {name: p if g is None else p - LR * g for (name, p), g in zip(weights.items(), grads, strict=True)}
    wanted = loss_of(x)
    assert_same(mine, [wanted, *torch.autograd.grad(wanted, [*net.parameters(), *added])])
    assert all(torch.equal(p, q) for p, q in zip(new, added, strict=True)), "they keep their weights"


# --- what takes the place of a fast weight


def assign(layer: Any, value: nn.Parameter) -> None:
    layer.weight = value


def register(layer: Any, value: nn.Parameter) -> None:
    layer.register_parameter("weight", value)


def delete_and_register(layer: Any, value: nn.Parameter) -> None:
    """As adapters of attention do around a forward pass."""
    del layer.weight
    layer.register_parameter("weight", value)


def delete_and_assign(layer: Any, value: nn.Parameter) -> None:
    del layer.weight
    layer.weight = value


@pytest.mark.parametrize("replace", [assign, register, delete_and_register, delete_and_assign])
@pytest.mark.parametrize("called", [True, False])
def test_a_parameter_in_the_place_of_a_fast_weight_is_one(replace: Callable[[Any, nn.Parameter], None], called: bool) -> None:
    """It is stepped from then on, and nothing goes on with the weight that it replaces."""
    x = batch(9)[0]
    net: Any = make("mlp")
    handle, diffopt = stepped(net)
    before = list(handle.parameters())
    if called:
        handle(x)
    value = nn.Parameter(torch.randn(5, 3))
    replace(handle[0], value)
    assert handle[0].weight is value and next(handle.parameters()) is value
    now = [value, *before[1:]]
    for step in range(2):
        diffopt.step(handle(batch(step)[0]).square().mean())
        loss = functional(now, batch(step)[0]).square().mean()
        now = [p - LR * g for p, g in zip(now, torch.autograd.grad(loss, now, create_graph=True), strict=True)]
    mine, wanted = handle(x).square().mean(), functional(now, x).square().mean()
    sources = [value, *net.parameters()]
    assert_same([mine, *torch.autograd.grad(mine, sources, retain_graph=True)], [wanted, *torch.autograd.grad(wanted, sources)])


def functional(weights: list[Tensor], x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, *weights[:2])), *weights[2:])


def test_a_parameter_that_is_gone_is_refused_by_name() -> None:
    handle, _ = stepped(make("mlp"))
    del handle[0].weight
    with pytest.raises(ModelChanged, match="'weight' is no parameter of the patched module's Linear any more"):
        handle(batch(1)[0])
    with pytest.raises(TypeError, match="must be a tensor, got NoneType"):
        handle[2].register_parameter("weight", None)


# --- what is frozen


ADVICE = r"Add adapters .* on the original.*detach\(\)"
REFUSED: dict[str, Callable[[Any], Any]] = {
    "an adapter added by a method": lambda handle: handle.add_adapter("c"),
    "a module": lambda handle: handle.requires_grad_(False),
    "a part": lambda handle: handle.first.base_layer.requires_grad_(False),
    "a generator": lambda handle: list(handle.freezing()),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("steps", [0, 2])
def test_flags_of_computed_weights_are_refused_by_name(name: str, steps: int) -> None:
    """PyTorch's own error says nothing of handles."""
    handle, _ = stepped(built("a"), steps)
    with pytest.raises(NotALeaf, match=ADVICE) as caught:
        REFUSED[name](handle)
    assert isinstance(caught.value, AdaptrtError) and isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("name", REFUSED)
def test_flags_of_leaves_are_set(name: str) -> None:
    """Before the first step, where the initial weights were copied."""
    handle, diffopt = stepped(built("a"), 0, copied=True)
    before = list(handle.parameters())
    REFUSED[name](handle)
    frozen = [not p.requires_grad for p in before]
    assert any(frozen) == (name != "an adapter added by a method")
    if all(frozen):
        return
    handle.set_adapter("a")
    diffopt.step(handle(batch(1)[0]).square().mean())
    assert [p is q for p, q in zip(before, handle.parameters(), strict=True)] == frozen


def test_a_weight_is_frozen_by_an_assignment() -> None:
    """As the error advises."""
    handle, diffopt = stepped(make("mlp"))
    handle[0].weight = fixed = handle[0].weight.detach()
    before = list(handle.parameters())
    diffopt.step(handle(batch(1)[0]).square().mean())
    assert [p is q for p, q in zip(before, handle.parameters(), strict=True)] == [True, False, False, False]
    assert handle[0].weight is fixed


def test_other_errors_of_methods_are_their_own() -> None:
    class Failing(nn.Linear):
        def fail(self) -> None:
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match=r"^something else$") as caught:
        ours.monkeypatch(Failing(2, 2)).fail()  # pyright: ignore[reportCallIssue]
    assert type(caught.value) is RuntimeError
