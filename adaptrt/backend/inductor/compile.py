"""Compiles a graph with Inductor: fused C++ kernels on the CPU, Triton on a GPU.

The graph goes to Inductor's graph compiler directly. Dynamo and AOTAutograd, which `torch.compile` would run first, have nothing to do
here: the graph is functional, holds no autograd, and inputs are checked by `Program`, so no guards are evaluated when it runs.

Inductor is imported by the functions that use it: importing it takes seconds, and it warns about its own deprecations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from adaptrt.backend.base import COMPILING, Backend, Building, Form, Runner, rehearsing
from adaptrt.backend.inductor.costly_loops import costly_loops_vectorised
from adaptrt.backend.inductor.exchange import exchanged
from adaptrt.backend.inductor.few_libraries import few_libraries
from adaptrt.backend.inductor.index_strides import quick_strides
from adaptrt.backend.inductor.recorded import record
from adaptrt.backend.inductor.rewrites import channel_sums, convolutions_as_products, inline_small_matmuls
from adaptrt.backend.inductor.rewrites.compute_once import compute_once, computed_once
from adaptrt.backend.inductor.rewrites.inline_small_matmuls import small_matmul
from adaptrt.backend.inductor.rewrites.one_channel_last import one_channel_last
from adaptrt.backend.inductor.rewrites.products_by_onednn import products_by_onednn
from adaptrt.backend.inductor.small_matmuls import small_matmuls_in_place_of_loops
from adaptrt.errors import CompilerUnavailable
from adaptrt.graph.collector import collecting, garbage_collection_paused
from adaptrt.graph.ir import Graph, autocast_off
from adaptrt.graph.passes.base import Pass, apply, copy_module
from adaptrt.graph.passes.decompose import decompose
from adaptrt.graph.passes.functionalise import functionalise
from adaptrt.graph.passes.merge_duplicates import merge_duplicates
from adaptrt.graph.passes.own_outputs import own_outputs
from adaptrt.graph.passes.remove_identities import remove_identities
from adaptrt.graph.passes.retrace import fake_inputs

_KEPT = torch.ops.aten.embedding_dense_backward.default
"""Left to ATen. Decomposed, the gradient of an embedding is a scatter into a buffer, and the CPU code of 2.13 fuses with it what reads that
buffer: with a task axis the numbers are silently wrong."""


def _decompose(graph: Graph) -> Graph:
    from torch._inductor.decomposition import select_decomp_table

    importlib.import_module("torch._inductor.lowering")  # a rule uses it without importing it
    table: dict[Any, Callable[..., Any]] = {op: rule for op, rule in select_decomp_table().items() if op != _KEPT}
    for op, rule in itertools.chain(*(part.RULES.items() for part in (inline_small_matmuls, convolutions_as_products, channel_sums))):
        table[op] = _first_of(rule, table.get(op))
    return decompose(graph, table)


def _first_of(rule: Callable[..., Any], other: Callable[..., Any] | None) -> Callable[..., Any]:
    def either(*args: Any, **kwargs: Any) -> Any:
        found = rule(*args, **kwargs)
        return other(*args, **kwargs) if found is NotImplemented and other is not None else found

    return either


def _keep_strides(module: torch.fx.GraphModule, num_results: int) -> torch.fx.GraphModule:
    """Asks for the first `num_results` results in the memory layout that eager code gives them; the rest only a next program sees.

    Inductor chooses another where it is faster for a convolution. Such weights make eager code that follows compute in another layout, in
    which it draws other random numbers, and are copied when they are the next program's input.
    """
    end = module.graph.output_node()
    values = [value.meta["val"] for value in end.args[0]]  # type: ignore[union-attr]
    end.meta["user_visible_output_idxs"] = list(range(num_results))
    end.meta["original_output_strides"] = [value.stride() for value in values]
    return module


_CACHE_TAG = "adaptrt 6"
"""Part of the key under which Inductor keeps a compiled graph on disk. The key knows the graph and Inductor's settings, not what this file
changes in Inductor: a change of that needs a new tag."""

LOWERING = (
    Pass("convolutions_as_products, inline_small_matmuls and decompose for Inductor", _decompose),
    functionalise,
    remove_identities,
    merge_duplicates,
)
PASSES = (*LOWERING, one_channel_last, products_by_onednn, compute_once, own_outputs)


@dataclasses.dataclass(frozen=True, slots=True)
class Inductor(Backend):
    """Inductor, with the settings that the process has in `torch._inductor.config`.

    What it compiles is kept in Inductor's cache on disk, so that another process has it in a fraction of the time.
    """

    name = "inductor"
    fuses = True

    def builds_ahead(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def lower(self, graph: Graph) -> Graph:
        return apply((*LOWERING, own_outputs), graph)

    def compile(self, graph: Graph) -> Runner:
        if not rehearsing():
            return _runner(*_compile(graph, None))
        waits: list[Callable[[], None]] = []
        compiled, lowered = _compile(graph, waits)

        def finish() -> Runner:
            try:
                for wait in waits:
                    wait()
            except Exception:  # fails again, unless the processor was trusted in vain: then instructions are tried out
                return _runner(*_compile(graph, None))
            return _runner(compiled, lowered)

        forms = _forms(compiled, lowered)
        return finish() if forms is None else Building(forms, finish)


@functools.cache
def let_freed_memory_stay() -> None:
    """Lets the C library keep memory that was freed, where it would give back to the system what the next call asks for again.

    Every page of memory that is fresh from the system costs a fault: of adapting a convolutional network on the CPU that was a third. The C
    library of GNU adapts to what a process does: whoever frees a large block will ask for more of its size. So one is freed, which was
    never written to. From then on the process's blocks of up to 32 MiB lie in its heaps, each of which keeps up to 64 MiB free at its end.
    Other C libraries do not mind, and limits that the user has set (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_) stand.
    """
    torch.empty(_LARGEST_BLOCK, dtype=torch.uint8, device="cpu")


_LARGEST_BLOCK = (1 << 25) - (1 << 13)
"""Bytes, below the 32 MiB from which on GNU's C library learns nothing."""


