"""What the daemon is made of, and its state: a tracker for calls, a relay for trackers' batches, one database."""

from __future__ import annotations

import time
from collections import deque
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, Literal

import anyio

from tracker_daemon.applier import kind_of
from tracker_daemon.clock import SystemClock
from tracker_daemon.collector import TrackerCollector, collector_of
from tracker_daemon.daemon.admission import Admission, Shares
from tracker_daemon.daemon.history import Error, History, Journal, Ledger, Status, Totals
from tracker_daemon.daemon.refused import RefusedRequests
from tracker_daemon.errors import TrackerError
from tracker_daemon.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prometheus_client.registry import CollectorRegistry

    from tracker_daemon.books import DrainReport
    from tracker_daemon.daemon.bearer import Token
    from tracker_daemon.daemon.options import Options
    from tracker_daemon.daemon.relay import Relay
    from tracker_daemon.tracker import Tracker

State = Literal["ready", "not_ready", "draining"]
_SAMPLE: Final = 1.0
_PROBE: Final = 2.0
_TELL_AGAIN: Final = 300.0
_ERRORS: Final = 50
_TEXT: Final = 400


def shown(error: BaseException, options: Options | None) -> str:
    """Return an error as whoever asks may see it: libpq's words name hosts and users."""
    if options is None or all(address.is_loopback for address in options.listen):
        return " ".join(str(error).split())[:_TEXT]
    return f"the database cannot be written: {kind_of(error)}; the log has the words"


class Service:
    """The daemon's parts and its state.

    Args:
        options: the daemon's settings.
        tracker: takes calls that come as lines.
        relay: takes trackers' batches.
        token: what a client must bring, or `None`.
        registry: what `/metrics` shows; the tracker's.
        config: what the status page shows of the settings; no secrets.
        max_calls: in one request.
    """

    def __init__(
        self,
        options: Options,
        tracker: Tracker,
        relay: Relay,
        token: Token | None,
        registry: CollectorRegistry,
        config: Mapping[str, Any],
        max_calls: int,
    ) -> None:
        self.options, self.tracker, self.relay = options, tracker, relay
        self.token, self.registry, self.max_calls = token, registry, max_calls
        self.admission, self.shares = Admission(options.memory), Shares(tracker)
        self.refused = RefusedRequests(registry)
        self._config = dict(config)
        self._clock = SystemClock()
        self._history = History(interval=_SAMPLE)
        self._started_at = self._clock.wall()
        self._collector: TrackerCollector = collector_of(registry)
        self._collector.add(relay)
        relay.on_error = self.note
        self._errors: deque[Error] = deque(maxlen=_ERRORS)
        self._draining = False
        self.became_ready = anyio.Event()
        self._fault: str | None = "the database was not reached yet"

    # -- the state ---------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Whether it can accept and write."""
        if self._draining:
            return "draining"
        return "ready" if self.reason is None else "not_ready"

    @property
    def reason(self) -> str | None:
        """Why it is not ready, or `None`."""
        if self._draining:
            return "the daemon is shutting down"
        if self.tracker.closed:
            return "the tracker writes nothing more: see the log"
        return self._fault

    def note(self, error: BaseException) -> None:
        """Keep an error for the status page. Called from any thread."""
        text = self._shown(error)
        self._errors.appendleft({"at": round(time.time(), 3), "class": kind_of(error), "text": text})

    def count_malformed(self, calls: int) -> None:
        """Count calls that were malformed."""
        self.tracker.count_rejected("invalid", calls)

    # -- what runs beside the requests -------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.relay.run)
            tasks.start_soon(self._sample)
            tasks.start_soon(self._probe)

    async def _sample(self) -> None:
        while True:
            reading = await anyio.to_thread.run_sync(self._collector.reading)
            self._history.add(reading, at=self._clock.wall(), monotonic=self._clock.monotonic())
            await anyio.sleep(_SAMPLE)

    async def _probe(self) -> None:
        told, told_at = "", 0.0
        while True:
            try:
                await self.relay.probe()
            except TrackerError as error:
                fault = " ".join(str(error).split())[:_TEXT]
                self._fault = self._shown(error)
                if fault != told or self._clock.monotonic() - told_at > _TELL_AGAIN:
                    told, told_at = fault, self._clock.monotonic()
                    self.note(error)
                    get_logger().warning("not_ready", reason=fault)
            else:
                if self._fault is not None:
                    get_logger().info("ready")
                told, self._fault = "", None
                self.became_ready.set()
            await anyio.sleep(_PROBE)

    def _shown(self, error: BaseException) -> str:
        return shown(error, self.options)

    # -- the end -----------------------------------------------------------------------------------

    def stop_accepting(self) -> None:
        """From here on requests for calls and batches are refused."""
        self._draining = True

    async def drain(self, timeout: float) -> DrainReport:  # noqa: ASYNC109 - handed on
        """Bring everything accepted to the database, for at most *timeout* seconds."""
        report = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._drain_relay, timeout)
            report = await self.tracker.aclose(timeout)
        assert report is not None
        return report

    async def _drain_relay(self, timeout: float) -> None:  # noqa: ASYNC109 - of the drain
        with anyio.move_on_after(timeout):
            await self.relay.drain()

    def hurry(self) -> None:
        """Cut the drain short."""
        self.relay.abort()

    # -- what is shown -----------------------------------------------------------------------------

    def status(self, since: str | None) -> Status:
        """Return the status page's document; *since* as `history` says."""
        try:
            after = None if since is None else float(since)
        except ValueError:
            after = None
        reading = self._collector.reading()
        books, numbers = reading.books, self.tracker.reading().numbers
        producer, epoch, sequence = numbers.ledger
        relayed = self.relay.numbers
        return Status(
            version=version("tracker-daemon"),
            now=round(self._clock.wall(), 3),
            started_at=round(self._started_at, 3),
            state=self.state,
            reason=self.reason,
            history=self._history.columns(after),
            totals=Totals(
                accepted=sum(books.accepted.values()),
                applied=sum(books.applied.values()),
                dead_lettered=sum(books.dead_lettered.values()),
                lost=sum(books.lost.values()),
                rejected=sum(reading.rejected.values()),
                pending=books.queue_calls,
            ),
            queue_limit=reading.queue_limit,
            ledger=Ledger(
                producer=producer,
                epoch=epoch,
                sequence=sequence,
                relayed=self.relay.batches,
                regressions=numbers.regressions + relayed.regressions,
                fenced=numbers.fenced,
            ),
            journal=self._journal(),
            clients=self.relay.live_clients(),
            errors=list(self._errors),
            stream=None,
            config=self._config,
        )

    def _journal(self) -> Journal | None:
        journal = self.tracker.journal
        if journal is None:
            return None
        return Journal(
            directory=str(journal.directory), bytes=journal.bytes, segments=journal.files, degraded=journal.degraded
        )
