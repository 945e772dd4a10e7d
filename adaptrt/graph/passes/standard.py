"""The passes that every captured graph goes through, in order."""

from __future__ import annotations

from adaptrt.graph.passes.base import Pass
from adaptrt.graph.passes.convolution_gradients import convolution_gradients
from adaptrt.graph.passes.functionalise import functionalise
from adaptrt.graph.passes.merge_duplicates import merge_duplicates
from adaptrt.graph.passes.merge_sums import merge_sums
from adaptrt.graph.passes.numbers_as_tensors import numbers_as_tensors
from adaptrt.graph.passes.own_outputs import own_outputs
from adaptrt.graph.passes.relax_views import relax_views
from adaptrt.graph.passes.remove_identities import remove_identities

STANDARD: tuple[Pass, ...] = (
    functionalise,
    numbers_as_tensors,
    relax_views,
    remove_identities,
    convolution_gradients,
    merge_duplicates,
    merge_sums,
    own_outputs,
)
