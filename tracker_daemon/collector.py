"""The Prometheus collector: reads the trackers' plain integers when it is scraped.

Rules:
1. One collector a registry; several trackers on it add up.
2. What a tracker counted stays, closed or dropped; of those that are gone one sum is kept, however many they were. No
   tracker is held here: one that nobody else holds is freed.
3. No counter ever goes back, whatever is closed or freed meanwhile: an account leaves, and the sum of those that are
   gone grows, in one step.
4. Every child exists from the first scrape; no label has values that a caller chooses.
5. `accepted = applied + dead_lettered + lost + queue_calls` in every scrape: one reading of the books gives them all.
"""

from __future__ import annotations

import os
from collections import Counter
from copy import copy
from dataclasses import dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from threading import Lock
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary, ref

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry

from tracker_daemon.books import LOST_REASONS, Books
from tracker_daemon.flush_numbers import SECONDS, FlushNumbers, Histogram
from tracker_daemon.front_door import REJECTED_REASONS
from tracker_daemon.generation import KINDS
from tracker_daemon.journal.directory import OPERATIONS
from tracker_daemon.sink import DEAD_REASONS, FAULT_KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from tracker_daemon.backlog import Backlog
    from tracker_daemon.front_door import Refusals
    from tracker_daemon.journal.journal import Journal

OUTCOMES = ("ok", "duplicate", "retry", "error")


@dataclass(frozen=True, slots=True)
class Reading:
    """All numbers of one tracker at one instant."""

    books: Books
    rejected: Mapping[str, int]
    numbers: FlushNumbers
    queue_limit: int
    journal: Journal | None = None


class Source(Protocol):
    """A tracker, as the collector sees it."""

    def reading(self) -> Reading:
        """Read all numbers now."""
        ...


class Counted(Protocol):
    """What is summed up at a scrape.

    Attributes:
        closed: whether its limit and state count no more.
        folded: whether what it counted is in the sum of those that are gone.
    """

    closed: bool
    folded: bool

    @property
    def ended(self) -> bool:
        """Whether it is gone, and nothing is counted any more."""
        ...

    def collected(self) -> Reading:
        """Read all numbers now."""
        ...


class Account:
    """Where one tracker counts, apart from it: what it counted outlives it.

    Nothing here may lead back to the tracker, or it would live as long as the registry.

    Attributes:
        started: whether the worker was started; from then on the tracker lives until it is closed.
        closed: whether the tracker's limit and state count no more.
        folded: whether what was counted is in the sum of those that are gone.
    """

    def __init__(self, owner: Source) -> None:
        self._owner = ref(owner)
        self.started = self.closed = self.folded = False

    def begin(
        self, backlog: Backlog, refusals: Refusals, numbers: FlushNumbers, journal: Journal | None = None
    ) -> None:
        """Count from zero: a life begins."""
        self._parts = backlog, refusals, numbers, journal  # in one step: a scrape finds one life or the other
        self.started = False

    @property
    def ended(self) -> bool:
        """Whether the tracker is gone, and nothing is counted any more."""
        # In a cycle of garbage the reference dies before the finalizers run, and one of them may make the first call.
        return self._owner() is None and (self.closed or not self.started)

    def collected(self) -> Reading:
        """Read all numbers now; through the tracker, which knows of a fork, while it lives."""
        owner = self._owner()
        if owner is not None:
            return owner.reading()
        if self.closed:
            self._parts[0].abandon("closed")  # a call that overlapped with the very end of `close`
        return self.reading()

    def reading(self) -> Reading:
        """Read all numbers now."""
        backlog, refusals, numbers, journal = self._parts
        return Reading(
            books=backlog.books(),
            rejected=dict(refusals.counts),
            numbers=numbers,
            queue_limit=backlog.max_pending,
            journal=journal,
        )


