"""Modules whose parameters are plain tensors that a training loop replaces: fast weights.

`monkeypatch(model)` returns a handle with the model's class, attributes, hooks and submodules. A call runs on a twin of the model that
holds the fast weights as they are at that moment, and keeps them: whatever looks at its modules later, as checkpointing does when it
computes activations again, finds the weights of its own time. What a forward pass leaves in attributes is taken over by the handle.

Known limits: a method other than `forward` that checkpoints parts of the model, called on the handle, finds the latest weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adaptrt.functional import shadow
from adaptrt.higher.utils import copied, get_func_params

_OWN = frozenset({"_parameters", "_modules", "_fast"})
"""Attributes of a handle that are not its twin's."""


class FastWeights:
    """The fast weights of one handle: every version of them, where in the module tree they go, and the twin that holds the last ones."""

    def __init__(self, model: nn.Module, handle: nn.Module) -> None:
        self.versions: list[list[Tensor]] | None = None
        self.track = True
        index = {id(p): i for i, p in enumerate(model.parameters())}
        self.modules = list(handle.modules())
        # For each module the name of each of its parameters, and which fast weight it is. Shared weights have one.
        self.places = [[(name, index[id(p)]) for name, p in part._parameters.items() if p is not None] for part in model.modules()]
        self.classes = [type(part) for part in model.modules()]
        self.number = {id(part): i for i, part in enumerate(self.modules)}
        self.twins: list[nn.Module] | None = None

    @property
    def latest(self) -> list[Tensor] | None:
        return None if self.versions is None else self.versions[-1]

    def put(self, values: Iterable[Tensor]) -> None:
        """Makes `values` the latest: one more version where versions are tracked, else in place of the only one."""
        values = list(values)
        if self.versions is None or self.track:
            self.versions = [*(self.versions or []), values]
        else:
            self.versions[0] = values
            del self.versions[1:]
        self.twins = None

    def show(self) -> None:
        """Lets the handle's modules show the latest as their parameters."""
        latest = self.latest
        if latest is None:
            return
        for part, places in zip(self.modules, self.places, strict=True):
            _hold(part, {name: latest[i] for name, i in places})

    def twin_of(self, part: nn.Module) -> nn.Module:
        """The module that runs in place of a handle's part."""
        if self.twins is None:
            self.twins = self._make_twins()
        return self.twins[self.number[id(part)]]

    def _make_twins(self) -> list[nn.Module]:
        latest = self.latest
        if latest is None:
            raise ValueError("params must be given: the patched module does not hold fast weights of its own")
        twins: list[nn.Module] = [object.__new__(kind) for kind in self.classes]
        for part, twin, places in zip(self.modules, twins, self.places, strict=True):
            own = vars(twin)
            own.update(vars(part))
            del own["_fast"]
            own["_parameters"] = dict(part._parameters)
            own["_modules"] = {name: child if child is None else twins[self.number[id(child)]] for name, child in part._modules.items()}
            _hold(twin, {name: latest[i] for name, i in places})
        return twins

    def take_over(self) -> None:
        """Copies what a forward pass has set on the twins to the handle."""
        for part, twin in zip(self.modules, self.twins or (), strict=False):
            own = vars(part)
            for name, value in vars(twin).items():
                if own.get(name) is not value and name not in _OWN and name != "_flat_weights":
                    own[name] = value


def _hold(module: nn.Module, values: dict[str, Tensor]) -> None:
    module._parameters.update(values)  # type: ignore[arg-type]
    names = vars(module).get("_flat_weights_names")
    if names is not None:  # recurrent modules keep their weights in a list as well
        vars(module)["_flat_weights"] = [getattr(module, name, None) for name in names]


