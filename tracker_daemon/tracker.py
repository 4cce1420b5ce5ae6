"""The tracker: builds and wires the parts, and offers them to a chat server."""

from __future__ import annotations

import os
import threading
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

from prometheus_client.registry import REGISTRY

from tracker_daemon import exits, host
from tracker_daemon.backlog import Backlog
from tracker_daemon.books import TrackerStats
from tracker_daemon.clock import SystemClock
from tracker_daemon.collector import Account, collector_of
from tracker_daemon.errors import FlushTimeout, TrackerClosed, TrackerError
from tracker_daemon.flush_numbers import FlushNumbers
from tracker_daemon.flusher import Flusher
from tracker_daemon.front_door import FrontDoor, Refusals
from tracker_daemon.journal.journal import Journal
from tracker_daemon.settings import Overflow, Settings
from tracker_daemon.settings import timeout as checked_timeout
from tracker_daemon.sinks import sink_factory
from tracker_daemon.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from concurrent.futures import Future

    from prometheus_client.registry import CollectorRegistry
    from psycopg_pool import AsyncConnectionPool

    from tracker_daemon.books import DrainReport
    from tracker_daemon.clock import Clock
    from tracker_daemon.delta import ThreadDelta
    from tracker_daemon.readings import Reading
    from tracker_daemon.sink import Sink

# How much longer than its deadline a caller of `close` waits for the worker's answer, seconds.
_GRACE = 1.0

# What a fork's child must not touch nor let a destructor touch: connections and loops that are the parent's.
_inherited: list[object] = []


