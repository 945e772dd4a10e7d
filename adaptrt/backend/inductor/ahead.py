"""Compiles graphs into an AOTInductor package, a file that runs without Python, and loads one.

The graphs go through the passes of this backend, but for the one whose operation is written in Python. Inductor then writes C++ for the
whole program instead of kernels for Python to call.

A package holds machine code. Whoever loads one runs it, so its source has to be trusted like that of any program.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptrt.backend.base import COMPILING
from adaptrt.backend.inductor import thread_buffers
from adaptrt.backend.inductor.assumptions import assumptions_in_the_code
from adaptrt.backend.inductor.compile import PASSES, WORKAROUNDS, keep_strides, register_operations, threads_for
from adaptrt.backend.inductor.index_strides import quick_strides
from adaptrt.backend.inductor.instructions import trusting_the_processor
from adaptrt.backend.inductor.rewrites.products_by_onednn import products_by_onednn
from adaptrt.backend.inductor.small_matmuls import small_matmuls_in_place_of_loops
from adaptrt.graph.forgetting import forgetting
from adaptrt.graph.ir import Graph, autocast_off
from adaptrt.graph.passes.base import apply, copy_module
from adaptrt.graph.passes.retrace import fake_inputs
from adaptrt.process import leaving_nothing, warnings_put_back

_PASSES = tuple(entry for entry in PASSES if entry is not products_by_onednn)


@leaving_nothing
@forgetting
def compile_ahead(graph: Graph, folder: str) -> Sequence[Any]:
    """Compiles a graph for this machine, and returns the files that `package` takes.

    Args:
      graph: without constants that are not inputs.
      folder: an empty one, where the files are written.
    """
    with COMPILING, warnings_put_back():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        from torch._guards import TracingContext, tracing
        from torch._inductor import compile_fx, config
        from torch._inductor.virtualized import V
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        register_operations()
        graph = apply(_PASSES, graph)
        mode = FakeTensorMode(shape_env=ShapeEnv())
        inputs = fake_inputs(mode, graph.signature.inputs)
        settings = {
            **WORKAROUNDS,
            **threads_for(graph),
            "cpp_wrapper": True,
            "aot_inductor.package": True,
            "aot_inductor.output_path": f"{folder}/",
            **thread_buffers.settings(),
        }
        if hasattr(config.aot_inductor, "enable_line_tables"):  # PyTorch >= 2.13: debug information, two thirds of a small program
            settings["aot_inductor.enable_line_tables"] = False

        def compile_once() -> Any:
            module = keep_strides(copy_module(graph), len(graph.signature.outputs))
            return compile_fx.compile_fx_inner(module, inputs, cpp_wrapper=True, is_inference=True)

        with contextlib.ExitStack() as stack:
            for context in (torch.inference_mode(False), torch.no_grad(), autocast_off(), mode, tracing(TracingContext(mode))):
                stack.enter_context(context)
            for context in (
                config.patch(settings),
                quick_strides(),
                small_matmuls_in_place_of_loops(in_one_file=True),
                assumptions_in_the_code(),
                thread_buffers.buffers_of_threads(),
            ):
                stack.enter_context(context)
            stack.enter_context(V.set_aot_compilation(True))
            compiled = trusting_the_processor(compile_once)
        return getattr(compiled, "filename", compiled)


def package(path: str | os.PathLike[str], files: Mapping[str, Sequence[Any]]) -> None:
    """Puts the files of several programs, by name, into one package.

    What their sources hold is left out: nothing reads it, and it names folders of the machine that compiled them. Their names stay, because
    the loader of PyTorch 2.11 finds the other files by them.
    """
    from torch._inductor.package.package import package_aoti

    for file in [file for own in files.values() for file in own if str(file).endswith(".cpp")]:
        Path(file).write_text("// left out\n")
    package_aoti(os.fspath(path), {_in_package(name): list(own) for name, own in files.items()})


def load_package(path: str | os.PathLike[str], name: str) -> Callable[[list[Tensor]], list[Tensor]]:
    """Loads a program of a package, and so runs code of its maker's. The caller checks that its inputs are what it was compiled for."""
    loader = torch._C._aoti.AOTIModelPackageLoader(os.fspath(path), _in_package(name), False, 1, -1)  # pyright: ignore
    return loader.boxed_run


def _in_package(name: str) -> str:
    """The name of a program in a package. None is part of another: PyTorch 2.11 would take "adapt_predict" for "adapt"."""
    return f"program-{name}-"
