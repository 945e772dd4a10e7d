"""Runs whole calls: either their programs one by one, or a recording of them as one launch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from adaptrt.backend.base import COMPILING, rehearsal
from adaptrt.backend.launch import Launcher, Recording
from adaptrt.errors import NonFiniteInput
from adaptrt.process import leaving_nothing
from adaptrt.runtime.program_set import ProgramSet

Validate = Callable[..., tuple[tuple[Any, ...], Tensor | None]]
"""From arguments to arguments that kernels may be given, and whether all were valid (0-dim bool; None if nothing was looked at)."""


def _rehearse(fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with rehearsal():
        fn(*args)


class Calls:
    """Runs the calls of one plan.

    Where there is a launcher, a call is recorded the first time, and launched as a whole from then on. Elsewhere its programs run one by
    one. If the backend can build code in the background, the first call is then preceded by a rehearsal: it runs without values, only to
    find out which programs there are, so that the code of one is built while the next is generated.

    Args:
      programs: the programs that the calls run.
      launcher: makes a call one launch; None to run its programs one by one.
      rehearses: whether first calls are preceded by rehearsals.
    """

    def __init__(self, programs: ProgramSet, launcher: Launcher | None, rehearses: bool) -> None:
        self._programs = programs
        self._launcher = launcher
        self._rehearses = rehearses
        self._rehearsed: set[str] = set()
        self._recordings: dict[Hashable, Recording] = {}

    def run(self, name: str, key: Hashable, fn: Callable[..., Any], args: tuple[Any, ...], validate: Validate | None = None) -> Any:
        """Returns `fn(*args)`.

        Args:
          name: of the call, for messages and reports.
          key: everything that `fn` depends on besides its arguments.
          fn: runs programs of this plan.
          args: trees of tensors.
          validate: applied to the arguments within a recorded call. Arguments of other calls have been validated already.
        Raises:
          NonFiniteInput: the arguments of a launch were not valid.
          OutOfDeviceMemory: see `adaptrt.errors`; and what `fn` raises.
        """
        if self._launcher is None:
            if self._rehearses and name not in self._rehearsed:
                self._rehearse(name, fn, args)
            return fn(*args)

        def validated(*args: Any) -> tuple[Any, Tensor | None]:
            is_valid = None
            if validate is not None:
                args, is_valid = validate(*args)
            return fn(*args), is_valid

        result, is_valid = self._recording(self._launcher, name, key, validated, args)(*args)
        if is_valid is not None and not is_valid.item():
            raise NonFiniteInput("the data holds NaN, infinity, or an index of what does not exist")
        return result

    def recordings(self) -> list[Recording]:
        """Returns the calls recorded so far."""
        return list(self._recordings.values())

    def _rehearse(self, name: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        with COMPILING:
            if name not in self._rehearsed:
                leaving_nothing(_rehearse)(fn, args)
                self._programs.finish_building()
                self._rehearsed.add(name)

    def _recording(self, launcher: Launcher, name: str, key: Hashable, fn: Callable[..., Any], args: tuple[Any, ...]) -> Recording:
        """Returns the recording of this call, and makes it if there is none, or none that is current."""
        recording = self._recordings.get((name, key, launcher.settings()))
        if recording is not None and recording.is_current:
            return recording
        with COMPILING:
            full_key = name, key, launcher.settings()  # as they are while it is recorded
            recording = self._recordings.get(full_key)
            if recording is None or not recording.is_current:
                recording = self._recordings[full_key] = launcher.record(name, fn, args, self._programs.constants)
        return recording
