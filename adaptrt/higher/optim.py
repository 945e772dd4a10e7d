"""Optimisers that write their steps on autograd's tape, one call of `step(loss)` at a time.

Their arithmetic is that of `adaptrt.optim`, as in compiled programs.
"""

from __future__ import annotations

import abc
import collections
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from adaptrt.errors import UnsupportedOptimizer
from adaptrt.higher.registered import RegisteredSource, number_or_zero
from adaptrt.higher.utils import _recursive_map, copied, flatten, settings_of
from adaptrt.optim.base import Optimizer
from adaptrt.optim.convert import of_entry
from adaptrt.optim.families import ALIASES, FAMILIES, Group
from adaptrt.optim.sgd import SGDState
from adaptrt.optim.source import register

Grads = Sequence[Tensor | None]
Override = Mapping[str, Sequence[Any]]
GradCallback = Callable[[Any], Any]


class DifferentiableOptimizer(abc.ABC):
    """A `torch.optim` instance's groups and state, stepped out of place so that gradients flow through the steps.

    Args:
      other: where groups and state are copied from. A rate that a scheduler changes in it later is followed, unless overridden.
      reference_params: the model's parameters, in the order of fast weights and of `grad_callback`.
      fmodel: a handle by `monkeypatch`, whose fast weights are stepped; without one `step` needs `params`.
      device: where the state goes.
      override: settings by name, each a list with one value for all groups or one for each; tensors that require grad are learned.
      grad_callback: applied to the tuple of gradients, in the order of `reference_params`, before each step.
      track_higher_grads: whether the steps are on the tape. False keeps nothing of a step but its result.
      first_order: whether the gradients are constants on it, as in first-order MAML.

    Attributes:
      param_groups: settings of each group, and under "params" the weights as the last step left them (None before the first).
      state: for each group by the parameter's index a dict, its keys those of `torch.optim`.
    """

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: Any = None,
        device: torch.device | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        track_higher_grads: bool = True,
        first_order: bool = False,
        **kwargs: Any,
    ) -> None:
        del kwargs
        index = {id(p): i for i, p in enumerate(reference_params)}
        self._num_params = len(index)
        self.param_groups: list[dict[str, Any]] = []
        self.state: list[dict[int, dict[str, Any]]] = []
        self._members: list[list[int]] = []
        for group in other.param_groups:
            missing = [p for p in group["params"] if id(p) not in index]
            if missing:
                raise ValueError(f"a parameter of the optimiser, of shape {list(missing[0].shape)}, is not among the reference parameters")
            self._members.append([index[id(p)] for p in group["params"]])
            self.param_groups.append({**group, "params": [None] * len(group["params"])})
            held = {i: other.state[p] for i, p in enumerate(group["params"]) if p in other.state}
            self.state.append(
                collections.defaultdict(dict, {i: {key: _own(value, device) for key, value in entry.items()} for i, entry in held.items()})
            )
        self._kind = type(other)
        self._defaults = other.defaults
        self._followed = other.param_groups
        self._seen = [dict(group) for group in other.param_groups]
        self._overridden: set[str] = set()
        self._fmodel = fmodel
        self._grad_callback = grad_callback
        self._track_higher_grads = track_higher_grads
        self._first_order = first_order
        self._override(override)

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """One step on `loss`; the new weights, which the handle takes over.

        Args:
          loss: 0-dim, computed from the latest fast weights.
          params: step these in place of the handle's.
          override: as for the constructor; it stays in force.
          grad_callback: in place of the constructor's, for this step.
          grad_scaler: what scaled the loss. The gradients are divided by its scale, and where one is not finite weights and state stay as
            they are, as in `GradScaler.step`.
        Raises:
          ValueError: there are no weights to step, or an override's list has a wrong length.
        """
        del kwargs
        self._follow()
        self._override(override)
        if params is None and self._fmodel is not None:
            params = self._fmodel.fast_params
        if params is None:
            raise ValueError("step needs params: the optimiser has no patched module that holds fast weights")
        weights = list(params)
        if len(weights) < self._num_params:
            raise IndexError(f"params has {len(weights)} tensors: give one for each of the {self._num_params} reference parameters")
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must be a tensor, got a {type(loss).__name__}")
        for group, members in zip(self.param_groups, self._members, strict=True):
            group["params"] = [weights[i] for i in members]
        grads = self._gradients(loss, weights, grad_scaler)
        if grad_scaler is not None and not all(grad.isfinite().all() for grad in grads if grad is not None):
            if self._fmodel is not None:
                self._fmodel.update_params(weights)
            return weights
        callback = grad_callback or self._grad_callback
        if callback is not None:
            grads = callback(grads)
            if not isinstance(grads, Sequence):
                raise TypeError(f"grad_callback must return the gradients, as many as it is given; got a {type(grads).__name__}")
            if len(grads) < len(weights):
                raise IndexError(f"grad_callback must return as many gradients as it is given, {len(weights)}; got {len(grads)}")
        self._update([[grads[i] for i in members] for members in self._members])
        for group, members in zip(self.param_groups, self._members, strict=True):
            for i, p in zip(members, group["params"], strict=True):
                weights[i] = p if self._track_higher_grads else p.detach().requires_grad_(weights[i].requires_grad)
        if not self._track_higher_grads:
            for states in self.state:
                states.update({i: _recursive_map(entry, _detached) for i, entry in states.items()})
        if self._fmodel is not None:
            self._fmodel.update_params(weights)
        return weights

    @abc.abstractmethod
    def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
        """Replaces `self.param_groups[i]["params"][j]` and `self.state[i][j]`, out of place, by what follows from `grouped_grads[i][j]`."""

    def write_state(self, opt: torch.optim.Optimizer) -> None:
        """Writes the state, detached, to a `torch.optim` instance with the same groups, so that it goes on where this stands.

        Raises:
          ValueError: `opt` is of another class or has other groups.
        """
        if type(opt) is not self._kind or [len(group["params"]) for group in opt.param_groups] != list(map(len, self._members)):
            raise ValueError(f"the state is for a {self._kind.__name__} with groups of {list(map(len, self._members))} parameters")
        for group, states in zip(opt.param_groups, self.state, strict=True):
            for i, entry in states.items():
                p = group["params"][i]
                entry = self._entry_for(entry, group, p)
                opt.state[p] = _recursive_map(entry, lambda x: copied(x.detach()) if isinstance(x, Tensor) else x)

    def _entry_for(self, entry: dict[str, Any], group: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
        """One parameter's state as the real optimiser keeps it."""
        del group, param
        return entry

    def _gradients(self, loss: Tensor, weights: list[Tensor], scaler: torch.amp.GradScaler | None) -> Grads:
        # Something in any case: a loss that requires no grad is an error also where all weights are frozen.
        wanted = [p for p in weights if p.requires_grad] or [torch.zeros((), requires_grad=True)]
        on_tape = self._track_higher_grads and not self._first_order
        found = torch.autograd.grad(loss, wanted, create_graph=on_tape, retain_graph=self._track_higher_grads, allow_unused=True)
        if scaler is not None:
            scale = scaler.get_scale()
            found = tuple([grad if grad is None else grad / scale for grad in found])
        left = iter(found)
        return tuple([next(left) if p.requires_grad else None for p in weights])

    def _override(self, override: Override | None) -> None:
        for key, values in (override or {}).items():
            self._overridden.add(key)
            for group, value in zip(self.param_groups, _by_group(key, values, len(self.param_groups)), strict=True):
                group[key] = value

    def _follow(self) -> None:
        """Takes over what has changed in the groups of the original since the last step, as schedulers change it."""
        for original, group, seen in zip(self._followed, self.param_groups, self._seen, strict=False):
            if len(original) == len(seen) and all(map(operator.is_, original.values(), seen.values())):
                continue
            for key, value in settings_of(original).items():
                if key not in self._overridden and value is not seen.get(key):
                    group[key] = value
            seen.clear()
            seen.update(original)


def _by_group(key: str, values: Any, num_groups: int) -> list[Any]:
    """A value for each group from an entry of an override."""
    if not isinstance(values, Sequence):
        raise TypeError(f"override of '{key}' must be a list of one value for all groups or one for each, got a {type(values).__name__}")
    if len(values) not in (1, num_groups):
        raise ValueError(f"override of '{key}' has {len(values)} values: give one, or one for each of {num_groups} groups")
    return list(values) * (num_groups if len(values) == 1 else 1)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def _own(value: Any, device: torch.device | None) -> Any:
    return _recursive_map(value, lambda leaf: copied(leaf, device) if isinstance(leaf, Tensor) else leaf)


class _Built(NamedTuple):
    """A group's settings as they stood, the pure optimiser made of them, and by a weight's number of axes what its state is made of."""

    settings: dict[str, Any]
    optimizer: Optimizer
    fields: dict[int, tuple[Any, list[str | None]]]
    """The state's type, and the names of its fields; None for one that is not in use."""


class _OfFamily(DifferentiableOptimizer):
    """The step of a class of `torch.optim`, by its pure counterpart."""

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
        """The pure optimiser of a group, made anew when one of its settings is another object."""
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
        # What may change and stay the same object is no reason to believe that it did not.
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
    """Replaces some of a group's weights and their states."""
    named = [(j, str(j), weights[j], states.get(j) or {}) for j in members]
    params = {name: weight for _, name, weight, _ in named}
    before = {name: _state(built, entry, name, weight) for _, name, weight, entry in named}
    given = {name: cast("Tensor", grads[j]) for j, name, _, _ in named}
    after, new = built.optimizer.update(given, before, params, built.optimizer.hyper)
    for j, name, _, entry in named:
        weights[j] = after[name]
        states[j] = {**entry, **_entry(new[name], entry.get("step", 0) + 1)}


def _readable(params: Mapping[str, Tensor]) -> Callable[[Any], Any]:
    """A number as `Family.build` takes it: a tensor of several elements is given to each parameter."""

    def readable(leaf: Any) -> Any:
        leaf = number_or_zero(leaf)
        if isinstance(leaf, Tensor) and leaf.numel() != 1:
            return {name: leaf.expand_as(p) for name, p in params.items()}
        return leaf

    return readable


def _state(built: _Built, entry: Mapping[str, Any], name: str, weight: Tensor) -> Any:
    """One weight's state as the pure optimiser takes it. What belongs to a flag that is off now stays behind in `entry`."""
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
    """A state before the first step with its steps counted in Python."""
    return fresh._replace(step=0) if isinstance(getattr(fresh, "step", None), Tensor) else fresh


def _entry(state: Any, step: Any) -> dict[str, Any]:
    """One weight's state under the names of `torch.optim`, after so many steps."""
    entry = {key: value for key, value in zip(state._fields, state, strict=True) if type(value) is not tuple}
    entry.setdefault("step", step)
    return entry


class DifferentiableSGD(_OfFamily):
    """`adaptrt.optim.sgd` on the tape."""

    kind = torch.optim.SGD


class DifferentiableAdam(_OfFamily):
    """`adaptrt.optim.adam` on the tape."""

    kind = torch.optim.Adam


class DifferentiableAdamW(_OfFamily):
    """`adaptrt.optim.adamw` on the tape."""

    kind = torch.optim.AdamW


class DifferentiableAdadelta(_OfFamily):
    """`adaptrt.optim.adadelta` on the tape."""

    kind = torch.optim.Adadelta


class DifferentiableAdagrad(_OfFamily):
    """`adaptrt.optim.adagrad` on the tape."""

    kind = torch.optim.Adagrad


class DifferentiableAdamax(_OfFamily):
    """`adaptrt.optim.adamax` on the tape."""

    kind = torch.optim.Adamax


class DifferentiableASGD(_OfFamily):
    """`adaptrt.optim.asgd` on the tape."""

    kind = torch.optim.ASGD


class DifferentiableRMSprop(_OfFamily):
    """`adaptrt.optim.rmsprop` on the tape."""

    kind = torch.optim.RMSprop


class DifferentiableRprop(_OfFamily):
    """`adaptrt.optim.rprop` on the tape."""

    kind = torch.optim.Rprop


class DifferentiableNAdam(_OfFamily):
    """`adaptrt.optim.nadam` on the tape."""

    kind = torch.optim.NAdam


class DifferentiableRAdam(_OfFamily):
    """`adaptrt.optim.radam` on the tape."""

    kind = torch.optim.RAdam


class DifferentiableAdafactor(_OfFamily):
    """`adaptrt.optim.adafactor` on the tape."""

    kind = torch.optim.Adafactor


class DifferentiableMuon(_OfFamily):
    """`adaptrt.optim.muon` on the tape."""

    kind = torch.optim.Muon


_BUILT_IN: tuple[type[_OfFamily], ...] = (
    DifferentiableSGD,
    DifferentiableAdam,
    DifferentiableAdamW,
    DifferentiableAdadelta,
    DifferentiableAdagrad,
    DifferentiableAdamax,
    DifferentiableASGD,
    DifferentiableRMSprop,
    DifferentiableRprop,
    DifferentiableNAdam,
    DifferentiableRAdam,
    DifferentiableAdafactor,
    DifferentiableMuon,
)
_registered: dict[type[torch.optim.Optimizer], type[DifferentiableOptimizer]] = {made.kind: made for made in _BUILT_IN}


def register_optim(optim_type: type[torch.optim.Optimizer], diff_optim_type: type[DifferentiableOptimizer]) -> None:
    """Makes `diff_optim_type` the differentiable version of `optim_type`, on the tape and in `compile_unroll`."""
    _registered[optim_type] = diff_optim_type
    ALIASES.pop(optim_type, None)
    register(optim_type, None)
    kind = next((made.kind for made in _BUILT_IN if made is diff_optim_type), None)
    if kind is None:
        register(optim_type, functools.partial(RegisteredSource, DifferentiableOptimizer, diff_optim_type))
    elif kind is not optim_type:
        ALIASES[optim_type] = kind


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: Any = None,
    device: torch.device | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable version of `opt`, with its groups and its state. Arguments as for `DifferentiableOptimizer`.

    Raises:
      UnsupportedOptimizer: there is none for its class.
    """
    return _version_of(type(opt))(
        opt, reference_params, fmodel=fmodel, device=device, override=override, track_higher_grads=track_higher_grads, **kwargs
    )


def create_diff_optim(
    opt_type: type[torch.optim.Optimizer],
    opt_kwargs: Mapping[str, Any] | None = None,
    params: Iterable[Any] | None = None,
    fmodel: Any = None,
    device: torch.device | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """A differentiable optimiser without a real one.

    Args:
      opt_type: a class of `torch.optim`, or one registered.
      opt_kwargs: its constructor's arguments.
      params: weights, or groups of weights as `torch.optim` takes them; looked at for their shapes. None: those of `fmodel`.
      fmodel, device, override, track_higher_grads, kwargs: as for `DifferentiableOptimizer`.
    Raises:
      UnsupportedOptimizer: there is none for the class.
      ValueError: neither weights nor a handle are given.
    """
    version = _version_of(opt_type)
    if params is None and fmodel is None:
        raise ValueError("create_diff_optim needs params or fmodel")
    given = list(fmodel.parameters() if params is None else params)

    def like(weights: Any) -> list[Tensor]:
        weights = [weights] if isinstance(weights, Tensor) else weights
        return [torch.zeros_like(p, requires_grad=True) for p in weights]

    grouped = bool(given) and isinstance(given[0], Mapping)
    dummies: list[Any] = [{**group, "params": like(group["params"])} for group in given] if grouped else like(given)
    reference = [p for group in dummies for p in group["params"]] if grouped else dummies
    opt = opt_type(dummies, **(opt_kwargs or {}))
    return version(opt, reference, fmodel=fmodel, device=device, override=override, track_higher_grads=track_higher_grads, **kwargs)


def _version_of(kind: type[torch.optim.Optimizer]) -> type[DifferentiableOptimizer]:
    if not isinstance(kind, type):
        raise UnsupportedOptimizer(f"opt_type must be a class, got an instance of {type(kind).__name__}; use get_diff_optim for that")
    if kind not in _registered:
        known = ", ".join(known.__name__ for known in _registered)
        raise UnsupportedOptimizer(f"{kind.__name__} has no differentiable version; there are those of {known}. Add one by register_optim.")
    return _registered[kind]


def get_trainable_opt_params(opt: torch.optim.Optimizer, device: torch.device | None = None) -> dict[str, list[Any]]:
    """The numbers in the optimiser's groups as tensors that require grad, in the form of `override`. Flags stay flags."""
    family = FAMILIES.get(type(opt))
    override: dict[str, list[Any]] = {}

    def trainable(value: Any) -> Tensor:
        value = torch.as_tensor(value, device=device).detach().clone()
        return (value if value.is_floating_point() else value.to(torch.get_default_dtype())).requires_grad_()

    for group in opt.param_groups:
        for key, value in settings_of(group).items():
            leaves = flatten(value)
            numbers = bool(leaves) and all(isinstance(x, int | float | Tensor) and not isinstance(x, bool) for x in leaves)
            if numbers and (family is None or key in family.numbers):
                override.setdefault(key, []).append(_recursive_map(value, trainable))
    return override


def apply_trainable_opt_params(opt: torch.optim.Optimizer, override: Override) -> None:
    """Writes learned numbers to the optimiser's groups, each as the kind that stands there.

    Raises:
      ValueError: a list of a wrong length, or a number for a nest of them.
    """
    for key, values in override.items():
        for group, value in zip(opt.param_groups, _by_group(key, values, len(opt.param_groups)), strict=True):
            group[key] = _written(key, value, group[key])


def _written(key: str, value: Any, target: Any) -> Any:
    if isinstance(target, Tensor):
        return torch.as_tensor(value).detach().to(target).clone()
    if isinstance(target, Mapping):
        return {name: _written(key, value[name], entry) for name, entry in target.items()}
    if isinstance(target, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(target):
            raise ValueError(f"override of '{key}': expected {len(target)} numbers in place of {target}, got {value}")
        return type(target)([_written(key, new, old) for new, old in zip(value, target, strict=True)])
    if isinstance(value, list | tuple | Mapping) or (isinstance(value, Tensor) and value.numel() != 1):
        raise ValueError(f"override of '{key}': expected a number in place of {target}, got {value}")
    return type(target)(value.item() if isinstance(value, Tensor) else value)


def _get_mask_closure(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook that zeroes a gradient where `mask` is true, and every gradient of that gradient."""

    def closure(grad: Tensor) -> Tensor:
        grad = torch.where(mask, torch.zeros_like(grad), grad)
        if grad.requires_grad:
            grad.register_hook(closure)
        return grad

    return closure
