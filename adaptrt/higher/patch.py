"""Patched modules: copies of a model whose parameters are plain tensors that a training loop replaces, called fast weights.

`monkeypatch(model)` returns a handle, which has the model's class, attributes, hooks and submodules. A call of it runs on a twin of the
model, which holds the fast weights of this moment and keeps them. Whatever looks at the twin's modules later, as checkpointing does when it
computes activations again, finds the weights of its own time. What a forward pass leaves in attributes is handed over to the handle.

Known limits:

- If a method other than `forward` checkpoints parts of the model and is called on the handle, these parts are computed again with the
  latest weights.
- The handle has its own copy of whatever of the model is reached by attributes, lists, tuples, dicts, sets and bound methods. What is
  reached in another way (a function that encloses a part, a weak reference, a parameter in a list) is the model's own, with the model's
  weights. If the `forward` of a module is of that kind, `monkeypatch` raises.
- Attention in a checkpointed part is computed again where `backward()` is called, with the kernels that are allowed there. Call
  `backward()` within `sdpa_kernel(SDPBackend.MATH)`.
- `DistributedDataParallel` rearranges its buckets, together with the other processes, at the first forward pass after the first backward
  pass, even if that is a forward pass of a handle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptrt.functional import shadow
from adaptrt.higher import utils as _utils  # noqa: F401
from adaptrt.higher.fast_weights import FastWeights
from adaptrt.higher.handle import FunctionalModule, Patched
from adaptrt.higher.handle_names import names_for
from adaptrt.higher.methods import methods_for, wrap_own_methods
from adaptrt.higher.special_parts import check_parts, expect_no_gradient, prepare_part
from adaptrt.higher.utils import _get_param_mapping, _places_of_params, copied, get_func_params

__all__ = ["FunctionalModule", "Patched", "buffer_sync", "make_functional", "monkeypatch"]

# The original's names, which programs use in signatures and for isinstance.
_MonkeyPatchBase = Patched
_BufferType = dict[str, Tensor | None]
_EncapsulatorType = Callable[[Patched, nn.Module], None] | None
_patched_parameters = FunctionalModule.parameters
_internal_attrs = {"_backend"} | {name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)}
"""The attributes that a loop over a module's attributes leaves out, since `nn.Module` itself keeps its tables in them."""


def make_functional(module: nn.Module, encapsulator: Callable[[Any, nn.Module], None] | None = None) -> Any:
    """Returns a handle of `module` without fast weights: every call needs `params`, unless an update came before it.

    Args:
      module: remains unchanged. The handle shares its tensors until an update replaces them.
      encapsulator: a function that is called with the handle and the module before the handle is returned.
    Raises:
      TypeError: `module` is no `nn.Module`, or a part of it is a script.
      ValueError: it is a handle already, or has one as a part; it is a `DistributedDataParallel` with a static graph; or the `forward` of a
        part was replaced by a function that encloses a module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {torch.typename(module)}")
    if any(isinstance(part, Patched) for part in module.modules()):
        raise ValueError("the module, or a part of it, is patched already; patch the original")
    check_parts(list(module.modules()))
    handle = shadow(module)
    fast = FastWeights(module, handle)
    methods_of = functools.cache(methods_for)  # once for each class
    for number, part in enumerate(list(handle.modules())):
        prepare_part(part)
        wrap_own_methods(part)
        base = FunctionalModule if part is handle else Patched
        kind: Any = type(part)
        names = {**methods_of(kind, base), **names_for(part, part is handle)}
        vars(part).update(_adaptrt_fast=fast, _adaptrt_number=number)
        part.__class__ = type(f"Functional{kind.__name__}", (base, kind), {"__module__": kind.__module__, **names})
    if encapsulator is not None:
        encapsulator(handle, module)
    return handle


def buffer_sync(module: nn.Module, fmodule: nn.Module, device: torch.device | None = None) -> None:
    """Copies the buffers of one module tree into another. A buffer that stands in two places remains one.

    Args:
      module: the module that the buffers are copied from.
      fmodule: a module with the same submodules, usually a handle of `module`. Its buffers are replaced.
      device: where the copies are put; None leaves them where the buffers are.
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
    """Returns a handle of `module` with fast weights and buffers of its own.

    Args:
      module: remains unchanged.
      device: where fast weights and buffers are put; None leaves them where they are.
      copy_initial_weights: start with copies of the weights, from which no gradient flows back. If False, start with the module's own
        weights, as MAML does, so that gradients reach `module.parameters()`.
      track_higher_grads: keep every version of the fast weights. If False, keep only the latest.
    Raises:
      TypeError, ValueError: as `make_functional`.
    """

    def encapsulate(handle: Any, original: nn.Module) -> None:
        buffer_sync(original, handle, device)
        if copy_initial_weights:
            handle.update_params(get_func_params(original, device))
            for part in handle.modules():
                expect_no_gradient(part)
        else:
            handle.update_params([p.clone() if device is None else p.clone().to(device) for p in original.parameters()])

    handle = make_functional(module, encapsulate)
    handle.track_higher_grads = track_higher_grads
    return handle


@contextmanager
def _modify_internally(fmodule: Any) -> Iterator[None]:
    """Within the block, assignments to this module's parameters change what it shows until the next update, not the fast weights."""
    before = fmodule._adaptrt_only_shows
    vars(fmodule)["_adaptrt_only_shows"] = True
    try:
        yield
    finally:
        vars(fmodule)["_adaptrt_only_shows"] = before


def _update_patched_params(fmodule: nn.Module, params_box: Sequence[Sequence[Tensor]], params_offset: int) -> int:
    """Changes which tensors the modules of a handle show as their parameters until the next update, but not the fast weights.

    Args:
      fmodule: the handle or a part of it.
      params_box: a list whose first entry has one tensor for each place of a parameter, as `_expand_params` returns them.
      params_offset: where in that entry those of `fmodule` begin.
    Returns:
      Where they end.
    """
    places = list(_places_of_params(fmodule))
    end = params_offset + len(places)
    for (part, name), value in zip(places, params_box[0][params_offset:end], strict=False):
        part._parameters[name] = value  # pyright: ignore[reportArgumentType]
    return end


def _make_functional(
    module: nn.Module, params_box: Sequence[Sequence[Tensor] | None], params_offset: int, root_patched: Any = None
) -> tuple[int, Any, type]:
    """Returns a handle whose calls take their parameters from a box, if there are some in it.

    Args:
      module: as for `make_functional`.
      params_box: a list with one entry, None or one tensor for each place of a parameter, as `_expand_params` returns them.
      params_offset: where in that entry those of `module` begin.
      root_patched: has no effect. The handle is a root.
    Returns:
      Where they end, the handle and its class.
    """
    del root_patched
    handle = make_functional(module)
    mapping = _get_param_mapping(module, [], [])
    end = params_offset + len(mapping)

    def from_box(self: Any, *args: Any, params: Any = None, **kwargs: Any) -> Any:
        if params is None and params_box[0] is not None:
            by_index = dict(zip(mapping, params_box[0][params_offset:end], strict=True))
            params = [by_index[index] for index in range(len(by_index))]
        return kind.__call__(self, *args, params=params, **kwargs)

    kind: Any = type(handle)
    handle.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__call__": from_box})
    return end, handle, type(handle)


class _ParameterPlaceholder:
    """Stands for a parameter of which only the name is known.

    Args:
      name: the parameter's name.
    """

    def __init__(self, name: str) -> None:
        self._param_name = name

    def __repr__(self) -> str:
        return f'Parameter placeholder ("{self._param_name}")'
