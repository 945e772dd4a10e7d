"""Computes batches: requests become lanes of one call, and its results are taken apart again. Nothing is committed here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from adaptrt import Adapted
from adaptrt.errors import NonFiniteInput
from adaptrt.serve import trees
from adaptrt.serve.policies import History, Policy
from adaptrt.serve.programs import Programs, is_kept
from adaptrt.serve.records import Record, Shared, Stamp
from adaptrt.serve.sizes import Sizes
from adaptrt.serve.work import Work

Result = TypeVar("Result")


class Lane(NamedTuple):
    """What an adaptation has computed.

    Attributes:
      row: the state after it.
      kept: whether the guard keeps it.
      losses: before each step.
      before: the record that it went on from, None where it started from the base.
      shared: the memory that the row shares.
    """

    row: Adapted
    kept: bool
    losses: tuple[float, ...]
    before: Record | None
    shared: Shared | None


class Lanes:
    """Runs programs on requests.

    Args:
      programs: to run.
      supports, queries: sizes of data.
      policy: which decides what an adaptation starts from.
      refuses_unknown: whether a tenant without a state gets an error instead of predictions of the base.
    """

    def __init__(self, programs: Programs, supports: Sizes, queries: Sizes, policy: Policy, refuses_unknown: bool) -> None:
        self._programs = programs
        self._supports = supports
        self._queries = queries
        self._policy = policy
        self._refuses_unknown = refuses_unknown

    def adapt(self, works: Sequence[Work]) -> list[Lane]:
        """Runs adaptations of one size as one batch. Raises whatever the programs raise."""
        now = Stamp.now()
        programs, size = self._programs, works[0].size
        begins = [self._begin(work, now) for work in works]
        rows = [self._row_of(record) for record in begins]
        num_lanes = programs.lanes_for(len(works))
        if not programs.is_together("adapt", num_lanes):
            found = [programs.adapt_one(row, self._supports.alone(work.data, size)) for row, work in zip(rows, works, strict=True)]
            each = zip(found, begins, strict=True)
            return [Lane(row, is_kept(row), tuple(row.losses.tolist()), before, None) for row, before in each]
        support = self._supports.together([work.data for work in works], size, num_lanes)
        adapted, kept, losses = programs.adapt([*rows, *[rows[-1]] * (num_lanes - len(rows))], support)
        shared = Shared(num_lanes) if num_lanes > 1 else None
        lanes = zip(adapted, kept, losses, begins, strict=False)  # lanes that were added are dropped
        return [Lane(row, was_kept, tuple(values), before, shared) for row, was_kept, values, before in lanes]

    def predict(self, works: Sequence[Work]) -> list[Any]:
        """Runs predictions of one size as one batch, and returns the outputs of each. Raises whatever the programs raise."""
        programs, size = self._programs, works[0].size
        rows = [self._row(work) for work in works]
        num_lanes = programs.lanes_for(len(works))
        if not programs.is_together("predict", num_lanes):
            found = [programs.predict_one(row, self._queries.alone(work.data, size)) for row, work in zip(rows, works, strict=True)]
            return [trees.own(value, None if work.length == size else work.length) for value, work in zip(found, works, strict=True)]
        inputs = self._queries.together([work.data for work in works], size, num_lanes)
        outputs = programs.predict([*rows, *[rows[-1]] * (num_lanes - len(rows))], inputs)
        is_padded = any([work.length != size for work in works])
        return trees.take_apart(outputs, len(works), [work.length for work in works] if is_padded else None)

    def each(self, works: Sequence[Work], compute: Callable[[Sequence[Work]], list[Result]]) -> list[Result | Exception]:
        """Returns for each request what `compute` returns for it; or the error of this request alone, by which no other is touched.

        A batch that fails is computed again without the requests whose data is not finite, or else one by one.
        """
        try:
            return [*compute(works)]
        except Exception as error:
            if len(works) == 1:
                return [error]
            refused = {index: found for index, work in enumerate(works) if (found := self._not_finite(work, error)) is not None}
        if not 0 < len(refused) < len(works):
            return [result for work in works for result in self.each([work], compute)]
        rest = iter(self.each([work for index, work in enumerate(works) if index not in refused], compute))
        return [refused[index] if index in refused else next(rest) for index in range(len(works))]

    def _not_finite(self, work: Work, error: Exception) -> NonFiniteInput | None:
        if not isinstance(error, NonFiniteInput):
            return None
        try:
            (self._supports if work.kind == "adapt" else self._queries).require_finite(work.data)
        except NonFiniteInput as found:
            return found
        return None

    def _begin(self, work: Work, now: Stamp) -> Record | None:
        """Returns the record that an adaptation goes on from, None for the base."""
        record = None if work.tenant is None else work.tenant.record
        if record is None:
            return None
        history = History(record.num_adaptations, record.created.age_s(now), record.updated.age_s(now))
        return record if self._policy.goes_on(history) else None

    def _row_of(self, record: Record | None) -> Adapted:
        if record is None:
            return self._programs.base
        assert isinstance(record.state, Adapted)
        return record.state

    def _row(self, work: Work) -> Adapted:
        if work.row is not None:
            return work.row
        return self._row_of(None if work.tenant is None else work.tenant.record)

    def is_unknown(self, work: Work) -> bool:
        """Whether a prediction is refused because its tenant has no state."""
        return self._refuses_unknown and work.tenant is not None and work.tenant.record is None
