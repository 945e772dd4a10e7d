"""Every exception a user of adaptrt can meet.

Each message names the argument, what was expected, what was got and the next action. All derive from `AdaptrtError`, and from
`ValueError`, `TypeError` or `RuntimeError` where one of those fits, so that existing handlers keep working.
"""

from __future__ import annotations


class AdaptrtError(Exception):
    """Base class of every error that adaptrt raises on purpose."""


class InvalidArgument(AdaptrtError, ValueError):
    """An argument has the right type and a value outside its domain, for example `k=0`."""


class InvalidType(AdaptrtError, TypeError):
    """An argument, a tensor's dtype included, is of a kind that cannot be used where it stands."""


class InvalidBatch(InvalidArgument):
    """Support or query data is empty, does not fit the model, or its parts disagree on the batch size."""


class DeviceMismatch(InvalidArgument):
    """A tensor lives on another device than the model."""


class LabelOutOfRange(InvalidArgument):
    """A class label, or an index into a table, is negative or too large."""


class NonFiniteInput(InvalidArgument):
    """Support or query data holds NaN or infinity and `nonfinite="error"`."""


class ShapeChanged(InvalidArgument):
    """Data of a shape that no program was compiled for, under `on_new_shape="error"`."""


class UnsupportedParameter(InvalidType):
    """A parameter is complex, of integer type, sparse or uninitialised."""


class NothingToAdapt(InvalidArgument):
    """No parameter of the model is adaptable, or the support loss depends on none that is."""


class InvalidLoss(InvalidArgument):
    """The loss is not a real floating-point scalar, or no loss can be chosen for the target."""


class OptimizerMismatch(InvalidArgument):
    """The optimiser holds parameters or state that do not belong to the model."""


class UnsupportedOptimizer(InvalidType, ValueError):
    """The optimiser is of a class, or uses a feature, that has no pure counterpart here. Also a ValueError, which `higher` raises."""


class NotTraceable(AdaptrtError, RuntimeError):
    """The model cannot be turned into a graph; the message names the line of the user's code."""


class DataDependentControlFlow(NotTraceable):
    """Python control flow, or an output's shape, depends on the values in a tensor."""


class UnsupportedRandomness(NotTraceable):
    """A random operation cannot be drawn before the program runs."""


class NotDifferentiable(AdaptrtError, RuntimeError):
    """An operation has no derivative of its gradient; the message names it and the module that called it."""


class CannotRecord(AdaptrtError, RuntimeError):
    """A call cannot be recorded or launched here: within somebody else's capture, or in a forked process."""


class OutOfDeviceMemory(AdaptrtError, MemoryError):
    """A device has too little memory to record a call; the message says how much it takes."""


class InvalidGraph(AdaptrtError, RuntimeError):
    """A graph breaks an invariant that `adaptrt.graph.verify` holds; a defect of a pass, not of the user's code."""


class CompilerUnavailable(UserWarning):
    """No C++ compiler was found: programs run on the eager backend."""


class RecordingFailed(UserWarning):
    """A call cannot be recorded as one launch: its programs are launched one by one."""


class UnknownPyTorch(UserWarning):
    """This PyTorch differs, where it is private, from those that the library knows: something is slower, or done as PyTorch does it."""
