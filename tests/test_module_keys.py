"""A model that finds something by one of its own modules, or by its `id`: in a dict, or in a set."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import naive
from tests.test_refusals import close, double, looped, unrolled


class Keyed(nn.Module):
    """Its layers' outputs are scaled by what a table has for each of them."""

    def __init__(self, tabled: Callable[[nn.ModuleList], Any], find: Callable[[Any, nn.Module], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)])
        self.table, self.find = tabled(self.layers), find
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * self.find(self.table, layer)
        return x


def scales(layers: nn.ModuleList) -> list[tuple[nn.Module, float]]:
    return [(layer, 1.0 + index) for index, layer in enumerate(layers)]


class Table(dict[Any, Any]):
    """A class of its own."""


CASES: dict[str, tuple[Callable[[nn.ModuleList], Any], Callable[[Any, nn.Module], Any]]] = {
    "a dict": (lambda layers: dict(scales(layers)), lambda table, layer: table[layer]),
    "get": (lambda layers: dict(scales(layers)), lambda table, layer: table.get(layer, 7.0)),
    "an ordered dict": (lambda layers: collections.OrderedDict(scales(layers)), lambda table, layer: table[layer]),
    "a defaultdict": (lambda layers: collections.defaultdict(lambda: 7.0, scales(layers)), lambda table, layer: table[layer]),
    "a class of its own": (lambda layers: Table(scales(layers)), lambda table, layer: table[layer]),
    "pairs": (lambda layers: {(layer, "scale"): value for layer, value in scales(layers)}, lambda table, layer: table[layer, "scale"]),
    "a nested dict": (lambda layers: {"scales": dict(scales(layers))}, lambda table, layer: table["scales"][layer]),
    "methods": (lambda layers: {layer.forward: value for layer, value in scales(layers)}, lambda table, layer: table[layer.forward]),
    "modules by modules": (
        lambda layers: {layer: (nn.Identity() if index else layer, value) for index, (layer, value) in enumerate(scales(layers))},
        lambda table, layer: table[layer][1],
    ),
    "ids": (lambda layers: {id(layer): value for layer, value in scales(layers)}, lambda table, layer: table[id(layer)]),
    "get by id": (lambda layers: {id(layer): value for layer, value in scales(layers)}, lambda table, layer: table.get(id(layer), 7.0)),
    "a set of modules": (lambda layers: {layers[0]}, lambda table, layer: 3.0 if layer in table else 1.0),
    "a set of ids": (lambda layers: {id(layers[0])}, lambda table, layer: 3.0 if id(layer) in table else 1.0),
    "a list of ids": (lambda layers: [id(layers[0])], lambda table, layer: 3.0 if id(layer) in table else 1.0),
    "an id": (lambda layers: id(layers[0]), lambda table, layer: 3.0 if id(layer) == table else 1.0),
    "the order": (lambda layers: dict(reversed(scales(layers))), lambda table, layer: 1.0 + list(table).index(layer)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_dict_whose_keys_are_modules_is_read_as_it_is(name: str) -> None:
    model, batch = Keyed(*CASES[name]), double()
    keys = list(model.table) if hasattr(model.table, "__iter__") else []
    unroll = unrolled(model)
    for _ in range(2):
        found, wanted = unroll(batch, batch), naive.meta_loss(*looped(model), batch, batch)
        # The oracle runs on the model itself, whose keys are its own layers.
        close(found, wanted)
        close(torch.autograd.grad(found, list(model.parameters())), torch.autograd.grad(wanted, list(model.parameters())))
    assert not keys or list(model.table) == keys


def test_a_value_of_such_a_dict_is_followed() -> None:
    model, batch = Keyed(*CASES["a dict"]), double()
    unroll = unrolled(model)
    close(unroll(batch, batch), naive.meta_loss(*looped(model), batch, batch))
    model.table[model.layers[0]] = 5.0
    close(unroll(batch, batch), naive.meta_loss(*looped(model), batch, batch))


class Noting(Keyed):
    """It keeps its last activations in a container, by a name that could be that of any container."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.notes: dict[Any, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        for container in (self.notes,):
            container["last"] = x.detach()
        return super().forward(x)


@pytest.mark.parametrize("name", ["a dict", "ids", "a set of ids", "a set of modules", "pairs"])
def test_such_a_container_is_not_taken_for_one_that_a_pass_has_changed(name: str) -> None:
    model, batch = Noting(*CASES[name]), double()
    close(unrolled(model)(batch, batch), naive.meta_loss(*looped(model), batch, batch))
