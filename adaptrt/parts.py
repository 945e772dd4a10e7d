"""Changes modules of a copied model that cannot be traced as they are, so that a program computes what they compute.

- What `torch.compile` made runs what it was made from. A program is compiled as a whole, and needs the operations themselves.
- `DataParallel` runs the module in it, on the one device on which a program runs.
- Batch normalisation with `momentum=None` divides by the number of batches, which PyTorch's `forward` reads as a Python number.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def prepare(part: nn.Module) -> None:
    """Changes what must be changed in one module of a copy, and nothing in most modules."""
    attributes = vars(part)
    if attributes.get("_compiled_call_impl") is not None:
        attributes["_compiled_call_impl"] = None
    if is_compiled(part):
        run_uncompiled(part)
    elif isinstance(part, nn.DataParallel):
        attributes["forward"] = types.MethodType(_on_one_device, part)
    elif isinstance(part, _NORMS) and part.momentum is None and type(part).forward in _FORWARDS and "forward" not in attributes:
        attributes["forward"] = types.MethodType(_cumulative_norm, part)


def is_compiled(part: nn.Module) -> bool:
    """Whether `torch.compile` made the module. It asks by name, because importing Dynamo takes seconds."""
    return type(part).__module__.startswith("torch._dynamo") and "_orig_mod" in part._modules


def run_uncompiled(part: nn.Module) -> None:
    """Makes a module for which `is_compiled` holds run the module that it was made from."""
    vars(part)["forward"] = types.MethodType(_uncompiled, part)


def _uncompiled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    module: Any = self._modules["_orig_mod"]
    return module(*args, **kwargs)


def _on_one_device(self: nn.DataParallel[Any], *args: Any, **kwargs: Any) -> Any:
    return self.module(*args, **kwargs)


_FORWARDS = {kind.forward for kind in _NORMS}


def _cumulative_norm(self: Any, input: Tensor) -> Tensor:
    """Batch normalisation whose running statistics are the mean over all batches so far.

    PyTorch's function is given empty statistics and a momentum of 1, so that it leaves those of this batch in them.
    """
    if not (self.training and self.track_running_stats and self.num_batches_tracked is not None):
        return type(self).forward(self, input)
    self._check_input_dim(input)
    self.num_batches_tracked.add_(1)
    share = 1.0 / self.num_batches_tracked.to(torch.float64)
    mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
    output = F.batch_norm(input, mean, var, self.weight, self.bias, True, 1.0, self.eps)
    for running, found in ((self.running_mean, mean), (self.running_var, var)):
        rate = share.to(running.dtype)
        running.copy_(running * (1.0 - rate) + found * rate)
    return output
