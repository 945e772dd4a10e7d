"""Compiles a graph with Inductor: fused C++ kernels on the CPU, Triton on a GPU.

The graph goes to Inductor's graph compiler directly. Dynamo and AOTAutograd, which `torch.compile` would run first, are not needed: the
graph is functional and contains no autograd. `Program` checks the inputs, so no guards are evaluated when the graph runs.

What is changed in Inductor for the time of one compilation is listed in `exchange.py`. If compiling fails with these changes, it is tried
again without them.

Inductor is imported by the functions that use it, because importing it takes seconds and gives warnings about its own deprecations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import os
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptrt.backend.base import COMPILING, Backend, Building, Form, Runner, rehearsing
from adaptrt.backend.eager import Eager
from adaptrt.backend.inductor import processor
from adaptrt.backend.inductor.assumptions import assumptions_in_the_code, number_of_threads
from adaptrt.backend.inductor.available import cannot_build, comes_from_outside, refuse_without_assertions
from adaptrt.backend.inductor.cached_files import cached_files, free_with
from adaptrt.backend.inductor.exchange import COLLECTING, COMPILER, RANDOM_STATE, SIZE_ASSERTS, active, in_use
from adaptrt.backend.inductor.few_libraries import few_libraries
from adaptrt.backend.inductor.index_strides import quick_strides
from adaptrt.backend.inductor.instructions import trusting_the_processor
from adaptrt.backend.inductor.recorded import record
from adaptrt.backend.inductor.rewrites import channel_sums, convolutions_as_products, inline_small_matmuls
from adaptrt.backend.inductor.rewrites.compute_once import compute_once, computed_once
from adaptrt.backend.inductor.rewrites.inline_small_matmuls import small_matmul
from adaptrt.backend.inductor.rewrites.one_channel_last import one_channel_last
from adaptrt.backend.inductor.rewrites.products_by_onednn import products_by_onednn
from adaptrt.backend.inductor.small_matmuls import small_matmuls_in_place_of_loops
from adaptrt.backend.inductor.sources import tag
from adaptrt.backend.inductor.tables import shorten_tables
from adaptrt.graph.collector import collecting, garbage_collection_paused
from adaptrt.graph.exchange import exchanged, give_up, nothing_exchanged
from adaptrt.graph.forgetting import forgetting
from adaptrt.graph.ir import Graph, autocast_off
from adaptrt.graph.passes.base import Pass, apply, copy_module
from adaptrt.graph.passes.decompose import decompose
from adaptrt.graph.passes.functionalise import functionalise
from adaptrt.graph.passes.merge_duplicates import merge_duplicates
from adaptrt.graph.passes.own_outputs import own_outputs
from adaptrt.graph.passes.remove_identities import remove_identities
from adaptrt.graph.passes.retrace import fake_inputs
from adaptrt.process import leaving_nothing, warnings_put_back

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


def keep_strides(module: torch.fx.GraphModule, num_results: int) -> torch.fx.GraphModule:
    """Asks for the first `num_results` results in the memory layout that eager code gives them. The others only go to another program.

    Inductor chooses another layout where that is faster for a convolution. Weights in such a layout would make the eager code that follows
    compute in it, too, where it draws other random numbers. They would also have to be copied to be inputs of the next program.
    """
    end = module.graph.output_node()
    values = [value.meta["val"] for value in end.args[0]]  # type: ignore[union-attr]
    end.meta["user_visible_output_idxs"] = list(range(num_results))
    end.meta["original_output_strides"] = [value.stride() for value in values]
    return module


LOWERING = (
    Pass("convolutions_as_products, inline_small_matmuls and decompose for Inductor", _decompose),
    functionalise,
    remove_identities,
    merge_duplicates,
)
PASSES = (*LOWERING, one_channel_last, products_by_onednn, compute_once, own_outputs)


@dataclasses.dataclass(frozen=True, slots=True)
class Inductor(Backend):
    """Compiles by Inductor, with the settings that the process has in `torch._inductor.config`.

    Compiled programs are kept in Inductor's cache on disk, from which another process gets them in a fraction of the time.

    Raises:
      InvalidArgument: as `refuse_without_assertions` raises it.
    """

    name = "inductor"
    fuses = True

    def __post_init__(self) -> None:
        refuse_without_assertions()

    def builds_ahead(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def lower(self, graph: Graph) -> Graph:
        return apply((*LOWERING, own_outputs), graph) if COMPILER.holds else graph

    def private_parts(self) -> tuple[str, ...]:
        return active()

    def compile(self, graph: Graph) -> Runner:
        if not COMPILER.holds:
            return Eager().compile(graph)
        if not rehearsing():
            return Eager().compile(graph) if (found := _compiled_or_not(graph, None)) is None else _runner(*found)
        waits: list[Callable[[], None]] = []
        found = _compiled_or_not(graph, waits)
        if found is None:
            return Eager().compile(graph)
        forms = _forms(*found)

        process = os.getpid()

        def finish() -> Runner:
            if os.getpid() == process:  # otherwise the threads that build did not survive the fork
                # What fails here fails again below, unless the reason was the processor's instructions, or what is exchanged.
                with contextlib.suppress(Exception):
                    for wait in waits:
                        wait()
                    return _runner(*found)
            again = _compiled_or_not(graph, None)
            return _in_forms(Eager().compile(graph), forms) if again is None else _runner(*again)

        return finish() if forms is None else Building(forms, finish)


@functools.cache
def let_freed_memory_stay() -> None:
    """Makes the C library keep memory that was freed, instead of giving back to the system what the next call asks for again.

    Every page of memory that is fresh from the system costs a page fault. That was a third of the time of adapting a convolutional network
    on the CPU. GNU's C library raises its thresholds when a process frees a large block, as it expects more blocks of this size. So one is
    allocated here, and freed without having been written to. From then on blocks of up to 32 MiB lie in the process's heaps, each of which
    keeps up to 64 MiB free at its end. Other C libraries are not affected, and limits that the user has set (MALLOC_MMAP_THRESHOLD_,
    MALLOC_TRIM_THRESHOLD_) hold.
    """
    torch.empty(_LARGEST_BLOCK, dtype=torch.uint8, device="cpu")


_LARGEST_BLOCK = (1 << 25) - (1 << 13)
"""Bytes. GNU's C library does not raise its thresholds for blocks of 32 MiB and more."""


