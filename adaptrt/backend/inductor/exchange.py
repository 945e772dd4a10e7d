"""Lists every private part of PyTorch that compiling and running programs exchanges or relies on, and what happens without it.

`TABLE` is data for whoever has to support another PyTorch, and `active` says which entries hold in this one. What has no fallback is not in
it: fake tensors, dispatch modes and lazily compiled graph modules (`torch._subclasses`, `torch.utils._python_dispatch`,
`torch.fx._lazy_graph_module`) are what `capture` itself is made of.
"""

from __future__ import annotations

from adaptrt.backend.engine import FREED, RETAINED
from adaptrt.backend.entry_points import ENTRY_POINTS
from adaptrt.backend.guards import GUARDS, TANGENTS
from adaptrt.graph.defaults import DEFAULT_DEVICE
from adaptrt.graph.exchange import FLAGS_OF_MODES, FX_TRACING, FX_TRACING_OF_OLD, Entry, Target
from adaptrt.graph.forgetting import FAKE_RESULTS, GENERATED_SOURCES
from adaptrt.graph.plain import CHECKPOINTS, SAVING_HOOKS
from adaptrt.graph.pytrees import PYTREES
from adaptrt.graph.surroundings import TRANSFORMS

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
        Target(f"{_INDUCTOR}.async_compile", "get_compile_threads", ()),
        Target(f"{_INDUCTOR}.async_compile", "kernel_code_log"),
        Target(f"{_INDUCTOR}.codecache", "LambdaFuture", keywords=("result_fn",)),
        Target(f"{_INDUCTOR}.cpp_builder", "CppTorchDeviceOptions", keywords=("vec_isa", "device_type", "include_pytorch", "shared")),
        *[
            Target(f"{_INDUCTOR}.cpp_builder", f"CppTorchDeviceOptions.get_{part}", ("self",))
            for part in ("compiler", "definitions", "cflags", "include_dirs", "passthrough_args", "ldflags", "libraries", "libraries_dirs")
        ],
        Target(f"{_INDUCTOR}.cpp_builder", "get_compiler_version_info", ("compiler",)),
        Target(f"{_INDUCTOR}.cpp_builder", "is_gcc", ()),
        Target(f"{_INDUCTOR}.cpu_vec_isa", "VecISA.build_arch_flags", ("self",)),
        Target(f"{_INDUCTOR}.config", "save_config_portable", keywords=("ignore_private_configs",)),
        Target(f"{_INDUCTOR}.config", "cpp_cache_precompile_headers"),
        Target(f"{_INDUCTOR}.exc", "CppCompileError"),
        Target(f"{_INDUCTOR}.runtime.cache_dir_utils", "cache_dir", ()),
        Target(f"{_INDUCTOR}.runtime.cache_dir_utils", "default_cache_dir", ()),
        Target("torch._C._dynamo.guards", "_torchinductor_pyobject_tensor_data_ptr"),
    ),
)

INTACT_FILES = Entry(
    "intact files",
    "Files in Inductor's cache on disk are compared with what was written, and made again where they differ (`cached_files.py`).",
    "a program may fail to load if its file was damaged, until the cache is removed",
    exchanged=(
        Target(f"{_INDUCTOR}.codecache", "PyCodeCache.write", ("source_code", "extra")),
        Target(f"{_INDUCTOR}.output_code", "CompiledFxGraph.write_to_disk", ("self",)),
        Target(f"{_INDUCTOR}.codecache", "FxGraphCache._get_tmp_dir_for_key", ("key",)),
    ),
    needed=(
        Target(f"{_INDUCTOR}.codecache", "sha256_hash", ("data",)),
        Target(f"{_INDUCTOR}.codecache", "write_atomic", keywords=("path_", "content", "make_dirs")),
    ),
)

