"""The demo from start to verdict.

Rules:
1. The server, its directory and whatever is in it are gone at the end, however the demo ends.
2. The first signal ends the traffic early; what was called is still drained, compared and reported. A second one,
   or one before the traffic began, ends everything at once.
3. The server is as durable as in production: fsync and synchronous_commit stay on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from tracker_daemon import Tracker
from tracker_daemon.demo.screen import Figure, Progress, Report, Screen, screen
from tracker_daemon.demo.screen import milliseconds as ms
from tracker_daemon.demo.traffic import CONNECTIONS, TASKS, THREADS, Traffic, WrittenThrough, write_through
from tracker_daemon.demo.verdict import Comparison, compare
from tracker_daemon.embedded import EmbeddedPostgres
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.schema import migrate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import AsyncConnection

    from tracker_daemon.demo.count import Counted

SECONDS: Final = 10.0
RATE: Final = 20_000.0
CONVERSATIONS: Final = 5_000

_TABLE: Final = "conversations"
_BASELINE_SCHEMA: Final = "one_statement_a_call"
_BASELINE_CALLS: Final = 2_000
_BASELINE_SECONDS: Final = 2.0
_LOOK: Final = 0.05  # seconds between two looks at the queue


def run(
    *,
    seconds: float = SECONDS,
    rate: float = RATE,
    threads: int = CONVERSATIONS,
    tamper: Callable[[str], object] | None = None,
) -> int:
    """Run the demo; return the exit status: 0 only if every row is exact and no call was refused or lost.

    Args:
        seconds: how long the traffic lasts.
        rate: calls a second.
        threads: distinct conversations.
        tamper: called with the conninfo before the table is compared: to see the comparison fail.
    """
    with screen() as shown, _Signals() as signals, _directory() as directory:
        shown.head(f"tracker-daemon {version('tracker-daemon')} demo")
        shown.say("starting PostgreSQL in a temporary directory")
        server = EmbeddedPostgres(directory / "postgres")
        try:
            demo = _Demo(server.start(), shown, signals, seconds=seconds, rate=rate, threads=threads)
            try:
                report = asyncio.run(demo.run(tamper))
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None
            signals.ignore()
            shown.report(report)
        finally:
            server.stop("immediate")  # nobody reads it again: it need not write a checkpoint
    return 0 if report.exact else 1


@contextmanager
def _directory() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="tracker-demo-"))
    try:
        directory.chmod(0o711)  # as root the server runs as another user, who must get through
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class _Signals:
    """What SIGINT, SIGTERM and SIGHUP do, step by step: end the traffic, end the demo, nothing (it is cleaning up)."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._next = self._end_demo
        self._cancel: Callable[[], object] | None = None

    @contextmanager
    def cancelling(self) -> Iterator[None]:
        """Have the end of the demo cancel the task that runs now: an exception would hit any task of the loop."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        self._cancel = partial(loop.call_soon_threadsafe, task.cancel)
        try:
            yield
        finally:
            self._cancel = None

    def traffic_begins(self) -> None:
        """From now on, the first signal ends the traffic only."""
        self._next = self._end_traffic

    def ignore(self) -> None:
        """From now on, the end must not be disturbed."""
        self._next = self._nothing

    def _end_traffic(self) -> None:
        self._next = self._end_demo
        self.stop.set()

    def _end_demo(self) -> None:
        self._next = self._nothing
        self.stop.set()
        logging.disable()  # connections that are cut off are no news
        if self._cancel is None:
            raise KeyboardInterrupt
        self._cancel()

    def _nothing(self) -> None:
        pass

    def __enter__(self) -> Self:
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                self._before[number] = signal.signal(number, lambda *_: self._next())
        return self

    def __exit__(self, *_: object) -> None:
        logging.disable(logging.NOTSET)
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass(frozen=True, slots=True)
class _Look:
    at: float
    calls: int
    rows: int


class _Demo:
    """One run on a server that is up."""

    def __init__(
        self, conninfo: str, shown: Screen, signals: _Signals, *, seconds: float, rate: float, threads: int
    ) -> None:
        self._conninfo, self._screen, self._signals = conninfo, shown, signals
        self._stop = signals.stop
        self._seconds, self._rate, self._threads = seconds, rate, threads
        self._tracker = Tracker(conninfo, table=_TABLE)
        self._phase = "chat traffic"
        self._started = self._traffic_seconds = 0.0
        self._peak_threads = self._peak_calls = 0
        self._looks: deque[_Look] = deque(maxlen=int(1 / _LOOK) + 1)

    async def run(self, tamper: Callable[[str], object] | None) -> Report:
        with self._signals.cancelling():
            return await self._run(tamper)

    async def _run(self, tamper: Callable[[str], object] | None) -> Report:
        async with await Connector(self._conninfo).connect() as connection:
            server, client = await _settings(connection)
            await migrate(connection, None, _TABLE)
            await migrate(connection, _BASELINE_SCHEMA, _TABLE)
            self._screen.say(server)
            self._screen.say(client)
            pace = f"chat traffic for {self._seconds:g} s at {self._rate:,.0f} calls a second"
            self._screen.say(f"{pace}; Ctrl-C ends it early")
            self._signals.traffic_begins()
            traffic = await self._drive()
            if tamper is not None:
                await asyncio.to_thread(tamper, self._conninfo)
            self._show(f"comparing {len(traffic.counted):,} rows")
            comparison = await compare(connection, _TABLE, traffic.counted)
        self._show("measuring one statement a call")
        through = await write_through(
            self._conninfo,
            f"{_BASELINE_SCHEMA}.{_TABLE}",
            self._threads,
            calls=_BASELINE_CALLS,
            seconds=_BASELINE_SECONDS,
        )
        return self._report(traffic, comparison, through)

    async def _drive(self) -> Traffic:
        """Drive the traffic until it is to stop, and drain."""
        traffic = Traffic(self._tracker, self._threads, self._rate)
        async with self._tracker, asyncio.TaskGroup() as group:
            self._started = time.monotonic()
            watching = group.create_task(self._watch())
            await traffic.run(self._stop)
            self._traffic_seconds = time.monotonic() - self._started
            self._phase = "draining"
            await self._tracker.aclose()
            watching.cancel()
        return traffic

    async def _watch(self) -> None:
        """Look at the tracker twenty times a second, show what is seen, and end the traffic when its time is up."""
        show_at = self._started
        try:
            while True:
                now = time.monotonic()
                self._look(now)
                if now >= show_at:
                    self._show(self._phase)
                    show_at = now + self._screen.every
                if now - self._started >= self._seconds:
                    self._stop.set()
                await asyncio.sleep(_LOOK)
        finally:
            self._stop.set()  # the threads must not outlive the tasks

    def _look(self, now: float) -> None:
        reading = self._tracker.reading()
        books = reading.books
        self._peak_threads = max(self._peak_threads, books.threads)
        self._peak_calls = max(self._peak_calls, books.queue_calls)
        self._looks.append(_Look(now, sum(books.accepted.values()), int(reading.numbers.flush_rows.total)))

    def _show(self, phase: str) -> None:
        self._look(time.monotonic())
        reading = self._tracker.reading()
        numbers = reading.numbers
        first, last = self._looks[0], self._looks[-1]
        passed = (last.at - first.at) or 1.0
        self._screen.show(
            Progress(
                phase=phase,
                elapsed=self._traffic_seconds or last.at - self._started,
                seconds=self._seconds,
                calls=last.calls,
                calls_rate=(last.calls - first.calls) / passed,
                waiting_calls=reading.books.queue_calls,
                waiting_threads=reading.books.threads,
                rows=last.rows,
                rows_rate=(last.rows - first.rows) / passed,
                flushes=numbers.flushes.total(),
                recent=tuple(numbers.flush_seconds.recent.copy()),
                p50=numbers.flush_seconds.quantile(0.5),
                p99=numbers.flush_seconds.quantile(0.99),
            )
        )

    def _check_books(self, counted: dict[str, Counted], refused: int, comparison: Comparison) -> None:
        """Compare the tracker's own numbers with the count."""
        stats = self._tracker.stats()
        expected = {
            "accepted": sum(each.calls for each in counted.values()),
            "applied": sum(each.calls for each in counted.values()),
            "dead_lettered": 0,
            "lost": 0,
            "pending": 0,
            "rejected": refused,
        }
        for name, value in expected.items():
            if getattr(stats, name) != value:
                comparison.add(f"the tracker's own stats: {name} is {getattr(stats, name):,}, counted {value:,}")

    def _report(self, traffic: Traffic, comparison: Comparison, through: WrittenThrough) -> Report:
        counted = traffic.counted
        self._check_books(counted, traffic.refused, comparison)
        lost = self._tracker.stats().lost
        faults = {"NOT EXACT": comparison.differences, "CALLS LOST": lost, "CALLS REFUSED": traffic.refused}
        headline = f"{comparison.rows:,} rows, every column: {comparison.differences:,} differences"
        return Report(
            exact=not any(faults.values()),
            verdict=next((word for word, number in faults.items() if number), "EXACT"),
            headline=f"{headline}; {traffic.refused + lost:,} calls refused or lost",
            differences=comparison.named,
            more=comparison.differences - len(comparison.named),
            sections=[
                ("Written behind", self._written_behind(counted, traffic.refused)),
                ("The same calls, one statement each", _written_through(counted, through)),
            ],
        )

    def _written_behind(self, counted: dict[str, Counted], refused: int) -> list[Figure]:
        stats = self._tracker.stats()
        numbers = self._tracker.reading().numbers
        rows, flushes = int(numbers.flush_rows.total), numbers.flushes["ok"] + numbers.flushes["duplicate"]
        calls = sum(each.calls for each in counted.values())
        p50, p99 = (ms(numbers.flush_seconds.quantile(share)) for share in (0.5, 0.99))
        who = f"in {self._traffic_seconds:.1f} s by {TASKS} asyncio tasks, {THREADS} threads"
        return [
            Figure("calls made", f"{calls + refused:,}", who),
            Figure("calls refused", f"{refused:,}"),
            Figure("calls lost", f"{stats.lost:,}"),
            Figure("rows written", f"{rows:,}", f"in {flushes:,} transactions"),
            Figure("calls per row written", f"{calls / rows:.1f}" if rows else "none"),
            Figure("flush p50", p50),
            Figure("flush p99", p99),
            Figure("peak queue depth", f"{self._peak_threads:,}", f"threads, {self._peak_calls:,} calls"),
        ]


