"""Replaces functions of PyTorch by simpler operations while a model runs, before they are differentiated."""

# pyright: reportIncompatibleMethodOverride=false, reportPrivateUsage=false, reportUnknownMemberType=false

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode


class WriteOut(TorchFunctionMode, abc.ABC):
    """Replaces calls of its functions by simpler operations while it is active.

    Attributes:
      functions: the functions that it replaces.
      name, noun: names of the rewrite and of what it replaces, for the graph's history.
      num_written: how many calls were replaced.
    """

    functions: ClassVar[tuple[Callable[..., Any], ...]]
    name: ClassVar[str]
    noun: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.num_written = 0

    @abc.abstractmethod
    def write(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what one of the functions returns for these arguments, or NotImplemented if the function itself is to be called."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        del types
        kwargs = kwargs or {}
        if func in self.functions and not _under_transform():
            written = self.write(*args, **kwargs)
            if written is not NotImplemented:
                self.num_written += 1
                return written
        return func(*args, **kwargs)


def _under_transform() -> bool:
    """Whether a `torch.func` transform or forward mode is active, for which an autograd `Function` would need rules of its own."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0  # type: ignore[attr-defined]
