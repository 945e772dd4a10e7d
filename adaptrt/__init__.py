"""adaptrt: a model, an optimiser and a number of steps become one compiled, differentiable program that adapts the model."""

from adaptrt import errors, optim
from adaptrt.adjoint import Adjoint, FirstOrder, Implicit, Replay, Stash, Truncated, Unrolled
from adaptrt.backend import Backend, CudaGraph, Eager, Inductor
from adaptrt.export import Exported, load
from adaptrt.runtime.adapted import Adapted
from adaptrt.runtime.compile import compile_unroll
from adaptrt.runtime.execution import Result
from adaptrt.runtime.stack import stack, where
from adaptrt.runtime.trace import trace
from adaptrt.runtime.unroll import CompiledUnroll

__version__ = "0.1.0"

__all__ = [
    "Adapted",
    "Adjoint",
    "Backend",
    "CompiledUnroll",
    "CudaGraph",
    "Eager",
    "Exported",
    "FirstOrder",
    "Implicit",
    "Inductor",
    "Replay",
    "Result",
    "Stash",
    "Truncated",
    "Unrolled",
    "compile_unroll",
    "errors",
    "load",
    "optim",
    "stack",
    "trace",
    "where",
]
