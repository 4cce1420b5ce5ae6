"""The last minutes in samples, for the status page; and `GET /status.json`, the document that carries them.

Rules:
1. Pure: no clock and no I/O; time is handed in.
2. A sample is the difference of two readings, so the first reading gives none.
3. A counter that went back was started again, and counts from 0 (as Prometheus' `rate` has it).
4. Instants grow along the samples. When the wall clock goes back, the samples that would lie in its future are dropped.

`GET /` is `page/index.html`, and `/page/NAME` the files beside it. Everything works under
`Content-Security-Policy: default-src 'self'; style-src 'self'; script-src 'self'`.

`GET /status.json[?since=AT]` answers 200 with a `Status`, whatever the state is, and `Cache-Control: no-store`. *AT* is
`history.at[-1]` of the answer before, as it was printed; what is no number counts as not given.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tracker_daemon.flush_numbers import Histogram
    from tracker_daemon.readings import Reading


class Columns(TypedDict):
    """Samples, a list a field, all of one length, oldest first; `null` where nothing was observed."""

    interval: float
    """Seconds between two samples, as meant."""
    since: float | None
    """These samples follow the one of this instant; `null`: this is all there is, what was known before is void."""
    at: list[float]
    """Seconds since 1970, growing."""
    accepted: list[float]
    """Calls a second, as are `applied`."""
    applied: list[float]
    queue_threads: list[int]
    """Threads with uncommitted change."""
    queue_calls: list[int]
    """Calls accepted and not settled."""
    flush_p50: list[float | None]
    """Seconds, as are the other quantiles."""
    flush_p99: list[float | None]
    commit_lag_p99: list[float | None]


class Totals(TypedDict):
    """Calls since the start, of one reading: accepted = applied + dead_lettered + lost + pending."""

    accepted: int
    applied: int
    dead_lettered: int
    lost: int
    rejected: int
    pending: int


class Ledger(TypedDict):
    """Where this daemon's own producer stands."""

    producer: str
    epoch: int
    sequence: int
    """The highest that was applied."""
    relayed: int
    """Batches of clients that were applied; each has moved a row of its client's own."""
    regressions: int
    fenced: bool


class Journal(TypedDict):
    """The journal, as it is on the disk."""

    directory: str
    bytes: int
    segments: int
    degraded: bool
    """Accepted calls are held in memory only, because writing failed."""


class StreamPartition(TypedDict):
    """A partition of the stream."""

    partition: int
    owned: bool
    """Read by this consumer; else the rest is 0."""
    position: int
    """The last message that is applied."""
    lag: int
    """Messages behind it."""
    bytes: int
    """In the log, of which `max_bytes` may be."""
    max_bytes: int
    fault: str
    """Why it does not go on; empty if it does."""


Error = TypedDict("Error", {"at": float, "class": str, "text": str})
"""An error of the sink or the journal: seconds since 1970; its class as in `tracker_database_errors_total`; what it
said, cut at some hundred characters. It comes from outside and may hold anything but credentials."""

Setting: TypeAlias = "str | int | float | bool | list[str] | None"


class General(TypedDict):
    """What `Status` has of a daemon and of a consumer alike."""

    version: str
    now: float
    """Seconds since 1970, as is `started_at`."""
    started_at: float
    state: Literal["ready", "not_ready", "draining"]
    reason: str | None
    """Why it is not ready, in the words of `/readyz`; `null` when ready."""
    history: Columns
    totals: Totals
    queue_limit: int
    """Threads with uncommitted change that may be held."""
    errors: list[Error]
    """Newest first, at most 50. Equal ones are shown as one."""
    config: dict[str, Setting]
    """By name of the option. No secret gets here: the page shows all of it."""


class Status(General):
    """What `GET /status.json` answers."""

    ledger: Ledger
    journal: Journal | None
    clients: int
    """Connections that are open now."""
    stream: list[StreamPartition] | None
    """Of a consumer, its stream's partitions; the ledger is then of no one, and there is no journal."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one interval was like; fields and units as in `Columns`."""

    at: float
    accepted: float
    applied: float
    queue_threads: int
    queue_calls: int
    flush_p50: float | None
    flush_p99: float | None
    commit_lag_p99: float | None


