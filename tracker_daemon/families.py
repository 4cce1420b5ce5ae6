"""A sum of numbers as Prometheus has them: every child is there from the first scrape."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from tracker_daemon.books import LOST_REASONS
from tracker_daemon.flush_numbers import SECONDS, FlushNumbers, Histogram
from tracker_daemon.front_door import REJECTED_REASONS
from tracker_daemon.generation import KINDS
from tracker_daemon.journal.directory import OPERATIONS
from tracker_daemon.sink import DEAD_REASONS, FAULT_KINDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tracker_daemon.readings import Sum

OUTCOMES = ("ok", "duplicate", "retry", "error")


def families(total: Sum) -> Iterator[Metric]:
    """Yield every family of *total*."""
    kinds = KINDS
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


def _journal_families(total: Sum) -> Iterator[Metric]:
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


def _histogram(name: str, text: str, total: Sum, key: str) -> HistogramMetricFamily:
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
