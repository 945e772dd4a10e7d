"""Gives images of one channel the strides of the channels-last layout, so that convolutions of them write their result in it.

With one channel the two layouts are the same memory, and PyTorch takes such a tensor for channels-first. Then the first convolution writes
its result channels-first and all later ones write theirs channels-last, so that the operations between them transpose at every step.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from adaptrt.graph.ir import Graph
from adaptrt.graph.operations import is_view
from adaptrt.graph.passes.base import Pass

aten = torch.ops.aten
_IMAGE = {aten.convolution.default: 0, aten.convolution_backward.default: 1}


def _run(graph: Graph) -> Graph:
    module = graph.module
    renewed: dict[fx.Node, fx.Node] = {}
    for node in list(module.graph.nodes):
        position = _IMAGE.get(node.target)
        if position is None:
            continue
        image = node.args[position]
        value = image.meta["val"]
        if value.dim() != 4 or value.shape[1] != 1 or not value.is_contiguous() or value.device.type != "cpu":
            continue
        if is_view(image.target) or image.target is operator.getitem:
            continue  # Inductor takes the offset in memory that as_strided is not given for 0, also where it is not
        if image not in renewed:
            strides = [value.stride(0), 1, value.stride(2), value.stride(3)]
            with module.graph.inserting_after(image):
                renewed[image] = module.graph.call_function(aten.as_strided.default, (image, list(value.shape), strides))
            renewed[image].meta["val"] = value.as_strided(value.shape, strides)
        node.update_arg(position, renewed[image])
    return graph


one_channel_last = Pass("one_channel_last", _run)
