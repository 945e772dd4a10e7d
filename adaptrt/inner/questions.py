"""Notices where the user's code asks a tensor about its part in autograd's graph, and what would be computed for the opposite answer.

Code may ask if a tensor requires grad, is a leaf, has a `grad_fn` or is an inference tensor. Programs are traced under conditions of their
own: gradients are on, and data may require grad so that it can be differentiated. So the answers are not always those of an eager pass.
Where they only decide on checkpoints or empty hooks, nothing depends on them. To find out, a pass that has asked is traced once more with
the opposite answers.

Known limits: what a hook on a tensor does to gradients is seen for support batches only, as those of query batches are not computed here.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from adaptrt.inner.user_code import is_of_user

_NEGATED: dict[Any, Callable[[Any], Any]] = {
    Tensor.requires_grad.__get__: lambda answer: not answer,  # pyright: ignore
    Tensor.is_leaf.__get__: lambda answer: not answer,  # pyright: ignore
    Tensor.grad_fn.__get__: lambda answer: object() if answer is None else None,  # pyright: ignore
    Tensor.is_inference: lambda answer: not answer,
}


class TensorQuestions(TorchFunctionMode):
    """Collects the lines of the user's code that ask such questions while it is active.

    Attributes:
      lines: as `file:line`.
      negates: whether the opposite is answered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, None] = {}
        self.negates = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        answer = func(*args, **(kwargs or {}))
        if func not in _NEGATED and getattr(func, "__name__", "") != "is_inference":
            return answer
        frame = _asking(sys._getframe(1))  # pyright: ignore[reportPrivateUsage]
        if frame is None:
            return answer
        self.lines[f"{frame.f_code.co_filename}:{frame.f_lineno}"] = None
        return _NEGATED.get(func, _NEGATED[Tensor.is_inference])(answer) if self.negates else answer


def _asking(frame: types.FrameType | None) -> types.FrameType | None:
    """The frame that asks, if it is the user's. Frames of modes through which the question came do not count."""
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame if frame is not None and is_of_user(frame.f_code, frame.f_globals) else None
