"""Modules whose parameters are plain tensors that a training loop replaces: fast weights.

`monkeypatch(model)` returns a handle with the model's class, attributes, hooks and submodules. A call runs on a twin of the model that
holds the fast weights as they are at that moment, and keeps them: whatever looks at its modules later, as checkpointing does when it
computes activations again, finds the weights of its own time. What a forward pass leaves in attributes is taken over by the handle.

A handle of `DistributedDataParallel` sends nothing until `backward()` comes to the model's own parameters.

Known limits: a method other than `forward` that checkpoints parts of the model, called on the handle, finds the latest weights. What is
reached other than by attributes, lists, tuples, dicts, sets and bound methods (a function that encloses a part, a weak reference, a
parameter in a list) is the model's own, with the model's weights; for a `forward` of that kind `monkeypatch` raises.
Attention in a checkpointed part is computed again where `backward()` is called, with the kernels that are allowed there: call it within
`sdpa_kernel(SDPBackend.MATH)`. DistributedDataParallel rearranges its buckets, together with the other processes, at the first forward pass
after the first backward pass, also where that is a handle's.
"""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import operator
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from adaptrt import tree
from adaptrt.functional import refers, remapped, shadow
from adaptrt.graph.capture import weight_norm
from adaptrt.higher.utils import copied, get_func_params

_CONTAINERS = frozenset({list, dict, set, collections.OrderedDict, collections.deque})
_SIMPLE = frozenset({bool, int, float, str, type(None)})
_APART = frozenset({"_parameters", "_modules", "_adaptrt_fast", "_adaptrt_number"})
"""Attributes of a handle that are not its twin's."""


class _Switches:
    """Settings of the process's that are as wanted while a handle runs.

    Of several threads the first one in makes them and the last one out takes them back. PyTorch's own context managers take four times as
    long, and a handle enters one at every call.

    Args:
      rows: for each the function that reads it, the one that sets it, and the value wanted.
    """

    def __init__(self, *rows: tuple[Callable[[], bool], Callable[[bool], object], bool]) -> None:
        self._rows = rows
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[bool] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = [read() for read, _, _ in self._rows]
                for _, put, wanted in self._rows:
                    put(wanted)
            self._inside += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for (_, put, _), before in zip(self._rows, self._before, strict=True):
                    put(before)


_MATH_ATTENTION = _Switches(
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp, True),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, False),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp, False),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp, False),
)
_NO_CUDNN = _Switches((lambda: torch.backends.cudnn.enabled, functools.partial(setattr, torch.backends.cudnn, "enabled"), False))
"""Its recurrent kernels have no second derivative. `torch.backends.cudnn.flags` would also write the setting of TF32."""


