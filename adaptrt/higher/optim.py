"""The differentiable optimisers: one for each class of `torch.optim` that has a version here, and those that users register.

This is the module that a program written for the archived package imports as `higher.optim`; what it needs from there is here, too.
"""

from __future__ import annotations

import abc
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, cast

import torch
from torch import Tensor

from adaptrt.errors import UnsupportedOptimizer
from adaptrt.higher import patch as _patch  # noqa: F401
from adaptrt.higher import utils as _utils  # noqa: F401
from adaptrt.higher.arithmetic import _add, _addcdiv, _addcmul, _get_mask_closure, _maybe_mask  # noqa: F401
from adaptrt.higher.differentiable import DifferentiableOptimizer, GradCallback, Grads
from adaptrt.higher.of_family import OfFamily
from adaptrt.higher.registered import RegisteredSource
from adaptrt.higher.trainable import (
    Override,
    _recursive_apply,  # noqa: F401
    apply_trainable_opt_params,
    get_trainable_opt_params,
)
from adaptrt.optim.registry import REGISTERED, Registration

__all__ = [
    "DifferentiableASGD",
    "DifferentiableAdadelta",
    "DifferentiableAdafactor",
    "DifferentiableAdagrad",
    "DifferentiableAdam",
    "DifferentiableAdamW",
    "DifferentiableAdamax",
    "DifferentiableMuon",
    "DifferentiableNAdam",
    "DifferentiableOptimizer",
    "DifferentiableRAdam",
    "DifferentiableRMSprop",
    "DifferentiableRprop",
    "DifferentiableSGD",
    "GradCallback",
    "Grads",
    "Override",
    "apply_trainable_opt_params",
    "create_diff_optim",
    "get_diff_optim",
    "get_trainable_opt_params",
    "register_optim",
]


# The original's names for types, which programs use in signatures.
_GroupedGradsType = list[list[Tensor]]
_StateType = list[defaultdict[int, Any]]
_GradClosureType = Callable[[Tensor], Tensor]
_OverrideType = Override
_GradCallbackType = GradCallback
_OptMappingType = MutableMapping[type[torch.optim.Optimizer], type[DifferentiableOptimizer]]


def _of(kind: type[torch.optim.Optimizer]) -> type[OfFamily]:
    """Makes the differentiable version of a class of `torch.optim`."""
    name = f"Differentiable{kind.__name__}"
    docstring = f"`adaptrt.optim.{kind.__name__.lower()}` on autograd's tape."
    return cast("type[OfFamily]", abc.ABCMeta(name, (OfFamily,), {"__doc__": docstring, "__module__": __name__, "kind": kind}))


DifferentiableSGD = _of(torch.optim.SGD)
DifferentiableAdam = _of(torch.optim.Adam)
DifferentiableAdamW = _of(torch.optim.AdamW)
DifferentiableAdadelta = _of(torch.optim.Adadelta)
DifferentiableAdagrad = _of(torch.optim.Adagrad)
DifferentiableAdamax = _of(torch.optim.Adamax)
DifferentiableASGD = _of(torch.optim.ASGD)
DifferentiableRMSprop = _of(torch.optim.RMSprop)
DifferentiableRprop = _of(torch.optim.Rprop)
DifferentiableNAdam = _of(torch.optim.NAdam)
DifferentiableRAdam = _of(torch.optim.RAdam)
DifferentiableAdafactor = _of(torch.optim.Adafactor)
DifferentiableMuon = _of(torch.optim.Muon)

_BUILT_IN: dict[type[torch.optim.Optimizer], type[DifferentiableOptimizer]] = {
    version.kind: version
    for version in (
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
}


class _Versions(_OptMappingType):
    """The differentiable version of each class, as `get_diff_optim` finds it. Setting an entry registers a version."""

    def __getitem__(self, kind: type[torch.optim.Optimizer]) -> type[DifferentiableOptimizer]:
        registration = REGISTERED.get(kind)
        return _BUILT_IN[kind] if registration is None else registration.version

    def __setitem__(self, kind: type[torch.optim.Optimizer], version: type[DifferentiableOptimizer]) -> None:
        register_optim(kind, version)

    def __delitem__(self, kind: type[torch.optim.Optimizer]) -> None:
        del REGISTERED[kind]

    def __iter__(self) -> Iterator[type[torch.optim.Optimizer]]:
        return iter({**_BUILT_IN, **REGISTERED})

    def __len__(self) -> int:
        return len({**_BUILT_IN, **REGISTERED})


_opt_mapping = _Versions()


def register_optim(optim_type: type[torch.optim.Optimizer], diff_optim_type: type[DifferentiableOptimizer]) -> None:
    """Makes `diff_optim_type` step the instances of `optim_type`, in eager loops and in `compile_unroll`.

    Args:
      optim_type: the class. Its subclasses are not registered with it. An earlier registration is replaced.
      diff_optim_type: one of the classes above, whose arithmetic then serves for `optim_type`, too; or a subclass of
        `DifferentiableOptimizer` of your own, whose `_update` makes the steps and is traced by `compile_unroll`.
    """
    if diff_optim_type in _BUILT_IN.values():
        registration = Registration(diff_optim_type, steps_as=cast("type[OfFamily]", diff_optim_type).kind)
    else:
        registration = Registration(diff_optim_type, make_source=functools.partial(RegisteredSource, diff_optim_type))
    REGISTERED[optim_type] = registration


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: Any = None,
    device: torch.device | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """Returns the differentiable version of `opt`, with a copy of its groups and its state.

    Args:
      opt: an instance of a class of `torch.optim` that has a version here, or of a registered class.
      reference_params, fmodel, device, override, track_higher_grads, kwargs: as for `DifferentiableOptimizer`.
    Raises:
      UnsupportedOptimizer: its class has no differentiable version.
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
    """Returns a differentiable optimiser of a class, without the need for an instance.

    Args:
      opt_type: a class of `torch.optim` that has a version here, or a registered class.
      opt_kwargs: the arguments of its constructor.
      params: weights, or groups of weights as `torch.optim` takes them. Only their shapes, dtypes and devices matter. None takes those of
        `fmodel`.
      fmodel, device, override, track_higher_grads, kwargs: as for `DifferentiableOptimizer`.
    Raises:
      UnsupportedOptimizer: the class has no differentiable version.
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
    version = _opt_mapping.get(kind)
    if version is None:
        known = ", ".join([known.__name__ for known in _opt_mapping])
        raise UnsupportedOptimizer(f"{kind.__name__} has no differentiable version; there are those of {known}. Add one by register_optim.")
    return version