@dataclass(slots=True)
class _Sum:
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

    def copy(self) -> _Sum:
        """Return an equal sum that shares nothing that changes."""
        return _Sum(**{each.name: copy(getattr(self, each.name)) for each in fields(self)})

    def _add_histogram(self, name: str, histogram: Histogram) -> None:
        _, counts, total = self.histograms.get(name, ((), [0] * len(histogram.counts), 0.0))
        added = [a + b for a, b in zip(counts, list(histogram.counts), strict=True)]
        self.histograms[name] = (histogram.bounds, added, total + histogram.total)


class TrackerCollector(Collector):
    """Exposes every tracker of one registry."""

    def __init__(self) -> None:
        # First the sum of those that are gone, then an account each. Changed by single steps, and read by one: a signal
        # handler may open or close a tracker in the middle of a scrape, the garbage collector may free one anywhere.
        self._entries: list[_Sum | Counted] = [_Sum()]
        self._folding = Lock()
        self._pid = os.getpid()

    def add(self, account: Counted) -> None:
        """Include *account* in every scrape."""
        self._entries.append(account)
        self._fold()

    def start(self, account: Account) -> None:
        """The tracker of *account* is about to work."""
        account.started = True
        if account.folded:
            # A finalizer made the first call of a tracker that was taken for gone: its refused calls count twice.
            account.folded = False
            self._entries.append(account)

    def retire(self, account: Account) -> None:
        """The tracker of *account* is closed: its limit and state count no more, what it counted stays."""
        account.closed = True

    def after_fork(self) -> None:
        """In a fork's child, once: nothing of trackers that are gone in the parent is counted here."""
        if self._pid != os.getpid():
            living = (each for each in self._entries if not isinstance(each, _Sum) and not each.ended)
            self._entries, self._folding, self._pid = [_Sum(), *living], Lock(), os.getpid()

    def _fold(self) -> None:
        """Put those that are gone into the sum."""
        if not self._folding.acquire(blocking=False):
            return  # somebody does it, perhaps below this very call
        try:
            entries = self._entries.copy()
            total, living, ended = _Sum(), list[Counted](), list[Counted]()
            for entry in entries:
                if isinstance(entry, _Sum):
                    total = entry
                else:
                    (ended if entry.ended else living).append(entry)
            if ended:
                total = total.copy()
                for account in ended:
                    account.folded = True
                    total.add(account.collected(), alive=False)
                self._entries[: len(entries)] = [total, *living]  # what was added meanwhile stands behind them
        finally:
            self._folding.release()

    def describe(self) -> Iterable[Metric]:
        """The names, for the registry to find duplicates."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Read everything once and yield the families."""
        yield from _families(self._total())

    def reading(self) -> Reading:
        """Read everything once, as if it were one tracker's."""
        return self._total().reading()

    def _total(self) -> _Sum:
        self.after_fork()  # the process may have forked without Python's knowledge
        self._fold()
        total = _Sum()
        for entry in self._entries.copy():
            if isinstance(entry, _Sum):
                total = entry.copy()
            else:
                total.add(entry.collected(), alive=not (entry.closed or entry.ended))
        return total


