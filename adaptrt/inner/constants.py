"""Constants of a graph: tensors that a traced function uses and does not get as arguments.

A program reads each of them at every call, from the module that holds it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from adaptrt.errors import NotTraceable, UnsupportedParameter
from adaptrt.graph.ir import Constant


def constant_reader(value: Tensor, modules: Sequence[nn.Module]) -> Constant:
    """Returns a function that reads a constant: from the modules that hold it as a plain attribute, else the tensor that was captured.

    Raises:
      NotTraceable: it is a parameter or buffer of the modules, reached in a way that capture cannot follow.
      UnsupportedParameter: it requires grad and is no parameter; its gradient would be lost.
    """
    places: list[tuple[nn.Module, str, str]] = []
    for root in modules:
        for name, held in (*root.named_parameters(), *root.named_buffers()):
            if held is value:
                raise NotTraceable(
                    f"'{name}' is used by way of a module that the model holds in a closure or an object of its own; it would keep "
                    "its first value while the model adapts. Register the module as an attribute, or in nn.ModuleList or nn.ModuleDict"
                )
        for path, module in root.named_modules():
            places += [(module, name, f"{path}.{name}".lstrip(".")) for name, held in vars(module).items() if held is value]
    if value.requires_grad:
        what = (
            f"the tensor attribute '{places[0][2]}'"
            if places
            else f"a tensor of shape {list(value.shape)} that the model, the loss or the optimiser uses"
        )
        raise UnsupportedParameter(
            f"{what} requires grad and is no parameter; its gradient would be lost. Make it an nn.Parameter, or in an optimiser one of its "
            "hyperparameters, or detach it"
        )
    if not places:
        return lambda: value

    def read() -> Tensor:
        found = [getattr(module, name) for module, name, _ in places]
        if any(other is not found[0] for other in found):
            names = ", ".join(path for _, _, path in places)
            raise NotTraceable(
                f"the attributes {names} held one tensor when the program was captured, and differ now; compile a new unroll"
            )
        return found[0]

    return read
