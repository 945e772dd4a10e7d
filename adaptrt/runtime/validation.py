"""Decides who validates the values of a call's data, and validates them."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from torch import Tensor

from adaptrt.backend import Backend
from adaptrt.graph.indices import IndexBound
from adaptrt.inner import check
from adaptrt.inner.step import Batch


class Validator(enum.Enum):
    """Who validates the values."""

    HOST = "host"
    """Python code validates them before the programs run, and waits for the device."""
    PROGRAM = "program"
    """The program that computes the call finds NaN and infinity while it reads the data anyway; Python code validates indices."""
    LAUNCH = "launch"
    """Operations within the recorded call validate them, so that nothing waits for the device before the launch."""


@dataclasses.dataclass(frozen=True, slots=True)
class Validation:
    """How the values of a call's data are validated.

    Attributes:
      validator: who does it. Labels and indices are validated in any case.
      finite: whether NaN and infinity are refused.
    """

    validator: Validator
    finite: bool

    @staticmethod
    def decide(*, finite: bool, backend: Backend, is_launched: bool, sees_all_data: bool) -> Validation:
        """Decides who validates.

        Args:
          finite: whether NaN and infinity are to be refused.
          backend: what runs the programs.
          is_launched: whether calls are recorded and launched as one.
          sees_all_data: whether each program is given all data of a call.
        """
        if is_launched:
            return Validation(Validator.LAUNCH, finite)
        return Validation(Validator.PROGRAM if finite and backend.fuses and sees_all_data else Validator.HOST, finite)

    @property
    def in_program(self) -> bool:
        """Whether programs refuse NaN and infinity themselves."""
        return self.validator is Validator.PROGRAM and self.finite

    def before(self, name: str, batch: Batch, bounds: Sequence[IndexBound]) -> None:
        """Validates, before the programs run, what they do not validate themselves.

        Args:
          name: of the batch, for messages.
          batch: the data.
          bounds: which of it are class labels or indices.
        Raises:
          LabelOutOfRange, NonFiniteInput, InvalidBatch: a value is not valid; weights that sum to 0.
        """
        if self.validator is not Validator.LAUNCH:
            if batch.weights is not None:
                check.weights(name, batch)
            check.indices(name, batch, bounds)
            if self.finite and self.validator is Validator.HOST:
                check.finite(name, batch)

    def within(self, batch: Batch, bounds: Sequence[IndexBound]) -> tuple[Batch, Tensor | None]:
        """Validates within a recorded call; returns what `check.validated` does."""
        return check.validated(batch, bounds, self.finite)

    def report(self, name: str, batch: Batch, bounds: Sequence[IndexBound]) -> None:
        """Raises an error that names the invalid value in data that a program or a launch has refused."""
        check.weights(name, batch)
        check.indices(name, batch, bounds)
        if self.finite:
            check.finite(name, batch)
