"""Leaves out what only wraps a computation while functions are traced: activation checkpointing, `torch.compile`, and saving hooks.

The adjoint decides what is kept in memory and what is computed again, so a checkpoint in a model is the identity in a program. What
`torch.compile` made runs the function that it was made from, because the operations that it calls are to be recorded. Hooks on tensors that
autograd saves (`torch.autograd.graph.saved_tensors_hooks`) would be given tensors without values, and what they do would be in the graph.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.utils.checkpoint

from adaptrt.graph.exchange import Entry, Target, exchanged

_NEW = "_checkpoint_without_reentrant_generator_impl"

CHECKPOINTS = Entry(
    "checkpoints",
    "torch.utils.checkpoint does nothing while a function is captured: the adjoint decides what is computed again.",
    "models with checkpoints are refused",
    exchanged=(
        Target("torch.utils.checkpoint", _NEW if hasattr(torch.utils.checkpoint, _NEW) else "_checkpoint_without_reentrant_generator"),
        Target("torch.utils.checkpoint", "CheckpointFunction.apply"),
    ),
)


SAVING_HOOKS = Entry(
    "hooks on saved tensors",
    "The user's hooks on tensors that autograd saves are not called while a function is captured.",
    "models are refused, or captured with what the hooks do, while such hooks are set",
    needed=(Target("torch._C._autograd", "_saved_tensors_hooks_set_tracing"),),
)


@contextlib.contextmanager
def without_wrappers() -> Generator[None]:
    """Within the block this thread runs checkpointed and compiled functions as plain ones.

    For compiled functions that is so as long as the thread says that it traces (`FX_TRACING` in `exchange.py`).
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(exchanged(CHECKPOINTS, _around_nothing, _called_directly))
        if SAVING_HOOKS.holds:
            autograd: Any = getattr(torch._C, "_autograd", None)
            pause: Any = autograd._saved_tensors_hooks_set_tracing
            stack.callback(pause, pause(True))
        dynamo = sys.modules.get("torch._dynamo")  # importing it takes seconds; without it nothing was compiled
        if dynamo is not None:
            stack.enter_context(dynamo.config.patch(error_on_nested_fx_trace=False))
        yield


def _around_nothing(original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of the generator that `checkpoint` advances before and after it calls the function."""
    del original

    def around(*args: Any, **kwargs: Any) -> Generator[None]:
        del args, kwargs
        yield

    return around


def _called_directly(original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of the custom function of autograd that calls what is checkpointed."""
    del original

    def call(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        del preserve_rng_state
        return function(*args)

    return call
