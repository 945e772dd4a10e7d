"""Removes gradients of convolutions that nothing uses, and computes the others in the way that is fast.

Autograd asks `convolution_backward` for the gradients of image and weights together. In the gradient of a gradient, one of them is often
not used, and it costs as much as the other. In addition, the double backward of a convolution expresses a weight gradient as a convolution
of images by images, with batch and channels exchanged. These are the same sums, but in a shape at which libraries are slow, and after two
copies.

The double backward of a transposed convolution hands its output padding on to the plain convolutions that it consists of. `convolution`
ignores it there and `convolution_backward` refuses it, so it is set to zero first.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from adaptrt.graph.ir import Graph
from adaptrt.graph.passes.base import Pass, add_call, has_other_strides, renew_value, strides_of

aten = torch.ops.aten
_TRANSPOSED = {aten.convolution.default: 6, aten.convolution_backward.default: 7}
"""Where each operation's arguments say that it is transposed. The output padding comes next."""


def _without_output_padding(graph: Graph) -> Graph:
    """Sets the output padding of convolutions that are not transposed to zero."""
    for node in graph.module.graph.nodes:
        place = _TRANSPOSED.get(node.target)
        if place is not None and not node.args[place] and any(node.args[place + 1]):
            node.update_arg(place + 1, [0] * len(node.args[place + 1]))
    return graph


def _narrow(graph: Graph) -> Graph:
    module = graph.module
    for node in module.graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        used = {user.args[1] for user in node.users}
        mask = [asked and index in used for index, asked in enumerate(node.args[-1])]
        if mask != list(node.args[-1]) and all(user.target is operator.getitem for user in node.users):
            node.args = (*node.args[:-1], mask)
            node.meta["val"] = tuple(value if asked else None for value, asked in zip(node.meta["val"], mask, strict=True))
    return graph


def _name_weight_gradients(graph: Graph) -> Graph:
    module = graph.module
    changed: set[fx.Node] = set()
    for node in module.graph.find_nodes(op="call_function", target=aten.convolution.default):
        arguments = _as_weight_gradient(node)
        if arguments is None:
            continue
        value: Tensor = node.meta["val"]
        image, gradient, shape, rest = arguments
        with module.graph.inserting_before(node):
            # convolution_backward reads only the shape of the weights here.
            weights = add_call(module, aten.full.default, shape, 0, dtype=value.dtype, device=value.device)
            found = add_call(module, aten.convolution_backward.default, gradient, image, weights, None, *rest, [False, True, False])
            of_weights = add_call(module, operator.getitem, found, 1)
            renewed = add_call(module, aten.transpose.int, of_weights, 0, 1)
        node.replace_all_uses_with(renewed)
        if has_other_strides(renewed, node):
            changed.add(renewed)
        module.graph.erase_node(node)
    for node in module.graph.nodes if changed else ():  # the strides of later values may have changed, too
        if node.op == "call_function" and not changed.isdisjoint(node.all_input_nodes):
            before = strides_of(node.meta["val"])
            renew_value(node)
            if strides_of(node.meta["val"]) != before:
                changed.add(node)
    module.graph.eliminate_dead_code()
    return graph


def _as_weight_gradient(node: fx.Node) -> tuple[fx.Node, fx.Node, list[int], tuple[Any, ...]] | None:
    """Returns image, gradient, shape of the weights and the convolution's numbers if `node` is a weight gradient in disguise.

    That is a convolution of images by images, both with their first two axes exchanged.
    """
    image, weights, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    if transposed or groups != 1 or bias is not None:
        return None
    images = _exchanged(image), _exchanged(weights)
    if images[0] is None or images[1] is None:
        return None
    sizes, gradients = images[0].meta["val"].shape[2:], images[1].meta["val"].shape[2:]
    inputs, outputs, *kernel = node.meta["val"].shape  # of weights [outputs, inputs, *kernel], exchanged
    # Strides and dilations of the original convolution have exchanged their places in this one.
    numbers: Any = zip(sizes, padding, stride, kernel, dilation, strict=True)  # type: ignore[arg-type]
    expected = [(length + 2 * pad - stretch * (taps - 1) - 1) // step + 1 for length, pad, stretch, taps, step in numbers]
    if list(gradients) != expected:
        return None
    return images[0], images[1], [outputs, inputs, *kernel], (dilation, padding, stride, False, output_padding, 1)


def _exchanged(node: Any) -> fx.Node | None:
    """Returns the node whose first two axes `node` exchanges, or None if `node` is no such transposition."""
    if node.target is aten.transpose.int and sorted(axis % node.meta["val"].dim() for axis in node.args[1:]) == [0, 1]:
        return node.args[0]
    return None


convolution_gradients = Pass("convolution_gradients", lambda graph: _narrow(_name_weight_gradients(_without_output_padding(graph))))
