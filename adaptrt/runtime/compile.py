"""`compile_unroll`, the entry point: checks its arguments and resolves them to settings.

Known limits: which parameters adapt is decided here; a program is compiled for one set of shapes, and the caller's autocast is off inside
programs.
"""

from __future__ import annotations

import torch
from torch import nn

from adaptrt.adjoint import Adjoint
from adaptrt.backend import Backend, CudaGraph, Eager, Inductor, Tiered
from adaptrt.backend.entry_points import entry_point
from adaptrt.backend.inductor import warn_if_missing
from adaptrt.errors import InvalidArgument, InvalidType
from adaptrt.inner import check
from adaptrt.inner.reader import Select, Selection
from adaptrt.inner.refused import unwrapped
from adaptrt.inner.step import LossFunction
from adaptrt.optim import Optimizer
from adaptrt.optim.source import source
from adaptrt.runtime.settings import Settings
from adaptrt.runtime.unroll import CompiledUnroll


@entry_point
def compile_unroll(
    model: nn.Module,
    opt: Optimizer | torch.optim.Optimizer | None,
    k: int,
    *,
    loss: LossFunction = None,
    query_loss: LossFunction = None,
    params: Select = None,
    adjoint: Adjoint | str = "auto",
    backend: Backend | str = "auto",
    per_step: bool = False,
    examples: str = "equal",
    on_new_shape: str = "compile",
    cache_size: int = 16,
    nonfinite: str = "error",
    tiered: bool = False,
    dtype: torch.dtype | None = None,
) -> CompiledUnroll:
    """Compiles k steps of `opt` on a support batch, and their meta-gradient.

    Programs are compiled when data of a shape is first seen; `warmup` does it ahead of time. The model is never changed: neither its
    parameters, buffers and mode, nor its hooks and `.grad`.

    Args:
      model: any module. Its parameters, buffers and train/eval mode are read at every call. Of a `DataParallel` the module in it is taken,
        whose parameters' names count; of what `torch.compile` made the names count that it gives, such as "_orig_mod.weight".
      opt: an instance of `torch.optim` (docs/optimisers.md says which), whose groups, hyperparameters and state are read at every call and
        never changed, or an optimiser of `adaptrt.optim`. Hyperparameters are inputs: changing one does not recompile, and a tensor that
        requires grad gets its meta-gradient. None: no parameter adapts, and a step is a forward pass that updates buffers; it needs no
        loss, and its losses are 0 if there is neither `loss` nor a target.
      k: number of inner steps, at least 1.
      loss: `loss(output, target)`, or `loss(output)` for batches without target; returns a scalar, or `(scalar, update)` with a bool
        tensor of shape []: where it is false, the step changes nothing. A module's parameters are meta-learned with the model's. None:
        cross-entropy for integer targets, mean squared error for floating ones, the output itself (or its `.loss`) when that is a scalar
        already.
      query_loss: the loss of the query batch, where it is another than that of the inner steps; as `loss`. None: the same as `loss`.
      params: which parameters adapt: a glob on their names, a list of globs, or a predicate of (name, parameter). Left out: all that
        require grad, and with a `torch.optim` instance only those it holds. The rest are used unchanged, and get meta-gradients through
        support and query losses if they require grad.
      adjoint: `Unrolled()`, `Replay(every=n)`, `Stash()`, `FirstOrder()`, `Truncated(n)`, `Implicit()`, or "auto" to choose by the size of
        the graph and of what it would keep.
      backend: "cudagraph" (compiled programs, and every call one launch), "inductor", "eager", a `Backend`, or "auto": cudagraph on CUDA,
        inductor elsewhere, and eager with a warning where no compiler is found.
      per_step: support has a leading axis of length k, one batch for each step.
      examples: "weighted" if batches end with weights of their examples, `(inputs, target, weights)` or `(inputs, weights)`. The losses
        then return one value for each example, [S], and sum(weights * losses) / sum(weights) is the loss, of queries too. Weights are
        numbers of at least 0 or bools, [S], and may require grad. An example of weight 0 is padding, so that tasks of different sizes
        fit in one batch. It is refused where an example's loss depends on others, as with BatchNorm in train mode.
      on_new_shape: what data of a shape not seen before does: "compile", or "error" to allow what `warmup` has seen only.
      cache_size: how many support shapes are kept, and query shapes for each; the least recently used is dropped.
      nonfinite: "error" refuses data with NaN or infinity, "ignore" accepts it.
      tiered: answer from programs that run operation by operation at once, and compile in the background; each program is replaced when its
        compiled form is there. Numbers then change by rounding. `explain()` says what is still to come; `warmup()` waits for it.
      dtype: `torch.bfloat16` runs model and loss in it where `torch.autocast` would, and predicts in it; parameters, gradients, optimiser
        state and losses stay in float32. None: in the dtypes that the model has, whatever autocast is on around a call.
    Returns:
      A `CompiledUnroll`.
    Raises:
      InvalidArgument, InvalidType: an argument out of its domain or of the wrong kind.
      UnsupportedParameter: complex, integer, uninitialised or sparse parameters.
      UnsupportedOptimizer: a class of optimiser that cannot be converted; the message lists those that can.
      OptimizerMismatch: the optimiser holds parameters that are not the model's, or lacks one that `params` asks for.
      NothingToAdapt: no parameter is adaptable, or without an optimiser no buffer.

    Example:
      >>> model = nn.Linear(3, 2)
      >>> unroll = compile_unroll(model, torch.optim.SGD(model.parameters(), lr=0.1), k=2, backend="eager")
      >>> support = torch.randn(6, 3), torch.randint(2, (6,))
      >>> unroll.adapt(support)(torch.randn(4, 3)).shape
      torch.Size([4, 2])
      >>> unroll(support, support).backward()
      >>> model.weight.grad.shape
      torch.Size([2, 3])
    """
    model = unwrapped(model)
    device = check.model_device(model, may_lack_parameters=opt is None)
    check.positive_int("k", k)
    check.positive_int("cache_size", cache_size)
    check.one_of("on_new_shape", on_new_shape, ("compile", "error"))
    check.one_of("nonfinite", nonfinite, ("error", "ignore"))
    check.one_of("examples", examples, ("equal", "weighted"))
    if dtype is not None:
        check.precision(dict(model.named_parameters()), dtype)
    query_loss = None if query_loss is loss else query_loss
    losses = {"loss": loss, "query_loss": query_loss}
    for name, part in losses.items():
        check.loss(name, part)
    if adjoint != "auto" and not isinstance(adjoint, Adjoint):
        kind = InvalidArgument if isinstance(adjoint, str) else InvalidType
        raise kind(
            f"adjoint must be 'auto', Unrolled(), Replay(every=n), Stash(), FirstOrder(), Truncated(n) or Implicit(), got {adjoint!r}"
        )
    selection = Selection(model, opt, params, loss)
    adapted = selection()
    check.shared_tensors(model, losses, adapted)
    return CompiledUnroll(
        Settings(
            model=model,
            loss=loss,
            query_loss=query_loss,
            adapted=adapted,
            opt=opt,
            source=source(opt, {name: param for name, param in model.named_parameters() if name in adapted}),
            k=k,
            adjoint=adjoint if isinstance(adjoint, Adjoint) else None,
            backend=_backend(backend, device, tiered),
            per_step=bool(per_step),
            must_be_warm=on_new_shape == "error",
            cache_size=cache_size,
            check_finite=nonfinite == "error",
            device=device,
            dtype=dtype,
            weighted=examples == "weighted",
            selection=selection,
        )
    )


def _backend(backend: Backend | str, device: torch.device, tiered: bool) -> Backend:
    if not isinstance(backend, Backend):
        backend = _backend_named(backend, device, tiered)
    if tiered and isinstance(backend, Eager | CudaGraph):
        raise InvalidArgument(f"tiered=True needs backend='inductor', got backend={backend.name!r}; leave one of them out")
    return Tiered(backend) if tiered else backend


def _backend_named(name: str, device: torch.device, tiered: bool) -> Backend:
    check.one_of("backend", name, ("auto", "eager", "inductor", "cudagraph"))
    if name == "eager" or (name == "auto" and warn_if_missing(device)):
        return Eager()
    return CudaGraph() if name == "cudagraph" or (name == "auto" and device.type == "cuda" and not tiered) else Inductor()
