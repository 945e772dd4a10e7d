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
import sys
import types
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from adaptrt import tree
from adaptrt.errors import NotTraceable
from adaptrt.graph import draws
from adaptrt.graph.collector import garbage_collection_paused
from adaptrt.graph.constants import ON_CONSTANTS, refuse_on_constant
from adaptrt.graph.eager_rules import EagerRules
from adaptrt.graph.forgetting import forgetting
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
from adaptrt.graph.profile import RulesUnprofiled
from adaptrt.graph.signature import Input, Output, Role, Signature
from adaptrt.graph.switches import MATH_ATTENTION, TRACEABLE
from adaptrt.graph.tracing_state import flags_of_modes, marked_as_tracing, modes
from adaptrt.process import changed, leaving_nothing
from adaptrt.tree import Spec, Tree

_WEIGHT_NORM: Any = torch._weight_norm  # pyright: ignore[reportPrivateImportUsage]
_SET_DATA: Any = Tensor.data.__set__  # pyright: ignore
_SET_REQUIRES_GRAD: Any = Tensor.requires_grad.__set__  # pyright: ignore


@leaving_nothing
@forgetting
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
        `lift_noise`; it may not mutate its arguments. It may be called twice.
      examples: one tree of tensors or of `Spec`s for each argument. Values are not read.
      roles: for each argument a role, or a tree of roles with a role at each leaf. DATA if left out.
      names: for each argument the name its inputs' names start with. `arg0`, `arg1`, ... if left out.
      fused_attention: keep fused attention kernels. They have no second derivative; otherwise attention is traced as matmul and softmax.
      for_fusion: write functions that a compiler could not fuse with the operations around them in terms of a few pointwise operations
        (`pool_as_maxima`, `gelu_by_sigmoid`).
    Raises:
      UnsupportedRandomness: `fn` calls a random operation outside `lift_noise`, or one that cannot be lifted, or draws in Python.
      InvalidGraph: a pass has a defect.
    """
    values, arguments = tree.flatten(examples)
    specs = [Spec.of(value) for value in values]
    before = draws.states()
    recorded = _record(fn, arguments, specs, fused_attention, for_fusion)
    if before != draws.states():  # `fn` has drawn, or another thread
        with draws.refused():
            recorded = _record(fn, arguments, specs, fused_attention, for_fusion)
    _require_dense(recorded.constants)
    labels = list(names) or [f"arg{index}" for index in range(len(examples))]
    given = list(roles) or [Role.DATA] * len(examples)
    input_names = [path for label, example in zip(labels, examples, strict=True) for path in tree.paths(example, label)]
    input_roles = [role for example, entry in zip(examples, given, strict=True) for role in _spread(entry, example)]
    inputs = [Input(name, role, Spec.of(fake)) for name, role, fake in zip(input_names, input_roles, recorded.inputs, strict=True)]
    inputs += [Input(f"const.{index}", Role.CONST, Spec.of(value)) for index, value in enumerate(recorded.constants)]
    computed: Any = recorded.module.graph.output_node().args[0]
    outputs = [Output(name, Spec.of(node.meta["val"])) for name, node in zip(recorded.output_names, computed, strict=True)]
    signature = Signature(tuple(inputs), tuple(outputs))
    graph = Graph(recorded.module, signature, recorded.constants, arguments, recorded.result)
    written = [f"{writer.name} of {writer.num_written} {writer.noun}" for writer in recorded.writers if writer.num_written]
    history = tuple([PassRecord(text, graph.num_nodes, graph.num_nodes) for text in written])
    return apply(STANDARD, dataclasses.replace(graph, history=history))


class _Recorded(NamedTuple):
    """What one run of a function has given."""

    module: GraphModule
    inputs: list[Tensor]
    constants: tuple[Tensor, ...]
    result: tree.Structure
    output_names: list[str]
    writers: tuple[PoolAsMaxima | GeluBySigmoid, ...]


def _record(
    fn: Callable[..., Tree], arguments: tree.Structure, specs: Sequence[Spec], fused_attention: bool, for_fusion: bool
) -> _Recorded:
    result: list[tree.Structure] = []
    output_names: list[str] = []
    writers = (PoolAsMaxima(), GeluBySigmoid()) if for_fusion else ()

    def flat(*inputs: Tensor) -> list[Tensor]:
        with contextlib.ExitStack() as stack:
            for context in (EagerRules(), forbid_noise(), *writers, RulesUnprofiled()):
                stack.enter_context(context)
            returned = fn(*tree.unflatten(arguments, inputs))
        outputs, structure = tree.flatten(returned)
        result.append(structure)
        output_names.extend(tree.paths(returned, "result"))
        return outputs

    mode = _fake_mode()
    fakes = fake_tensors(mode, specs)
    with _tracing(mode, fused_attention) as functions:
        module, constants = record(flat, fakes, functions.copies)
    return _Recorded(module, fakes, constants, result[0], output_names, writers)


def _fake_mode() -> FakeTensorMode:
    _start_autograd()
    return FakeTensorMode(allow_non_fake_inputs=True)


@functools.cache
def _start_autograd() -> None:
    """Lets PyTorch's autograd count the devices before the first fake tensor is made.

    Where PyTorch is built for CUDA and there is no GPU, a fake tensor makes it believe in eight of them. It would start eight threads, and
    refuse to run in any child that is forked later.
    """
    with torch.inference_mode(False), torch.enable_grad():
        one = torch.ones((), device="cpu", requires_grad=True)
        torch.autograd.grad(one * 1, one)


if torch.version.cuda is not None and torch.__version__ < (2, 14) and not torch.cuda.is_available():  # pyright: ignore
    # The first fake tensor puts an object of its thread in the place where PyTorch keeps what switches between GPUs. When that thread has
    # ended, the process crashes. Here it is the thread that imports adaptrt, which mostly lasts as long as the process.
    with _fake_mode():
        pass


def is_of_trace(value: Tensor) -> bool:
    """Whether a tensor was made while a function was captured, so that it has no values."""
    functorch = cast(Any, torch._C)._functorch
    return isinstance(value, FakeTensor) or functorch.is_functorch_wrapped_tensor(value)


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


def _spread(entry: Role | Tree, example: Tree) -> list[Role]:
    return [entry] * len(tree.leaves(example)) if isinstance(entry, Role) else list(entry)


@contextlib.contextmanager
def _tracing(mode: FakeTensorMode, fused_attention: bool) -> Generator[_Functions]:
    """The state in which functions are traced, whatever the caller's: gradients on, autocast off, kernels with a second derivative only."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(changed(flags_of_modes()))
        stack.enter_context(changed(modes(), of_thread=True))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # Otherwise autograd traces the gradients of CUDA tensors in a thread of its own, which may itself wait for this capture to end.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(autocast_off())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))  # it would look at the values of gradients
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)  # a cast that one function made is none of another's
        stack.enter_context(TRACEABLE.held())
        if not fused_attention:
            stack.enter_context(MATH_ATTENTION.held())
        stack.enter_context(marked_as_tracing())
        stack.enter_context(without_wrappers())
        functions = stack.enter_context(_Functions())
        stack.enter_context(mode)
        yield functions


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
        if func in ON_CONSTANTS and not isinstance(args[0], FakeTensor):
            refuse_on_constant(func, args[0])
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
    return [_numbers_of(part) for part in value.unbind(0)] if value.dim() else value.item()


