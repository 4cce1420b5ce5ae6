"""All numbers of a tracker at one instant, and the sum of several trackers' numbers."""

from __future__ import annotations

from collections import Counter
from copy import copy
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from tracker_daemon.books import Books
from tracker_daemon.flush_numbers import FlushNumbers, Histogram

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tracker_daemon.journal.journal import Journal


@dataclass(frozen=True, slots=True)
class Reading:
    """All numbers of one tracker at one instant."""

    books: Books
    rejected: Mapping[str, int]
    numbers: FlushNumbers
    queue_limit: int
    journal: Journal | None = None


@dataclass(slots=True)
class Sum:
    """What several trackers counted, in all."""

    accepted: Counter[str] = field(default_factory=Counter)
    applied: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    dead_lettered: Counter[str] = field(default_factory=Counter)
    queue_calls: int = 0
    threads: int = 0
    limit: int = 0
    oldest: float = 0.0
    last_success: float = 0.0
    rows_skipped: int = 0
    regressions: int = 0
    fenced: bool = False
    flushes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, tuple[Sequence[float], list[int], float]] = field(default_factory=dict)
    journals: int = 0
    journal_bytes: int = 0
    journal_quota: int = 0
    journal_degraded: bool = False
    journal_errors: Counter[str] = field(default_factory=Counter)
    recovered: int = 0
    replayed: int = 0

    def add(self, reading: Reading, *, alive: bool) -> None:
        """Add one tracker's; *alive*: its limits and state count as well."""
        books, numbers = reading.books, reading.numbers
        for name in ("accepted", "applied", "lost", "dead_lettered"):
            getattr(self, name).update(getattr(books, name))
        self.rejected.update(reading.rejected)
        self.queue_calls += books.queue_calls
        self.threads += books.threads
        oldest = books.oldest_at / 1e9
        self.oldest = min(self.oldest, oldest) if self.oldest and oldest else self.oldest or oldest
        self.last_success = max(self.last_success, numbers.last_success)
        self.rows_skipped += books.rows_skipped
        self.regressions += numbers.regressions
        self.flushes.update(dict(numbers.flushes))  # copied in one step: the worker adds to them
        self.errors.update(dict(numbers.errors))
        for name in ("flush_seconds", "flush_rows", "commit_lag_seconds"):
            self._add_histogram(name, getattr(numbers, name))
        if alive:
            self.limit += reading.queue_limit
            self.fenced = self.fenced or numbers.fenced
        if reading.journal is not None:
            self._add_journal(reading.journal, alive=alive)

    def _add_journal(self, journal: Journal, *, alive: bool) -> None:
        self.journals += 1
        self.journal_errors.update(dict(journal.errors))
        self.recovered += journal.recovered
        self.replayed += journal.replayed
        self._add_histogram("fsync_seconds", journal.fsync_seconds)
        if alive:
            self.journal_bytes += journal.bytes
            self.journal_quota += journal.quota
            self.journal_degraded = self.journal_degraded or journal.degraded

    def reading(self) -> Reading:
        """Return the sum as the reading of one."""
        numbers = FlushNumbers(flushes=self.flushes, errors=self.errors, last_success=self.last_success)
        numbers.regressions, numbers.fenced = self.regressions, self.fenced
        for name, (bounds, counts, total) in self.histograms.items():
            if name != "fsync_seconds":
                histogram = Histogram(bounds)
                histogram.counts, histogram.total = counts, total
                setattr(numbers, name, histogram)
        books = Books(
            accepted=dict(self.accepted),
            applied=dict(self.applied),
            dead_lettered=dict(self.dead_lettered),
            lost=dict(self.lost),
            queue_calls=self.queue_calls,
            threads=self.threads,
            oldest_at=round(self.oldest * 1e9),
            rows_skipped=self.rows_skipped,
        )
        return Reading(books, dict(self.rejected), numbers, self.limit)

    def copy(self) -> Sum:
        """Return an equal sum that shares nothing that changes."""
        return Sum(**{each.name: copy(getattr(self, each.name)) for each in fields(self)})

    def _add_histogram(self, name: str, histogram: Histogram) -> None:
        _, counts, total = self.histograms.get(name, ((), [0] * len(histogram.counts), 0.0))
        added = [a + b for a, b in zip(counts, list(histogram.counts), strict=True)]
        self.histograms[name] = (histogram.bounds, added, total + histogram.total)