class FastWeights:
    """The fast weights of one handle: every version of them, where in the module tree they go, and the twin that holds the last ones."""

    def __init__(self, model: nn.Module, handle: nn.Module) -> None:
        self.versions: list[list[Tensor]] | None = None
        self.track = True
        self._recurrent = any(isinstance(part, nn.RNNBase) for part in model.modules())
        index = {id(p): i for i, p in enumerate(model.parameters())}
        self.num_params = len(index)
        # Weakly: the handle has these weights, and what holds them goes with it rather than at the next garbage collection.
        self.modules = [weakref.ref(part) for part in handle.modules()]
        # For each module the name of each of its parameters, and which fast weight it is. Shared weights have one.
        self.places = [[(name, index[id(p)]) for name, p in part._parameters.items() if p is not None] for part in model.modules()]
        self.owners = [number for number, places in enumerate(self.places) if places]
        self.classes = [type(part) for part in model.modules()]
        self.twins: Twins | None = None
        self.forms: list[Any] = []
        self.links: list[_Links] | None = None

    def adopt(self, handle: nn.Module) -> None:
        """Makes the weights those of a copied handle."""
        for part in handle.modules():
            if isinstance(part, Patched):
                self.modules[part._adaptrt_number] = weakref.ref(part)

    def __deepcopy__(self, memo: dict[int, Any]) -> FastWeights:
        """A copy whose weights have the same graph behind them; `adopt` tells it its modules."""
        made = memo[id(self)] = object.__new__(FastWeights)
        for values in self.versions or ():
            memo.update({id(value): value.clone() for value in values if not value.is_leaf})
        vars(made).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name not in ("twins", "links")})
        made.twins = made.links = None
        return made

    @property
    def latest(self) -> list[Tensor] | None:
        return None if self.versions is None else self.versions[-1]

    def put(self, values: Iterable[Tensor]) -> None:
        """Makes `values` the latest: one more version where versions are tracked, else in place of the only one."""
        values = list(values)
        if len(values) < self.num_params:
            raise IndexError(
                f"params has {len(values)} tensors: give one for each of the module's {self.num_params} parameters, in their order"
            )
        if strange := [type(value).__name__ for value in values if not isinstance(value, Tensor)]:
            raise TypeError(f"params must be tensors, in the order of the module's parameters; got a {strange[0]}")
        if self.versions is None or self.track:
            self.versions = [*(self.versions or []), values]
        else:
            self.versions[0] = values
            del self.versions[1:]
        self.twins = None

    def differentiable_twice(self) -> AbstractContextManager[Any]:
        """In which attention and recurrent networks have a derivative of their gradient, where one is needed."""
        if not (self.track and torch.is_grad_enabled()):
            return nullcontext()
        if not self._recurrent:
            return _MATH_ATTENTION
        stack = ExitStack()
        stack.enter_context(_MATH_ATTENTION)
        stack.enter_context(_NO_CUDNN)
        return stack

    def show(self) -> None:
        """Lets the handle's modules show the latest as their parameters."""
        latest = self.latest
        if latest is None:
            return
        for number in self.owners:
            part = self.modules[number]()
            if part is None:
                continue
            for name, _ in self.places[number]:
                if name not in part._parameters:
                    raise ValueError(
                        f"'{name}' is no parameter of the patched module's {self.classes[number].__name__} any more. Delete parameters and "
                        "register or remove parametrizations, on the original before it is patched"
                    )
            _hold(part, self.places[number], latest)

    def running(self) -> Twins:
        """What runs in place of the handle, with the latest weights."""
        forms = self._forms()
        if forms != self.forms:
            self.show()
            self.forms, self.links, self.twins = forms, None, None
        if self.twins is None:
            self.twins = self._make_twins()
        return self.twins

    def _forms(self) -> list[Any]:
        """What of a module may change without its `__setattr__`: submodules, the number of its parameters, its mode."""
        # By ids, as the handle's modules are not to be held.
        return [
            (tuple(map(id, part._modules.values())), len(part._parameters), part.training)
            for reference in self.modules
            if (part := reference()) is not None
        ]

    def _make_twins(self) -> Twins:
        latest = self.latest
        if latest is None:
            raise ValueError("params must be given: the patched module does not hold fast weights of its own")
        twins: list[nn.Module] = [object.__new__(kind) for kind in self.classes]
        parts = [reference() for reference in self.modules]
        of_part = {id(part): twin for part, twin in zip(parts, twins, strict=True) if part is not None}
        if self.links is None:
            self.links = [_links({} if part is None else vars(part), of_part) for part in parts]
        attributes = list(map(vars, twins))
        for part, own, links in zip(parts, attributes, self.links, strict=True):
            if part is None:
                continue
            own.update(vars(part))
            del own["_adaptrt_fast"], own["_adaptrt_number"]
            own["_parameters"] = own["_parameters"].copy()
            own["_modules"] = {name: None if child is None else of_part.get(id(child), child) for name, child in part._modules.items()}
            for name in links.names:
                own[name] = remapped(own[name], of_part)
        for number in self.owners:
            if parts[number] is not None:
                _hold(twins[number], self.places[number], latest)
        containers = [links.containers_of(own) for own, links in zip(attributes, self.links, strict=True)]
        children = [own.get("_modules", {}) for own in attributes]
        given, submodules = [own.copy() for own in attributes], [held.copy() for held in children]
        return Twins(twins, attributes, given, self.links, containers, children, submodules)

    def take_over(self, twins: Twins) -> None:
        """Lets the handle have what a forward pass has set, changed or deleted on the twins."""
        if twins.untouched():
            return
        parts = [reference() for reference in self.modules]
        of_twin = {id(twin): part for part, twin in zip(parts, twins.modules, strict=True) if part is not None}
        changed = False
        for part, now, given, links, containers, modules in zip(
            parts, twins.attributes, twins.given, twins.links, twins.containers, twins.submodules, strict=True
        ):
            if part is None:
                continue
            own = vars(part)
            for name, value in zip(links.containers, containers, strict=True):  # which may have been written to
                if value and refers(value, of_twin) and own.get(name) is value:
                    own[name], changed = remapped(value, of_twin), True
            if len(now) == len(given) and all(map(operator.is_, now.values(), given.values())) and now["_modules"] == modules:
                continue
            for name, value in now.items():
                if name not in _APART and given.get(name, self) is not value:
                    own[name] = remapped(value, of_twin) if refers(value, of_twin) else value
                    given[name], changed = value, True
            for name in [name for name in given if name not in now]:
                own.pop(name, None)
                del given[name]
                changed = True
            if now["_modules"] != modules:
                for name in {**modules, **now["_modules"]}:
                    if name not in now["_modules"]:
                        part._modules.pop(name, None)
                    elif now["_modules"][name] is not modules.get(name, self):
                        child = now["_modules"][name]
                        part._modules[name] = child if child is None else of_twin.get(id(child), child)
                modules.clear()
                modules.update(now["_modules"])
                changed = True
        if changed:
            self.links = None
            if self.twins is not twins:
                self.twins = None


