"""What the daemon is made of, and its state: a tracker for calls, a relay for trackers' batches, one database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import anyio

from tracker_daemon.daemon.admission import Admission, Shares
from tracker_daemon.daemon.history import Journal, Ledger, Status
from tracker_daemon.daemon.refused import RefusedRequests
from tracker_daemon.daemon.watched import Watched, words_of
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

_PROBE: Final = 2.0
_TELL_AGAIN: Final = 300.0


class Service(Watched):
    """The daemon's parts and its state.

    Args:
        options: the daemon's settings.
        tracker: takes calls that come as lines.
        relay: takes trackers' batches.
        token: what a client must bring, or `None`.
        registry, config: see `Watched`; the registry is the tracker's.
        max_calls: in one request.
    """

    name = "daemon"

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
        super().__init__(options, registry, config)
        self.options, self.tracker, self.relay = options, tracker, relay
        self.token, self.max_calls = token, max_calls
        self.admission, self.shares = Admission(options.memory), Shares(tracker)
        self.refused = RefusedRequests(registry)
        self.collector.add(relay)
        relay.on_error = self.note
        self._fault: str | None = "the database was not reached yet"

    # -- the state ---------------------------------------------------------------------------------

    @property
    def fault(self) -> str | None:
        """Why it cannot write, or `None`."""
        return "the tracker writes nothing more: see the log" if self.tracker.closed else self._fault

    @property
    def waiting(self) -> str:
        """How many calls wait."""
        return f"{self.queue_calls} calls wait"

    def count_malformed(self, calls: int) -> None:
        """Count calls that were malformed."""
        self.tracker.count_rejected("invalid", calls)

    # -- what runs beside the requests -------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.relay.run)
            tasks.start_soon(self.sample)
            tasks.start_soon(self._probe)

    async def _probe(self) -> None:
        told, told_at = "", 0.0
        while True:
            try:
                await self.relay.probe()
            except TrackerError as error:
                fault = words_of(error)
                self._fault = self.shown(error)
                if fault != told or self.clock.monotonic() - told_at > _TELL_AGAIN:
                    told, told_at = fault, self.clock.monotonic()
                    self.note(error)
                    get_logger().warning("not_ready", reason=fault)
            else:
                if self._fault is not None:
                    get_logger().info("ready")
                told, self._fault = "", None
            await anyio.sleep(_PROBE)

    # -- the end -----------------------------------------------------------------------------------

    def stop_accepting(self) -> None:
        """From here on requests for calls and batches are refused."""
        self.draining = True

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
        """Return the status page's document."""
        numbers, relayed = self.tracker.reading().numbers, self.relay.numbers
        producer, epoch, sequence = numbers.ledger
        return {
            **self.general(since),
            "ledger": Ledger(
                producer=producer,
                epoch=epoch,
                sequence=sequence,
                relayed=self.relay.batches,
                regressions=numbers.regressions + relayed.regressions,
                fenced=numbers.fenced,
            ),
            "journal": self._journal(),
            "clients": self.relay.live_clients(),
            "stream": None,
        }

    def _journal(self) -> Journal | None:
        journal = self.tracker.journal
        if journal is None:
            return None
        return Journal(
            directory=str(journal.directory), bytes=journal.bytes, segments=journal.files, degraded=journal.degraded
        )