FORGOTTEN_PROGRAMS = Entry(
    "forgotten programs",
    "Inductor's tables of what it has loaded do not keep programs (`cached_files.py`).",
    "programs for shapes that were dropped stay in memory",
    exchanged=(
        Target(f"{_INDUCTOR}.codecache", "PyCodeCache.load_by_key_path", keywords=("key", "path")),
        Target("torch.compiler._cache", "CacheArtifactManager.record_artifact", ("artifact_type", "key", "content")),
    ),
    needed=(
        Target(f"{_INDUCTOR}.codecache", "PyCodeCache.modules"),
        Target(f"{_INDUCTOR}.codecache", "PyCodeCache.modules_no_attr"),
        Target(f"{_INDUCTOR}.codecache", "PyCodeCache.linemaps"),
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

ASSUMPTIONS = Entry(
    "assumptions of generated code",
    "A kernel takes no more threads than its caller may use, and names the instructions of its processor (`assumptions.py`).",
    "it takes as many threads as it was compiled for, and processors with different instructions must not share a cache on disk",
    exchanged=(Target(f"{_INDUCTOR}.codegen.cpp", "KernelGroup.codegen_group", ("self", "name")),),
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

_ARRAYS = f"{_INDUCTOR}.codegen.cpp_wrapper_cpu_array_ref"

THREAD_BUFFERS = Entry(
    "buffers of threads",
    "A thread keeps the small buffers of an exported program between calls (`thread_buffers.py`).",
    "they are made in every call: a call of a small model takes longer",
    exchanged=(
        Target(
            _ARRAYS,
            "CppWrapperCpuArrayRef.make_allocation",
            ("self", "name", "device", "dtype", "shape", "stride", "buffer_if_can_stack_allocate", "is_pinned"),
        ),
        Target(_ARRAYS, "CppWrapperCpuArrayRef.memory_plan_reuse", ("self",)),
        Target(_ARRAYS, "CppWrapperCpuArrayRef.generate_return", ("self", "output_refs")),
    ),
    needed=(Target(_ARRAYS, "MAX_STACK_ALLOCATION_SIZE"),),
)

_SHAPES = "torch.fx.experimental.symbolic_shapes"

COMPILER_TABLES = Entry(
    "tables of the compiler",
    "What the compiler remembers for ever is forgotten when it is much (`tables.py`).",
    "the tables that are missing here are left alone, and memory may grow with every program",
    needed=(
        # Functions that remember their results. The key of each result holds the object whose method was called.
        Target(_SHAPES, "ShapeEnv.simplify"),
        Target(_SHAPES, "ShapeEnv.replace"),
        Target(_SHAPES, "ShapeEnv.get_axioms"),
        Target(_SHAPES, "ShapeEnv._maybe_evaluate_static"),
        Target(_SHAPES, "ShapeEnv._inner_evaluate_expr"),
        Target(f"{_INDUCTOR}.codegen.debug_utils", "DebugPrinterManager._get_debug_filtered_kernel_names"),
        Target(f"{_INDUCTOR}.metrics", "cpp_outer_loop_fused_inner_counts"),
        Target("torch._dynamo.utils", "compilation_time_metrics"),  # how long each part of each compilation took
    ),
)

LATER_TABLES = (Target(f"{_INDUCTOR}.codecache", "FxGraphCachePickler._pickleable_type_cache"),)
"""Like `COMPILER_TABLES`. PyTorch 2.11 does not have it. It is by class, and every generated module has a class of its own."""

TABLE: tuple[Entry, ...] = (
    COMPILER,
    FEW_LIBRARIES,
    INTACT_FILES,
    FORGOTTEN_PROGRAMS,
    INDEX_STRIDES,
    SMALL_MATMULS,
    ASSUMPTIONS,
    SIZE_ASSERTS,
    COLLECTING,
    RANDOM_STATE,
    INSTRUCTIONS,
    RECORDED,
    THREAD_BUFFERS,
    COMPILER_TABLES,
    GUARDS,
    RETAINED,
    CHECKPOINTS,
    SAVING_HOOKS,
    FREED,
    PYTREES,
    TANGENTS,
    DEFAULT_DEVICE,
    TRANSFORMS,
    ENTRY_POINTS,
    FX_TRACING,
    FX_TRACING_OF_OLD,
    FLAGS_OF_MODES,
    FAKE_RESULTS,
    GENERATED_SOURCES,
)


def active() -> tuple[str, ...]:
    """The names of the entries that hold in this PyTorch. Imports Inductor, which takes seconds where nothing was compiled before."""
    return tuple(dict.fromkeys([entry.name for entry in TABLE if entry.fault() is None]))


def in_use() -> tuple[str, ...]:
    """The names of the active entries for which functions are exchanged: what code that Inductor generates depends on."""
    return tuple([entry.name for entry in TABLE if entry.exchanged and entry.fault() is None])
