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
    """A product of the gradient with the windows of the images, for each tap or for several taps together."""
    # N = images, G = groups, C = channels of x in a group, O = channels of the gradient in a group, P = taps, L = places in all images
    groups, taps = numbers.groups, weight.shape[2:]
    lead = (groups,) if groups > 1 else ()
    num_out, num_in, num_places = weight.shape[0] // groups, weight.shape[1], gradient[:, 0].numel()
    layout = _Layout(groups, images_last=numbers.stride[-1] > 1 or gradient.shape[-1] < _LONG_ROW)
    left = layout.of(gradient).reshape(*lead, num_out, num_places)
    together = _together(num_in, taps)
    shared = math.prod(taps[len(taps) - together :])
    each: list[Tensor] = []
    for windows in _windows(x, gradient, weight, numbers, layout, together):
        each.append(torch.matmul(left, windows.reshape(*lead, shared * num_in, num_places).transpose(-1, -2)))
    found = torch.cat([product.reshape(1, groups * num_out, shared, num_in) for product in each])
    return found.permute(1, 3, 0, 2).reshape(weight.shape)


_LONG_ROW = 24
"""With rows of so many places or more, slices of them are fast, and moving the images last takes longer than it saves."""

_MANY_COLUMNS = 16
"""Products of fewer columns are slow. From so many on it takes longer to put the windows of several taps together first."""


def _together(num_in: int, taps: Sequence[int]) -> int:
    """Returns the number of axes, counted from the last, whose taps share a product."""
    counts = range(len(taps))
    return next((n for n in counts if num_in * math.prod(taps[len(taps) - n :]) >= _MANY_COLUMNS), len(taps))


class _Layout(NamedTuple):
    """[G, channels of a group, ..., N], or [G, channels of a group, N, ...].

    With the images last, windows with a stride are made of longer pieces than single numbers, and those without of whole images.
    """

    groups: int
    images_last: bool

    def of(self, x: Tensor) -> Tensor:
        num_images, num_channels, *sizes = x.shape
        if self.images_last:
            return (
                x.reshape(num_images, math.prod(x.shape[1:]))
                .permute(1, 0)
                .reshape(self.groups, num_channels // self.groups, *sizes, num_images)
            )
        return x.permute(1, 0, *range(2, x.dim())).reshape(self.groups, num_channels // self.groups, num_images, *sizes)

    @property
    def first_axis(self) -> int:
        """Of those of an image."""
        return 2 if self.images_last else 3


def _windows(x: Tensor, gradient: Tensor, weight: Tensor, numbers: Numbers, layout: _Layout, together: int) -> list[Tensor]:
    """Returns the elements of the images that taps meet at each place.

    There is a tensor for each tap of the first axes, which has the channels for all taps of the last `together` axes one after another.
    """
    taps, places = weight.shape[2:], gradient.shape[2:]
    axes = range(len(taps))
    whole = layout.of(x)
    if any(numbers.padding):
        pads = [size for i in reversed(axes) for size in (numbers.padding[i],) * 2]
        whole = aten.constant_pad_nd.default(whole, [0, 0, *pads] if layout.images_last else pads)
    parts = [whole]
    for i in reversed(axes):  # the other slices are then copies of whole rows, and several taps share the first
        axis, step, length = layout.first_axis + i, numbers.stride[i], (places[i] - 1) * numbers.stride[i] + 1
        firsts = [tap * numbers.dilation[i] for tap in range(taps[i])]
        parts = [_sliced(part, axis, first, first + length, step) for first in firsts for part in parts]
        if i >= len(taps) - together:
            parts = [torch.cat(parts, 1)]
    return parts


def _sliced(x: Tensor, axis: int, first: int, last: int, step: int) -> Tensor:
    return x if (first, last, step) == (0, x.shape[axis], 1) else aten.slice.Tensor(x, axis, first, last, step)
