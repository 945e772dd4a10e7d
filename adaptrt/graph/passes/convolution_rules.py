"""Writes the gradients of a convolution in terms of convolutions, slices and products.

With x the images, w the weights and g the gradient of y = conv(x, w):

- dx is the transposed convolution of g with w, because a convolution is linear in x;
- dw[o, c, taps] = sum over images n and places p of g[n, o, p] * x[n, c, stride * p + dilation * taps - padding], a product of g with the
  windows of x;
- db is the sum of g over images and places.

A transposed convolution is the transpose of a plain one with the same weights. So its dx is that plain convolution, and its dw is that
convolution's with g and x in exchanged roles.

Known limits: groups are products in a batch, so many groups of few channels (depthwise convolutions) are slow. The double backward of a
convolution is made of these same operations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Numbers(NamedTuple):
    """The numbers of a convolution, with one entry for each axis of the images."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`aten.convolution_backward` in terms of forward operations."""
    del bias_sizes, output_padding
    num_axes = x.dim() - 2
    numbers = Numbers(_spread(stride, num_axes), _spread(padding, num_axes), _spread(dilation, num_axes), groups)
    of_image = of_weight = of_bias = None
    if output_mask[0]:
        of_image = _of_transposed(gradient, x, weight, numbers) if transposed else _of_image(gradient, x, weight, numbers)
    if output_mask[1]:
        of_weight = _of_weight(x, gradient, weight, numbers) if transposed else _of_weight(gradient, x, weight, numbers)
    if output_mask[2]:
        of_bias = aten.sum.dim_IntList(gradient, [0, *range(2, 2 + num_axes)])
    return of_image, of_weight, of_bias


def _spread(value: Sequence[int], num_axes: int) -> list[int]:
    """Returns one number for each axis. PyTorch lets a single number stand for all of them."""
    return [int(entry) for entry in value] * (num_axes if len(value) == 1 else 1)


def _of_image(gradient: Tensor, x: Tensor, weight: Tensor, numbers: Numbers) -> Tensor:
    stride, padding, dilation, groups = numbers
    sizes, places, taps = x.shape[2:], gradient.shape[2:], weight.shape[2:]
    axes = range(len(sizes))
    reached = [(places[i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (taps[i] - 1) + 1 for i in axes]
    # A stride may not have reached the last elements of an image.
    rest = [sizes[i] - reached[i] for i in axes]
    return aten.convolution.default(gradient, weight, None, stride, padding, dilation, True, rest, groups)


def _of_transposed(gradient: Tensor, x: Tensor, weight: Tensor, numbers: Numbers) -> Tensor:
    stride, padding, dilation, groups = numbers
    found = aten.convolution.default(gradient, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)
    for axis, size in enumerate(x.shape[2:], 2):  # output padding may have made room for one more
        if found.shape[axis] != size:
            found = aten.slice.Tensor(found, axis, 0, size)
    return found


def _of_weight(gradient: Tensor, x: Tensor, weight: Tensor, numbers: Numbers) -> Tensor:
    # N = images, G = groups, C = channels of x in a group, O = channels of the gradient in a group, P = taps, L = places in all images
    groups, num_images, num_taps = numbers.groups, x.shape[0], math.prod(weight.shape[2:])
    num_out, num_in, num_places = weight.shape[0] // groups, weight.shape[1], num_images * math.prod(gradient.shape[2:])
    lead = (groups,) if groups > 1 else ()
    left = _channels_first(gradient, groups).reshape(*lead, num_out, num_places)
    windows = [window.reshape(*lead, num_in, num_places) for window in _windows(_channels_first(x, groups), gradient, weight, numbers)]
    if num_in >= _MANY_CHANNELS or num_taps == 1:
        each = [torch.matmul(left, window.transpose(-1, -2)) for window in windows]
        found = torch.cat(each).reshape(num_taps, groups * num_out, num_in).permute(1, 2, 0)
    else:
        all_taps = torch.matmul(left, torch.cat(windows, -2).transpose(-1, -2))
        found = all_taps.reshape(groups * num_out, num_taps, num_in).transpose(1, 2)
    return found.reshape(weight.shape)


_MANY_CHANNELS = 8
"""From so many on, a product for each tap is faster than one product for all, whose windows have to be put together first."""


def _channels_first(x: Tensor, groups: int) -> Tensor:
    """[G, channels of a group, N, ...]"""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]).permute(1, 2, 0, *range(3, x.dim() + 1))


def _windows(x: Tensor, gradient: Tensor, weight: Tensor, numbers: Numbers) -> list[Tensor]:
    """Returns for each tap the elements of the images, [G, C, N, ...], that it meets at each place."""
    taps, places = weight.shape[2:], gradient.shape[2:]
    axes = range(len(taps))
    if any(numbers.padding):
        x = aten.constant_pad_nd.default(x, [size for i in reversed(axes) for size in (numbers.padding[i],) * 2])
    parts: list[Tensor] = []
    for tap in itertools.product(*map(range, taps)):
        part = x
        for i in reversed(axes):  # the other slices are then copies of whole rows, and several taps share the first
            first, step = tap[i] * numbers.dilation[i], numbers.stride[i]
            last = first + (places[i] - 1) * step + 1
            if (first, last, step) != (0, part.shape[3 + i], 1):
                part = aten.slice.Tensor(part, 3 + i, first, last, step)
        parts.append(part)
    return parts
