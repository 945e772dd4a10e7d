"""Lists every private part of PyTorch that compiling and running programs exchanges or relies on, and what happens without it.

`TABLE` is data for whoever has to support another PyTorch, and `active` says which entries hold in this one. What has no fallback is not in
it: fake tensors, dispatch modes and lazily compiled graph modules (`torch._subclasses`, `torch.utils._python_dispatch`,
`torch.fx._lazy_graph_module`) are what `capture` itself is made of.
"""

from __future__ import annotations

from adaptrt.backend.engine import FREED, RETAINED
from adaptrt.backend.entry_points import ENTRY_POINTS
from adaptrt.backend.guards import GUARDS, TANGENTS, TRANSFORMS
from adaptrt.graph.exchange import FX_TRACING, FX_TRACING_OF_OLD, Entry, Target
from adaptrt.graph.plain import CHECKPOINTS
from adaptrt.graph.pytrees import PYTREES

_INDUCTOR = "torch._inductor"

COMPILER = Entry(
    "compiler",
    "Inductor's graph compiler is called directly, with what its cache on disk needs, and with operations of our own.",
    "programs run on the eager backend, correct but slower",
    needed=(
        Target(f"{_INDUCTOR}.compile_fx", "compile_fx_inner"),
        Target(f"{_INDUCTOR}.config", "patch"),
        Target(f"{_INDUCTOR}.decomposition", "select_decomp_table", ()),
        Target(f"{_INDUCTOR}.lowering", "lowerings"),
        Target(f"{_INDUCTOR}.lowering", "make_fallback", keywords=("warn", "override_decomp")),
        Target(f"{_INDUCTOR}.lowering", "register_lowering", keywords=("type_promotion_kind",)),
        Target(f"{_INDUCTOR}.cpu_vec_isa", "pick_vec_isa", ()),
        Target("torch._guards", "TracingContext"),
        Target("torch._guards", "tracing"),
        Target("torch.fx.experimental.symbolic_shapes", "ShapeEnv"),
        Target("torch.compiler", "config.cache_key_tag"),
    ),
    warns=True,
)

FEW_LIBRARIES = Entry(
    "few libraries",
    "The C++ kernels of a program are built as few libraries, and while the next program is generated (`few_libraries.py`).",
    "each kernel is a library of its own, and programs are built one after the other: compiling takes longer",
    exchanged=(
        Target(f"{_INDUCTOR}.async_compile", "AsyncCompile.cpp_pybinding", ("self", "argtypes", "source_code")),
        Target(f"{_INDUCTOR}.async_compile", "AsyncCompile.wait", ("self", "scope")),
    ),
    needed=(
        Target(f"{_INDUCTOR}.async_compile", "AsyncCompile.submit", ("task",)),
        Target(f"{_INDUCTOR}.async_compile", "get_compile_threads", ()),
        Target(f"{_INDUCTOR}.async_compile", "kernel_code_log"),
        Target(f"{_INDUCTOR}.codecache", "LambdaFuture", keywords=("result_fn",)),
        Target(f"{_INDUCTOR}.codecache", "CppPythonBindingsCodeCache.load_async", keywords=("main_code", "submit_fn")),
    ),
)

INDEX_STRIDES = Entry(
    "index strides",
    "How far an index moves with a loop variable is read off where it can be (`index_strides.py`).",
    "it is found by computer algebra: compiling takes longer",
    exchanged=(Target(f"{_INDUCTOR}.codegen.cpp", "stride_at_vec_range", ("index", "var", "vec_length")),),
)

SMALL_MATMULS = Entry(
    "small matrix products",
    "Small matrix products are calls of a function within a kernel (`small_matmuls.py`).",
    "they are loops: programs take longer",
    exchanged=(
        Target(f"{_INDUCTOR}.codegen.cpp", "CppScheduling.can_fuse_horizontal", ("self", "node1", "node2")),
        Target(f"{_INDUCTOR}.codegen.cpp", "CppScheduling.can_fuse_vertical", ("self", "node1", "node2")),
        Target(f"{_INDUCTOR}.codegen.cpp", "KernelGroup.finalize_kernel", ("self", "new_kernel", "nodes")),
        Target(f"{_INDUCTOR}.codegen.cpp", "KernelGroup.codegen_group", ("self", "name")),
    ),
    needed=(
        Target(f"{_INDUCTOR}.codegen.cpp_utils", "DTYPE_TO_CPP"),
        Target(f"{_INDUCTOR}.utils", "parallel_num_threads", ()),
    ),
)

SIZE_ASSERTS = Entry(
    "no size assertions",
    "Programs do not look at the sizes of their inputs, which `Program` has looked at.",
    "they look again: programs take longer",
    exchanged=(Target(f"{_INDUCTOR}.codegen.wrapper", "PythonWrapperCodegen.codegen_input_size_asserts", ("self",)),),
)

COLLECTING = Entry(
    "garbage collection while compiling",
    "Garbage is collected while a program is generated that is not in the cache.",
    "it is collected when the program is done: other threads' garbage waits for up to a minute",
    exchanged=(Target(f"{_INDUCTOR}.compile_fx", "fx_codegen_and_compile"),),
)

RANDOM_STATE = Entry(
    "random numbers of other threads",
    "The generators of random numbers are left alone while a program is compiled.",
    "PyTorch puts them back after compiling, and other threads draw again what they drew meanwhile",
    exchanged=(Target("torch._dynamo.utils", "preserve_rng_state", ()),),
    warns=True,
)

INSTRUCTIONS = Entry(
    "vector instructions",
    "Programs are compiled for the vector instructions that the processor has (`instructions.py`).",
    "Inductor tries each set of instructions first: the first compilation of a process takes seconds longer",
    exchanged=(Target(f"{_INDUCTOR}.cpu_vec_isa", "VecISA.check_build", ("self", "code")),),
    needed=(
        Target(f"{_INDUCTOR}.cpu_vec_isa", "valid_vec_isa_list.cache_clear"),
        Target(f"{_INDUCTOR}.cpu_vec_isa", "supported_vec_isa_list"),
        Target(f"{_INDUCTOR}.config", "cpp.vec_isa_ok"),
    ),
)

RECORDED = Entry(
    "recorded kernels",
    "Programs that only call kernels are run without Inductor's Python (`recorded.py`).",
    "they run as Inductor made them: a call of a small model takes longer",
    needed=(
        Target("torch._C._dynamo.guards", "_empty_strided_cpu"),
        Target("torch._C._dynamo.guards", "_reinterpret_tensor"),
    ),
)

TABLE: tuple[Entry, ...] = (
    COMPILER,
    FEW_LIBRARIES,
    INDEX_STRIDES,
    SMALL_MATMULS,
    SIZE_ASSERTS,
    COLLECTING,
    RANDOM_STATE,
    INSTRUCTIONS,
    RECORDED,
    GUARDS,
    RETAINED,
    CHECKPOINTS,
    FREED,
    PYTREES,
    TANGENTS,
    TRANSFORMS,
    ENTRY_POINTS,
    FX_TRACING,
    FX_TRACING_OF_OLD,
)


def active() -> tuple[str, ...]:
    """The names of the entries that hold in this PyTorch. Imports Inductor, which takes seconds where nothing was compiled before."""
    return tuple(dict.fromkeys([entry.name for entry in TABLE if entry.fault() is None]))


def in_use() -> tuple[str, ...]:
    """The names of the active entries for which functions are exchanged: what code that Inductor generates depends on."""
    return tuple([entry.name for entry in TABLE if entry.exchanged and entry.fault() is None])
