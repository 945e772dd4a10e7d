"""Modules that do not work in a handle as they are: which are refused, and what is changed in the others.

- A script runs on its own weights, and is refused. So is a module whose own `forward`, set on the instance, encloses a module of the model.
- A module that `torch.compile` made runs the module that it was made from, not compiled: its compiled gradients have no derivative.
- `DistributedDataParallel` sends nothing until `backward()` comes to the model's own parameters.
- Weight norm is computed by its formula: the second derivative of PyTorch's kernel is wrong.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from adaptrt import tree
from adaptrt.graph.capture import weight_norm
from adaptrt.parts import is_compiled, run_uncompiled


def check_parts(parts: list[nn.Module]) -> None:
    """Raises if a module would run with the original's weights also as part of a handle.

    Args:
      parts: all modules of the model.
    Raises:
      TypeError: one of them is a script.
      ValueError: the `forward` of an instance encloses a module of the model.
    """
    known = {id(part) for part in parts}
    for part in parts:
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(
                f"a script ({torch.typename(part)}) cannot run on other weights than its own; patch the module it was made from"
            )
        for held in () if is_compiled(part) else _held_by(vars(part).get("forward")):
            if id(held) in known:
                raise ValueError(
                    f"forward of a {type(part).__name__} was replaced by a function that holds on to a {type(held).__name__}, and would "
                    "run on its weights; make it a method, types.MethodType(function, module), that finds everything in self"
                )


def _held_by(function: Any) -> list[Any]:
    """What a function can reach by what it has enclosed, its defaults, what it wraps, and containers of these; not by globals.

    What the given function itself is bound to does not count, because it may well be bound to the module's own copy. What a method that
    it reaches is bound to does count.
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


def prepare_part(part: nn.Module) -> None:
    """Changes what must be changed in one module of a handle.

    Args:
      part: a copy of a module of the model, which shares its tensors.
    Raises:
      ValueError: it is a `DistributedDataParallel` with a static graph.
    """
    # What torch.compile made runs the original, and its gradients have no derivative in AOTAutograd.
    vars(part)["_compiled_call_impl"] = None
    if is_compiled(part):
        run_uncompiled(part)
    if isinstance(part, DistributedDataParallel):
        _keep_to_itself(part)
    if isinstance(part, _WeightNorm) and "forward" not in vars(part):
        vars(part)["forward"] = types.MethodType(_normed, part)
    hooks: dict[int, Any] = part._forward_pre_hooks
    for key, hook in hooks.items():
        if type(hook) is WeightNorm:
            hooks[key] = _WeightNormByFormula(hook.name, hook.dim)


def expect_no_gradient(part: nn.Module) -> None:
    """Must be called for the modules of a handle from which no gradient comes to the model's own parameters.

    The hooks of `DistributedDataParallel` on these parameters must not wait for one from the handle's forward passes.
    """
    if isinstance(part, DistributedDataParallel):
        part.require_backward_grad_sync = False


def _keep_to_itself(part: DistributedDataParallel) -> None:
    """Makes forward passes and inner steps send nothing to other processes, so that each process may take as many as it likes.

    The hooks that reduce gradients are on the model's own parameters, and run when `backward()` gets to these.
    """
    if part.static_graph:
        raise ValueError(
            "DistributedDataParallel(static_graph=True) reduces gradients after the first backward pass, which is that of an inner step; "
            "wrap the model with static_graph=False"
        )
    part.broadcast_buffers = False
    part.register_forward_hook(_outlive)


def _outlive(module: nn.Module, args: Any, output: Any) -> None:
    """Keeps a twin alive as long as the graph of its output: with `find_unused_parameters` the backward pass needs the twin.

    `DistributedDataParallel` itself has only a weak reference to it there.
    """
    del args
    for leaf in tree.leaves(output):
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
            leaf.grad_fn.register_prehook(lambda grads, module=module: None)


def _normed(self: Any, weight_g: Tensor, weight_v: Tensor) -> Tensor:
    return weight_norm(weight_v, weight_g, self.dim)


class _WeightNormByFormula(WeightNorm):
    """The hook of `torch.nn.utils.weight_norm` by its formula, which has the right second derivative; PyTorch's kernel has not."""

    def compute_weight(self, module: nn.Module) -> Tensor:
        return weight_norm(getattr(module, f"{self.name}_v"), getattr(module, f"{self.name}_g"), self.dim)
