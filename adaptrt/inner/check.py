"""Checks models, arguments and data before anything runs, and refuses what could only give wrong numbers or obscure errors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptrt import tree
from adaptrt.errors import DeviceMismatch, InvalidArgument, InvalidBatch, InvalidType, LabelOutOfRange, NonFiniteInput, UnsupportedParameter
from adaptrt.graph.in_memory import changes_operations, in_memory
from adaptrt.graph.indices import IndexBound
from adaptrt.inner.refused import refuse_parts, refuse_script
from adaptrt.inner.step import Batch


def model_device(model: nn.Module, may_lack_parameters: bool = False) -> torch.device:
    """Returns the device of the model, after checking that its parameters can be adapted and are all on one device.

    `may_lack_parameters`: a model that has none is on the device of its buffers, or the CPU.

    Raises:
      InvalidType: not a module, or a script.
      UnsupportedParameter: a parameter is complex, of integer type, uninitialised, without values, or gets sparse gradients; and what
        `refuse_parts` refuses.
      DeviceMismatch: parameters on several devices.
      InvalidArgument: no parameters.
    """
    if not isinstance(model, nn.Module):
        raise InvalidType(f"model must be a torch.nn.Module, got {type(model).__name__}")
    refuse_parts(model)
    devices: dict[torch.device, str] = {}
    for name, param in model.named_parameters():
        if isinstance(param, nn.parameter.UninitializedParameter):
            raise UnsupportedParameter(f"parameter '{name}' is not initialised yet; run the model once before compiling")
        if not param.is_floating_point():
            raise UnsupportedParameter(
                f"parameter '{name}' is of {param.dtype}; only real floating-point parameters can be adapted. Make it a buffer"
            )
        if changes_operations(type(param)):
            raise UnsupportedParameter(
                f"parameter '{name}' is of class {type(param).__name__}, which changes by its __torch_function__ what operations do; "
                "make it an nn.Parameter of ordinary values"
            )
        if param.layout is not torch.strided:
            raise UnsupportedParameter(f"parameter '{name}' has layout {param.layout}; only dense parameters can be adapted")
        devices.setdefault(param.device, name)
    if not devices and may_lack_parameters:
        return next((buffer.device for buffer in model.buffers()), torch.device("cpu"))
    if not devices:
        raise InvalidArgument("the model has no parameters")
    if len(devices) > 1:
        raise DeviceMismatch(
            f"the model's parameters are on several devices: {', '.join(f'{name} on {device}' for device, name in devices.items())}"
        )
    device, name = next(iter(devices.items()))
    if device.type == "meta":
        raise UnsupportedParameter(f"parameter '{name}' is on the meta device, where it has no values; load the model's weights first")
    return device


def precision(params: Mapping[str, Tensor], dtype: Any) -> None:
    """Checks that the model can compute in `dtype` while its parameters keep their own dtype.

    Raises:
      InvalidType: not a dtype.
      InvalidArgument: a dtype other than bfloat16, or parameters of a dtype that autocast does not convert.
    """
    if not isinstance(dtype, torch.dtype):
        raise InvalidType(f"dtype must be torch.bfloat16 or None, got {dtype!r}")
    if dtype is not torch.bfloat16:
        reason = "float16 would need its losses scaled" if dtype is torch.float16 else "for another precision convert the model"
        raise InvalidArgument(f"dtype must be torch.bfloat16 or None, got {dtype}; {reason}")
    for name, param in params.items():
        if param.dtype is not torch.float32:
            raise InvalidArgument(
                f"dtype=torch.bfloat16 needs parameters in float32, '{name}' is {param.dtype}; call model.float(), or leave out dtype="
            )


def shared_tensors(model: nn.Module, losses: Mapping[str, object], adapted: Collection[str]) -> None:
    """Checks that no tensor that a step changes has a second name in a loss, where it would keep its first value.

    Args:
      model, adapted: the model, and the names of what adapts in it.
      losses: "loss" and "query_loss", in this order, and what they are.
    Raises:
      UnsupportedParameter: a loss module that holds adapted parameters or buffers of the model, or buffers of the other loss.
      InvalidType: a loss module that is a script.
    """
    params = {id(param): name for name, param in model.named_parameters() if name in adapted}
    buffers = {id(buffer): f"the model's buffer '{name}'" for name, buffer in model.named_buffers()}
    for name, loss in losses.items():
        if not isinstance(loss, nn.Module):
            continue
        spoken = f"the {name.replace('_', ' ')}"
        for part in loss.modules():
            refuse_script(part, spoken)
        for place, param in loss.named_parameters():
            if id(param) in params:
                raise UnsupportedParameter(
                    f"{spoken} holds the model's parameter '{params[id(param)]}' (as '{place}'), which adapts; let the model return what "
                    "the loss needs"
                )
        own = dict(loss.named_buffers())
        for place, buffer in own.items():
            if id(buffer) in buffers:
                raise UnsupportedParameter(
                    f"{spoken} holds {buffers[id(buffer)]} (as '{place}'), which steps may change; give it a copy, by value.clone(), or "
                    "let the model return what the loss needs"
                )
        buffers |= {id(buffer): f"the {name.replace('_', ' ')}'s buffer '{place}'" for place, buffer in own.items()}


def loss(name: str, value: Any) -> None:
    """Checks that `value` can be a loss, the argument `name`.

    Raises:
      InvalidType: it cannot be called, or is the class of a loss.
    """
    if isinstance(value, type) and issubclass(value, nn.Module):
        raise InvalidType(f"{name} must be an instance, got the class {value.__name__}; write {name}={value.__name__}()")
    if value is not None and not callable(value):
        raise InvalidType(f"{name} must be a function, a module or None, got {type(value).__name__}")


def positive_int(name: str, value: Any) -> int:
    """Returns `value`, after checking that it is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidType(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise InvalidArgument(f"{name} must be at least 1, got {value}")
    return value


def step_weights(value: Any, k: int, device: torch.device) -> None:
    """Checks that `value` has one weight for each of k steps.

    Raises:
      InvalidType, InvalidArgument, DeviceMismatch: it has not.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = str(tree.Spec.of(value)) if isinstance(value, Tensor) else type(value).__name__
        raise InvalidType(f"step_weights must be a floating-point tensor, one weight for each of {k} steps, got {found}")
    if value.shape != (k,):
        raise InvalidArgument(f"step_weights must have one weight for each of {k} steps, shape [{k}], got {list(value.shape)}")
    if value.device != device:
        raise DeviceMismatch(f"step_weights is on {value.device}, the model on {device}; call .to('{device}') on it first")


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """Returns `value`, after checking that it is one of `choices`."""
    if value not in choices:
        raise InvalidArgument(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def as_batch(name: str, value: Any, device: torch.device, weighted: bool = False) -> Batch:
    """Returns `(inputs, target)` or `(inputs,)` as a `Batch`, after checking structure, device and sizes.

    `weighted`: there is one more entry behind these, the weights of the examples.

    Raises:
      InvalidType: not such a tuple, or without tensors.
      DeviceMismatch: a tensor on another device than the model.
      InvalidBatch: an empty tensor, or a target whose length is no batch size of the inputs.
    """
    batch = value if isinstance(value, Batch) else _parts(name, value, weighted)
    inputs, targets = tree.leaves(batch.inputs), tree.leaves(batch.target)
    for part, value in zip(Batch._fields, batch, strict=True):
        if type(value).__module__ == "numpy":
            raise InvalidType(f"{name} {part} is a numpy.{type(value).__name__}; pass a tensor, for example torch.from_numpy(...)")
    try:
        hash(tree.flatten(batch)[1])
    except TypeError as error:
        advice = (
            "pass a tensor in its place, for example torch.from_numpy(...)"
            if "numpy" in str(error)
            else "pass tensors, numbers and strings"
        )
        raise InvalidType(f"{name} holds something that is neither a tensor nor hashable ({error}); {advice}") from error
    if not inputs:
        raise InvalidType(f"{name} inputs must be a tensor, a tuple or a dict with tensors; got {type(batch.inputs).__name__}")
    for kind, values in (("input", inputs), ("target", targets), ("weights", tree.leaves(batch.weights))):
        for index, tensor in enumerate(values):
            if tensor.is_nested:
                raise InvalidType(
                    f"{name} {kind} {index} is a nested tensor; pad it, with value.to_padded_tensor(0.0), and pass a mask, too"
                )
            if type(tensor) is not Tensor:
                in_memory(tensor)  # raises if its values are elsewhere
            if tensor.is_quantized:
                raise InvalidType(f"{name} {kind} {index} is quantised; call .dequantize() on it first")
            if tensor.layout is not torch.strided:
                raise InvalidType(f"{name} {kind} {index} has layout {tensor.layout}; call .to_dense() on it first")
            if tensor.device != device:
                raise DeviceMismatch(
                    f"{name} {kind} {index} is on {tensor.device}, the model on {device}; call .to('{device}') on it first"
                )
            if tensor.numel() == 0:
                raise InvalidBatch(f"{name} {kind} {index} is empty ({tree.Spec.of(tensor)}); a step needs at least one example")
    return batch


def _parts(name: str, value: Any, weighted: bool) -> Batch:
    """Returns a user's batch by its parts."""
    least = 2 if weighted else 1
    if not isinstance(value, tuple | list) or len(value) not in (least, least + 1):
        found = f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else type(value).__name__
        if weighted:
            raise InvalidType(
                f"{name} must be a tuple (inputs, target, weights), or (inputs, weights) for a loss without target, since "
                f"examples='weighted'; got {found}"
            )
        raise InvalidType(f"{name} must be a tuple (inputs, target), or (inputs,) for a loss without target; got {found}")
    target = value[1] if len(value) == least + 1 else None
    if not weighted:
        return Batch(value[0], target)
    weights = value[-1]
    if not isinstance(weights, Tensor) or weights.is_complex():
        found = str(tree.Spec.of(weights)) if isinstance(weights, Tensor) else type(weights).__name__
        raise InvalidType(f"{name} weights must be a tensor, one number for each example (0 for padding), got {found}")
    return Batch(value[0], target, weights)


def weights(name: str, batch: Batch) -> None:
    """Checks that the weights of examples, if there are any, are not negative, and of each task and step not all 0.

    Raises:
      InvalidBatch: they are not so.
    """
    values = batch.weights
    if values is None:
        return
    values = values.detach()
    if not bool((values >= 0).all()):
        place = (~(values >= 0)).nonzero()[0].tolist()
        raise InvalidBatch(f"{name} weights must be at least 0, and are {values[tuple(place)].item()} at {place}")
    totals = values.sum(-1)
    if not bool((totals > 0).all()):
        place = (~(totals > 0)).nonzero()[0].tolist()
        at = f" at {place}" if place else ""
        raise InvalidBatch(
            f"{name} weights{at} sum to 0: there is padding alone, which has no loss; leave it out, or give an example a weight"
        )


def rows_differ(name: str, batch: Batch) -> str:
    """Returns a sentence if a target has another number of rows than the inputs, else an empty text.

    That alone is no mistake: a target may belong to a whole graph or sequence. It is a likely reason if the loss cannot be computed. Some
    models take the batch as the second axis of sequences: of tokens [S, N], or of vectors [S, N, F].

    Args:
      name: "support" or "query".
      batch: of one task and step.
    """
    sizes: set[int] = set()
    for leaf in tree.leaves(batch.inputs):
        is_sequence = leaf.dim() >= (3 if leaf.is_floating_point() else 2)
        sizes |= set(leaf.shape[: 2 if is_sequence else 1])
    for index, target in enumerate(tree.leaves(batch.target)):
        if target.dim() and sizes and target.shape[0] not in sizes:
            return (
                f"\n  {name} target {index} has {target.shape[0]} rows ({tree.Spec.of(target)}), the inputs are "
                f"{tree.describe(batch.inputs)}; most losses need one target for each example."
            )
    return ""


def class_axis(name: str, batch: Batch, bounds: Sequence[IndexBound], leading: int) -> None:
    """Checks that class labels have an axis of examples behind that of tasks.

    Raises:
      InvalidBatch: they have not. Most likely the examples of one task were given as many tasks.
    """
    leaves = tree.leaves(batch)
    for bound in bounds:
        value = leaves[bound.position]
        if bound.is_class and value.dim() == leading:
            raise InvalidBatch(
                f"{name} {bound.name.removeprefix('batch.')} ({tree.Spec.of(value)}) has no axis of examples behind that of tasks. For one "
                "task, call the unroll without vmap(); for several, stack them: inputs [T, S, ...] and targets [T, S]"
            )


def leading_axis(name: str, value: tree.Tree, axis: int, size: int | None, meaning: str) -> int:
    """Returns the size that all leaves have along a leading axis.

    Raises:
      InvalidBatch: a leaf lacks the axis, or sizes differ from each other or from `size`.
    """
    for index, leaf in enumerate(tree.leaves(value)):
        if leaf.dim() <= axis:
            raise InvalidBatch(f"{name} tensor {index} ({tree.Spec.of(leaf)}) needs an axis {axis} of {meaning}")
        size = leaf.shape[axis] if size is None else size
        if leaf.shape[axis] != size:
            raise InvalidBatch(
                f"{name} tensor {index} ({tree.Spec.of(leaf)}) must have {size} {meaning} along axis {axis}, got {leaf.shape[axis]}"
            )
    assert size is not None, "as_batch found a tensor"
    return size


def finite(name: str, batch: Batch) -> None:
    """Checks that floating-point data holds neither NaN nor infinity.

    Raises:
      NonFiniteInput: it does; the message names the tensor and its first such element.
    """
    for position, value in enumerate(tree.leaves(batch)):
        # A finite sum proves finite terms, at a fraction of the cost; the sum of finite terms may overflow.
        if value.is_floating_point() and not math.isfinite(value.sum().item()) and not bool(torch.isfinite(value).all()):
            parts = zip(("input", "target", "weights"), map(tree.leaves, batch), strict=True)
            kind, index = [(kind, index) for kind, values in parts for index in range(len(values))][position]
            where = (~torch.isfinite(value)).nonzero()[0].tolist()
            raise NonFiniteInput(
                f'{name} {kind} {index} holds {value[tuple(where)].item()} at {where}; clean the data, or pass nonfinite="ignore"'
            )


def validated(batch: Batch, bounds: Sequence[IndexBound], finite: bool) -> tuple[Batch, Tensor | None]:
    """Does what `indices` and `finite` do without waiting for the device.

    Returns:
      The batch with 0 in the place of indices that do not exist, since a GPU's kernels must not be given those; and a bool tensor (0-dim)
      that says whether all indices exist and, with `finite`, whether all numbers are finite. It is None if there is nothing to validate.
    """
    values, structure = tree.flatten(batch)
    found: list[Tensor] = [torch.isfinite(value).all() for value in values if value.is_floating_point()] if finite else []
    for bound in bounds:
        value = values[bound.position]
        wide = value.long()  # in a narrow dtype a bound may wrap around
        exists = (wide >= 0) & (wide < bound.size)
        if bound.ignore_index is not None:
            exists |= wide == bound.ignore_index
        if bound.part is not None:  # its axes are the last ones
            exists |= ~bound.part
        values[bound.position] = torch.where(exists, value, 0)
        found.append(exists.all())
    if batch.weights is not None:
        found += [(batch.weights >= 0).all(), (batch.weights.sum(-1) > 0).all()]
    return tree.unflatten(structure, values), torch.stack(found).all() if found else None


def indices(name: str, batch: Batch, bounds: Sequence[IndexBound]) -> None:
    """Checks that every class label, and every row of an embedding that the data asks for, exists.

    Raises:
      LabelOutOfRange: names the value and the range.
    """
    if not bounds:
        return
    leaves = tree.leaves(batch)
    for bound in bounds:
        values: Tensor = leaves[bound.position]
        low, high = (int(extreme) for extreme in torch.aminmax(values))
        if low >= 0 and high < bound.size:
            continue
        outside = (values < 0) | (values >= bound.size)
        if bound.ignore_index is not None:
            outside &= values != bound.ignore_index
        if bound.part is not None:  # its axes are the last ones
            outside &= bound.part
        wrong = values[outside]
        if wrong.numel():
            part = bound.name.removeprefix("batch.")
            raise LabelOutOfRange(
                f"{name} {part} holds {int(wrong[0])}; {bound.of} are 0 to {bound.size - 1}. Number them from 0, or enlarge what they index"
            )