class Twins(NamedTuple):
    """What runs in place of a handle's modules, and what of them may change.

    Attributes:
      modules: the twins.
      attributes, given: their attributes, as they are, and as they were made.
      links: which of them refer to others, and which are containers.
      containers: the latter.
      children, submodules: the modules in them, as they are, and as they were made.
    """

    modules: list[nn.Module]
    attributes: list[dict[str, Any]]
    given: list[dict[str, Any]]
    links: list[_Links]
    containers: list[tuple[Any, ...]]
    children: list[dict[str, nn.Module | None]]
    submodules: list[dict[str, nn.Module | None]]

    def untouched(self) -> bool:
        """Whether a forward pass certainly left nothing behind: nearly always, so it is asked at once for all."""
        return (
            list(map(len, self.attributes)) == list(map(len, self.given))
            and all(map(operator.is_, _values(self.attributes), _values(self.given)))
            and self.children == self.submodules
            and not any(map(any, self.containers))
        )


def _values(mappings: Iterable[dict[str, Any]]) -> Iterator[Any]:
    return itertools.chain.from_iterable(map(dict.values, mappings))


class _Links(NamedTuple):
    """Of a module the names of the attributes that refer to others, and of those that are containers."""

    names: list[str]
    containers: list[str]
    containers_of: Callable[[dict[str, Any]], tuple[Any, ...]]
    """The latter themselves, from the attributes."""


def _links(own: Mapping[str, Any], parts: Mapping[int, nn.Module]) -> _Links:
    links: list[str] = []
    containers: list[str] = []
    for name, value in own.items():
        kind = type(value)
        if kind in _SIMPLE or name in _APART:
            continue
        if kind in _CONTAINERS:
            containers.append(name)
            if not value:
                continue
        if refers(value, parts):
            links.append(name)
    if len(containers) < 2:  # of which itemgetter makes no tuple
        return _Links(links, containers, lambda own: tuple([own[name] for name in containers]))
    return _Links(links, containers, operator.itemgetter(*containers))


def _hold(module: nn.Module, places: Iterable[tuple[str, int]], values: Sequence[Tensor]) -> None:
    own = vars(module)
    held: dict[str, Any] = own["_parameters"]
    for name, i in places:
        held[name] = values[i]
    names = own.get("_flat_weights_names")
    if names is not None:  # recurrent modules keep their weights in a list as well
        own["_flat_weights"] = [getattr(module, name, None) for name in names]


