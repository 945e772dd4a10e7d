"""What becomes of adaptations that were computed: commits, answers, second tries and predictions; and what `forget` deletes."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence

from adaptrt.errors import CommitConflict, TooManyTenants
from adaptrt.serve.lanes import Lane
from adaptrt.serve.policies import Policy
from adaptrt.serve.queue import WorkQueue, expired
from adaptrt.serve.records import Record, Stamp
from adaptrt.serve.states import States
from adaptrt.serve.stores import Change
from adaptrt.serve.work import Answer, Outcome, Tenant, Work


class Commits:
    """Commits adaptations.

    Args:
      queue: for predictions that follow, and for adaptations that are to be computed again. Its lock is that of all that is shared.
      states: of tenants.
      policy: what is kept and forgotten.
      max_tries: how often an adaptation is computed if others commit meanwhile.
      max_tenants: how many tenants the store may have, None without limit.
      events: counts.
      answer: hands answers to callers; called with the lock held.
      on_store_thread: has a function called on the thread that may block for the store.
    """

    def __init__(
        self,
        queue: WorkQueue,
        states: States,
        policy: Policy,
        max_tries: int,
        max_tenants: int | None,
        events: Counter[str],
        answer: Callable[[list[Answer]], None],
        on_store_thread: Callable[..., None],
    ) -> None:
        self._queue = queue
        self._lock = queue.lock
        self._states = states
        self._policy = policy
        self._max_tries = max_tries
        self._max_tenants = max_tenants
        self._events = events
        self._answer = answer
        self._on_store_thread = on_store_thread

    def finish(self, works: Sequence[Work], found: Sequence[Lane | Exception], began: float) -> None:
        """Does what follows from a batch of adaptations: commits, answers, and predictions of stateless ones.

        Args:
          works: the batch.
          found: what was computed for each.
          began: when the batch began, by the clock of deadlines.
        """
        answers: list[Answer] = []
        to_commit: list[tuple[Work, Lane]] = []
        with self._lock:
            for work, lane in zip(works, found, strict=True):
                tenant, then = work.tenant, work.then
                if isinstance(lane, Exception):
                    answers.append(Answer(work, None, lane))
                elif then is not None:
                    then.row, then.tag, then.number = lane.row, work.tag, work.number
                    then.outcome = Outcome(lane.kept, lane.losses, 0, 0.0)
                    self._queue.push(then)
                elif lane.kept and self._policy.keeps:
                    to_commit.append((work, lane))
                elif lane.kept or not self._policy.forgets_refused:
                    answers.append(Answer(work, self._outcome(work, lane), None))
                else:
                    self._on_store_thread(self.forget, work, lane)
                if not isinstance(lane, Exception) and not lane.kept:
                    self._events["not kept"] += 1
                assert tenant is not None or then is not None
            self._answer(answers)
            if not to_commit:
                self._queue.took(works, began)
            elif not self._states.is_local:
                for work, _ in to_commit:
                    self._queue.waits_again(work)
        if to_commit and self._states.is_local:
            self._commit(to_commit, began)
        elif to_commit:
            self._on_store_thread(self._commit, to_commit, began)

    def _commit(self, found: Sequence[tuple[Work, Lane]], began: float) -> None:
        """Commits adaptations whose callers still wait, and answers these. `began`: when their batch began."""
        now = Stamp.now()
        answers: list[Answer] = []
        kept: list[tuple[Work, Lane, Tenant]] = []
        changes: list[Change] = []
        with self._lock:
            self._queue.took([work for work, _ in found], began)
            for work, lane in found:
                tenant = work.tenant
                assert tenant is not None
                self._queue.left(work)
                if work.is_cancelled or self._queue.has_expired(work):
                    answers.append(Answer(work, None, None if work.is_cancelled else expired(work)))
                    continue
                kept.append((work, lane, tenant))
                changes.append(Change(tenant.name, tenant.version, self._record(tenant, lane, now)))
        error: Exception | None = None
        committed: Sequence[bool] = ()
        try:
            if self._max_tenants is not None and not all([change.expected_version for change in changes]):
                kept, changes, refused = self._within_bound(kept, changes)
                answers += refused
            committed = self._states.commit(changes) if changes else ()
        except Exception as raised:
            error = raised
        conflicts: list[tuple[Work, Tenant]] = []
        with self._lock:
            if error is not None:
                answers += [Answer(work, None, error) for work, _, _ in kept]
            for (work, lane, tenant), change, is_committed in zip(kept, changes, committed, strict=error is None):
                if not is_committed:
                    conflicts.append((work, tenant))
                    continue
                tenant.record = change.record
                self._events["committed"] += 1
                answers.append(Answer(work, self._outcome(work, lane), None))
            self._answer(answers)
        for work, tenant in conflicts:
            self._try_again(work, tenant)

    def _within_bound(
        self, kept: list[tuple[Work, Lane, Tenant]], changes: list[Change]
    ) -> tuple[list[tuple[Work, Lane, Tenant]], list[Change], list[Answer]]:
        """Takes out adaptations of new tenants for whom there is no room, and returns what these are answered."""
        assert self._max_tenants is not None
        room = self._max_tenants - self._states.num_tenants()
        stay: list[int] = []
        refused: list[Answer] = []
        for index, change in enumerate(changes):
            if change.expected_version == 0 and room <= 0 and not self._states.has(change.tenant):
                refused.append(Answer(kept[index][0], None, _too_many(self._max_tenants)))
                continue
            room -= change.expected_version == 0
            stay.append(index)
        return [kept[index] for index in stay], [changes[index] for index in stay], refused

    def _record(self, tenant: Tenant, lane: Lane, now: Stamp) -> Record:
        version = tenant.version + 1 if tenant.version else 1 + secrets.randbelow(2**31)
        before = lane.before
        num_adaptations, created = (1, now) if before is None else (before.num_adaptations + 1, before.created)
        return Record(version, lane.row, self._states.num_bytes, num_adaptations, created, now, lane.shared, self._states.save)

    def _try_again(self, work: Work, tenant: Tenant) -> None:
        """Has an adaptation computed from what another engine has committed meanwhile."""
        work.num_tries += 1
        error: Exception | None = None
        if work.num_tries >= self._max_tries:
            error = CommitConflict(f"others committed for this tenant {work.num_tries} times meanwhile; send its requests to one engine")
        try:
            record = self._states.load(tenant.name)
        except Exception as raised:
            record, error = tenant.record, error or raised
        with self._lock:
            tenant.record = record
            self._events["conflicts"] += 1
            if error is None:
                self._queue.push(work)
            else:
                self._answer([Answer(work, None, error)])

    def forget(self, work: Work, lane: Lane | None = None) -> None:
        """Deletes a tenant's record and answers; `lane`: the adaptation that the guard refused, for the policy that forgets then."""
        tenant = work.tenant
        assert tenant is not None
        error: Exception | None = None
        was_there = False
        try:
            was_there = self._states.forget(tenant.name)
        except Exception as raised:
            error = raised
        with self._lock:
            if error is None:
                tenant.record = None
            result = was_there if lane is None else self._outcome(work, lane)
            self._answer([Answer(work, None if error else result, error)])

    def _outcome(self, work: Work, lane: Lane) -> Outcome:
        version = 0 if work.tenant is None else work.tenant.version
        return Outcome(lane.kept, lane.losses, version, self._queue.clock() - work.began)


def _too_many(bound: int) -> TooManyTenants:
    return TooManyTenants(f"{bound} tenants have a state here, which is the bound (max_tenants); have others forgotten first")
