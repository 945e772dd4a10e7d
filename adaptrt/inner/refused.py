"""Refuses models and losses of kinds that programs cannot be made of, with the way out, and takes off wrappers that do not matter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adaptrt.errors import InvalidType, NotTraceable, UnsupportedParameter, UnsupportedRandomness
from adaptrt.graph.gradient_mode import GradientMode
from adaptrt.inner.executed import Executed

_DISTRIBUTED = """DistributedDataParallel would average the gradients of the first call only. Wrap the meta-loss of the plain model:
  meta_loss = DistributedDataParallel(compile_unroll(model, ...).module())"""
_SHARDED = """A call reads all parameters at its beginning, and these are sharded then. Shard the meta-loss of the plain model:
  meta_loss = fully_shard(compile_unroll(model, ...).module())"""


def unwrapped(model: Any) -> Any:
    """Returns the model in `DataParallel`, after checking that it is a module that can be compiled.

    Raises:
      InvalidType: it is an exported program, or it is or holds a `DistributedDataParallel` or what `fully_shard` has sharded.
    """
    while isinstance(model, nn.DataParallel):
        model = model.module
    if type(model).__name__ == "ExportedProgram":
        raise InvalidType("model must be a torch.nn.Module, got ExportedProgram; pass its .module(), or the model that was exported")
    for name, part in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(part, DistributedDataParallel):
            raise InvalidType(f"{_what('model', name)} is wrapped. {_DISTRIBUTED}")
        if any(base.__name__ == "FSDPModule" for base in type(part).__mro__):
            raise InvalidType(f"{_what('model', name)} is sharded. {_SHARDED}")
    return model


def refuse_parts(model: nn.Module) -> None:
    """Raises if a module in the model, or a buffer, is of a kind that cannot be traced.

    Raises:
      InvalidType: a module is a script.
      UnsupportedParameter: a table of embeddings is built with `sparse` or `max_norm`, or a buffer is sparse, nested or without values.
    """
    for name, part in model.named_modules():
        refuse_script(part, _what("model", name))
        if isinstance(part, nn.Embedding | nn.EmbeddingBag):
            _refuse_table(name, part)
    for name, buffer in model.named_buffers():
        _refuse_buffer(name, buffer)


def refuse_code(executed: Executed, mode: GradientMode) -> None:
    """Raises if code that ran while a model was traced in a gradient mode does what a program cannot do.

    Raises:
      UnsupportedRandomness: it seeds a generator. A program's random numbers are drawn before it runs.
      NotTraceable: in inference mode, it asks for the mode in a way in which it is given the wrong answer.
    """
    if executed.seeding:
        raise UnsupportedRandomness(
            f"{executed.seeding[0]} seeds a generator, or sets its state, while the model runs; a program's random numbers are drawn "
            "before it runs, from the global generator or the one that the call is given. Seed before the call; numbers that are the same "
            "in every pass belong in a buffer of the model (register_buffer)"
        )
    if mode is GradientMode.INFERENCE and torch.is_inference_mode_enabled.__name__ in executed.questions:
        raise NotTraceable(
            "the model or the loss asks for inference mode by a name that it has imported; write torch.is_inference_mode_enabled(), or "
            "call under no_grad"
        )


def refuse_questions(lines: Iterable[str]) -> None:
    """Raises because what is computed depends on what a tensor answers about autograd.

    Raises:
      NotTraceable: names the lines that ask.
    """
    raise NotTraceable(
        f"{', '.join(lines)} asks whether a tensor requires grad, is a leaf or an inference tensor, or has a grad_fn, and what is computed "
        "depends on the answer, which is another one while a program is traced. Let it depend on self.training, on torch.is_grad_enabled() "
        "or on a flag of the model's"
    )


def refuse_script(value: Any, what: str) -> None:
    """Raises if a module is one that `torch.jit` made.

    Raises:
      InvalidType: it is. Its weights are out of reach.
    """
    if isinstance(value, torch.jit.ScriptModule):
        raise InvalidType(
            f"{what} was made by torch.jit.script or torch.jit.trace, and runs on its own weights only; pass the Python module that it was "
            "made from. Where there is only the file, build the model in Python and call load_state_dict(scripted.state_dict()) on it"
        )


def _refuse_table(name: str, part: nn.Embedding | nn.EmbeddingBag) -> None:
    if part.sparse:
        raise UnsupportedParameter(
            f"module '{name}' was built with sparse=True; sparse gradients cannot be unrolled. Build it with sparse=False"
        )
    if part.max_norm is not None:
        raise UnsupportedParameter(
            f"module '{name}' was built with max_norm={part.max_norm}, so that each call rewrites rows of its weight outside of the "
            f"optimiser. Build it with max_norm=None, and scale what it returns: rows * ({part.max_norm} / rows.norm(dim=-1, "
            "keepdim=True)).clamp(max=1)"
        )


def _refuse_buffer(name: str, value: Tensor) -> None:
    if value.is_nested:
        raise UnsupportedParameter(f"buffer '{name}' is a nested tensor; pad it, with value.to_padded_tensor(0.0), and keep a mask")
    if value.is_quantized:
        raise UnsupportedParameter(f"buffer '{name}' is quantised; keep its .dequantize(), or quantise it where it is used")
    if value.layout is not torch.strided:
        raise UnsupportedParameter(
            f"buffer '{name}' has layout {value.layout}; only dense tensors can be inputs of a program. Call .to_dense()"
        )
    if value.is_meta:
        raise UnsupportedParameter(f"buffer '{name}' is on the meta device, where it has no values; load the model's weights first")


def _what(model: str, name: str) -> str:
    return f"module '{name}'" if name else f"the {model}"
