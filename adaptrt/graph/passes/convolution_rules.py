"""Writes the gradients of a convolution in terms of convolutions, slices and products.

With x the images, w the weights and g the gradient of y = conv(x, w):

- dx is the transposed convolution of g with w, because a convolution is linear in x;
- dw[o, c, taps] = sum over images n and places p of g[n, o, p] * x[n, c, stride * p + dilation * taps - padding], a product of g with the
  windows of x;
- db is the sum of g over images and places.

A transposed convolution is the transpose of a plain one with the same weights. So its dx is that plain convolution, and its dw is that
convolution's with g and x in exchanged roles.

Known limits: groups are products in a batch, so many groups of few channels (depthwise convolutions) are slow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    # N = images, P = taps, C = channels of x in a group, O = channels of the gradient in a group, L = places
    groups, num_images, num_taps = numbers.groups, x.shape[0], math.prod(weight.shape[2:])
    num_out, num_in, num_places = weight.shape[0] // groups, weight.shape[1], math.prod(gradient.shape[2:])
    windows = _windows(x, weight.shape[2:], gradient.shape[2:], numbers)
    shape = (num_images, groups, num_out, num_places) if groups > 1 else (num_images, num_out, num_places)
    left = aten.reshape.default(gradient, shape)
    if groups == 1:  # each image's product, which batch and threads share, and no copy of the windows in another order
        right = aten.reshape.default(windows, (num_images, num_taps * num_in, num_places))
        each = aten.bmm.default(left, aten.permute.default(right, [0, 2, 1]))
        found = aten.reshape.default(aten.sum.dim_IntList(each, [0]), (num_out, num_taps, num_in))
        return aten.reshape.default(aten.permute.default(found, [0, 2, 1]), weight.shape)
    right = aten.reshape.default(windows, (num_images, num_taps, groups, num_in, num_places))
    right = aten.reshape.default(aten.permute.default(right, [2, 0, 4, 3, 1]), (groups, num_images * num_places, num_in * num_taps))
    left = aten.reshape.default(aten.permute.default(left, [1, 2, 0, 3]), (groups, num_out, num_images * num_places))
    return aten.reshape.default(aten.bmm.default(left, right), weight.shape)


def _windows(x: Tensor, taps: Sequence[int], places: Sequence[int], numbers: Numbers) -> Tensor:
    """Returns for each tap the element of the image that it meets at each place, one tap's channels after another's."""
    axes = range(len(taps))
    padded = x
    if any(numbers.padding):
        padded = aten.constant_pad_nd.default(x, [size for i in reversed(axes) for size in (numbers.padding[i],) * 2])
    parts: list[Tensor] = []
    for tap in itertools.product(*map(range, taps)):
        part: Any = padded
        for i in axes:
            first, step = tap[i] * numbers.dilation[i], numbers.stride[i]
            last = first + (places[i] - 1) * step + 1
            if (first, last, step) != (0, part.shape[2 + i], 1):
                part = aten.slice.Tensor(part, 2 + i, first, last, step)
        parts.append(part)
    return aten.cat.default(parts, 1) if len(parts) > 1 else parts[0]