class Patched(nn.Module):
    """What every module of a handle is, besides an instance of its original's class."""

    _adaptrt_fast: FastWeights | None = None
    """None for what a handle's own methods make of its class: a slice of a `Sequential` holds parts of the handle, but is none."""
    _adaptrt_number: int

    def __call__(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        """What the module returns for these arguments under the latest fast weights, or under `params`, which become the latest."""
        if self._adaptrt_fast is None:
            return super().__call__(*args, **kwargs)
        return self._adaptrt_run(lambda twin: twin(*args, **kwargs), self._adaptrt_fast, params)

    def forward(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        """As a call, without the module's own hooks."""
        if self._adaptrt_fast is None:
            return super().forward(*args, **kwargs)
        return self._adaptrt_run(lambda twin: twin.forward(*args, **kwargs), self._adaptrt_fast, params)

    def _adaptrt_run(self, run: Callable[[Any], Any], fast: FastWeights, params: Iterable[Tensor] | None) -> Any:
        if params is not None:
            fast.put(params)
            fast.show()
        twins = fast.running()
        try:
            with fast.differentiable_twice():
                return run(twins.modules[self._adaptrt_number])
        finally:
            fast.take_over(twins)

    def __setattr__(self, name: str, value: Any) -> None:
        fast = self._adaptrt_fast
        if fast is None or name not in self.__dict__.get("_parameters", ()):
            super().__setattr__(name, value)
            self._adaptrt_changed()
            return
        if not isinstance(value, Tensor):
            raise TypeError(f"a fast weight must be a tensor, got {torch.typename(value)} for '{name}'")
        if fast.latest is None:
            raise ValueError(
                f"'{name}' cannot be assigned: the patched module does not hold fast weights of its own; call update_params first"
            )
        index = dict(fast.places[self._adaptrt_number])[name]
        fast.put([value if i == index else old for i, old in enumerate(fast.latest)])
        fast.show()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self._adaptrt_changed()

    def __copy__(self) -> Any:
        raise TypeError("copy.copy of a patched module would share its fast weights and take over their places; use copy.deepcopy")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._adaptrt_fast is not None and id(self._adaptrt_fast) not in memo:
            raise TypeError("a part of a patched module has no weights of its own to copy; copy the patched module, or the original's part")
        made = memo[id(self)] = object.__new__(type(self))
        made.__setstate__(copy.deepcopy(vars(self), memo))
        return made

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module. Tensors that are assigned are together one update, of weights that require grad as before."""
        fast = self._adaptrt_fast
        before = [] if fast is None else list(fast.versions or [])
        keys = super().load_state_dict(state_dict, strict, assign)
        if fast is not None and before and fast.latest is not None and fast.latest is not before[-1]:
            pairs = zip(fast.latest, before[-1], strict=True)
            assigned = [new if new is old else new.detach().requires_grad_(old.requires_grad) for new, old in pairs]
            fast.versions = before
            fast.put(assigned)
            fast.show()
        return keys

    def add_module(self, name: str, module: nn.Module | None) -> None:
        super().add_module(name, module)
        self._adaptrt_changed()

    def _adaptrt_changed(self) -> None:
        if self._adaptrt_fast is not None:
            self._adaptrt_fast.twins = self._adaptrt_fast.links = None


class FunctionalModule(Patched):
    """The root of a handle: it has the fast weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy.deepcopy(self._adaptrt_fast, memo)
        return super().__deepcopy__(memo)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._adaptrt_fast is not None:
            self._adaptrt_fast.adopt(self)

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Any]:
        """The fast weights, in the order of the model's parameters.

        Args:
          recurse: there for `nn.Module`'s signature; all are returned in either case.
          time: how many updates after the beginning; None for the latest.
        Raises:
          ValueError: there are none, or an earlier version while `track_higher_grads` is off.
          IndexError: there were fewer updates.
        """
        if self._adaptrt_fast is None:
            return super().parameters(recurse)
        versions = self._adaptrt_fast.versions
        if versions is None:
            raise ValueError("the patched module does not hold fast weights of its own; call update_params first")
        if not recurse:
            warnings.warn("parameters(recurse=False) of a patched module returns the fast weights of all modules", stacklevel=2)
        if not self.track_higher_grads and time not in (None, -1, 0):
            raise ValueError(f"time={time}: only the latest fast weights are kept while track_higher_grads is off; leave time out")
        if time is not None and not -len(versions) <= time < len(versions):
            raise IndexError(f"time={time}: there were {len(versions) - 1} updates of the fast weights; give a time from 0 to that")
        return iter(versions[-1 if time is None else time])

    @property
    def init_fast_params(self) -> list[Tensor]:
        """The fast weights of the beginning."""
        if not self.track_higher_grads:
            raise ValueError("init_fast_params are kept only while track_higher_grads is on")
        if self._held.versions is None:
            raise ValueError("the patched module does not hold fast weights of its own; call update_params first")
        return self._held.versions[0]

    @property
    def _held(self) -> FastWeights:
        if self._adaptrt_fast is None:
            raise ValueError("a slice of a patched module has no fast weights of its own; use the patched module")
        return self._adaptrt_fast

    @property
    def fast_params(self) -> list[Tensor] | None:
        """The latest fast weights. Assigning a list of tensors makes them the latest."""
        return self._held.latest

    @fast_params.setter
    def fast_params(self, value: Iterable[Tensor]) -> None:
        self._held.put(value)
        self._held.show()

    def update_params(self, params: Iterable[Tensor]) -> None:
        """Makes `params` the latest fast weights."""
        self._held.put(params)
        self._held.show()

    @property
    def track_higher_grads(self) -> bool:
        """Whether earlier fast weights are kept, so that gradients can reach them."""
        return self._held.track

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"track_higher_grads must be a bool, got {type(value).__name__}; give True or False")
        self._held.track = value