class Patched(nn.Module):
    """What every module of a handle is, besides an instance of its original's class."""

    _fast: FastWeights

    def __call__(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        """What the module returns for these arguments under the latest fast weights, or under `params`, which become the latest."""
        fast = self._fast
        if params is not None:
            fast.put(params)
            fast.show()
        twin = fast.twin_of(self)
        try:
            return twin(*args, **kwargs)
        finally:
            fast.take_over()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__.get("_parameters", ()):
            super().__setattr__(name, value)
            self._fast.twins = None
            return
        if not isinstance(value, Tensor):
            raise TypeError(f"a fast weight must be a tensor, got {torch.typename(value)} for '{name}'")
        fast = self._fast
        if fast.latest is None:
            raise ValueError(f"'{name}' cannot be assigned: the patched module does not hold fast weights of its own")
        index = dict(fast.places[fast.number[id(self)]])[name]
        fast.put([value if i == index else old for i, old in enumerate(fast.latest)])
        fast.show()


class FunctionalModule(Patched):
    """The root of a handle: it has the fast weights."""

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Any]:
        """The fast weights, in the order of the model's parameters.

        Args:
          recurse: there for `nn.Module`'s signature; all are returned in either case.
          time: how many updates after the beginning; None for the latest.
        Raises:
          ValueError: there are none, or an earlier version while `track_higher_grads` is off.
        """
        versions = self._fast.versions
        if versions is None:
            raise ValueError("the patched module does not hold fast weights of its own")
        if not recurse:
            warnings.warn("parameters(recurse=False) of a patched module returns the fast weights of all modules", stacklevel=2)
        if not self.track_higher_grads and time not in (None, -1, 0):
            raise ValueError("only the latest fast weights are kept while track_higher_grads is off")
        return iter(versions[-1 if time is None else time])

    @property
    def init_fast_params(self) -> list[Tensor]:
        """The fast weights of the beginning."""
        if not self.track_higher_grads or self._fast.versions is None:
            raise ValueError("the initial fast weights are kept while track_higher_grads is on only")
        return self._fast.versions[0]

    @property
    def fast_params(self) -> list[Tensor] | None:
        """The latest fast weights. Assigning a list of tensors makes them the latest."""
        return self._fast.latest

    @fast_params.setter
    def fast_params(self, value: Iterable[Tensor]) -> None:
        self._fast.put(value)
        self._fast.show()

    def update_params(self, params: Iterable[Tensor]) -> None:
        """Makes `params` the latest fast weights."""
        self.fast_params = params

    @property
    def track_higher_grads(self) -> bool:
        """Whether earlier fast weights are kept, so that gradients can reach them."""
        return self._fast.track

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"track_higher_grads must be a bool, got {type(value).__name__}")
        self._fast.track = value


def make_functional(module: nn.Module, encapsulator: Callable[[Any, nn.Module], None] | None = None) -> Any:
    """A handle without fast weights: every call needs `params`, or an update before it.

    Args:
      module: left as it is; its tensors are shared until an update replaces them.
      encapsulator: called with the handle and the module before the handle is returned.
    Raises:
      ValueError: the module is a handle already.
    """
    if any(isinstance(part, Patched) for part in module.modules()):
        raise ValueError("the module, or a part of it, is patched already; patch the original")
    handle = shadow(module)
    fast = FastWeights(module, handle)
    for part in fast.modules:
        base = FunctionalModule if part is handle else Patched
        kind = type(part)
        vars(part)["_fast"] = fast
        part.__class__ = type(f"Functional{kind.__name__}", (base, kind), {"__module__": kind.__module__})
    if encapsulator is not None:
        encapsulator(handle, module)
    return handle


def buffer_sync(module: nn.Module, fmodule: nn.Module, device: torch.device | None = None) -> None:
    """Copies the buffers of `module` to `fmodule`, which has the same submodules. A buffer in two places stays one.

    Raises:
      KeyError: `fmodule` lacks a submodule.
    """
    _sync(module, fmodule, device, {})


def _sync(module: nn.Module, fmodule: nn.Module, device: torch.device | None, known: dict[int, Tensor]) -> None:
    for name, value in module._buffers.items():
        if value is not None and id(value) not in known:
            known[id(value)] = copied(value.detach(), device)
        fmodule._buffers[name] = None if value is None else known[id(value)]
    for name, child in module._modules.items():
        if name not in fmodule._modules:
            raise KeyError(f"the patched module has no submodule '{name}'")
        other = fmodule._modules[name]
        if child is not None and other is not None:
            _sync(child, other, device, known)


def monkeypatch(
    module: nn.Module,
    device: torch.device | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> Any:
    """A handle of `module` with fast weights and buffers of its own.

    Args:
      module: left as it is.
      device: where fast weights and buffers go; None leaves them where they are.
      copy_initial_weights: begin with copies that no gradient leaves. False: begin with the module's own weights, as MAML does, so that
        gradients reach `module.parameters()`.
      track_higher_grads: keep every version of the fast weights; False keeps the latest only.
    """

    def encapsulate(handle: Any, original: nn.Module) -> None:
        buffer_sync(original, handle, device)
        if copy_initial_weights:
            handle.update_params(get_func_params(original, device))
        else:
            handle.update_params([p.clone() if device is None else p.clone().to(device) for p in original.parameters()])

    handle = make_functional(module, encapsulate)
    handle.track_higher_grads = track_higher_grads
    return handle