def _families(total: _Sum) -> Iterator[Metric]:
    kinds = tuple(KINDS.values())
    yield _counter("calls_accepted", "Calls taken.", "call", kinds, total.accepted)
    yield _counter("calls_applied", "Calls committed to the database.", "call", kinds, total.applied)
    yield _counter("calls_rejected", "Calls not taken.", "reason", REJECTED_REASONS, total.rejected)
    yield _counter("calls_lost", "Calls taken that could not be kept.", "reason", LOST_REASONS, total.lost)
    yield _counter(
        "calls_dead_lettered",
        "Calls in deltas that the database will never take.",
        "reason",
        DEAD_REASONS,
        total.dead_lettered,
    )
    yield _gauge("queue_depth", "Threads with uncommitted change.", total.threads)
    yield _gauge("queue_calls", "Calls taken and not yet applied, dead-lettered or lost.", total.queue_calls)
    yield _gauge("queue_limit", "Threads with uncommitted change that may be held (max_pending).", total.limit)
    yield _gauge(
        "oldest_pending_timestamp_seconds",
        "When the oldest pending call was made; 0 when empty.",
        total.oldest,
    )
    yield _gauge("last_success_timestamp_seconds", "When a flush last committed; 0 before.", total.last_success)
    yield _histogram("flush_duration_seconds", "One flush, from begin to commit.", total, "flush_seconds")
    yield _histogram("flush_rows", "Threads in one flush.", total, "flush_rows")
    yield _histogram(
        "commit_lag_seconds", "From the oldest call of a batch to its commit.", total, "commit_lag_seconds"
    )
    yield _counter("flushes", "Flushes by how they ended.", "outcome", OUTCOMES, total.flushes)
    skipped = CounterMetricFamily("tracker_rows_skipped", "Threads without a row, left alone (create_missing=False).")
    skipped.add_metric([], total.rows_skipped)
    yield skipped
    yield _counter("database_errors", "Errors of the database by class.", "class", FAULT_KINDS, total.errors)
    regressions = CounterMetricFamily("tracker_ledger_regressions", "Times the database had forgotten commits.")
    regressions.add_metric([], total.regressions)
    yield regressions
    yield _gauge("fenced", "1 when this process may not write any more.", int(total.fenced))
    if total.journals:
        yield from _journal_families(total)
    build = GaugeMetricFamily("tracker_build_info", "1, with the version.", labels=["version"])
    build.add_metric([_version()], 1)
    yield build


def _journal_families(total: _Sum) -> Iterator[Metric]:
    yield _gauge("journal_bytes", "Bytes that the journal's files take.", total.journal_bytes)
    yield _gauge("journal_quota_bytes", "Bytes that the journal's files may take (journal_quota).", total.journal_quota)
    yield _gauge("journal_degraded", "1 while calls are held in memory alone.", int(total.journal_degraded))
    yield _counter("journal_errors", "Errors of the journal by operation.", "op", OPERATIONS, total.journal_errors)
    yield _histogram("journal_fsync_duration_seconds", "One fsync of the journal.", total, "fsync_seconds")
    for name, text, value in (
        ("recovered", "Calls that an earlier process had accepted, applied by this one.", total.recovered),
        ("replayed", "Calls applied again because the database had forgotten them.", total.replayed),
    ):
        family = CounterMetricFamily(f"tracker_journal_{name}_calls", text)
        family.add_metric([], value)
        yield family


def _counter(name: str, text: str, label: str, values: Sequence[str], counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"tracker_{name}", text, labels=[label])
    for value in values:
        family.add_metric([value], counts.get(value, 0))
    return family


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"tracker_{name}", text, value=value)


def _histogram(name: str, text: str, total: _Sum, key: str) -> HistogramMetricFamily:
    bounds, counts, observed = total.histograms.get(key) or _EMPTY[key]
    buckets, running = [], 0
    for bound, count in zip([*bounds, float("inf")], counts, strict=True):
        running += count
        buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), float(running)))
    return HistogramMetricFamily(f"tracker_{name}", text, buckets=buckets, sum_value=observed)


def _empty() -> dict[str, tuple[Sequence[float], list[int], float]]:
    numbers = FlushNumbers()
    names = ("flush_seconds", "flush_rows", "commit_lag_seconds")
    found = {name: getattr(numbers, name) for name in names} | {"fsync_seconds": Histogram(SECONDS)}
    return {name: (each.bounds, list(each.counts), 0.0) for name, each in found.items()}


_EMPTY = _empty()


def _version() -> str:
    try:
        return version("tracker-daemon")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


_collectors: WeakKeyDictionary[CollectorRegistry, TrackerCollector] = WeakKeyDictionary()
_collectors_lock = Lock()


def collector_of(registry: CollectorRegistry) -> TrackerCollector:
    """Return the one collector of *registry*, registered."""
    with _collectors_lock:
        collector = _collectors.get(registry)
        if collector is None:
            collector = TrackerCollector()
            registry.register(collector)
            _collectors[registry] = collector
        return collector
