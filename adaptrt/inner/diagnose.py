"""Turns what PyTorch raises while a model is traced into an error in the user's terms: which line, operation and module it came from."""

from __future__ import annotations

import linecache
import logging
import os
import re
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptrt import tree
from adaptrt.errors import AdaptrtError, DataDependentControlFlow, InvalidArgument, InvalidBatch, NotDifferentiable, NotTraceable
from adaptrt.inner import check
from adaptrt.inner.comparisons import Comparisons
from adaptrt.inner.step import Batch

_LIBRARIES = tuple(os.path.dirname(path) + os.sep for path in (torch.__file__, os.path.dirname(__file__)))
_NO_LINE = "a line inside PyTorch"
_NEEDS_VALUE = (
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "GuardOnDataDependentSymNode",
    "UnsupportedOperatorException",
)
# What reading a value, or selecting by one, raises on traced tensors.
_READS_VALUE = (
    "tracing tensor",
    "Cannot access data pointer",
    "not supported for tensor subclasses",
    "_local_scalar_dense",
    "aten.item",
    "aten.equal",
    "aten.nonzero",
    "aten.masked_select",
    "aten.index.Tensor",
    "aten.unique",
    "aten._unique",
    "aten.repeat_interleave",
)
_NO_DERIVATIVE = re.compile(
    r"(?:derivative for (?:aten::)?'?(?:\w+::)?(\w+)'? is not implemented|double backwards? on (\w+) not supported"
    r"|Trying to backward through \w+\.(\w+)\.\w+ but no autograd formula)"
)
_NO_FAKE = ("fake impl", "fake/meta kernel", "fake implementation", "FakeTensor support")
_SELECTS = ("aten.nonzero", "aten.masked_select", "aten.index.Tensor")
# What operations raise whose operands differ in dtype.
_DTYPES_DIFFER = ("operands of one dtype", "should be the same", "same dtype", "expected scalar type")