def _compiled_or_not(graph: Graph, waits: list[Callable[[], None]] | None) -> tuple[Any, Graph] | None:
    """As `_compile`; None, and a warning, if programs cannot be built or kept on this machine at present."""
    try:
        return _compile(graph, waits)
    except Exception as error:
        if not cannot_build(error):
            raise
        return None
    finally:
        shorten_tables()


@leaving_nothing
@forgetting
def _compile(graph: Graph, waits: list[Callable[[], None]] | None) -> tuple[Any, Graph]:
    """Returns what Inductor makes of a graph, and the graph that Inductor was given. `waits` is as for `few_libraries`."""
    if all(entry.spec.device.type == "cpu" for entry in graph.signature.inputs):
        let_freed_memory_stay()
    with COMPILING, warnings_put_back():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        # PyTorch 2.11 says so of every softmax over fewer than eight numbers; nobody can do anything about it.
        warnings.filterwarnings("ignore", message=r"\s*Online softmax is disabled")
        from torch._guards import TracingContext, tracing
        from torch._inductor import compile_fx, config
        from torch._inductor.cpu_vec_isa import pick_vec_isa
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        register_operations()
        cache_config: Any = torch.compiler.config
        graph = apply(PASSES, graph)
        num_results = sum(not output.kept for output in graph.signature.outputs)
        # Inductor keeps what it compiled on disk only where a tracing context with a shape environment is.
        mode = FakeTensorMode(shape_env=ShapeEnv())
        inputs = fake_inputs(mode, graph.signature.inputs)
        sources = tag()
        settings = WORKAROUNDS | threads_for(graph) | ({} if sources else {"fx_graph_cache": False})

        def compile_once() -> Any:
            if waits is not None:
                waits.clear()  # of an attempt that failed
            # What the key on disk does not know, and code depends on: besides our sources the processor and what was picked of it, and
            # the dtype of numbers, which PyTorch 2.11 leaves out.
            machine = f"{pick_vec_isa()} of {processor.instruction_sets()}"
            python = f"{torch.get_default_dtype()}, assertions {__debug__}"
            key = f"{sources}, {num_results} results, {machine}, {python}, exchanged: {', '.join(in_use())}"
            with cache_config.patch(cache_key_tag=key):
                return compile_fx.compile_fx_inner(keep_strides(copy_module(graph), num_results), inputs)

        with contextlib.ExitStack() as stack:
            for context in (torch.inference_mode(False), torch.no_grad(), autocast_off(), mode, tracing(TracingContext(mode))):
                stack.enter_context(context)
            stack.enter_context(config.patch(settings))
            _ = RANDOM_STATE.holds  # warns, which is no failure of the compiler
            try:
                with _exchanges(waits), garbage_collection_paused():
                    compiled = trusting_the_processor(compile_once)
            except Exception as error:
                if comes_from_outside(error):
                    raise
                with nothing_exchanged():
                    compiled = compile_once()  # raises again where what is exchanged was not the reason
                give_up(f"what this library exchanges in PyTorch's compiler made it fail ({type(error).__name__}: {error})")
    free_with(compiled)
    return compiled, graph