def _compile(graph: Graph, waits: list[Callable[[], None]] | None) -> tuple[Any, Graph]:
    """What Inductor makes of a graph, and the graph that it was given. `waits` as for `few_libraries`."""
    if all(entry.spec.device.type == "cpu" for entry in graph.signature.inputs):
        let_freed_memory_stay()
    with COMPILING, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        # PyTorch 2.11 says so of every softmax over fewer than eight numbers; nobody can do anything about it.
        warnings.filterwarnings("ignore", message=r"\s*Online softmax is disabled")
        from torch._dynamo import utils as dynamo_utils
        from torch._inductor import compile_fx, config
        from torch._inductor.codegen.wrapper import PythonWrapperCodegen
        from torch._inductor.cpu_vec_isa import pick_vec_isa
        from torch._inductor.lowering import lowerings, make_fallback, register_lowering

        if _KEPT not in lowerings:
            make_fallback(_KEPT, warn=False, override_decomp=True)
        if computed_once not in lowerings:
            register_lowering(computed_once, type_promotion_kind=None)(_in_memory)

        cache_config: Any = torch.compiler.config
        graph = apply(PASSES, graph)
        num_results = sum(not output.kept for output in graph.signature.outputs)
        # Inductor keeps what it compiled on disk only where a tracing context with a shape environment is.
        mode = FakeTensorMode(shape_env=ShapeEnv())
        inputs = fake_inputs(mode, graph.signature.inputs)
        with contextlib.ExitStack() as stack:
            for context in (torch.inference_mode(False), torch.no_grad(), autocast_off(), mode, tracing(TracingContext(mode))):
                stack.enter_context(context)
            for context in (few_libraries(waits), quick_strides(), costly_loops_vectorised(), small_matmuls_in_place_of_loops()):
                stack.enter_context(context)
            if hasattr(PythonWrapperCodegen, "codegen_input_size_asserts"):  # `Program` has looked at inputs
                stack.enter_context(exchanged(PythonWrapperCodegen, "codegen_input_size_asserts", lambda wrapper: None))
            # What is not in the cache is made by this function.
            stack.enter_context(exchanged(compile_fx, "fx_codegen_and_compile", collecting(compile_fx.fx_codegen_and_compile)))
            # It would put generators back where they were, and other threads would draw the same numbers again. Compiling draws none, and
            # autotuning, where a user asks for it, puts back what it has drawn by itself.
            stack.enter_context(exchanged(dynamo_utils, "preserve_rng_state", contextlib.nullcontext))
            stack.enter_context(garbage_collection_paused())
            stack.enter_context(config.patch(_WORKAROUNDS | _threads(graph)))

            def compile_once() -> Any:
                # Code is for the instructions that were picked when it was generated, which the key does not know.
                with cache_config.patch(cache_key_tag=f"{_CACHE_TAG}, {num_results} results, {pick_vec_isa()}"):
                    return compile_fx.compile_fx_inner(_keep_strides(copy_module(graph), num_results), inputs)

            compiled = _trusting_the_processor(compile_once)
    return compiled, graph


def _in_memory(x: Any) -> Any:
    """Of an expression, as Inductor has it: the buffer in which it is computed."""
    x.realize()
    return x