def user_line(error: BaseException) -> str:
    """The innermost line of the error's traceback that is neither PyTorch's nor ours, as `file:line: code`."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((*_LIBRARIES, "<"))]
    if not frames:
        return _NO_LINE
    frame = frames[-1]
    code = (linecache.getline(frame.filename, frame.lineno or 0) or "").strip()
    return f"{frame.filename}:{frame.lineno}: {code}"


@contextmanager
def running(name: str, batch: Batch) -> Generator[None]:
    """Turns what the model or the loss raises on a batch into an error that names the batch and the line.

    Comparisons of outputs with targets that can only be mistakes (`Comparisons`) are such errors, too.

    Raises:
      DataDependentControlFlow: the line reads a tensor's value.
      NotTraceable: the line calls an operation that cannot be traced.
      InvalidBatch: anything else that is not an error of ours.
    """

    def other(error: str) -> AdaptrtError:
        return InvalidBatch(
            f"the model or the loss cannot be run on the {name} batch: {error}\n"
            f"  inputs: {tree.describe(batch.inputs)}; target: {tree.describe(batch.target)}. "
            f"Check shapes and dtypes against what the model takes.{_precision_advice(error)}{check.rows_differ(name, batch)}"
        )

    try:
        with _tracing("the model", "read the value before the model is called", other), Comparisons(batch.target):
            yield
    except InvalidBatch as error:
        note = check.rows_differ(name, batch)
        if not note or note in str(error):
            raise
        raise InvalidBatch(f"{error}{note}") from error


def _precision_advice(error: str) -> str:
    if not any(text in error for text in _DTYPES_DIFFER):
        return ""
    return (
        " Convert the data to the dtype of the model's parameters, or the model to that of the data, for example by model.float(); "
        "dtype=torch.bfloat16 computes in half precision while the parameters stay in float32."
    )


def updating() -> AbstractContextManager[None]:
    """Turns what the optimiser raises into an error that names the line.

    Raises:
      DataDependentControlFlow, NotTraceable: as `running`.
      InvalidArgument: anything else that is not an error of ours.
    """

    def other(error: str) -> AdaptrtError:
        return InvalidArgument(
            f"the optimiser's update fails: {error}\n  Hyperparameters and counts are tensors here: write `p - lr * g`, not `alpha=lr`."
        )

    return _tracing("the optimiser", "make the value a number when the optimiser is built", other)


def guarding() -> AbstractContextManager[None]:
    """Turns what a guard raises into an error that names the line. Errors are those of `updating`."""

    def other(error: str) -> AdaptrtError:
        return InvalidArgument(f"keep(before, after) fails: {error}")

    return _tracing("keep", "compare tensors, and return a bool tensor of shape []", other)


@contextmanager
def _tracing(what: str, advice: str, other: Callable[[str], AdaptrtError]) -> Generator[None]:
    # It logs a traceback of its own before it raises.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    except NotTraceable as error:
        line = user_line(error)
        if "embedding_renorm_" in str(error):
            raise NotTraceable(
                f"{line}: max_norm rewrites rows of the table outside of the optimiser. Leave it out, and scale the rows that it returns: "
                "rows * (max_norm / rows.norm(dim=-1, keepdim=True)).clamp(max=1)"
            ) from error
        if line in str(error) or line == _NO_LINE:
            raise
        raise type(error)(f"{line}: {error}") from error
    except AdaptrtError:
        raise
    except Exception as error:
        line = user_line(error)
        if type(error).__name__ == "UnsupportedOperatorException" or any(text in str(error) for text in _NO_FAKE):
            _refuse_operator(error, line)
        if any(text in str(error) for text in ("aten._nested_", "NestedTensor")) or _passes(error, "torch", "nested"):
            raise NotTraceable(f"{line} makes a nested tensor, which cannot be traced. Pad it, and keep a mask") from error
        reads = any(text in str(error) for text in _READS_VALUE)
        if type(error).__name__ in _NEEDS_VALUE and not reads:
            raise NotTraceable(
                f"{line} calls {error}, which PyTorch cannot trace: either the shape of its result depends on values, or it has "
                "no rule for tensors without values. Replace the operation, or "
                f"apply it to the data before {what} is called."
            ) from error
        if reads:
            raise DataDependentControlFlow(
                f"{line} depends on the value of a tensor, which is not known while {what} is traced. Use torch.where or arithmetic "
                f"masks for the branch, or {advice}.{_more_advice(error)}"
            ) from error
        raise other(f"{type(error).__name__} at {line}\n  {error}") from error
    finally:
        logger.disabled = disabled


def _refuse_operator(error: Exception, line: str) -> None:
    """Raises for an operator of the user's, or of another library, that does not say what shape its result has."""
    if "aten." in str(error):
        return
    raise NotTraceable(
        f"{line} calls a custom operator that cannot be traced, because the shape of its result is not known without running it "
        f"({str(error).splitlines()[0]}). Register a function that makes a tensor of that shape, with torch.library.register_fake"
    ) from error


def _more_advice(error: Exception) -> str:
    """What to do where the value is read by a function whose caller cannot see it."""
    if _passes(error, "torch", "distributions"):
        return " Arguments of a distribution are looked at unless it is built with validate_args=False."
    if any(text in str(error) for text in _SELECTS):
        return (
            " Where the mask never changes, make a buffer of the places, mask.nonzero(as_tuple=True), and index with these."
            ' In place of rows chosen by a mask keep all rows, and give the others the weight 0: with reduction="none", '
            "(losses * mask).sum() / mask.sum() is the mean over the chosen ones."
        )
    return ""


