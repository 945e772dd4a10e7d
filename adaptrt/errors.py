"""Defines every exception and warning of adaptrt.

Each message names the argument, what was expected, what was got and what to do. All exceptions derive from `AdaptrtError`, and also from
`ValueError`, `TypeError` or `RuntimeError` where one of those fits, so that existing handlers keep working.
"""

from __future__ import annotations


class AdaptrtError(Exception):
    """Base class of every error that adaptrt raises on purpose."""


class InvalidArgument(AdaptrtError, ValueError):
    """An argument has the right type but a value outside its domain, for example `k=0`."""


class InvalidType(AdaptrtError, TypeError):
    """An argument is of a type, or a tensor of a dtype, that cannot be used in its place."""


class InvalidBatch(InvalidArgument):
    """Support or query data is empty, does not fit the model, or has parts that disagree on the batch size."""


class DeviceMismatch(InvalidArgument):
    """A tensor is on another device than the model."""


class LabelOutOfRange(InvalidArgument):
    """A class label, or an index into a table, is negative or too large."""


class NonFiniteInput(InvalidArgument):
    """Support or query data holds NaN or infinity, and `nonfinite="error"`."""


class ShapeChanged(InvalidArgument):
    """No program was compiled for data of this shape, and `on_new_shape="error"`."""


class ModelChanged(InvalidArgument):
    """Layers, parameters or what adapts are not what they were when `compile_unroll` was called."""


class Overloaded(AdaptrtError, RuntimeError):
    """The queue of a serving engine, or a tenant's share of it, is full. Nothing was done; the caller may try again later."""


class DeadlineExceeded(AdaptrtError, TimeoutError):
    """A request's deadline passed before its work began or before its result could be committed. Nothing was committed."""


class StoreUnavailable(AdaptrtError, ConnectionError):
    """The store of tenants' states cannot be read or written now. What it had acknowledged is still in it; nothing new was."""


class CommitConflict(AdaptrtError, RuntimeError):
    """Another process committed for the same tenant meanwhile, again and again. Nothing was committed."""


class TooManyTenants(AdaptrtError, RuntimeError):
    """A tenant without a state adapted, and the engine keeps as many states as it may. Nothing was committed."""


class UnknownTenant(AdaptrtError, LookupError):
    """There is no state of this tenant, and the engine was made with `unknown="error"`."""


class NotServing(AdaptrtError, RuntimeError):
    """A serving engine is not started, or is draining or stopped, or is called from another event loop than its own."""


class CannotBeSet(AdaptrtError, AttributeError, TypeError):
    """Something that is read-only was assigned to: an attribute of an unroll or of a result, or an entry of its parameters."""


class CannotBePickled(InvalidType):
    """A compiled unroll, or a result that belongs to one, was to be pickled. The message says what can be saved or sent instead."""


class UnsupportedParameter(InvalidType):
    """A parameter is complex, of integer type, sparse or uninitialised."""


class NothingToAdapt(InvalidArgument):
    """The model has no parameter that can adapt, or the support loss depends on none of those."""


class InvalidLoss(InvalidArgument):
    """The loss is not a real floating-point scalar, or no loss can be chosen for the target."""


class OptimizerMismatch(InvalidArgument):
    """The optimiser holds parameters or state that do not belong to the model."""


class InvalidState(InvalidArgument):
    """A saved state is damaged, of a newer format, or was adapted from another base than the model at hand."""


class InvalidExport(InvalidArgument):
    """A folder of an export is damaged, of a newer format, or for another machine."""


class NotExportable(AdaptrtError, RuntimeError):
    """Something in a program cannot be written in the format asked for. The message names it, and nothing was written."""


class UnsupportedOptimizer(InvalidType, ValueError):
    """The optimiser is of a class, or uses a feature, that adaptrt does not support. It is also a ValueError, which `higher` raises."""


class AlreadyImported(AdaptrtError, ImportError):
    """The archived package `higher` is imported already, so `import higher` cannot come to mean `adaptrt.higher` any more."""


class NotALeaf(AdaptrtError, RuntimeError):
    """On a handle of `adaptrt.higher`, `requires_grad` of a weight was to be set that was computed from other weights."""


class NotTraceable(AdaptrtError, RuntimeError):
    """The model cannot be turned into a graph. The message names the line of the user's code."""


class DataDependentControlFlow(NotTraceable):
    """Python control flow, or the shape of an output, depends on the values in a tensor."""


class UnsupportedRandomness(NotTraceable):
    """A random operation cannot be drawn before the program runs."""


class NotDifferentiable(AdaptrtError, RuntimeError):
    """The gradient of an operation has no derivative. The message names the operation and the module that called it."""


class WithinTransform(AdaptrtError, RuntimeError):
    """An unroll, or a result of one, was called within a transformation of `torch.func` or within what records operations."""


class CannotRecord(AdaptrtError, RuntimeError):
    """A call cannot be recorded or launched, because it is within another capture of a CUDA graph or in a forked process."""


class OutOfDeviceMemory(AdaptrtError, MemoryError):
    """A device has too little memory to record a call. The message says how much memory the call takes."""


class InvalidGraph(AdaptrtError, RuntimeError):
    """A graph breaks an invariant that `adaptrt.graph.verify` checks. This is a defect of a pass, not of the user's code."""


class CompilerUnavailable(UserWarning):
    """A program cannot be built or kept on this machine, for example without a C++ compiler. It runs on the eager backend."""


class DamagedCache(UserWarning):
    """A file of a compiled program on disk is not what was written there. It is made again."""


class RecordingFailed(UserWarning):
    """A call cannot be recorded as one launch: its programs are launched one by one."""


class LongChain(UserWarning):
    """Many adaptations were chained with `start=`, and each keeps what `backward()` through all of them would need."""


class NotConverged(UserWarning):
    """The meta-gradient of `Implicit()` is not to be trusted: the steps, or the linear system, have not converged."""


class UnknownPyTorch(UserWarning):
    """This PyTorch differs, where it is private, from those that the library knows: something is slower, or done as PyTorch does it."""