def make_functional(module: nn.Module, encapsulator: Callable[[Any, nn.Module], None] | None = None) -> Any:
    """A handle without fast weights: every call needs `params`, or an update before it.

    Args:
      module: left as it is; its tensors are shared until an update replaces them.
      encapsulator: called with the handle and the module before the handle is returned.
    Raises:
      TypeError: it is no `nn.Module`, or a part of it is a script.
      ValueError: it is a handle already, its gradients are reduced by a static graph, or a part's own `forward` holds on to the module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {torch.typename(module)}")
    if any(isinstance(part, Patched) for part in module.modules()):
        raise ValueError("the module, or a part of it, is patched already; patch the original")
    _check_parts(list(module.modules()))
    handle = shadow(module)
    fast = FastWeights(module, handle)
    for number, part in enumerate(list(handle.modules())):
        # What torch.compile made runs the original, and its gradients have no derivative in AOTAutograd.
        vars(part)["_compiled_call_impl"] = None
        if _is_compiled(part):
            vars(part)["forward"] = types.MethodType(_uncompiled, part)
        if isinstance(part, DistributedDataParallel):
            _keep_to_itself(part)
        if isinstance(part, _WeightNorm) and "forward" not in vars(part):
            vars(part)["forward"] = types.MethodType(_normed, part)
        hooks: dict[int, Any] = part._forward_pre_hooks
        for key, hook in hooks.items():
            if type(hook) is WeightNorm:
                hooks[key] = _WeightNormByFormula(hook.name, hook.dim)
        base = FunctionalModule if part is handle else Patched
        kind: Any = type(part)
        vars(part).update(_adaptrt_fast=fast, _adaptrt_number=number)
        part.__class__ = type(f"Functional{kind.__name__}", (base, kind), {"__module__": kind.__module__})
    if encapsulator is not None:
        encapsulator(handle, module)
    return handle


def _normed(self: Any, weight_g: Tensor, weight_v: Tensor) -> Tensor:
    return weight_norm(weight_v, weight_g, self.dim)


class _WeightNormByFormula(WeightNorm):
    """The hook with a right second derivative."""

    def compute_weight(self, module: nn.Module) -> Tensor:
        return weight_norm(getattr(module, f"{self.name}_v"), getattr(module, f"{self.name}_g"), self.dim)


def _check_parts(parts: list[nn.Module]) -> None:
    """Raises for parts that would go on with the original's weights."""
    known = {id(part) for part in parts}
    for part in parts:
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(
                f"a script ({torch.typename(part)}) cannot run on other weights than its own; patch the module it was made from"
            )
        for held in () if _is_compiled(part) else _held_by(vars(part).get("forward")):
            if id(held) in known:
                raise ValueError(
                    f"forward of a {type(part).__name__} was replaced by a function that holds on to a {type(held).__name__}, and would "
                    "run on its weights; make it a method, types.MethodType(function, module), that finds everything in self"
                )


