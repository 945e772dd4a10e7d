"""Translates graphs to ONNX models.

`to_onnx` lowers a graph to forward operations (`adaptrt.graph.passes.lower_to_forward`) and translates these one by one, as the tables in
`elementwise`, `shapes`, `products`, `pools`, `reductions` and `indexing` say. `unsupported` names the operations that no table knows.

Models use the default domain only, so that every runtime can read them, and opset 18: it is the first in which all reductions take their
axes as an input and scattering knows sums and maxima, and ONNX Runtime has run it since release 1.14. What later opsets add is of no use
here: `Gelu` (20) is recognised by ONNX Runtime in its parts, and group normalisation (21) has a gradient that needs its statistics, which
ONNX's operation does not return.

Known limits: complex numbers and bfloat16 are refused. In float64 a model is valid, but ONNX Runtime has no kernels for some operations,
convolutions and erf among them. Where a unit of a ReLU is off and the gradient that arrives there is infinite or NaN, the result is NaN and
not zero.
"""

from __future__ import annotations

from adaptrt.export.onnx.translate import to_onnx, unsupported

__all__ = ["to_onnx", "unsupported"]
