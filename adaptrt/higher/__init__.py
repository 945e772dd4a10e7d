"""A drop-in for the archived package `higher`: write `from adaptrt import higher` in place of `import higher`.

Libraries that import `higher` themselves get this package after `install()`, or in `python -m adaptrt.higher script.py`.

A handle is a copy of a model whose parameters, the fast weights, are replaced by each inner step. A differentiable optimiser makes these
steps eagerly, so that autograd's tape records them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from adaptrt.higher import optim, patch, utils
from adaptrt.higher.install import install, uninstall
from adaptrt.higher.optim import create_diff_optim, get_diff_optim, register_optim
from adaptrt.higher.patch import monkeypatch

__all__ = [
    "create_diff_optim",
    "get_diff_optim",
    "innerloop_ctx",
    "install",
    "monkeypatch",
    "optim",
    "patch",
    "register_optim",
    "uninstall",
    "utils",
]


@contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device | None = None,
    copy_initial_weights: bool = True,
    override: optim.Override | None = None,
    track_higher_grads: bool = True,
    first_order: bool = False,
) -> Iterator[tuple[Any, optim.DifferentiableOptimizer]]:
    """Gives a handle of `model` with fast weights, and the differentiable version of `opt`, which steps them.

    Args:
      model: remains unchanged.
      opt: an optimiser of `model.parameters()` or of some of them. It remains unchanged.
      device, copy_initial_weights, track_higher_grads: as for `monkeypatch`.
      override, first_order: as for `DifferentiableOptimizer`.
    Raises:
      UnsupportedOptimizer: the class of `opt` has no differentiable version.
      TypeError, ValueError: as `monkeypatch` and `DifferentiableOptimizer`.
    """
    fmodel = monkeypatch(model, device, copy_initial_weights=copy_initial_weights, track_higher_grads=track_higher_grads)
    yield (
        fmodel,
        get_diff_optim(
            opt,
            model.parameters(),
            fmodel=fmodel,
            device=device,
            override=override,
            track_higher_grads=track_higher_grads,
            first_order=first_order,
        ),
    )
