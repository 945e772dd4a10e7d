"""Captures a pure Python function of tensors as a `Graph`.

The function runs once on fake tensors, with a fresh one for each input. Meanwhile every ATen operation is recorded, those of autograd
included. So the function may call `torch.autograd.grad`, and the gradient's operations are recorded like any others. A graph itself must
never be differentiated: the tensors that autograd saved for its backward pass are detached in it, so the result would be silently wrong.
This is why loss, gradient and the gradient's adjoint are one function, which is captured once.

Known limits: Python numbers that the function reads, such as attributes of a module, are constants of the graph. A function that depends on
its arguments' shapes is captured for these shapes only. No other thread may trace at the same time. If a `TorchDispatchMode` is active
around the call, what it does to operations is not in the graph.
"""

# pyright: reportPrivateUsage=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import _symbolic_trace
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from adaptrt import tree
from adaptrt.errors import NotTraceable, UnsupportedRandomness
from adaptrt.functional import note_write
from adaptrt.graph import grouped_products, mixed_norms
from adaptrt.graph.collector import garbage_collection_paused
from adaptrt.graph.exchange import FX_TRACING, FX_TRACING_OF_OLD
from adaptrt.graph.formulas import FORMULAS
from adaptrt.graph.ir import Graph, PassRecord, autocast_off
from adaptrt.graph.operations import name_of
from adaptrt.graph.passes.base import apply
from adaptrt.graph.passes.gelu_by_sigmoid import GeluBySigmoid
from adaptrt.graph.passes.item_by_tensor import assign_by_tensor, select_by_tensors
from adaptrt.graph.passes.lift_noise import forbid_noise
from adaptrt.graph.passes.pool_as_maxima import PoolAsMaxima
from adaptrt.graph.passes.recorder import record
from adaptrt.graph.passes.retrace import fake_tensors
from adaptrt.graph.passes.standard import STANDARD
from adaptrt.graph.plain import without_wrappers
from adaptrt.graph.signature import Input, Output, Role, Signature
from adaptrt.graph.switches import MATH_ATTENTION, TRACEABLE
from adaptrt.tree import Spec, Tree

aten = torch.ops.aten
_WEIGHT_NORM: Any = torch._weight_norm  # pyright: ignore[reportPrivateImportUsage]
_SET_DATA: Any = Tensor.data.__set__  # pyright: ignore
_SET_REQUIRES_GRAD: Any = Tensor.requires_grad.__set__  # pyright: ignore
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.mv.default, aten.dot.default}


@garbage_collection_paused()
def capture(
    fn: Callable[..., Tree],
    *examples: Tree,
    roles: Sequence[Role | Tree] = (),
    names: Sequence[str] = (),
    fused_attention: bool = False,
    for_fusion: bool = False,
) -> Graph:
    """Captures `fn` at the shapes, dtypes and devices of `examples`.

    Args:
      fn: a pure function of trees of tensors that returns a tree of tensors. It may call `torch.autograd.grad` and random operations inside
        `lift_noise`; it may not mutate its arguments.
      examples: one tree of tensors or of `Spec`s for each argument. Values are not read.
      roles: for each argument a role, or a tree of roles with a role at each leaf. DATA if left out.
      names: for each argument the name its inputs' names start with. `arg0`, `arg1`, ... if left out.
      fused_attention: keep fused attention kernels. They have no second derivative; otherwise attention is traced as matmul and softmax.
      for_fusion: write functions that a compiler could not fuse with the operations around them in terms of a few pointwise operations
        (`pool_as_maxima`, `gelu_by_sigmoid`).
    Raises:
      UnsupportedRandomness: `fn` calls a random operation outside `lift_noise`, or one that cannot be lifted.
      InvalidGraph: a pass has a defect.
    """
    values, arguments = tree.flatten(examples)
    result: list[tree.Structure] = []
    output_names: list[str] = []

    writers = (PoolAsMaxima(), GeluBySigmoid()) if for_fusion else ()

    def flat(*inputs: Tensor) -> list[Tensor]:
        with contextlib.ExitStack() as stack:
            for context in (_EagerRules(), forbid_noise(), _deterministic(), *writers):
                stack.enter_context(context)
            returned = fn(*tree.unflatten(arguments, inputs))
        outputs, structure = tree.flatten(returned)
        result.append(structure)
        output_names.extend(tree.paths(returned, "result"))
        return outputs

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = fake_tensors(mode, [Spec.of(value) for value in values])
    with _tracing(mode, fused_attention) as functions:
        module, constants = record(flat, fakes, functions.copies)
    _require_dense(constants)
    labels = list(names) or [f"arg{index}" for index in range(len(examples))]
    given = list(roles) or [Role.DATA] * len(examples)
    input_names = [path for label, example in zip(labels, examples, strict=True) for path in tree.paths(example, label)]
    input_roles = [role for example, entry in zip(examples, given, strict=True) for role in _spread(entry, example)]
    inputs = [Input(name, role, Spec.of(fake)) for name, role, fake in zip(input_names, input_roles, fakes, strict=True)]
    inputs += [Input(f"const.{index}", Role.CONST, Spec.of(value)) for index, value in enumerate(constants)]
    computed: Any = module.graph.output_node().args[0]
    outputs = [Output(name, Spec.of(node.meta["val"])) for name, node in zip(output_names, computed, strict=True)]
    graph = Graph(module, Signature(tuple(inputs), tuple(outputs)), constants, arguments, result[0])
    written = [f"{writer.name} of {writer.num_written} {writer.noun}" for writer in writers if writer.num_written]
    history = tuple([PassRecord(text, graph.num_nodes, graph.num_nodes) for text in written])
    return apply(STANDARD, dataclasses.replace(graph, history=history))