def _held_by(function: Any) -> list[Any]:
    """What a function can reach by what it has enclosed, its defaults, what it wraps, and containers of these; not by globals.

    Of a bound method what it is bound to counts only further in: the function given may well be bound to a module's own copy.
    """
    found: list[Any] = []
    seen: set[int] = set()
    left = [getattr(function, "__func__", function)]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        found.append(value)
        if isinstance(value, types.MethodType):
            left += [value.__self__, value.__func__]
        elif isinstance(value, types.FunctionType):
            cells = value.__closure__ or ()
            left += [cell.cell_contents for cell in cells if cell != types.CellType()]  # an empty one raises
            left += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values()]
        elif isinstance(value, functools.partial):
            left += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            left += value
        elif isinstance(value, dict):
            left += value.values()
    return found


def _is_compiled(part: nn.Module) -> bool:
    """Whether `torch.compile` made the module; Dynamo, which takes seconds to import, stays away where it is not used."""
    return type(part).__module__.startswith("torch._dynamo") and "_orig_mod" in part._modules


def _uncompiled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    module: Any = self._modules["_orig_mod"]
    return module(*args, **kwargs)


def _keep_to_itself(part: DistributedDataParallel) -> None:
    """Lets forward passes and inner steps send nothing to other processes, so that each process may take as many as it likes.

    The hooks that reduce gradients are on the module's own parameters: `backward()` runs them when it gets there.
    """
    if part.static_graph:
        raise ValueError(
            "DistributedDataParallel(static_graph=True) reduces gradients after the first backward pass, which is that of an inner step; "
            "wrap the model with static_graph=False"
        )
    part.broadcast_buffers = False
    part.register_forward_hook(_outlive)


def _outlive(module: nn.Module, args: Any, output: Any) -> None:
    """Keeps a twin while the graph of its output lives: with `find_unused_parameters` the way back asks for it by a weak reference."""
    del args
    for leaf in tree.leaves(output):
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
            leaf.grad_fn.register_prehook(lambda grads, module=module: None)


def buffer_sync(module: nn.Module, fmodule: nn.Module, device: torch.device | None = None) -> None:
    """Copies the buffers of `module` to `fmodule`, which has the same submodules. A buffer in two places stays one.

    Raises:
      KeyError: `fmodule` lacks a submodule.
    """
    _sync(module, fmodule, device, {})


def _sync(module: nn.Module, fmodule: nn.Module, device: torch.device | None, known: dict[int, Tensor]) -> None:
    for name, value in module._buffers.items():
        if value is not None and id(value) not in known:
            known[id(value)] = copied(value.detach(), device)
        fmodule._buffers[name] = None if value is None else known[id(value)]
    for name, child in module._modules.items():
        if name not in fmodule._modules:
            raise KeyError(f"the patched module has no submodule '{name}'")
        other = fmodule._modules[name]
        if child is not None and other is not None:
            _sync(child, other, device, known)


def monkeypatch(
    module: nn.Module,
    device: torch.device | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> Any:
    """A handle of `module` with fast weights and buffers of its own.

    Args:
      module: left as it is.
      device: where fast weights and buffers go; None leaves them where they are.
      copy_initial_weights: begin with copies that no gradient leaves. False: begin with the module's own weights, as MAML does, so that
        gradients reach `module.parameters()`.
      track_higher_grads: keep every version of the fast weights; False keeps the latest only.
    """

    def encapsulate(handle: Any, original: nn.Module) -> None:
        buffer_sync(original, handle, device)
        if copy_initial_weights:
            handle.update_params(get_func_params(original, device))
            for part in handle.modules():
                if isinstance(part, DistributedDataParallel):
                    # No gradient comes to the module's own parameters; their hooks must not wait for one from this forward pass.
                    part.require_backward_grad_sync = False
        else:
            handle.update_params([p.clone() if device is None else p.clone().to(device) for p in original.parameters()])

    handle = make_functional(module, encapsulate)
    handle.track_higher_grads = track_higher_grads
    return handle