def _written_through(counted: dict[str, Counted], through: WrittenThrough) -> list[Figure]:
    """Say what the same calls would have cost, and which of it is measured."""
    calls = sum(each.calls for each in counted.values())
    # An `ensure_conversation` writes the row once, every turn and every resolve a new version of it.
    versions = len(counted) + sum(each.turns + each.resolves for each in counted.values())
    return [
        Figure(
            "measured",
            f"{through.rate:,.0f}/s",
            f"{through.calls:,} calls, {CONNECTIONS} connections, {ms(through.median)} each",
        ),
        Figure("extrapolated", f"{calls / through.rate:,.0f} s", f"for all {calls:,} calls at that pace"),
        Figure("round trips", f"{calls:,}", "a call each, and as many commits"),
        Figure("row versions", f"{versions:,}", "a new thread, a turn, a resolve: one each"),
    ]


async def _settings(connection: AsyncConnection[Any]) -> tuple[str, str]:
    """Return what the figures depend on: the server's version and durability, the client's versions and machine."""
    values = []
    for name in ("server_version", "fsync", "synchronous_commit"):
        cursor = await connection.execute("SELECT current_setting(%s)", [name])
        row = await cursor.fetchone()
        values.append(row[0] if row else "unknown")
    postgres, fsync, commit = values
    python, driver, cores = platform.python_version(), version("psycopg"), os.cpu_count()
    return (
        f"PostgreSQL {postgres.split()[0]}, fsync {fsync}, synchronous_commit {commit}",
        f"Python {python}, psycopg {driver}, {cores} cores",
    )
