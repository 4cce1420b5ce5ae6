"""`tracker-daemon bench`: write-behind beside one statement a call, on the user's own database.

Rules:
1. Everything happens in a schema of its own, which is removed at the end, whatever ends it short of `kill -9`.
2. Both do the same work on the same threads, in turns; told are the rounds and the median of their ratios.
3. What both wrote is counted in the table at the end: a figure for calls that did not arrive would be worth nothing.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import statistics
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from random import Random
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

import anyio
import anyio.lowlevel
from prometheus_client import CollectorRegistry
from psycopg import sql
from psycopg_pool import AsyncConnectionPool

from tracker_daemon.conversation_trackers import PostgresConversationTracker
from tracker_daemon.errors import TrackerError
from tracker_daemon.operations import running_conninfo
from tracker_daemon.postgres import schema
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.session import Session
from tracker_daemon.tracker import Tracker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

_SETTINGS: Final = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers")
_TABLE: Final = "conversations"
_PATIENCE: Final = 60.0
_BURST: Final = 1_000
_ROUND_TRIPS: Final = 20


@dataclass(frozen=True, slots=True)
class Settings:
    """How it is measured.

    Attributes:
        seconds: of each round of each of the two.
        threads: distinct conversations.
        concurrency: calls under way at once where each is a statement: connections of the pool.
        rounds: how often both have their turn.
    """

    seconds: float
    threads: int
    concurrency: int
    rounds: int


@dataclass(frozen=True, slots=True)
class Round:
    """Calls made and committed, the seconds that took, and the median seconds that a caller waited for one."""

    calls: int
    seconds: float
    wait_s: float

    @property
    def rate(self) -> float:
        """Calls a second."""
        return self.calls / self.seconds


async def run(database: str, settings: Settings, say: Callable[[str], object]) -> int:
    """Compare, telling *say* line by line; return the exit status: 0, or 130 when a signal ended it."""
    # That a queue is full is what happens here, and waited for.
    logging.getLogger("tracker_daemon").setLevel(logging.CRITICAL)
    fault: Exception | None = None
    ended = False
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_until_signalled, tasks.cancel_scope)
        try:
            async with running_conninfo(database) as conninfo, _tables(conninfo, say) as session:
                await _compare(conninfo, session, settings, say)
            ended = True
        except* Exception as errors:
            fault = _first(errors)  # of one part that failed, not of the group around it
        tasks.cancel_scope.cancel()
    if fault is not None:
        raise fault
    if not ended:
        say("ended by a signal; the tables are removed")
        return 130
    return 0


def _first(errors: ExceptionGroup[Exception]) -> Exception:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, ExceptionGroup) else first


async def _until_signalled(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()
            return


@asynccontextmanager
async def _tables(conninfo: str, say: Callable[[str], object]) -> AsyncIterator[Session]:
    """Make the tables in a schema of their own, and remove it at the end."""
    name = f"tracker_bench_{uuid4().hex[:12]}"
    drop = sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(name))
    try:
        async with await Connector(conninfo).connect() as connection:
            await schema.migrate(connection, name, _TABLE)
        session = await Session.open(Connector(conninfo), (name, _TABLE), timeout=_PATIENCE)
        try:
            say(await _about(session))
            say(f"in the schema {name}, which is removed at the end\n")
            yield session
        finally:
            await session.close()
    finally:
        # Over a new connection: what was under way on the other may have been cut off in the middle.
        with anyio.CancelScope(shield=True), anyio.fail_after(_PATIENCE):
            async with await Connector(conninfo).connect() as connection:
                await connection.execute(drop)


async def _about(session: Session) -> str:
    """Say what is measured with, and how far away the database is."""
    found = []
    for name in _SETTINGS:
        cursor = session.cursor()
        await cursor.execute(sql.SQL("SHOW {}").format(sql.Identifier(name)), prepare=False)
        row = await cursor.fetchone()
        found.append(f"{name}={row[0] if row else '?'}")
    taken = []
    for _ in range(_ROUND_TRIPS):
        began = time.perf_counter()
        await session.connection.execute("SELECT 1", prepare=False)
        taken.append(time.perf_counter() - began)
    pooled = ", through a pooler" if session.pooled else ""
    return (
        f"tracker-daemon {version('tracker-daemon')}, psycopg {version('psycopg')}, "
        f"Python {platform.python_version()}, {os.cpu_count()} cores here\n"
        f"PostgreSQL {', '.join(found)}, a round trip of {statistics.median(taken) * 1e3:.2f} ms{pooled}"
    )


async def _compare(conninfo: str, session: Session, settings: Settings, say: Callable[[str], object]) -> None:
    random = Random(1)  # noqa: S311 - ids like a server's, the same ones each time
    ids = [str(UUID(int=random.getrandbits(128), version=4)) for _ in range(settings.threads)]
    table = f"{session.statements.schema}.{_TABLE}"
    async with _tracker(conninfo, table) as tracker:
        for start in range(0, len(ids), _BURST):
            for thread_id in ids[start : start + _BURST]:
                tracker.ensure_conversation(thread_id)
            await tracker.aflush(_PATIENCE)
    await session.connection.execute(sql.SQL("ANALYZE {table}").format(**session.statements.names))
    say(f"{'':12}{'one statement a call':>24}{'write-behind':>20}{'':>10}")
    made, ratios, waits = 0, [], []
    for number in range(1, settings.rounds + 1):
        direct = await _write_through(conninfo, session, table, ids, settings)
        behind = await _write_behind(conninfo, table, ids, settings)
        made += direct.calls + behind.calls
        ratios.append(behind.rate / direct.rate)
        waits.append((direct.wait_s, behind.wait_s))
        say(f"round {number:<6}{direct.rate:>15,.0f} calls/s{behind.rate:>11,.0f} calls/s{ratios[-1]:>9,.1f}x")
    waited = [statistics.median(each) for each in zip(*waits, strict=True)]
    say(f"a call takes{waited[0] * 1e6:>21,.1f} µs{waited[1] * 1e6:>17,.2f} µs")
    await _check(session, made)
    say(f"\nwrite-behind commits {statistics.median(ratios):,.1f} times as many calls a second")
    threads, size = settings.threads, settings.concurrency
    say(f"{threads:,} threads; connections: {size} for one statement a call, 1 for write-behind")
    say(f"all {made:,} turns are in the table")


async def _check(session: Session, made: int) -> None:
    cursor = session.cursor()
    statement = sql.SQL("SELECT sum(turn_count)::bigint FROM {table}").format(**session.statements.names)
    await cursor.execute(statement, prepare=False)
    row = await cursor.fetchone()
    if row is None or row[0] != made:
        raise TrackerError(f"{made:,} turns were made, {row[0] if row else 0:,} are in the table: no figure holds")


def _tracker(conninfo: str, table: str) -> Tracker:
    return Tracker(conninfo, table=table, registry=CollectorRegistry(), overflow="drop")


async def _write_through(conninfo: str, session: Session, table: str, ids: list[str], settings: Settings) -> Round:
    """One statement a call, *concurrency* of them under way at once."""
    kwargs: dict[str, Any] = {"prepare_threshold": None} if session.pooled else {}
    size, direct, waits = settings.concurrency, PostgresConversationTracker(table), list[float]()
    async with AsyncConnectionPool(
        conninfo, min_size=size, max_size=size, kwargs=kwargs, open=False, timeout=_PATIENCE
    ) as pool:
        await pool.wait(_PATIENCE)
        began = time.perf_counter()

        async def work(part: int) -> None:
            random = Random(part)  # noqa: S311
            while (before := time.perf_counter()) < began + settings.seconds:
                await direct.record_turn(pool, random.choice(ids), "billing", 812, 0.0041)
                waits.append(time.perf_counter() - before)

        async with anyio.create_task_group() as tasks:
            for part in range(size):
                tasks.start_soon(work, part)
        return Round(len(waits), time.perf_counter() - began, statistics.median(waits))


async def _write_behind(conninfo: str, table: str, ids: list[str], settings: Settings) -> Round:
    """As fast as calls are taken; counted until all of them are committed."""
    async with _tracker(conninfo, table) as tracker:
        await tracker.aflush(_PATIENCE)
        chosen = Random(0).choices(ids, k=_BURST * 16)  # noqa: S311
        record, calls, waits = tracker.record_turn, 0, list[float]()
        began = time.perf_counter()
        while (before := time.perf_counter()) < began + settings.seconds:
            start = calls % len(chosen)
            for thread_id in chosen[start : start + _BURST]:
                if not record(thread_id, "billing", 812, 0.0041):
                    break
                calls += 1
            else:
                waits.append((time.perf_counter() - before) / _BURST)
                await anyio.lowlevel.checkpoint()
                continue
            await anyio.sleep(0.001)  # full: the database is slower than the calls come
        await tracker.aflush(settings.seconds + _PATIENCE)
        return Round(calls, time.perf_counter() - began, statistics.median(waits or [0.0]))
