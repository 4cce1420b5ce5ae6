"""The books: what was accepted, and what became of it, in calls.

Rules:
1. Whoever changes a total or reads several at one instant holds the backlog's lock.
2. Accepted is applied, dead-lettered, lost or pending, exactly, in every reading.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Final

from tracker_daemon.delta import calls_of, rows_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tracker_daemon.delta import Row, ThreadDelta
    from tracker_daemon.sink import Applied

LOST_REASONS: Final = ("deadline", "halted", "worker_failed", "closed", "journal_gone")


@dataclass(frozen=True, slots=True)
class Books:
    """One consistent reading, in calls; by kind of call or by reason where it is a mapping."""

    accepted: dict[str, int]
    applied: dict[str, int]
    dead_lettered: dict[str, int]
    lost: dict[str, int]
    queue_calls: int
    """Accepted and neither applied, dead-lettered nor lost."""
    threads: int
    """Distinct threads with uncommitted change."""
    oldest_at: int
    """Nanoseconds since 1970 of the oldest pending call; 0 when nothing is pending."""
    rows_skipped: int
    journaled: int = 0
    """Of `queue_calls`: left to the journal by an end of the process, for the next one to apply."""


@dataclass(frozen=True, slots=True)
class DrainReport:
    """What became of the calls that were pending when `close` was called, in calls."""

    applied: int = 0
    dead_lettered: int = 0
    journaled: int = 0
    lost: int = 0

    @classmethod
    def between(cls, before: Books | None, now: Books) -> DrainReport:
        """Return what became of calls since *before*; `None`: `close` was never called."""
        if before is None:
            return cls()
        return cls(
            applied=sum(now.applied.values()) - sum(before.applied.values()),
            dead_lettered=sum(now.dead_lettered.values()) - sum(before.dead_lettered.values()),
            journaled=now.journaled,
            lost=sum(now.lost.values()) - sum(before.lost.values()),
        )


@dataclass(slots=True)
class Totals:
    """The running totals of one life, by kind of call or by reason.

    Attributes:
        folded: taken off the queue.
        recovered: of earlier lives, accepted by this one.
        journaled: left to the journal by the end of the process.
    """

    folded: Counter[str] = field(default_factory=Counter)
    applied: Counter[str] = field(default_factory=Counter)
    dead_lettered: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    recovered: Counter[str] = field(default_factory=Counter)
    rows_skipped: int = 0
    journaled: int = 0
    _recovering: Counter[str] = field(default_factory=Counter)

    def settle(self, rows: Sequence[Row], dead: Mapping[str, str]) -> None:
        """The sink has *rows*; *dead*: the threads of dead letters, and the reason of each."""
        if dead:
            for row in rows:
                if reason := dead.get(row[0]):
                    self.dead_lettered[reason] += calls_of(row)
            rows = [row for row in rows if row[0] not in dead]
        _count(self.applied, rows)

    def recover(self, batches: Iterable[Iterable[ThreadDelta]]) -> None:
        """Count as accepted what an earlier life had accepted and this one is to apply.

        What was to be applied before, and was not settled, comes again: the recovery was cut short and has begun anew.
        """
        self.recovered -= self._recovering
        self._recovering.clear()
        for batch in batches:
            _count(self._recovering, rows_of(batch))
        self.recovered += self._recovering

    def settle_recovered(self, batch: Iterable[ThreadDelta], applied: Applied) -> None:
        """The sink has *batch*, of an earlier life."""
        if self._recovering.total():  # else given up meanwhile
            rows = rows_of(batch)
            self._recovering -= _count(Counter(), rows)
            self.settle(rows, applied.dead)
            self.rows_skipped += applied.skipped

    def set_aside(self) -> None:
        """What was recovered and cannot be applied stays in the journal."""
        self.journaled += self._recovering.total()
        self._recovering.clear()

    def reading(self, waiting: Counter[str], threads: int, oldest_at: int) -> Books:
        """Return the books, with what waits in the queue, by method."""
        accepted = self.folded + self.recovered + waiting
        settled = self.applied.total() + self.dead_lettered.total() + self.lost.total()
        return Books(
            accepted=dict(accepted),
            applied=dict(self.applied),
            dead_lettered=dict(self.dead_lettered),
            lost=dict(self.lost),
            queue_calls=accepted.total() - settled,
            threads=threads,
            oldest_at=oldest_at,
            rows_skipped=self.rows_skipped,
            journaled=self.journaled,
        )


_TURNS, _ENSURES, _RARE = itemgetter(1), itemgetter(7), itemgetter(8)


def _count(counter: Counter[str], rows: Sequence[Row]) -> Counter[str]:
    counter["ensure_conversation"] += sum(map(_ENSURES, rows))
    counter["record_turn"] += sum(map(_TURNS, rows))
    counter["resolve"] += sum(rare[0] for rare in filter(None, map(_RARE, rows)))
    return counter


@dataclass(frozen=True, slots=True)
class TrackerStats:
    """Calls, at one instant: `accepted == applied + dead_lettered + lost + pending`, exactly.

    Attributes:
        accepted: taken; `True` was returned.
        applied: committed (or skipped, with `create_missing=False`).
        dead_lettered: in deltas that the database will never take; kept in `tracker_dead_letters`.
        lost: taken and not kept: a shutdown deadline passed.
        pending: taken and on their way.
        rejected: never taken: invalid, full or closed.
        rows_skipped: not calls but rows: threads of a flush that had none, with `create_missing=False`.
    """

    accepted: int
    applied: int
    dead_lettered: int
    lost: int
    pending: int
    rejected: int
    rows_skipped: int = 0
