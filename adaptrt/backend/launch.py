"""Records a call once and launches it again as a whole. What depends on the device is left to a `Recorder`.

A call runs several programs and small operations between them. Recorded, all of it is one launch over memory that belongs to the recording.
Arguments are copied in and results are copied out, so that no later call changes what an earlier one returned. `cudagraph.py` has the
recorder for CUDA, and the tests have one for the CPU.

Recordings of one `Launcher` share a pool of memory for their intermediate results. So no two of them may run at the same time: a lock keeps
threads apart, and the recorder keeps streams apart.
"""

from __future__ import annotations

import abc
import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt import tree
from adaptrt.backend.guards import Known
from adaptrt.errors import AdaptrtError, OutOfDeviceMemory, RecordingFailed, ShapeChanged
from adaptrt.graph.ir import Constant
from adaptrt.process import lock
from adaptrt.tree import Spec, Tree


class Recorder(abc.ABC):
    """Records and launches on one device. A recorder belongs to one `Launcher`, and so to one unroll."""

    device: torch.device

    @abc.abstractmethod
    def refuse(self) -> None:
        """Raises an error if nothing can be recorded or launched here at present.

        Raises:
          CannotRecord: says why, and what to do.
        """

    @abc.abstractmethod
    def settings(self) -> Hashable:
        """Global settings of PyTorch that are fixed when a call is recorded. If they change, another recording is needed."""

    @abc.abstractmethod
    def warm_up(self, run: Callable[[], object]) -> int:
        """Runs it until nothing is done for the first time any more. Returns about how many bytes it needs at its peak.

        Raises:
          torch.OutOfMemoryError: the device has too little memory.
        """

    @abc.abstractmethod
    def record(self, run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        """Records what it does. Returns the tensors that it returned, which each launch fills, and the function that launches it.

        Raises:
          torch.OutOfMemoryError: the device has too little memory.
          Exception: it does something that cannot be recorded. Earlier recordings still work.
        """

    @abc.abstractmethod
    def in_order(self, owned: Sequence[Tensor], streams: set[Hashable]) -> contextlib.AbstractContextManager[None]:
        """A block whose work on the device begins after the work of all earlier such blocks, whatever streams they are on.

        Args:
          owned: memory that it uses.
          streams: on which streams that memory was used before; updated.
        """


RUNNING = lock()
"""Held by whatever records or launches, or draws noise for that.

Before 2.12 a device of PyTorch has one state of random numbers, which is in no other use while something is captured.
"""


def _identity(value: Tensor, device: torch.device) -> Hashable:
    """Changes if a recording that has read `value` would not see its present numbers.

    A recording knows the address of what is on its own device, and has taken in the numbers of what is on another one.
    """
    return value.data_ptr(), value.stride(), None if value.device == device else value._version


class Launcher:
    """Records calls and launches them. Threads may share it; they call `record` under the lock that captures take."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    @property
    def device(self) -> torch.device:
        """The device on which everything has to be."""
        return self._recorder.device

    def settings(self) -> Hashable:
        """As for `Recorder`."""
        return self._recorder.settings()

    def refuse(self) -> None:
        """As for `Recorder`."""
        self._recorder.refuse()

    def record(self, name: str, fn: Callable[..., Tree], args: Sequence[Tree], constants: Callable[[], Sequence[Constant]]) -> Recording:
        """Records `fn(*args)`.

        Args:
          name: what it is, for messages.
          fn: takes trees of tensors and returns one. Besides these, it may read only `constants`, and what never changes.
          args: an example.
          constants: called after `fn` has run. Returns what else `fn` reads.
        Raises:
          OutOfDeviceMemory: the device has too little memory; earlier recordings still work.
          AdaptrtError: what `fn` raises.
        """
        values, structure = tree.flatten(tuple(args))
        for value in values:  # a kernel would take the value of another device's number in when it is recorded
            if value.device != self._recorder.device:
                reason = (
                    f"it is given a tensor on {value.device} ({Spec.of(value)}), the model is on {self._recorder.device}; move the loss, "
                    "or whatever holds or draws it, to the model's device"
                )
                return self._one_by_one(name, fn, reason)
        result: list[tree.Structure] = []
        with torch.inference_mode(False), torch.no_grad():
            inputs = [torch.empty_like(value, memory_format=torch.contiguous_format) for value in values]
            _copy(inputs, values)

            def run() -> list[Tensor]:
                outputs, found = tree.flatten(fn(*tree.unflatten(structure, inputs)))
                result[:] = [found]
                return outputs

            peak: int | None = None
            try:
                peak = self._recorder.warm_up(run)
                read = [(constant, value, _identity(value, self._recorder.device)) for constant in constants() for value in [constant()]]
                with RUNNING:
                    outputs, launch = self._recorder.record(run)
            except AdaptrtError:
                raise
            except torch.OutOfMemoryError as error:
                needed = sum(value.nbytes for value in inputs) + (peak or 0)
                raise OutOfDeviceMemory(
                    f"recording '{name}' needs {'about' if peak is not None else 'more than'} {needed / 1e6:.3g} MB beside what is in use: "
                    f"{error}. Use a smaller batch, Replay(every=n), or backend='inductor'"
                ) from error
            except Exception as error:
                if peak is None:  # it does not run at all
                    raise
                return self._one_by_one(name, fn, str(error))
        body = _Body(inputs, outputs, launch, tree.leaves_by(structure), tree.unflatten_by(result[0]))
        return Recording(name, None, read, body, self)

    def _one_by_one(self, name: str, fn: Callable[..., Tree], reason: str) -> Recording:
        warnings.warn(
            f"'{name}' cannot be recorded, so that its programs are launched one by one, which is slower: {reason}",
            RecordingFailed,
            stacklevel=3,
        )
        return Recording(name, fn, [], None, self)

    def launch(self, body: _Body, values: list[Tensor]) -> list[Tensor]:
        """Copies `values` in, launches, and copies what came out."""
        fresh = [torch.empty_like(value) for value in body.outputs]
        with RUNNING, self._recorder.in_order(body.inputs, body.streams), torch.no_grad():
            _copy(body.inputs, values)
            body.launch()
            _copy(fresh, body.outputs)
        return fresh


class _Body:
    """The memory of a recording, and what launches it."""

    __slots__ = ("inputs", "known", "launch", "leaves_of", "outputs", "result_of", "streams")

    def __init__(
        self,
        inputs: list[Tensor],
        outputs: list[Tensor],
        launch: Callable[[], None],
        leaves_of: Callable[[Tree], list[Tensor]],
        result_of: Callable[[Sequence[Tensor]], Tree],
    ) -> None:
        self.inputs, self.outputs, self.launch = inputs, outputs, launch
        self.leaves_of, self.result_of = leaves_of, result_of
        self.known = Known()
        self.streams: set[Hashable] = set()


class Recording:
    """A recorded call. A call that could not be recorded runs `fn` instead."""

    def __init__(
        self,
        name: str,
        fn: Callable[..., Tree] | None,
        constants: Sequence[tuple[Constant, Tensor, Hashable]],
        body: _Body | None,
        launcher: Launcher,
    ) -> None:
        self.name = name
        self._fn = fn
        self._constants = constants
        self._body = body
        self._launcher = launcher

    @property
    def is_one_launch(self) -> bool:
        """Whether it is recorded."""
        return self._body is not None

    @property
    def is_current(self) -> bool:
        """Whether everything that it has taken in besides its arguments is unchanged."""
        device = self._launcher.device
        return all([constant() is value and _identity(value, device) == identity for constant, value, identity in self._constants])

    def __call__(self, *args: Tree) -> Tree:
        """What the recorded function returns, in memory of its own.

        Raises:
          ShapeChanged: an argument differs in shape, dtype or device from what was recorded.
        """
        body = self._body
        if body is None:
            assert self._fn is not None
            return self._fn(*args)
        values = body.leaves_of(args)
        if values not in body.known:
            for value, own in zip(values, body.inputs, strict=True):
                if Spec.of(value) != Spec.of(own):
                    raise ShapeChanged(
                        f"'{self.name}' was recorded for {Spec.of(own)} on {own.device}, got {Spec.of(value)} on {value.device}"
                    )
            body.known.add(values)
        return body.result_of(self._launcher.launch(body, values))


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source to its target. Those of one dtype are copied together, which is one kernel on a GPU."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        into, of = groups[target.dtype]
        into.append(target)
        of.append(source)
    for into, of in groups.values():
        torch._foreach_copy_(into, of)  # type: ignore[attr-defined]