@dataclass(frozen=True, slots=True)
class _Base:
    """The numbers that the next reading is compared with, copied: a `Reading` holds some that go on changing."""

    monotonic: float
    accepted: Mapping[str, int]
    applied: Mapping[str, int]
    flush_seconds: Sequence[int]
    commit_lag_seconds: Sequence[int]


class History:
    """The last samples.

    Args:
        interval: seconds between two readings, as meant; rates are taken over the time that really passed.
        size: samples kept.
    """

    def __init__(self, *, interval: float = 1.0, size: int = 300) -> None:
        self.interval = interval
        self._samples: deque[Sample] = deque(maxlen=size)
        self._base: _Base | None = None

    def add(self, reading: Reading, *, at: float, monotonic: float) -> None:
        """Take a reading.

        Args:
            reading: all numbers of now.
            at: seconds since 1970, kept to the millisecond.
            monotonic: seconds of a clock that never goes back. A reading for which none passed is left out.
        """
        base, books, numbers = self._base, reading.books, reading.numbers
        if base is not None and monotonic <= base.monotonic:
            return
        self._base = new = _Base(
            monotonic,
            dict(books.accepted),
            dict(books.applied),
            tuple(numbers.flush_seconds.counts),
            tuple(numbers.commit_lag_seconds.counts),
        )
        if base is None:
            return
        at, passed = round(at, 3), monotonic - base.monotonic
        flush = _grown(base.flush_seconds, new.flush_seconds)
        lag = _grown(base.commit_lag_seconds, new.commit_lag_seconds)
        if self._samples and at <= self._samples[-1].at:
            self._samples.clear()
        self._samples.append(
            Sample(
                at=at,
                accepted=round(_calls(base.accepted, new.accepted) / passed, 3),
                applied=round(_calls(base.applied, new.applied) / passed, 3),
                queue_threads=books.threads,
                queue_calls=books.queue_calls,
                flush_p50=_latency(0.5, numbers.flush_seconds, flush),
                flush_p99=_latency(0.99, numbers.flush_seconds, flush),
                commit_lag_p99=_latency(0.99, numbers.commit_lag_seconds, lag),
            )
        )

    def columns(self, since: float | None = None) -> Columns:
        """Return the samples after the one at *since*, or all of them when there is none of that instant."""
        # By identity rather than by order: a page that outlived another daemon, a sleep or a change of the clock gets
        # everything, and knows it.
        found = next((i for i, sample in enumerate(self._samples, 1) if sample.at == since), None)
        samples = list(islice(self._samples, found or 0, None))
        return Columns(
            interval=self.interval,
            since=since if found else None,
            at=[each.at for each in samples],
            accepted=[each.accepted for each in samples],
            applied=[each.applied for each in samples],
            queue_threads=[each.queue_threads for each in samples],
            queue_calls=[each.queue_calls for each in samples],
            flush_p50=[each.flush_p50 for each in samples],
            flush_p99=[each.flush_p99 for each in samples],
            commit_lag_p99=[each.commit_lag_p99 for each in samples],
        )


def quantile(share: float, bounds: Sequence[float], counts: Sequence[int]) -> float | None:
    """Return the *share* quantile of observations counted by upper bound, `None` without any.

    Linear within a bucket, the first of which begins at 0; what lies above all bounds counts as the last bound.

    Shapes: (n,) bounds, growing and positive; (n + 1,) counts, each of its own bucket.
    Source: Prometheus, `histogram_quantile`.
    """
    total = sum(counts)
    if total == 0:
        return None
    rank, below, lower = share * total, 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and below + count >= rank:
            return lower + (bound - lower) * (rank - below) / count
        below, lower = below + count, bound
    return lower


def _latency(share: float, histogram: Histogram, counts: Sequence[int]) -> float | None:
    found = quantile(share, histogram.bounds, counts)
    return None if found is None else round(found, 6)


def _grown(old: Sequence[int], new: Sequence[int]) -> Sequence[int]:
    """Return what was added to counts that start again together."""
    if any(after < before for before, after in zip(old, new, strict=True)):
        return new
    return [after - before for before, after in zip(old, new, strict=True)]


def _calls(old: Mapping[str, int], new: Mapping[str, int]) -> int:
    """Return the calls added over all kinds."""
    kinds = old.keys() | new.keys()
    return sum(_grown([old.get(kind, 0) for kind in kinds], [new.get(kind, 0) for kind in kinds]))
