"""Keeps `torch.compile` out of the functions by which user code enters the library.

A function that is compiled may call an unroll. The call then runs as it does elsewhere, between the parts of the function before and after
it. Without this PyTorch would look into our code, compile pieces of it, and warn of each place that it cannot compile.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from adaptrt.graph.exchange import Entry, Target

_FRAMES = "torch._C._dynamo.eval_frame"

ENTRY_POINTS = Entry(
    "calls within torch.compile",
    "torch.compile leaves calls of an unroll as they are.",
    "it compiles pieces of the library's code, and warns of what it cannot compile",
    needed=(Target(_FRAMES, "set_code_exec_strategy"), Target(_FRAMES, "_FrameExecStrategy"), Target(_FRAMES, "_FrameAction.SKIP")),
)

Function = TypeVar("Function", bound=Callable[..., Any])


def entry_point(function: Function) -> Function:
    """Marks a function so that `torch.compile` compiles neither it nor what it calls. Returns the function itself: calls take no longer.

    `torch.compiler.disable` does the same, but imports the compiler, which takes seconds, and returns a wrapper.
    """
    if ENTRY_POINTS.holds:
        marked: Any = function
        marked._torchdynamo_disable = True
        marked._torchdynamo_disable_msg = "adaptrt has compiled what it calls"
        frames: Any = torch._C._dynamo.eval_frame  # type: ignore[attr-defined]
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(marked.__code__, frames._FrameExecStrategy(skip, skip))
    return function
