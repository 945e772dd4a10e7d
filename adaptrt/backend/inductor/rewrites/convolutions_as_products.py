"""Replaces convolutions on the CPU that have more weights than windows by a gathering of windows and a matrix product.

A convolution library brings the weights into a layout of its own at every call. That takes little of the time if the weights are applied to
many windows. It takes most of the time in the last layers of a deep network: 512 channels on 2×2 positions of 25 images take 6 to 10 ms,
and the product takes 2. The gathered windows take no more memory than the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

aten = torch.ops.aten

_DTYPES = (torch.float32, torch.float64)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """x [N, C, H, W], weight [O, C, h, w] -> [N, O, H', W']; NotImplemented where a convolution is better."""
    del output_padding
    if x.device.type != "cpu" or x.dtype not in _DTYPES or x.dim() != 4 or transposed or groups != 1:
        return NotImplemented
    stride, padding, dilation = (list(numbers) * (3 - len(numbers)) for numbers in (stride, padding, dilation))  # one number is for both
    images, (outputs, _, *window) = x.shape[0], weight.shape
    height, width = (
        (length + 2 * pad - spread * (size - 1) - 1) // step + 1
        for length, pad, spread, size, step in zip(x.shape[2:], padding, dilation, window, stride, strict=True)
    )
    if not 0 < images * height * width <= outputs:
        return NotImplemented
    windows = aten.im2col.default(x, window, dilation, padding, stride).transpose(1, 2)  # [N, H' W', C h w]
    found = windows.reshape(images * height * width, -1) @ weight.reshape(outputs, -1).T
    if bias is not None:
        found = found + bias
    found = found.reshape(images, height, width, outputs).permute(0, 3, 1, 2)
    if torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight)):
        return found
    # In the layout that the convolution gives: in another, eager code that follows draws other random numbers.
    return found.clone(memory_format=torch.contiguous_format)


RULES: dict[Any, Callable[..., Any]] = {aten.convolution.default: _convolution}
"""What replaces each operation. The backend applies these rules together with its own."""
