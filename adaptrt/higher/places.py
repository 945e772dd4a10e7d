"""Where in a handle's module tree the fast weights go."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from adaptrt.errors import ModelChanged


class Places:
    """The modules of a handle, and which fast weights each of them has as its parameters.

    The modules are numbered in the order of `modules()`.

    Args:
      model: the original. A parameter that several of its modules share is one fast weight.
      handle: a copy of its module tree.

    Attributes:
      num_params: how many fast weights there are.
      modules: the handle's modules, as weak references. The handle has the fast weights; if they held the handle in turn, both would live
        until the next garbage collection.
      of_module: for each module the name of each of its parameters, and which fast weight it is.
      owners: the numbers of the modules that have parameters.
      classes: the classes of the original's modules.
    """

    def __init__(self, model: nn.Module, handle: nn.Module) -> None:
        index = {id(p): i for i, p in enumerate(model.parameters())}
        self.num_params = len(index)
        self.modules = [weakref.ref(part) for part in handle.modules()]
        self.of_module = [[(name, index[id(p)]) for name, p in part._parameters.items() if p is not None] for part in model.modules()]
        self.owners = [number for number, names in enumerate(self.of_module) if names]
        self.classes = [type(part) for part in model.modules()]

    def parts(self) -> list[nn.Module | None]:
        """Returns the handle's modules, with None for one that is no more."""
        return [reference() for reference in self.modules]

    def adopt(self, parts: Mapping[int, nn.Module]) -> None:
        """Makes `parts`, by their numbers, the handle's modules: those of a copied handle."""
        for number, part in parts.items():
            self.modules[number] = weakref.ref(part)

    def show(self, values: Sequence[Tensor]) -> None:
        """Makes `values` the parameters that the handle's modules show.

        Raises:
          ModelChanged: a module of the handle does not have one of its parameters any more.
        """
        for number in self.owners:
            part = self.modules[number]()
            if part is None:
                continue
            for name, _ in self.of_module[number]:
                if name not in part._parameters:
                    raise ModelChanged(
                        f"'{name}' is no parameter of the patched module's {self.classes[number].__name__} any more. Delete parameters and "
                        "register or remove parametrizations, on the original before it is patched"
                    )
            hold(part, self.of_module[number], values)

    def forms(self) -> list[Any]:
        """Returns what may change of the modules without their `__setattr__`: submodules, number of parameters, mode."""
        # By ids, as the handle's modules are not to be held.
        return [
            (tuple(map(id, part._modules.values())), len(part._parameters), part.training)
            for reference in self.modules
            if (part := reference()) is not None
        ]


def hold(module: nn.Module, names: Iterable[tuple[str, int]], values: Sequence[Tensor]) -> None:
    """Makes fast weights the parameters of one module.

    Args:
      module: the module.
      names: the name of each of its parameters, and which fast weight it is.
      values: all fast weights.
    """
    own = vars(module)
    held: dict[str, Any] = own["_parameters"]
    for name, i in names:
        held[name] = values[i]
    flat = own.get("_flat_weights_names")
    if flat is not None:  # recurrent modules keep their weights in a list as well
        own["_flat_weights"] = [getattr(module, name, None) for name in flat]