def _require_dense(constants: Sequence[Tensor]) -> None:
    for value in constants:
        if value.is_nested or value.is_quantized or value.layout is not torch.strided:
            kind = (
                "a nested tensor"
                if value.is_nested
                else "a quantised tensor"
                if value.is_quantized
                else f"a tensor of layout {value.layout} (shape {list(value.shape)})"
            )
            raise NotTraceable(
                f"the model or the loss uses {kind} that it holds as an attribute or in a closure; only dense tensors can be inputs of a "
                "program. Call .to_dense() or .dequantize() on it, or make it where it is used"
            )


@contextlib.contextmanager
def _deterministic() -> Generator[None]:
    """Raises if the block draws from Python's or NumPy's random numbers, because each capture would hold another draw.

    Raises:
      UnsupportedRandomness: the block draws such numbers. The states of the generators are restored.
    """
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    yield
    if random.getstate() != python_state or (numpy is not None and repr(numpy.random.get_state()) != repr(numpy_state)):
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        raise UnsupportedRandomness(
            "the model or the loss draws from Python's or NumPy's random numbers while it runs; draw with torch instead "
            "(torch.rand(())), and use torch.where for the branch"
        )


def _spread(entry: Role | Tree, example: Tree) -> list[Role]:
    return [entry] * len(tree.leaves(example)) if isinstance(entry, Role) else list(entry)


@contextlib.contextmanager
def _tracing(mode: FakeTensorMode, fused_attention: bool) -> Generator[_Functions]:
    """The state in which functions are traced, whatever the caller's: gradients on, autocast off, kernels with a second derivative only."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # Otherwise autograd traces the gradients of CUDA tensors in a thread of its own, which may itself wait for this capture to end.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(autocast_off())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))  # it would look at the values of gradients
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)  # a cast that one function made is none of another's
        stack.enter_context(TRACEABLE)
        if not fused_attention:
            stack.enter_context(MATH_ATTENTION)
        stack.enter_context(_marked_as_tracing())
        stack.enter_context(without_wrappers())
        functions = stack.enter_context(_Functions())
        stack.enter_context(mode)
        yield functions


@contextlib.contextmanager
def _marked_as_tracing() -> Generator[None]:
    """What `torch.compile` compiled for fake tensors would not be recorded; while this thread traces, it does not compile (`plain.py`)."""
    trace: Any = _symbolic_trace
    if FX_TRACING.holds:
        before, flag, put = trace._get_is_fx_tracing(), True, trace._set_is_fx_tracing
    elif FX_TRACING_OF_OLD.holds:
        before, flag, put = trace._is_fx_tracing_flag, _InThisThread(), functools.partial(setattr, trace, "_is_fx_tracing_flag")
    else:
        yield
        return
    put(flag)
    try:
        yield
    finally:
        put(before)


class _InThisThread:
    """True in the thread that made it, and False in others."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self._thread


