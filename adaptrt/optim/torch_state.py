"""The state that a `torch.optim` instance keeps, in the form of the pure optimisers' states.

The fields of our states have the names that `torch.optim` gives them, so one function serves all classes but L-BFGS, which keeps one state
for all parameters together.

Known limits: SGD does not record how often it has stepped, and only whether it has stepped matters. So a parameter that has a momentum
buffer gets step count 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.errors import OptimizerMismatch
from adaptrt.optim.base import Params, State
from adaptrt.optim.lbfgs import LBFGSState
from adaptrt.optim.schedule import ScheduledState
from adaptrt.optim.sgd import SGDState


def held_state(opt: torch.optim.Optimizer, params: Params, fresh: State) -> State:
    """Returns a detached copy of the state that `opt` keeps for `params`, which are parameters of one group.

    Args:
      opt: only its state is read.
      params: by name; tensors of `opt.param_groups`.
      fresh: the initial state of the pure optimiser. The result has its tree, and its values for parameters without state.
    Raises:
      OptimizerMismatch: a tensor has the wrong shape, or part of the state is missing.
    """
    if isinstance(fresh, ScheduledState):  # schedules begin with the unroll
        return fresh._replace(state=held_state(opt, params, fresh.state))
    if isinstance(fresh, LBFGSState):
        return _held_lbfgs(opt, params, fresh)
    return {name: tree.map_leaves(_copied, of_entry(opt.state.get(params[name]), name, zeros)) for name, zeros in fresh.items()}


def _copied(value: Tensor) -> Tensor:
    return value.detach().clone()


def of_entry(entry: Mapping[str, Any] | None, name: str, fresh: Any) -> Any:
    """Returns what `torch.optim` keeps for one parameter as a named tuple of the type of `fresh`.

    Args:
      entry: `opt.state[parameter]`. Where it keeps nothing, the result is `fresh` itself.
      name: the parameter's name, for messages.
      fresh: the parameter's initial state.
    Raises:
      OptimizerMismatch: a tensor has the wrong shape, or part of the state is missing.
    """
    if entry and isinstance(fresh, SGDState):  # which counts no steps: one with a buffer has made some
        entry = {**entry, "step": 1}
    fields = {key: _field(entry, key, name, zero) for key, zero in fresh._asdict().items() if isinstance(zero, Tensor)}
    return fresh._replace(**fields)


def _field(entry: Mapping[str, Any] | None, key: str, name: str, zero: Tensor) -> Tensor:
    if not entry or all(value is None for value in entry.values()):
        return zero
    if entry.get(key) is None:
        raise OptimizerMismatch(
            f"The optimiser's state for parameter '{name}' has no '{key}', only {sorted(entry)}. It was made under other settings; "
            "build the optimiser anew, or restore them."
        )
    value = torch.as_tensor(entry[key], device=_device_of(entry[key]))
    if value.shape != zero.shape and not (key == "step" and value.numel() == 1):
        raise OptimizerMismatch(
            f"The optimiser's '{key}' for parameter '{name}' must have shape {list(zero.shape)}, got {list(value.shape)}. "
            "The state belongs to another model; load the matching checkpoint or clear opt.state."
        )
    return value.reshape(zero.shape).to(device=zero.device, dtype=zero.dtype)


def _device_of(value: object) -> torch.device:
    """Where a tensor is; the CPU for a number, whatever the default device is."""
    return value.device if isinstance(value, Tensor) else torch.device("cpu")


def _held_lbfgs(opt: torch.optim.Optimizer, params: Params, fresh: LBFGSState) -> LBFGSState:
    """PyTorch keeps one state for all parameters, under the first of them, as vectors in their order."""
    held = opt.param_groups[0]["params"]
    entry = opt.state.get(held[0], {})
    if not entry.get("n_iter"):
        return fresh
    if {id(p) for p in held} != {id(p) for p in params.values()}:
        raise OptimizerMismatch(
            f"The state of LBFGS is of {len(held)} parameters together, of which {len(params)} adapt. Adapt all, or clear opt.state."
        )
    size = sum(p.numel() for p in held)
    if len(entry["prev_flat_grad"]) != size:
        raise OptimizerMismatch(
            f"The state of LBFGS must have {size} elements, got {len(entry['prev_flat_grad'])}. Load the matching checkpoint or clear "
            "opt.state."
        )
    places = dict(zip(map(id, held), torch.split(torch.arange(size, device="cpu"), [p.numel() for p in held]), strict=True))
    order = torch.cat([places[id(p)] for p in params.values()])

    def rows(vectors: Sequence[Tensor], zeros: Tensor) -> Tensor:
        found = [vector.detach()[order].to(zeros) for vector in vectors[-len(zeros) :]]
        return torch.cat([zeros[len(found) :], torch.stack(found)]) if found else zeros

    return LBFGSState(
        n_iter=torch.as_tensor(entry["n_iter"], device=_device_of(entry["n_iter"])).to(fresh.n_iter),
        prev_flat_grad=entry["prev_flat_grad"].detach()[order].to(fresh.prev_flat_grad),
        prev_step=(entry["d"] * entry["t"]).detach()[order].to(fresh.prev_step),
        old_dirs=rows(entry["old_dirs"], fresh.old_dirs),
        old_stps=rows(entry["old_stps"], fresh.old_stps),
    )
