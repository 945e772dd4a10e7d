"""What all differentiable optimisers have in common: groups, state, overrides and gradients. Subclasses add the arithmetic of a step."""

from __future__ import annotations

import abc
import collections
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt.higher.trainable import Override, by_group
from adaptrt.higher.utils import _recursive_copy_and_cast, _recursive_map, copied, settings_of

Grads = Sequence[Tensor | None]
GradCallback = Callable[[Any], Any]


class DifferentiableOptimizer(abc.ABC):
    """An optimiser whose steps are out of place, so that gradients flow through them.

    It has a copy of the groups and the state of a `torch.optim` instance, which it leaves unchanged.

    Args:
      other: the instance that groups and state are copied from. If a scheduler changes a rate of it later, the next step uses the new
        rate, unless the rate is overridden.
      reference_params: the model's parameters. Fast weights and gradients have their order.
      fmodel: the handle, made by `monkeypatch`, whose fast weights are stepped. Without a handle `step` needs `params`.
      device: where the copy of the state is put; None leaves it where it is.
      override: settings by name, each a list with one value for all groups or one value for each group. Tensors that require grad are
        learned.
      grad_callback: a function that is applied to the tuple of gradients, in the order of `reference_params`, before each step.
      track_higher_grads: whether autograd's tape records the steps. If not, only the result of a step is kept.
      first_order: whether the gradients are constants on the tape, as in first-order MAML.

    Attributes:
      param_groups: for each group its settings and, under "params", the weights as the last step left them, or None before the first step.
      state: for each group a dict from a parameter's index in the group to its state, whose keys are those of `torch.optim`.

    Raises:
      ValueError: a parameter of `other` is not among `reference_params`, or an override's list has the wrong length.
      TypeError: an override is no list.
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
        self._group_to_param_list: list[list[int]] = []
        for group in other.param_groups:
            missing = [p for p in group["params"] if id(p) not in index]
            if missing:
                raise ValueError(f"a parameter of the optimiser, of shape {list(missing[0].shape)}, is not among the reference parameters")
            self._group_to_param_list.append([index[id(p)] for p in group["params"]])
            self.param_groups.append({**group, "params": [None] * len(group["params"])})
            held = {i: other.state[p] for i, p in enumerate(group["params"]) if p in other.state}
            self.state.append(
                collections.defaultdict(
                    dict, {i: {key: _recursive_copy_and_cast(value, device) for key, value in entry.items()} for i, entry in held.items()}
                )
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
        self._apply_override(override)

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Makes one step on `loss`, and returns the new weights, which also become the handle's latest.

        Args:
          loss: a 0-dim tensor, computed from the latest fast weights.
          params: weights to step in place of the handle's.
          override: as for the constructor. It also holds for later steps.
          grad_callback: used in place of the constructor's for this step.
          grad_scaler: the scaler that has scaled the loss. The gradients are divided by its scale. If one of them is not finite, weights
            and state stay as they are, as in `GradScaler.step`.
        Raises:
          ValueError: there are no weights to step, or an override's list has the wrong length.
          IndexError: `params`, or what `grad_callback` returns, has too few tensors.
          TypeError: the loss is no tensor, or `grad_callback` returns no sequence.
        """
        del kwargs
        self._follow()
        self._apply_override(override)
        if params is None and self._fmodel is not None:
            params = self._fmodel.fast_params
        if params is None:
            raise ValueError("step needs params: the optimiser has no patched module that holds fast weights")
        weights = list(params)
        if len(weights) < self._num_params:
            raise IndexError(f"params has {len(weights)} tensors: give one for each of the {self._num_params} reference parameters")
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must be a tensor, got a {type(loss).__name__}")
        for group, members in zip(self.param_groups, self._group_to_param_list, strict=True):
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
        self._update([[grads[i] for i in members] for members in self._group_to_param_list])
        for group, members in zip(self.param_groups, self._group_to_param_list, strict=True):
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
        """Replaces the weights `self.param_groups[i]["params"][j]` and their state `self.state[i][j]` by those after one step.

        Subclasses implement it. The new tensors must be made out of place.

        Args:
          grouped_grads: the gradient of weight j of group i under [i][j], or None where the loss does not use this weight.
        """

    def write_state(self, opt: torch.optim.Optimizer) -> None:
        """Writes the state, detached, into a `torch.optim` instance, which then continues from here.

        Args:
          opt: an instance of the class, and with the groups, that this optimiser was made from. Its state is changed.
        Raises:
          ValueError: `opt` is of another class or has other groups.
        """
        if type(opt) is not self._kind or [len(group["params"]) for group in opt.param_groups] != list(map(len, self._group_to_param_list)):
            raise ValueError(
                f"the state is for a {self._kind.__name__} with groups of {list(map(len, self._group_to_param_list))} parameters"
            )
        for group, states in zip(opt.param_groups, self.state, strict=True):
            for i, entry in states.items():
                p = group["params"][i]
                entry = self._entry_for(entry, group, p)
                opt.state[p] = _recursive_map(entry, lambda x: copied(x.detach()) if isinstance(x, Tensor) else x)

    def _entry_for(self, entry: dict[str, Any], group: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
        """Returns one parameter's state in the form in which the real optimiser keeps it."""
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

    def _apply_override(self, override: Override | None) -> None:
        for key, values in (override or {}).items():
            self._overridden.add(key)
            for group, value in zip(self.param_groups, by_group(key, values, len(self.param_groups)), strict=True):
                group[key] = value

    def _follow(self) -> None:
        """Takes over the settings of the original's groups that have changed since the last step, as schedulers change them."""
        for original, group, seen in zip(self._followed, self.param_groups, self._seen, strict=False):
            if len(original) == len(seen) and all(map(operator.is_, original.values(), seen.values())):
                continue
            for key, value in settings_of(original).items():
                if key not in self._overridden and value is not seen.get(key):
                    group[key] = value
            seen.clear()
            seen.update(original)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value