class _Functions(TorchFunctionMode):
    """Replaces functions of PyTorch's that could not be recorded as they are, some of them by their formulas (`formulas.py`).

    An assignment to `.data` is refused, because it calls no operation that could be recorded.

    Attributes:
      copies: pairs of what `p[i]` gave and of `p`, where that is a copy and not a view.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func == _SET_DATA:
            raise NotTraceable("the model assigns to the `.data` of a tensor, which cannot be traced; compute a new tensor, or use copy_()")
        if func == _SET_REQUIRES_GRAD and args[1] is True and args[0].requires_grad:
            return None  # data may require grad where the user's did not, so that it is no leaf here
        replacement = _REPLACED.get(func)
        if replacement is not None:
            found = replacement(*args, **(kwargs or {}))
            if found is not NotImplemented:
                if func is Tensor.__getitem__:
                    self.copies.append((found, args[0]))
                return found
        return func(*args, **(kwargs or {}))


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm` by its formula, `g * v / |v|` with the norm over all axes but `dim`.

    The operation's own gradient treats the norms as independent of `v`, so its second derivative is wrong (PyTorch 2.11 to 2.15). Like the
    operation, this function rounds only once in half precision.
    """
    dtype = torch.promote_types(v.dtype, g.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    direction, length = v.to(wide), g.to(wide)
    return (direction * (length / torch.norm_except_dim(direction, 2, dim))).to(dtype)


def _numbers_of(value: Tensor) -> Any:
    """`Tensor.tolist` by `item`, which is an operation that can be recorded or refused."""
    if not isinstance(value, FakeTensor):
        return NotImplemented
    return [_numbers_of(part) for part in value.unbind(0)] if value.dim() else value.item()


_REPLACED: dict[Any, Callable[..., Any]] = {
    **FORMULAS,
    _WEIGHT_NORM: weight_norm,
    Tensor.tolist: _numbers_of,  # pyright: ignore[reportUnknownMemberType]
    Tensor.__getitem__: select_by_tensors,
    Tensor.__setitem__: assign_by_tensor,
}


class _EagerRules(TorchDispatchMode):
    """Enforces rules of eager kernels that fake kernels or operator schemas do not state.

    The schema of `native_batch_norm` does not say that it updates the running statistics, and fake matrix products accept operands of
    different dtypes. PyTorch's Python dispatcher would correct both, but its recurrent networks drop the dropout between layers (2.13).
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        del types
        if func in _PRODUCTS:
            dtypes = {value.dtype for value in args if isinstance(value, Tensor)}
            if len(dtypes) > 1:
                raise RuntimeError(f"{name_of(func)} needs operands of one dtype, got {' and '.join(sorted(map(str, dtypes)))}")
        if func is aten.native_batch_norm.default and args[3] is not None:
            func = aten._native_batch_norm_legit.default
            if args[5]:
                note_write(*args[3:5])
        if func is aten._efficientzerotensor.default:  # of forward mode; what is computed from it may lose its device (PyTorch 2.13)
            func = aten.zeros.default
        rule = mixed_norms.RULES.get(func) or grouped_products.RULES.get(func)
        if rule is not None:
            found = rule(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Records the name of every operation and the module in which it was called."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.found: list[tuple[str, str]] = []
        self._paths: dict[int, str] = {}
        self._thread = threading.get_ident()
        self._stack: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        del types
        self.found.append((name_of(func), self._stack[-1] if self._stack else ""))
        return func(*args, **(kwargs or {}))

    def enter(self, module: torch.nn.Module, args: Any) -> None:
        del args
        if threading.get_ident() != self._thread:  # the hooks act on all threads of the process
            return
        if not self._stack:
            self._paths = {id(part): path for path, part in module.named_modules()}
        self._stack.append(self._paths.get(id(module), ""))

    def leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        del module, args, output
        if threading.get_ident() == self._thread:
            self._stack.pop()


def record_operations(fn: Callable[..., Any], *examples: Tree, fused_attention: bool = False) -> list[tuple[str, str]]:
    """Runs `fn` on fake tensors like `examples`, and returns each operation's name with the path of the module that called it."""
    values, structure = tree.flatten(examples)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = fake_tensors(mode, [Spec.of(value) for value in values])
    operations = _Operations()

    def watched(*inputs: Tensor) -> list[Tensor]:
        with operations:
            fn(*tree.unflatten(structure, inputs))
        return []

    before = torch.nn.modules.module.register_module_forward_pre_hook(operations.enter)
    after = torch.nn.modules.module.register_module_forward_hook(operations.leave, always_call=True)
    try:
        with _tracing(mode, fused_attention):
            record(watched, fakes)  # which knows what the model may read of its constants
    finally:
        before.remove()
        after.remove()
    return operations.found
