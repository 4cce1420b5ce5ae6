"""The demo from start to verdict.

Rules:
1. The server, its directory and whatever is in it are gone at the end, however the demo ends.
2. The first signal ends the traffic early; what was called is still drained, compared and reported. A second one,
   or one before the traffic began, ends everything at once.
3. The server is as durable as in production: fsync and synchronous_commit stay on.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import tempfile
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tracker_daemon import Tracker
from tracker_daemon.demo.driving import Driving
from tracker_daemon.demo.figures import Figure, Report
from tracker_daemon.demo.figures import milliseconds as ms
from tracker_daemon.demo.screen import screen
from tracker_daemon.demo.signals import Signals
from tracker_daemon.demo.traffic import CONNECTIONS, Traffic, WrittenThrough, write_through
from tracker_daemon.demo.verdict import Comparison, compare
from tracker_daemon.embedded import EmbeddedPostgres
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.schema import migrate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import AsyncConnection

    from tracker_daemon.demo.count import Counted
    from tracker_daemon.demo.screen import Screen

SECONDS: Final = 10.0
RATE: Final = 20_000.0
CONVERSATIONS: Final = 5_000

_TABLE: Final = "conversations"
_BASELINE_SCHEMA: Final = "one_statement_a_call"
_BASELINE_CALLS: Final = 2_000
_BASELINE_SECONDS: Final = 2.0


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
    with screen() as shown, Signals() as signals, _directory() as directory:
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


class _Demo:
    """One run on a server that is up."""

    def __init__(
        self, conninfo: str, shown: Screen, signals: Signals, *, seconds: float, rate: float, threads: int
    ) -> None:
        self._conninfo, self._screen, self._signals = conninfo, shown, signals
        self._seconds, self._rate, self._threads = seconds, rate, threads
        self._tracker = Tracker(conninfo, table=_TABLE)
        self._driving = Driving(self._tracker, shown, signals.stop, seconds=seconds, rate=rate, threads=threads)

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
            await self._driving.run()
            traffic = self._driving.traffic
            if tamper is not None:
                await asyncio.to_thread(tamper, self._conninfo)
            self._driving.show(f"comparing {len(traffic.counted):,} rows")
            comparison = await compare(connection, _TABLE, traffic.counted)
        self._driving.show("measuring one statement a call")
        through = await write_through(
            self._conninfo,
            f"{_BASELINE_SCHEMA}.{_TABLE}",
            self._threads,
            calls=_BASELINE_CALLS,
            seconds=_BASELINE_SECONDS,
        )
        return self._report(traffic, comparison, through)

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
                ("Written behind", self._driving.figures()),
                ("The same calls, one statement each", _written_through(counted, through)),
            ],
        )


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
