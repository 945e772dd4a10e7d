"""Who validates the values of a call's data, and for what: one decision of a plan."""

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
    """Who looks at the values."""

    HOST = "host"
    """Python code, before the programs run. It waits for the device."""
    PROGRAM = "program"
    """The program that computes the call looks for NaN and infinity while it has the data at hand; Python code looks at indices."""
    LAUNCH = "launch"
    """Operations within the recorded call, so that nothing waits for the device before it is launched."""


@dataclasses.dataclass(frozen=True, slots=True)
class Validation:
    """What happens to the values of a call's data.

    Attributes:
      validator: who looks at them. Labels and indices are always validated.
      finite: whether NaN and infinity are refused.
    """

    validator: Validator
    finite: bool

    @staticmethod
    def decide(*, finite: bool, backend: Backend, is_launched: bool, sees_all_data: bool) -> Validation:
        """Who validates.

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
        """Validates what has to be valid before the programs run.

        Args:
          name: of the batch, for messages.
          batch: the data.
          bounds: which of it are class labels or indices.
        Raises:
          LabelOutOfRange, NonFiniteInput: it is not.
        """
        if self.validator is not Validator.LAUNCH:
            check.indices(name, batch, bounds)
            if self.finite and self.validator is Validator.HOST:
                check.finite(name, batch)

    def within(self, batch: Batch, bounds: Sequence[IndexBound]) -> tuple[Batch, Tensor | None]:
        """The same within a recorded call: data that kernels may be given, and whether it was valid, as `check.validated` returns them."""
        return check.validated(batch, bounds, self.finite)

    def report(self, name: str, batch: Batch, bounds: Sequence[IndexBound]) -> None:
        """Raises an error that names the invalid value, if there is one; for data that a program or a launch has refused."""
        check.indices(name, batch, bounds)
        if self.finite:
            check.finite(name, batch)