@final
class Tracker(FrontDoor):
    """Write-behind tracking of conversations: calls in, sums in Postgres, exactly once.

    Nothing starts here or at import: the worker, one daemon thread with a loop and connections of its own, starts
    with the first call or with `with`.

    Args:
        sink: a URL or conninfo (`postgresql:`, `embedded:DIR`), the server's own `psycopg_pool.AsyncConnectionPool`
            (its conninfo, `kwargs` and `configure` are used, its connections are left alone), or a `Sink`.
        flush_interval: the window, seconds.
        max_batch_size: threads in one transaction, at most 100,000.
        max_queue_size: calls taken and not yet coalesced.
        max_pending: distinct threads with uncommitted change held in memory.
        overflow: at a bound or when closed, `"drop"` returns `False`, `"raise"` raises.
        create_missing: whether a turn whose thread has no row creates it; else it changes nothing and is counted.
        journal: a directory, for this tracker alone: an accepted call then survives the death of the process, and, once
            it is on the disk, a loss of power. The next tracker with it applies what is left.
        journal_sync: seconds between two fsyncs of the journal; 0: each window before its flush.
        journal_retain: how long an applied window is kept for a database that forgets commits, seconds.
        journal_quota: bytes the journal may take; beyond it calls go to memory alone.
        lanes: connections, at most 32, that flush disjoint threads at the same time; Postgres alone.
        table: of conversations, may be schema-qualified; unquoted names fold to lower case.
        shutdown_timeout: how long `close` drains, seconds.
        registry: a Prometheus registry; the global one if `None`.
        on_error: called in the worker's thread with every error of the sink; must not block.

    Raises:
        ConfigError: a value is wrong; the message names it.
        JournalError: another process uses the journal (the message names its pid), or it cannot be written.
    """

    _clock: Clock = SystemClock()
    _worker: Worker

    def __init__(
        self,
        sink: str | AsyncConnectionPool[Any] | Sink,
        *,
        flush_interval: float = 0.25,
        max_batch_size: int = 10_000,
        max_queue_size: int = 100_000,
        max_pending: int = 1_000_000,
        overflow: Overflow = "drop",
        create_missing: bool = True,
        journal: str | os.PathLike[str] | None = None,
        journal_sync: float = 0.1,
        journal_retain: float = 600.0,
        journal_quota: int = 1 << 30,
        lanes: int = 1,
        table: str = "conversations",
        shutdown_timeout: float = 10.0,
        registry: CollectorRegistry | None = None,
        on_error: Callable[[BaseException], object] | None = None,
    ) -> None:
        self._settings = Settings(
            flush_interval=flush_interval,
            max_batch_size=max_batch_size,
            max_queue_size=max_queue_size,
            max_pending=max_pending,
            overflow=overflow,
            create_missing=create_missing,
            lanes=lanes,
            table=table,
            shutdown_timeout=shutdown_timeout,
            registry=REGISTRY if registry is None else registry,
            on_error=on_error,
            journal=journal,
            journal_sync=journal_sync,
            journal_retain=journal_retain,
            journal_quota=journal_quota,
        )
        self._make_sink = sink_factory(sink, self._settings)
        self._raise = overflow == "raise"
        self._agents = {None: None}
        self._account = Account(self)
        self._begin()
        exits.know(self)
        self._collector = collector_of(self._settings.registry)
        self._collector.add(self._account)

    def _begin(self, *, forked: bool = False) -> None:
        """Start a life: empty, with an identity of its own."""
        settings = self._settings
        journal = self._make_journal(forked=forked)
        refusals, numbers = Refusals(self._clock), FlushNumbers()
        backlog = Backlog(
            max_queue_size=settings.max_queue_size,
            max_pending=settings.max_pending,
            max_batch_size=settings.max_batch_size,
            create_missing=settings.create_missing,
            journal=journal,
        )
        make_flusher = self._make_flusher(backlog, numbers, journal)
        worker = Worker(backlog, make_flusher, self._clock, settings.flush_interval, self._on_start, journal)
        pid = os.getpid()
        # From here to the last of them nothing is called: a signal handler in a fork's child finds the parent's life
        # whole, and begins one, or finds this one.
        if forked and self._pid == pid:
            return
        self._journal, self._backlog, self._worker = journal, backlog, worker
        self._refusals, self._numbers = refusals, numbers
        self._last_error: BaseException | None = None
        self._pid = pid
        self._account.begin(backlog, refusals, numbers, journal)

    def _make_flusher(self, backlog: Backlog, numbers: FlushNumbers, journal: Journal | None) -> Callable[[], Flusher]:
        sink, clock, on_error = self._make_sink, self._clock, self._settings.on_error
        return lambda: Flusher(backlog, sink(), clock, numbers, on_error, journal)

    def _make_journal(self, *, forked: bool) -> Journal | None:
        settings = self._settings
        if settings.journal is None:
            return None
        return Journal(
            Path(settings.journal),
            sync_interval=settings.journal_sync,
            retain=settings.journal_retain,
            quota=settings.journal_quota,
            max_batch_size=settings.max_batch_size,
            create_missing=settings.create_missing,
            forked=forked,
        )

    # -- the barrier -------------------------------------------------------------------------------

    def flush(self, timeout: float | None = None) -> None:
        """Return when every call accepted before is applied or dead-lettered, however many follow meanwhile.

        Args:
            timeout: seconds; `None` waits for as long as it takes.

        Raises:
            FlushTimeout: not in time; nothing is lost by that. Its `__cause__` is the sink's last error, if any.
        """
        self._not_in_worker("flush")
        seconds, began = checked_timeout(timeout, None), self._clock.monotonic()
        barrier = self._barrier()
        try:
            kept = host.result(barrier, seconds)
        except TimeoutError:
            kept = False
        finally:
            self._worker.leave(barrier)
        if not kept:
            raise self._flush_timeout(began) from self._error

    async def aflush(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - the contract's signature
        """Await what `flush` waits for, on asyncio or trio. Cancelling it cancels the waiting alone."""
        seconds, began = checked_timeout(timeout, None), self._clock.monotonic()
        barrier = self._barrier()
        try:
            kept = await host.wait_done(barrier, seconds) and barrier.result()
        finally:
            self._worker.leave(barrier)
        if not kept:
            raise self._flush_timeout(began) from self._error

    def _barrier(self) -> Future[bool]:
        if os.getpid() != self._pid:
            self._after_fork()
        return self._worker.barrier()

    def _flush_timeout(self, began: float) -> FlushTimeout:
        error, waited = self._error, round(self._clock.monotonic() - began, 3)
        return FlushTimeout(waited, self._backlog.books().queue_calls, str(error) if error else "")

    @property
    def _error(self) -> BaseException | None:
        error = self._numbers.last_error
        return self._last_error if error is None else error

    def _not_in_worker(self, name: str) -> None:
        if threading.get_ident() == self._worker.ident:
            raise TrackerError(
                f"{name}() was called in the worker's own thread (from on_error?): it would wait for itself"
            )

    # -- the end -----------------------------------------------------------------------------------

    def close(self, timeout: float | None = None) -> DrainReport:
        """Stop accepting, drain, and say what became of the calls that were pending.

        Idempotent: a further call returns the same report, and an earlier deadline cuts the drain short.

        Args:
            timeout: seconds; `shutdown_timeout` if `None`. Calls still pending then are lost and counted.
        """
        self._not_in_worker("close")
        seconds = self._close_seconds(timeout)
        finished = self._stop(seconds)
        try:
            report: DrainReport = host.result(finished, seconds + _GRACE)
        except TimeoutError:
            report = self._worker.give_up()
        self._retire()
        return report

    async def aclose(self, timeout: float | None = None) -> DrainReport:  # noqa: ASYNC109 - the contract's signature
        """Await what `close` waits for, on asyncio or trio; a cancellation takes effect when it is done."""
        seconds = self._close_seconds(timeout)
        finished = self._stop(seconds)
        try:
            done = await host.wait_shielded(finished, seconds + _GRACE)
        finally:
            if not finished.done():
                self._worker.give_up()
            self._retire()
        return finished.result() if done else self._worker.give_up()

    def _close_seconds(self, timeout: float | None) -> float:
        seconds = checked_timeout(timeout, self._settings.shutdown_timeout)
        return self._settings.shutdown_timeout if seconds is None else seconds

    def _stop(self, seconds: float) -> Future[DrainReport]:
        if os.getpid() != self._pid:
            self._after_fork()
        return self._worker.stop(seconds)

    def _start(self) -> None:
        if self.closed:
            raise TrackerClosed
        self._worker.wake()

    def _on_start(self) -> None:
        exits.watch(self)
        self._collector.start(self._account)

    def _retire(self) -> None:
        exits.forget(self)
        # The account outlives the tracker, and an error's traceback leads back to whoever it came by.
        self._last_error = self._error
        self._numbers.last_error = None
        self._collector.retire(self._account)

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        self._start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:  # noqa: ARG002 - the ASGI framework hands it in
        """Run the tracker for as long as an ASGI application: `FastAPI(lifespan=tracker.lifespan)`.

        Under uvicorn it is the way to a complete drain: SIGTERM there never runs `atexit`.
        """
        async with self:
            yield

    # -- looking in --------------------------------------------------------------------------------

    def pending(self, thread_id: str) -> ThreadDelta | None:
        """Return what is not yet committed of *thread_id*, or `None`: database row + pending = the true total.

        A batch that was committed and whose answer was lost counts in both until the next try has found it.
        """
        if os.getpid() != self._pid:
            self._after_fork()
        return self._backlog.pending(thread_id)

    def stats(self) -> TrackerStats:
        """Return the counts of this instant, in calls."""
        reading = self.reading()
        books = reading.books
        return TrackerStats(
            accepted=sum(books.accepted.values()),
            applied=sum(books.applied.values()),
            dead_lettered=sum(books.dead_lettered.values()),
            lost=sum(books.lost.values()),
            pending=books.queue_calls,
            rejected=sum(reading.rejected.values()),
            rows_skipped=books.rows_skipped,
        )

    def reading(self) -> Reading:
        """Return all numbers of this instant; the metrics' source."""
        if os.getpid() != self._pid:
            self._after_fork()
        if self._worker.finished.done():
            self._backlog.abandon("closed")  # a call that overlapped with the very end of `close`
        return self._account.reading()

    @property
    def closed(self) -> bool:
        """Whether calls are refused because `close` was called."""
        return self._worker.closed and self._pid == os.getpid()

    @property
    def create_missing(self) -> bool:
        """Whether a turn whose thread has no row creates it."""
        return self._settings.create_missing

    @property
    def journal(self) -> Journal | None:
        """Where accepted calls are written as well, or `None`; for looking at."""
        return self._journal

    def count_rejected(self, reason: str, calls: int) -> None:
        """Count calls as rejected that whoever takes them in has refused for *reason*."""
        self._refusals.add(reason, calls)

    @property
    def backlog(self) -> Backlog:
        """What was accepted and is not settled; for looking at."""
        return self._backlog

    def __repr__(self) -> str:
        state = "closed" if self._worker.closed else "running" if self._worker.started else "not started"
        return f"<Tracker {self._backlog.producer} {state}>"

    # -- told by the process -----------------------------------------------------------------------

    def at_exit(self) -> None:
        """The process ends: drain."""
        self._stop(self._settings.shutdown_timeout)
        self._worker.run_here()
        self.close()

    def before_fork(self) -> None:
        """The process is about to fork: until that is done every call asks in which process it is."""
        self._backlog.shut_for_fork()

    def after_fork(self) -> None:
        """It has, and this is the parent."""
        self._worker.after_fork()

    def at_fork(self) -> None:
        """This is a fork's child: the parent's calls are the parent's. Again: no effect."""
        if os.getpid() == self._pid:
            return  # a call was first: in a signal handler, a finalizer, or another's hook
        worker, backlog, journal = self._worker, self._backlog, self._journal
        _inherited.append((worker, backlog, journal))
        if journal is not None:
            journal.forget_fork()
        self._collector.after_fork()
        self._begin(forked=True)
        if worker.closed:
            self._worker.stop(0)

    def _after_fork(self) -> None:
        # A tracker not started yet, or a server that forks without Python's hooks.
        self.at_fork()
