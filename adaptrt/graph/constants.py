"""Refuses what traced code may not do to tensors of the user's: those that it uses and does not get as arguments.

Operations on such a tensor are recorded, and a program reads its values at every call. Functions that read the values themselves call no
operation, so what they return would be stale once the values change. Writes in place are refused where operations are recorded
(`passes/recorder.py`).
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from adaptrt.errors import UnsupportedParameter

_READS: set[Any] = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}

ON_CONSTANTS: set[Any] = {*_READS, Tensor.requires_grad_, Tensor.requires_grad.__set__}  # pyright: ignore
"""Functions that a tensor of the user's may not be given to."""

_WRAPPED = (torch._C.DispatchKey.FuncTorchBatched, torch._C.DispatchKey.FuncTorchGradWrapper)
"""What transformations of `torch.func` within a model wrap is none of the user's tensors."""


def refuse_on_constant(func: Any, value: Tensor) -> None:
    """Refuses a function in `ON_CONSTANTS` of a tensor of the user's, before it is called.

    Raises:
      DataDependentOutputException: it reads the values.
      UnsupportedParameter: it makes the tensor require grad.
    """
    keys = torch._C._dispatch_keys(value)
    if any(keys.has(key) for key in _WRAPPED):
        return
    if func in _READS:
        raise DataDependentOutputException(torch.ops.aten._local_scalar_dense.default)
    if not value.requires_grad:
        raise UnsupportedParameter(
            f"the model or the loss lets a tensor of shape {list(value.shape)} require grad that it holds as a plain attribute, in a "
            "closure or under a global name; its gradient would be lost. Make it an nn.Parameter, or let a copy require grad"
        )