def _passes(error: BaseException, *folders: str) -> bool:
    """Whether the error was raised in a file of this folder, or in what that called."""
    part = os.sep + os.path.join(*folders) + os.sep
    return any(part in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def pulling_back(loss: Tensor) -> AbstractContextManager[None]:
    """Turns what is raised while the gradient of a loss is traced into an error that names the line, or the custom functions that are met.

    Raises:
      DataDependentControlFlow, NotTraceable: as `running`.
      NotDifferentiable: anything else that is not an error of ours.
    """
    return _tracing("the gradient of the model", "save what it needs in forward", lambda error: _no_gradient(error, [loss]))


def _no_gradient(error: str, results: Sequence[Tensor]) -> NotDifferentiable:
    names = ", ".join(sorted(_custom_functions(results)[0]))
    known = next((advice for text, advice in _GRADIENT_ADVICE.items() if text in error), None)
    if known is not None and not (names and known is _IN_PLACE):
        return NotDifferentiable(f"the gradient of the loss cannot be computed: {error}\n  {known}")
    met = f" The loss was computed by custom autograd functions: {names}." if names else ""
    return NotDifferentiable(
        f"the gradient of the loss cannot be traced: {error}\n {met} Write their backward, and what the model computes in place, with "
        "operations that return new tensors, or replace them by PyTorch's own functions."
    )


_IN_PLACE = "A value that the gradient needs was changed in place. Write y = y + 1 in place of y += 1."

# By what PyTorch says where there is no first derivative, without which FirstOrder() cannot do either.
_GRADIENT_ADVICE = {
    "implement either the backward or vjp": "Give the custom autograd function a backward, or detach its input.",
    "no autograd formula was registered": "Give the custom operator a derivative by torch.library.register_autograd, or detach its input.",
    "is not implemented": "The operation has no derivative, which every adjoint needs. Replace it, or detach its input.",
    "modified by an inplace operation": _IN_PLACE,
}


def differentiating(run: Callable[[], Any], model: nn.Module, forward: Callable[[], Sequence[tuple[str, str]]]) -> Any:
    """Runs `run`; where a second derivative does not exist, the error names the operation and the module that calls it.

    Args:
      run: captures a gradient.
      model: where to look for the module.
      forward: runs the model once; gives each operation's name and the path of the module that calls it.
    Raises:
      NotDifferentiable: an operation has no derivative of its gradient, or it fails.
    """
    try:
        return run()
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, AdaptrtError | torch.OutOfMemoryError):
            raise
        found = _NO_DERIVATIVE.search(str(error))
        if found is None:
            raise _no_gradient(f"{type(error).__name__} at {user_line(error)}\n  {error}", []) from error
        operation = next(filter(None, found.groups()))
        where = _module_of(operation, model, forward)
        raise NotDifferentiable(
            f"'{operation}', called in {where}, has no derivative, so the meta-gradient through the inner steps does not exist. Use "
            "adjoint=FirstOrder(), leave the module's parameters and inputs out of the inner loop, or replace the operation."
        ) from error


def _module_of(operation: str, model: nn.Module, forward: Callable[[], Sequence[tuple[str, str]]]) -> str:
    """The module whose forward calls the operation of which `operation` is the backward."""
    for called, path in forward():
        if _stem(called) == _stem(operation):
            kind = type(model.get_submodule(path)).__name__
            return f"module '{path}' ({kind})" if path else f"the forward of {kind} itself"
    return "the model or the loss"


def _stem(operation: str) -> str:
    return re.sub(r"(_(forward|backward|only|dense))+$", "", operation.strip("_"))


def refuse_once_differentiable(results: Sequence[Tensor]) -> None:
    """Raises if a gradient among what `results` were computed from can itself not be differentiated.

    PyTorch marks such a gradient (`once_differentiable` in a custom function) with a node that raises when reached; no path leads from
    it to the inputs, so with unused inputs allowed it would be skipped and its second derivative silently be zero.

    Raises:
      NotDifferentiable: names the custom functions met.
    """
    custom, refused = _custom_functions(results)
    if refused:
        raise NotDifferentiable(
            f"a custom autograd function marked once_differentiable ({', '.join(sorted(custom)) or 'not named by PyTorch'}) has no "
            "derivative of its gradient. Write its backward with differentiable operations, or use adjoint=FirstOrder()."
        )


def _custom_functions(results: Sequence[Tensor]) -> tuple[set[str], bool]:
    """The names of the custom functions from which `results` were computed, and whether one of them can be differentiated only once."""
    pending = [value.grad_fn for value in results if value.grad_fn is not None]
    seen: set[Any] = set()
    custom: set[str] = set()
    refused = False
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        refused |= node.name().endswith("Error")
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            custom.add(node.name().removesuffix("Backward"))
        pending += [following for following, _ in node.next_functions if following is not None]
    return custom, refused
