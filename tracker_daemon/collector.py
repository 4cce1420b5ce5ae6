"""The Prometheus collector: reads the trackers' plain integers when it is scraped, and holds nothing of its own.

Rules:
1. One collector a registry; several trackers on it add up. What a closed tracker counted stays.
2. Every child exists from the first scrape; no label has values that a caller chooses.
3. `accepted = applied + dead_lettered + lost + queue_calls` in every scrape: one reading of the books gives them all.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from threading import Lock
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector, CollectorRegistry

from tracker_daemon.backlog import LOST_REASONS
from tracker_daemon.flush_numbers import FlushNumbers, Histogram
from tracker_daemon.front_door import REJECTED_REASONS
from tracker_daemon.generation import KINDS
from tracker_daemon.sink import DEAD_REASONS, FAULT_KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from tracker_daemon.backlog import Books

OUTCOMES = ("ok", "duplicate", "retry", "error")


@dataclass(frozen=True, slots=True)
class Reading:
    """All numbers of one tracker at one instant."""

    books: Books
    rejected: Mapping[str, int]
    numbers: FlushNumbers
    queue_limit: int


class Source(Protocol):
    """A tracker, as the collector sees it."""

    def reading(self) -> Reading:
        """Read all numbers now."""
        ...


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
        self.flushes.update(numbers.flushes)
        self.errors.update(numbers.errors)
        for name in ("flush_seconds", "flush_rows", "commit_lag_seconds"):
            self._add_histogram(name, getattr(numbers, name))
        if alive:
            self.limit += reading.queue_limit
            self.fenced = self.fenced or numbers.fenced

    def _add_histogram(self, name: str, histogram: Histogram) -> None:
        _, counts, total = self.histograms.get(name, ((), [0] * len(histogram.counts), 0.0))
        added = [a + b for a, b in zip(counts, list(histogram.counts), strict=True)]
        self.histograms[name] = (histogram.bounds, added, total + histogram.total)


class TrackerCollector(Collector):
    """Exposes every tracker of one registry."""

    def __init__(self) -> None:
        # One list for the living and the closed, changed by single steps: a signal handler may close a tracker in the
        # middle of a scrape.
        self._entries: list[Source | Reading] = []

    def add(self, source: Source) -> None:
        """Include *source* in every scrape."""
        self._entries.append(source)

    def retire(self, source: Source) -> None:
        """Keep what *source* has counted until now, and let go of it. Once, or without effect."""
        with suppress(ValueError):
            self._entries[self._entries.index(source)] = source.reading()

    def after_fork(self) -> None:
        """In a fork's child: nothing that the parent has closed is counted here."""
        self._entries = [entry for entry in self._entries if not isinstance(entry, Reading)]

    def describe(self) -> Iterable[Metric]:
        """The names, for the registry to find duplicates."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Read everything once and yield the families."""
        total = _Sum()
        for entry in self._entries.copy():
            closed = isinstance(entry, Reading)
            total.add(entry if isinstance(entry, Reading) else entry.reading(), alive=not closed)
        yield from _families(total)


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
    build = GaugeMetricFamily("tracker_build_info", "1, with the version.", labels=["version"])
    build.add_metric([_version()], 1)
    yield build


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
    found = {name: getattr(numbers, name) for name in names}
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
