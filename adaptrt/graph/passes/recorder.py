"""Records the operations that a function of tensors calls.

PyTorch's `make_fx` does the same and much more (dynamic shapes, control flow as operations), but takes twice the time.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import extract_val
from torch.fx.node import map_aggregate, map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from adaptrt.errors import NotTraceable
from adaptrt.graph.operations import is_composite, is_mutable, is_view, name_of
from adaptrt.graph.passes.known_values import known_values, on_real_tensors
from adaptrt.graph.passes.memory import memory_of, refuse_lost_writes, written_by

aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default  # PyTorch calls this to ask a fake tensor for its device

_INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
}
"""Operations whose second argument is a list of indices, among which there may be masks."""

_INPUT = (
    "the model writes to one of its inputs in place ({}), to data or a parameter (shape {}), which an adaptation never changes; let it "
    "work on a copy, for example x.clone(). What steps have to carry on is a buffer of the model (register_buffer)"
)
_CONSTANT = (
    "the model or the loss writes in place ({}) to a tensor (shape {}) that it holds as a plain attribute, in a closure or under a global "
    "name. Make it a buffer of the model (register_buffer), which is carried from step to step, or let it work on a copy, x.clone()"
)
_ARRAY = (
    "the model or the loss writes in place ({}) to a tensor (shape {}) that shares its memory with an array of NumPy's, which a program "
    "would not change; let it work on a copy, torch.tensor(array)"
)
"""Why a tensor may not be written to, and what to do."""

Rules = Mapping[Any, Callable[..., Any]]


def record(
    fn: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], copies: Sequence[tuple[Tensor, Tensor]] = ()
) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """Returns the operations that `fn` calls, as a module, and its constants.

    Constants are tensors that `fn` uses without getting them as arguments. They are the module's last inputs.

    Args:
      fn: a function of fake tensors. It runs once, with autograd.
      inputs: its arguments, made in the fake tensor mode that is active.
      copies: filled while `fn` runs; pairs of tensors, the first of which is a copy where PyTorch has a view of the second.
    Raises:
      NotTraceable: a write to a copy would be lost, or a tensor comes from elsewhere.
    """
    recorder = Recorder(fx.Graph())
    for index, value in enumerate(inputs):
        recorder.place(f"arg{index}", value)
    with recorder:
        outputs = fn(*inputs)
    refuse_lost_writes(recorder.graph, recorder.nodes_of(list(copies)))
    recorder.graph.output(recorder.nodes_of(list(outputs)))
    recorder.graph.eliminate_dead_code()
    return _LazyGraphModule({}, recorder.graph), tuple(recorder.constants)


class Recorder(TorchDispatchMode):
    """Writes all operations to `graph` while it is active, or the operations by which a rule replaces one.

    Attributes:
      graph: the operations, with their values.
      constants: tensors that were neither inputs nor results, in the order of their placeholders.
    """

    def __init__(self, graph: fx.Graph, rules: Rules | None = None) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.graph = graph
        self.constants: list[Tensor] = []
        self._rules = rules or {}
        self._literals: dict[fx.Node, Tensor] = {}
        self._owners: dict[int, str] = {}  # of memory that may not be written to
        # By the address of a tensor. The tensor is kept so that no other gets its address; the weak reference keeps `swap_tensors` from
        # exchanging it.
        self._known: dict[int, tuple[fx.Node, Tensor, weakref.ref[Tensor]]] = {}
        self._last_placeholder = graph._root  # the place before all nodes

    def place(self, name: str, value: Tensor) -> None:
        """Writes an input, after all others."""
        with self.graph.inserting_after(self._last_placeholder):
            self._last_placeholder = self.graph.placeholder(name)
        self.know(self._last_placeholder, value)
        if isinstance(value, FakeTensor):
            self._owners[memory_of(value)] = _INPUT

    def know(self, node: fx.Node, value: Tensor) -> None:
        """Registers `value` as the tensor that `node` computes."""
        self._known[id(value)] = node, value, weakref.ref(value)
        if "val" not in node.meta:
            node.meta["val"] = extract_val(value)

    def nodes_of(self, value: Any) -> Any:
        """Returns an argument or a result with nodes in place of its tensors."""
        return map_aggregate(value, self._node_of)

    def _node_of(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._known:
            if isinstance(value, FakeTensor):
                raise NotTraceable(
                    f"the model uses a tensor (shape {list(value.shape)}) that it made where it was not traced: in another thread, or "
                    "in an earlier run, kept since then. Make it where it is used, or keep it as a buffer"
                )
            self.place(f"const_{len(self.constants)}", value)
            self.constants.append(value)
        return self._known[id(value)][0]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if any(kind is not FakeTensor for kind in types):
            return NotImplemented  # a tensor subclass that holds other tensors calls operations on those itself
        kwargs = kwargs or {}
        if func is _DEVICE:
            return func(*args)
        if func in self._rules:
            with self:
                written = self._rules[func](*args, **kwargs)
            if written is not NotImplemented:
                return written
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if is_mutable(func):
            self._require_own(func, args, kwargs)
        if func is aten.masked_select.default and (places := self._places(args[1], args[0])) is not None:
            with self:
                return aten.index.Tensor(aten.expand(args[0], _broadcast(*args)), places)
        if func in _INDEXED:
            args = (args[0], self._with_known_masks(args[1]), *args[2:])
        if func is aten.lift_fresh.default:  # later writes to the new tensor must not change the constant
            func = aten.lift_fresh_copy.default
            if not isinstance(args[0], FakeTensor):
                self._literals[self._node_of(args[0])] = args[0]
        try:
            result: Any = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            known = self._of_known_values(func, args, kwargs)
            if known is NotImplemented:
                raise
            return known
        node_args, node_kwargs = self.nodes_of(args), self.nodes_of(kwargs)
        several = isinstance(result, list | tuple)
        if not (several or isinstance(result, Tensor) or is_mutable(func) or (result is None and _has_node((node_args, node_kwargs)))):
            return result  # such as a mark of the profiler, or a number that is known already
        node = self.graph.create_node("call_function", func, node_args, node_kwargs, func.overloadpacket.__name__)
        if isinstance(result, Tensor):
            self.know(node, result)
            self._note_owner(func, args, result)
            return result
        node.meta["val"] = extract_val(cast(Any, result))
        for index, part in enumerate(cast(Sequence[Any], result) if several else ()):
            if isinstance(part, Tensor):
                self.know(self.graph.call_function(operator.getitem, (node, index)), part)
        return cast(Any, result)

    def _require_own(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuses a write to memory of the user's before it is carried out, so that this memory and its tensor stay what they are.

        Raises:
          NotTraceable: the operation would write to an input or a constant, or to a new tensor that shares its memory with an array.
        """
        for value in written_by(func, args, kwargs):
            is_strided = value.layout is torch.strided
            owner = _CONSTANT if not isinstance(value, FakeTensor) else self._owners.get(memory_of(value)) if is_strided else None
            if owner is not None:
                raise NotTraceable(owner.format(name_of(func), list(value.shape)))

    def _note_owner(self, func: Any, args: tuple[Any, ...], result: Tensor) -> None:
        """Notes that a new tensor shares its memory with a constant, of which it is a view, or in an eager pass with an array."""
        first = args[0] if args and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor) else None
        if first is None or first.layout is not torch.strided or result.layout is not torch.strided:
            return
        if func is aten.lift_fresh_copy.default and not first.untyped_storage().resizable():
            self._owners[memory_of(result)] = _ARRAY
        elif is_view(func):
            self._owners[memory_of(result)] = _CONSTANT

    def _of_known_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Returns the result of an operation that reads values, if these are the same in every call; otherwise NotImplemented."""
        node_args, node_kwargs = self.nodes_of(args), self.nodes_of(kwargs)
        found: list[fx.Node] = []
        map_arg((node_args, node_kwargs), found.append)
        value_of = known_values(self.graph, found, self._literals)
        if value_of is None:
            return NotImplemented
        real_args, real_kwargs = cast(Any, map_arg((node_args, node_kwargs), value_of))
        return self._lifted(on_real_tensors(func, *real_args, **real_kwargs))

    def _with_known_masks(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Returns the indices with the places that a mask selects in place of the mask, if these are the same in every call."""
        found: list[Tensor | None] = []
        for index in indices:
            places = self._places(index) if index is not None and index.dtype in (torch.bool, torch.uint8) else None
            found += [index] if places is None else places
        return found

    def _places(self, mask: Tensor, of: Tensor | None = None) -> list[Tensor] | None:
        """Returns the places that a mask selects, broadcast to the shape of `of`; None if they are not the same in every call."""
        value_of = known_values(self.graph, [self._node_of(mask)], self._literals)
        if value_of is None:
            return None
        shape = mask.shape if of is None else _broadcast(mask, of)
        return self._lifted(on_real_tensors(_true_places, value_of(self._node_of(mask)), shape))

    def _lifted(self, value: Any) -> Any:
        """Returns fake tensors in place of real ones, which become constants."""
        with self:
            return tree_map_only(Tensor, aten.lift_fresh.default, value)


def _has_node(arguments: Any) -> bool:
    found: list[fx.Node] = []
    map_arg(arguments, found.append)
    return bool(found)


def _broadcast(one: Tensor, other: Tensor) -> torch.Size:
    return cast(Any, torch).broadcast_shapes(one.shape, other.shape)


def _true_places(mask: Tensor, shape: torch.Size) -> list[Tensor]:
    return list(mask.expand(shape).nonzero().unbind(1))