def register_operations() -> None:
    """Has Inductor know what is left to ATen, and operations of ours."""
    from torch._inductor.lowering import lowerings, make_fallback, register_lowering

    if _KEPT not in lowerings:
        make_fallback(_KEPT, warn=False, override_decomp=True)
    if computed_once not in lowerings:
        register_lowering(computed_once, type_promotion_kind=None)(_in_memory)


@contextlib.contextmanager
def _exchanges(waits: list[Callable[[], None]] | None) -> Generator[None]:
    """Within the block, PyTorch's compiler is changed in everything that is exchanged for a whole compilation."""
    with contextlib.ExitStack() as stack:
        for context in (
            few_libraries(waits),
            cached_files(),
            quick_strides(),
            small_matmuls_in_place_of_loops(),
            assumptions_in_the_code(),
            exchanged(SIZE_ASSERTS, lambda original: no_assertions),  # `Program` has looked at inputs
            exchanged(COLLECTING, collecting),  # what is not in the cache is made by this function
            # It would put generators back where they were, and other threads would draw the same numbers again. Compiling draws none, and
            # autotuning, where a user asks for it, puts back what it has drawn by itself.
            exchanged(RANDOM_STATE, lambda original: contextlib.nullcontext),
        ):
            stack.enter_context(context)
        yield


def no_assertions(wrapper: Any) -> None:
    """In place of `PythonWrapperCodegen.codegen_input_size_asserts`."""


def _in_memory(x: Any) -> Any:
    """Has Inductor compute an expression into a buffer."""
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
    """The forms of the results, in the layout that Inductor chose. None if it does not say which."""
    strides = getattr(compiled, "output_strides", None)
    if strides is None or len(strides) != len(graph.signature.outputs) or None in strides:
        return None
    specs = [output.spec for output in graph.signature.outputs]
    return [
        Form(spec.shape, tuple([int(stride) for stride in of_one]), spec.dtype, spec.device)
        for spec, of_one in zip(specs, strides, strict=True)
    ]


def _in_forms(run: Runner, forms: Sequence[Form] | None) -> Runner:
    """Returns a runner whose results have the strides that were announced."""
    if forms is None:
        return run

    def run_in_forms(values: list[Tensor]) -> list[Tensor]:
        return [
            value if value.stride() == form.strides else value.new_empty_strided(form.shape, form.strides).copy_(value)
            for value, form in zip(run(values), forms, strict=True)
        ]

    return run_in_forms


_MAX_ELEMENTS_OF_ONE_THREAD = 1 << 13


def threads_for(graph: Graph) -> dict[str, Any]:
    """Settings of how many threads a program is for: one, if its operations are over before a second thread has started."""
    operations = [node for node in graph.module.graph.nodes if node.op == "call_function" and node.target != computed_once]
    nodes = [node for node in operations if isinstance(node.meta.get("val"), Tensor)]
    return {"cpp.threads": 1} if sum(map(_num_elements, nodes)) <= _MAX_ELEMENTS_OF_ONE_THREAD * len(nodes) else number_of_threads()


def _num_elements(node: torch.fx.Node) -> int:
    """Elements of the result. A product counts as a loop of the same duration; in the time of one element it adds 16 products."""
    size = node.meta["val"].numel()
    return size if node.target != small_matmul else size * max(1, node.all_input_nodes[0].meta["val"].shape[-1] // 16)


# Fusing kernels that share no data makes the CPU code generator of 2.11 use a buffer before it allocates it (UnboundLocalError).
WORKAROUNDS: dict[str, int] = {"cpp.max_horizontal_fusion_size": 1} if torch.__version__.startswith(("2.11.", "2.12.")) else {}