def _runner(compiled: Any, graph: Graph) -> Runner:
    recorded = record(getattr(compiled, "current_callable", None), len(graph.signature.inputs))
    if recorded is not None:
        return recorded

    def run(values: list[Tensor]) -> Sequence[Tensor]:
        return compiled(values)

    return run


def _forms(compiled: Any, graph: Graph) -> list[Form] | None:
    """Of the results, in the layout that Inductor chose; None if it does not say."""
    strides = getattr(compiled, "output_strides", None)
    if strides is None or len(strides) != len(graph.signature.outputs) or None in strides:
        return None
    specs = [output.spec for output in graph.signature.outputs]
    return [
        Form(spec.shape, tuple([int(stride) for stride in of_one]), spec.dtype, spec.device)
        for spec, of_one in zip(specs, strides, strict=True)
    ]


def _trusting_the_processor(compile_once: Callable[[], Any]) -> Any:
    """Compiles for the vector instructions that the processor has, without Inductor's trials of them.

    Before its first kernel for the CPU Inductor builds and loads a small library for each set of instructions, to find out whether compiler
    and PyTorch go along: up to four with PyTorch's headers, which take seconds each, and up to seven short ones. Here programs themselves
    are the trial: if one cannot be built or loaded, all is forgotten and Inductor's own trials are made.
    """
    from torch._inductor import config, cpu_vec_isa

    global _trusts_the_processor
    if config.cpp.vec_isa_ok is not None or not _trusts_the_processor:
        return compile_once()
    try:
        with exchanged(cpu_vec_isa.VecISA, "check_build", _passes):
            return compile_once()
    except Exception:
        _forget_instructions()
        result = compile_once()  # raises again where the instructions were not the reason
        _trusts_the_processor = False
        return result


def _passes(self: Any, code: str) -> bool:
    """In place of `VecISA.check_build`."""
    del self, code
    return True


def _forget_instructions() -> None:
    """Lets Inductor find out anew which vector instructions can be used."""
    from torch._inductor import cpu_vec_isa

    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    for isa in cpu_vec_isa.supported_vec_isa_list:
        for name in dir(type(isa)):
            if name.startswith(("_is_", "is_")):
                vars(isa).pop(name, None)  # what a trial has found, over the class's False
        for name in ("__bool__", "_VecISA__bool__impl", "is_avx512_bf16_supported", "is_amx_fp16_supported"):
            forget = getattr(getattr(type(isa), name, None), "cache_clear", None)
            if forget is not None:
                forget()


_trusts_the_processor = True

_MAX_ELEMENTS_OF_ONE_THREAD = 1 << 13


def _threads(graph: Graph) -> dict[str, int]:
    """One thread for operations that are over before a second one has started; the process's setting otherwise."""
    operations = [node for node in graph.module.graph.nodes if node.op == "call_function" and node.target != computed_once]
    nodes = [node for node in operations if isinstance(node.meta.get("val"), Tensor)]
    return {"cpp.threads": 1} if sum(map(_num_elements, nodes)) <= _MAX_ELEMENTS_OF_ONE_THREAD * len(nodes) else {}


def _num_elements(node: torch.fx.Node) -> int:
    """Of the result; a product counts as a loop that takes as long, and computes 16 sums of products in the time of one element."""
    size = node.meta["val"].numel()
    return size if node.target != small_matmul else size * max(1, node.all_input_nodes[0].meta["val"].shape[-1] // 16)


def warn_if_missing(device: torch.device) -> bool:
    """Whether programs for `device` cannot be compiled here; says so in a warning, once a process."""
    reason = _missing(device.type)
    if reason is not None and device.type not in _WARNED:
        _WARNED.add(device.type)
        warnings.warn(
            f"{reason}; programs run on the eager backend, correct but slower. Install one, or pass backend='eager'.",
            CompilerUnavailable,
            stacklevel=5,
        )
    return reason is not None


# Fusing kernels that share no data makes the CPU code generator of 2.11 use a buffer before it allocates it (UnboundLocalError).
_WORKAROUNDS: dict[str, int] = {"cpp.max_horizontal_fusion_size": 1} if torch.__version__.startswith(("2.11.", "2.12.")) else {}

_WARNED: set[str] = set()


@functools.cache
def _missing(device_type: str) -> str | None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch.utils._triton import has_triton

        if device_type != "cpu":
            return None if has_triton() else "Triton was not found"
        try:
            compiler = get_cpp_compiler()
        except Exception:  # InvalidCxxCompiler, or what the failed search for one raised
            return "no C++ compiler was found"
    if shutil.which(compiler) is None:
        return f"the C++ compiler '{compiler}' was not found"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "the Python headers were not found (Python.h, on Debian in the package python3-dev), and compiled kernels need them"
    return None
