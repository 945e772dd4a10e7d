"""Eager, differentiable steps by the arithmetic of `adaptrt.optim`, which is also that of compiled programs.

`OfFamily` keeps weights and state under the names of `torch.optim`, and hands them to the pure optimiser of each group in its own form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from adaptrt.higher.differentiable import DifferentiableOptimizer, Grads
from adaptrt.higher.utils import _recursive_map, settings_of
from adaptrt.higher.watched import number_or_zero
from adaptrt.optim.base import Optimizer
from adaptrt.optim.families import FAMILIES, Group
from adaptrt.optim.sgd import SGDState
from adaptrt.optim.torch_state import of_entry


class _Built(NamedTuple):
    """The pure optimiser of one group.

    Attributes:
      settings: the settings that it was made from.
      optimizer: the pure optimiser.
      fields: by a weight's number of axes the type of its state and the names of the state's fields, with None for a field that is not in
        use. It is filled when a state is first needed.
    """

    settings: dict[str, Any]
    optimizer: Optimizer
    fields: dict[int, tuple[Any, list[str | None]]]


class OfFamily(DifferentiableOptimizer):
    """A differentiable optimiser that steps as a class of `torch.optim` does, by the pure counterpart of that class.

    Attributes:
      kind: the class of `torch.optim`. Subclasses set it.
    """

    kind: type[torch.optim.Optimizer]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._built: list[_Built | None] = [None] * len(self.param_groups)
        device: torch.device | None = kwargs.get("device")
        for i, (group, states) in enumerate(zip(self._followed, self.state, strict=True)):
            held = {str(j): torch.empty_like(group["params"][j], device=device) for j in states}
            if held:
                fresh = self._optimizer(i, group["params"]).optimizer.init(held)
                for name, zeros in fresh.items():
                    entry = states[int(name)]
                    states[int(name)] = _entry(of_entry(entry, name, zeros), entry.get("step") or 0)
                    if "step" in states[int(name)]:  # counted in Python, which spares the tape all that follows from the count alone
                        states[int(name)]["step"] = int(states[int(name)]["step"])

    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        del kwargs
        with torch.set_grad_enabled(self._track_higher_grads and torch.is_grad_enabled()):
            for i, (group, states, grads) in enumerate(zip(self.param_groups, self.state, grouped_grads, strict=True)):
                weights = group["params"]
                built = self._optimizer(i, weights)
                members = [j for j, grad in enumerate(grads) if grad is not None]
                # Where the tape does not hold it anyway, a weight's old state shall be free before the next one's is made.
                for together in [members] if self._track_higher_grads else [[j] for j in members]:
                    _step(built, weights, states, grads, together)

    def _optimizer(self, i: int, weights: Sequence[Tensor]) -> _Built:
        """The pure optimiser of a group. It is made anew when one of the group's settings is another object than before."""
        given, built = self.param_groups[i], self._built[i]
        if built is not None and all(built.settings.get(key) is value for key, value in given.items() if key != "params"):
            return built
        flags = FAMILIES[self.kind].flags
        settings = settings_of(given)
        params = {str(j): p.detach() for j, p in enumerate(weights)}
        readable = {
            key: bool(value) if key in flags and isinstance(value, Tensor) else _recursive_map(value, _readable(params))
            for key, value in settings.items()
        }
        # A list or a tensor may change and stay the same object. Left out here, it makes the comparison above fail at the next step.
        settings = {
            key: value for key, value in settings.items() if not (isinstance(value, list) or (key in flags and isinstance(value, Tensor)))
        }
        optimizer = FAMILIES[self.kind].build(Group("", readable, list(params), self._defaults))
        built = self._built[i] = _Built(settings, optimizer, {})
        return built

    def _entry_for(self, entry: dict[str, Any], group: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
        entry = dict(entry)
        # PyTorch counts in floats of the default dtype, or float32 where that is narrower.
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        if self.kind in (torch.optim.SGD, torch.optim.Muon):  # which count no steps
            entry.pop("step", None)
        for key in {"step", "mu_product"} & set(entry):
            entry[key] = torch.as_tensor(entry[key]).detach().to(dtype)
        if self.kind is torch.optim.ASGD:
            n, lr = entry["step"].to(param.device), group["lr"]
            entry["step"] = n
            entry["eta"] = lr / (1 + group["lambd"] * lr * n) ** group["alpha"]
            entry["mu"] = 1 / torch.clamp(n - group["t0"], min=1.0)
        return entry


def _step(built: _Built, weights: list[Tensor], states: dict[int, dict[str, Any]], grads: Grads, members: Sequence[int]) -> None:
    """Steps some of a group's weights: replaces them and their states."""
    named = [(j, str(j), weights[j], states.get(j) or {}) for j in members]
    params = {name: weight for _, name, weight, _ in named}
    before = {name: _state(built, entry, name, weight) for _, name, weight, entry in named}
    given = {name: cast("Tensor", grads[j]) for j, name, _, _ in named}
    after, new = built.optimizer.update(given, before, params, built.optimizer.hyper)
    for j, name, _, entry in named:
        weights[j] = after[name]
        states[j] = {**entry, **_entry(new[name], entry.get("step", 0) + 1)}


def _readable(params: Mapping[str, Tensor]) -> Callable[[Any], Any]:
    """A function that turns a setting into what `Family.build` takes: a tensor of several elements is given to each parameter."""

    def readable(leaf: Any) -> Any:
        leaf = number_or_zero(leaf)
        if isinstance(leaf, Tensor) and leaf.numel() != 1:
            return {name: leaf.expand_as(p) for name, p in params.items()}
        return leaf

    return readable


def _state(built: _Built, entry: Mapping[str, Any], name: str, weight: Tensor) -> Any:
    """One weight's state in the form that the pure optimiser takes. What belongs to a flag that is now off is left in `entry`."""
    if not entry:
        return _counting(built.optimizer.init({name: weight})[name])
    axes = weight.dim()
    if axes not in built.fields:
        like = built.optimizer.init({"": torch.empty((1,) * axes)})[""]
        used = [None if isinstance(zero, tuple) else key for key, zero in zip(like._fields, like, strict=True)]
        built.fields[axes] = type(like), used
    kind, used = built.fields[axes]
    try:
        return kind(*[() if key is None else entry[key] for key in used])
    except KeyError:  # a flag was turned on
        zeros = _counting(built.optimizer.init({name: weight})[name])
        return zeros if kind is SGDState else of_entry(entry, name, zeros)


def _counting(fresh: Any) -> Any:
    """A state before the first step, with a Python int as its count of steps."""
    return fresh._replace(step=0) if isinstance(getattr(fresh, "step", None), Tensor) else fresh


def _entry(state: Any, step: Any) -> dict[str, Any]:
    """One weight's state under the names that `torch.optim` gives it, after `step` steps."""
    entry = {key: value for key, value in zip(state._fields, state, strict=True) if type(value) is not tuple}
    entry.setdefault("step", step)
    return entry
