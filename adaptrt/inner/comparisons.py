"""Refuses comparisons of outputs with targets that PyTorch carries out and nobody means, while a model and its loss are traced.

Known limits: a target is recognised as long as only its dtype was changed. A loss that reshapes it decides itself how it broadcasts. What a
loss in TorchScript compares is not seen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from adaptrt import tree
from adaptrt.tree import Tree

_LABELLED = {"cross_entropy", "nll_loss"}
_LOSSES = {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"}
"""The losses for which PyTorch warns if their arguments differ in shape."""
_DIFFERENCES = {"sub", "subtract", "__sub__", "__rsub__", "rsub"}
_PRODUCTS = {"mul", "multiply", "__mul__", "__rmul__"}
_CONVERSIONS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "clone", "detach", "contiguous"}


class Comparisons(TorchFunctionMode):
    """Raises where a target meets an output in a form that can only be a mistake.

    Args:
      target: of the batch.
    """

    def __init__(self, target: Tree) -> None:
        super().__init__()
        self._targets: dict[int, Tensor] = {id(value): value for value in tree.leaves(target)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _LABELLED or name in _LOSSES:
            first, second = (*args, *[kwargs[key] for key in ("input", "target") if key in kwargs])[:2]
            if name in _LABELLED:
                _refuse_labels(first, second)
            else:
                _refuse_broadcast(name, first, second)
        elif (name in _DIFFERENCES or name in _PRODUCTS) and len(args) == 2:
            self._refuse_expansion(name.strip("_"), *args, is_difference=name in _DIFFERENCES)
        result = func(*args, **kwargs)
        if name in _CONVERSIONS and args and id(args[0]) in self._targets:
            self._targets[id(result)] = result
        return result

    def _refuse_expansion(self, name: str, first: Any, second: Any, is_difference: bool) -> None:
        """Refuses a difference in which a target has no value for each row, and what expands both output and target."""
        target, output = (first, second) if id(first) in self._targets else (second, first)
        if id(target) not in self._targets or not isinstance(output, Tensor) or not output.requires_grad or not target.dim():
            return
        shape = _broadcast(output, target)
        if shape is None or math.prod(shape) == target.numel():
            return
        has_rows = target.dim() == len(shape) and target.shape[0] == shape[0]
        if math.prod(shape) > output.numel() or (is_difference and not has_rows):
            raise ValueError(_broadcasts(name, output, target, shape))


def _refuse_labels(scores: Tensor, labels: Tensor) -> None:
    are_probabilities = labels.is_floating_point() and labels.shape == scores.shape
    if labels.dtype is not torch.int64 and not are_probabilities:
        raise TypeError(f"class labels must be int64, got {str(labels.dtype).removeprefix('torch.')}; call .long() on the target")


def _refuse_broadcast(name: str, output: Tensor, target: Tensor) -> None:
    shape = _broadcast(output, target)
    if shape is not None and not output.numel() == target.numel() == math.prod(shape):
        raise ValueError(_broadcasts(name, output, target, shape))


def _broadcast(first: Tensor, second: Tensor) -> torch.Size | None:
    """Returns the shape to which two tensors are broadcast, None if they cannot be."""
    try:
        return torch.broadcast_shapes(first.shape, second.shape)
    except RuntimeError:
        return None


def _broadcasts(name: str, output: Tensor, target: Tensor, shape: torch.Size) -> str:
    return (
        f"'{name}' of output {tree.Spec.of(output)} and target {tree.Spec.of(target)} would broadcast them to {list(shape)}; give the "
        "target the shape of the output, or call expand_as() on it in the loss"
    )