_REPLACED: dict[Any, Callable[..., Any]] = {
    **FORMULAS,
    _WEIGHT_NORM: weight_norm,
    Tensor.tolist: _numbers_of,  # pyright: ignore[reportUnknownMemberType]
    Tensor.__getitem__: select_by_tensors,
    Tensor.__setitem__: assign_by_tensor,
}


_CALL_OF_MODULE: types.CodeType = cast(Any, torch.nn.Module)._call_impl.__code__


class _Operations(TorchDispatchMode):
    """Records the name of every operation and the module in which it was called.

    Args:
      outermost: code, above whose frame the modules are not looked for.
    """

    def __init__(self, outermost: types.CodeType) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.found: list[tuple[str, str]] = []
        self._outermost = outermost

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        del types
        self.found.append((name_of(func), self._module()))
        return func(*args, **(kwargs or {}))

    def _module(self) -> str:
        """The path of the module that is running, in the outermost one."""
        running: list[torch.nn.Module] = []
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not self._outermost:
            if frame.f_code is _CALL_OF_MODULE:
                running.append(frame.f_locals["self"])
            frame = frame.f_back
        return next((path for path, part in running[-1].named_modules() if part is running[0]), "") if running else ""


@leaving_nothing
def record_operations(fn: Callable[..., Any], *examples: Tree, fused_attention: bool = False) -> list[tuple[str, str]]:
    """Runs `fn` on fake tensors like `examples`, and returns each operation's name with the path of the module that called it."""
    values, structure = tree.flatten(examples)
    mode = _fake_mode()
    fakes = fake_tensors(mode, [Spec.of(value) for value in values])

    def watched(*inputs: Tensor) -> list[Tensor]:
        with operations:
            fn(*tree.unflatten(structure, inputs))
        return []

    operations = _Operations(watched.__code__)
    with _tracing(mode, fused_attention):
        record(watched, fakes)  # which knows what the model may read of its constants
    return operations.found
