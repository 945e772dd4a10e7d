"""Writes batch, group and layer normalisation, and the gradients of the first two, in few operations on whole tensors.

With x^ = (x - mean) * invstd and m elements in each mean, the gradient of y = w * x^ + b is

    dx = w * invstd * (g - sum(g) / m - (x - mean) * sum(g * (x - mean)) * invstd^2 / m)

in which everything but g and x - mean has one number for each channel. Where means are over several channels, which have different weights,
it is w * g that is summed. PyTorch's own decompositions compute the same with twice as many operations on whole tensors, or with more on
small ones, which matters where none of them is fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Optional = Tensor | None


def _over_channels(x: Tensor) -> tuple[list[int], list[int], int]:
    """Returns the axes that a channel's mean is over, the shape of one number for each channel, and the number of elements in a mean."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    return axes, [1, -1, *[1] * (x.dim() - 2)], math.prod(x.shape[axis] for axis in axes)


def _normalised(x: Tensor, weight: Optional, bias: Optional, mean: Tensor, invstd: Tensor) -> Tensor:
    shape = _over_channels(x)[1]
    scale = invstd if weight is None else weight * invstd
    scaled = (x - mean.view(shape)) * scale.view(shape)
    return scaled if bias is None else scaled + bias.view(shape)


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean, variance and the inverse of the standard deviation of each channel."""
    axes, shape, count = _over_channels(x)
    mean = x.mean(axes)
    variance = (x - mean.view(shape)).square().sum(axes) / count
    return mean, variance, torch.rsqrt(variance + eps)


def batch_norm(
    x: Tensor,
    weight: Optional,
    bias: Optional,
    running_mean: Optional,
    running_var: Optional,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`aten.native_batch_norm`, without running statistics if it is in training mode."""
    if not training:
        assert running_mean is not None and running_var is not None
        output = _normalised(x, weight, bias, running_mean, torch.rsqrt(running_var + eps))
        return output, x.new_zeros([0]), x.new_zeros([0])
    if running_mean is not None:
        return NotImplemented  # it would write to them; the functional variant is `batch_norm_functional`
    mean, _, invstd = _statistics(x, eps)
    return _normalised(x, weight, bias, mean, invstd), mean, invstd


def batch_norm_functional(
    x: Tensor,
    weight: Optional,
    bias: Optional,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`aten._native_batch_norm_legit_functional`, which returns the new running statistics last."""
    if not training:
        return *batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps), running_mean, running_var
    mean, variance, invstd = _statistics(x, eps)
    count = _over_channels(x)[2]
    new_mean = running_mean * (1 - momentum) + mean * momentum
    new_var = running_var * (1 - momentum) + variance * (momentum * count / max(count - 1, 1))
    return _normalised(x, weight, bias, mean, invstd), mean, invstd, new_mean, new_var


def batch_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Optional,
    running_mean: Optional,
    running_var: Optional,
    mean: Optional,
    invstd: Optional,
    training: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`aten.native_batch_norm_backward`."""
    axes, shape, count = _over_channels(x)
    if not training:
        assert running_mean is not None and running_var is not None
        mean, invstd = running_mean, torch.rsqrt(running_var + eps)
    assert mean is not None and invstd is not None
    centred = x - mean.view(shape)
    total = gradient.sum(axes)
    along = (gradient * centred).sum(axes)
    of_x = None
    if output_mask[0]:
        scale = invstd if weight is None else weight * invstd
        of_x = gradient * scale.view(shape)
        if training:
            slope = scale * along * invstd.square() / -count
            of_x = of_x + (centred * slope.view(shape) + (scale * total / -count).view(shape))
    return of_x, along * invstd if output_mask[1] else None, total if output_mask[2] else None


def layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Optional, bias: Optional, eps: float
) -> tuple[Tensor, Tensor, Tensor] | Any:
    """`aten.native_layer_norm`, which stays as it is in float32."""
    if x.dtype == torch.float32:
        return NotImplemented  # there are kernels for it
    axes = list(range(x.dim() - len(normalized_shape), x.dim()))
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    invstd = torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    output = centred * invstd
    output = output if weight is None else output * weight
    return output if bias is None else output + bias, mean, invstd


def group_norm(
    x: Tensor, weight: Optional, bias: Optional, num_images: int, num_channels: int, num_places: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`aten.native_group_norm`: layer normalisation of each group, then one factor and term for each channel."""
    size = num_channels // groups * num_places
    output, mean, invstd = aten.native_layer_norm.default(x.reshape(num_images * groups, size), [size], None, None, eps)
    output, shape = output.reshape(x.shape), _over_channels(x)[1]
    output = output if weight is None else output * weight.view(shape)
    output = output if bias is None else output + bias.view(shape)
    return output, mean.reshape(num_images, groups), invstd.reshape(num_images, groups)


def group_norm_backward(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Optional,
    num_images: int,
    num_channels: int,
    num_places: int,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`aten.native_group_norm_backward`: the module's formula, with means over groups of channels."""
    # N = images, G = groups, D = channels of a group, L = places
    by_channel = num_images, groups, num_channels // groups  # [N, G, D]
    total = gradient.reshape(*by_channel, num_places).sum(-1)
    products = (gradient * x).reshape(*by_channel, num_places).sum(-1)
    along = (products - mean.unsqueeze(-1) * total) * invstd.unsqueeze(-1)  # sum(g * x^)
    of_x = None
    if output_mask[0]:
        weights = None if weight is None else weight.reshape(1, *by_channel[1:])
        scale = invstd.unsqueeze(-1).expand(by_channel) if weights is None else invstd.unsqueeze(-1) * weights
        share = -invstd / (by_channel[2] * num_places)  # [N, G], as all below
        slope = (along if weights is None else along * weights).sum(-1) * (share * invstd)
        level = (total if weights is None else total * weights).sum(-1) * share - slope * mean
        of_groups = x.reshape(*by_channel[:2], by_channel[2] * num_places) * slope.unsqueeze(-1) + level.unsqueeze(-1)
        of_channels = gradient.reshape(*by_channel, num_places) * scale.unsqueeze(-1)
        of_x = of_channels.reshape(x.shape) + of_groups.reshape(x.shape)
    of_weight = along.sum(0).reshape(num_channels) if output_mask[1] else None
    return of_x, of_weight, total.sum(0).reshape(num_channels) if output_mask[2] else None


RULES: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: batch_norm,
    aten._native_batch_norm_legit_functional.default: batch_norm_functional,
    aten.native_batch_norm_backward.default: batch_norm_backward,
    aten.native_layer_norm.default: layer_norm,
    aten.native_group_norm.default: group_norm,
}
