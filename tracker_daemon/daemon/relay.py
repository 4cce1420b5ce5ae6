"""Batches that come from clients, into the database: coalesced over a short window, exactly once by each one's ledger.

Rules:
1. A batch is answered when its transaction is committed, or refused with the reason; nothing is kept here in between
   but in memory, and whoever sent it keeps it until the answer.
2. One transaction at a time. What comes meanwhile waits for the next one, which takes it all, up to a bound.
3. A fault of the database is every sender's answer, one that may be of a batch's own row that sender's alone: each
   tries again by its own plan.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from tracker_daemon.daemon.admission import Admission
from tracker_daemon.daemon.relay_books import Hand, RelayBooks
from tracker_daemon.errors import SchemaError, TrackerError
from tracker_daemon.flush_numbers import FlushNumbers
from tracker_daemon.front_door import Refusals
from tracker_daemon.logs import Rated, get_logger
from tracker_daemon.readings import Reading
from tracker_daemon.sink import Applied, LedgerRegressed, Opened, SinkFault

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from tracker_daemon.batch import Batch
    from tracker_daemon.clock import Clock
    from tracker_daemon.postgres.many import ManySink


@dataclass(slots=True, eq=False)
class _Waiting:
    batch: Batch
    client: str
    hand: Hand
    since: float
    answer: Applied | TrackerError | None = None
    done: anyio.Event = field(default_factory=anyio.Event)


class Full(Exception):  # noqa: N818 - says what is the case
    """Too much waits already; nothing was taken. *status*: 429 if it is this client's, else 503."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Relay:
    """Joins clients' batches into transactions.

    Args:
        sink: where they go; used by this alone.
        clock: its time.
        window: how long the first batch of a transaction waits for others, seconds.
        max_batch_size: deltas in a transaction, at least one batch.
        max_waiting: deltas that may wait.
    """

    def __init__(self, sink: ManySink, clock: Clock, *, window: float, max_batch_size: int, max_waiting: int) -> None:
        self._sink, self._clock = sink, clock
        self._window, self._max_batch_size = window, max_batch_size
        self._queue: deque[_Waiting] = deque()
        self._admission = Admission(max_waiting)
        self._arrived = anyio.Event()
        self._turn = anyio.Lock()
        self._books = RelayBooks(clock)
        self._refusals, self._rated = Refusals(clock), Rated(clock)
        self.on_error: Callable[[TrackerError], None] = lambda _: None
        """Called with what the database, or a batch's ledger, says against a batch."""
        self.numbers = FlushNumbers()
        self.closed = self.folded = self.ended = False
        self.batches = 0
        """How many were applied."""
        self.clients: dict[UUID, float] = {}
        """When each client was heard last, seconds since 1970."""

    # -- for the requests --------------------------------------------------------------------------

    async def apply(self, batch: Batch, client: str) -> Applied:
        """Return when *batch*, which *client* has brought, is in the database.

        Raises:
            Full: nothing was taken.
            SinkFault, SchemaError, Fenced, LedgerMissing, LedgerRegressed: as `Sink.apply`.
        """
        self._heard(batch.producer)
        if status := self._admission.admit(client, len(batch.deltas)):
            self._refusals.add("batch", sum(delta.calls for delta in batch.deltas))
            raise Full(status)
        waiting = _Waiting(batch, client, self._books.take(batch), self._clock.monotonic())
        self._queue.append(waiting)
        self._arrived.set()
        await waiting.done.wait()
        if isinstance(waiting.answer, Applied):
            return waiting.answer
        raise waiting.answer or SinkFault("connection", _ENDING)

    async def open(self, producer: UUID, lane: int, known: Opened | None, after: int) -> Opened:
        """See `Sink.open`."""
        self._heard(producer)
        async with self._turn:
            return await self._sink.open(producer, lane, known=known, after=after)

    async def recall(self, batch: Batch) -> Applied:
        """See `Recalls.recall`."""
        self._heard(batch.producer)
        async with self._turn:
            return await self._sink.recall(batch)

    async def probe(self) -> None:
        """Ask the database whether it would take anything.

        Raises:
            SinkFault, SchemaError: it would not.
        """
        async with self._turn:
            await self._sink.probe()

    async def mark_closed(self, producer: UUID, lane: int, last: Opened) -> None:
        """The client has ended, cleanly."""
        self.clients.pop(producer, None)
        self._books.forget(producer, lane)
        async with self._turn:
            await self._sink.mark_closed(producer, lane, last)

    def _heard(self, producer: UUID) -> None:
        now = self._clock.wall()
        if len(self.clients) > _MOST_CLIENTS:
            self.clients = {name: at for name, at in self.clients.items() if now - at < _CLIENT_IS_GONE}
        self.clients[producer] = now

    def live_clients(self) -> int:
        """How many clients were heard in the last minutes."""
        now = self._clock.wall()
        return sum(now - at < _CLIENT_IS_GONE for at in self.clients.values())

    # -- the loop ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            await self._arrived.wait()
            await self._clock.wait(anyio.Event(), self._window)
            while self._queue:
                await self._flush(self._take())
            self._arrived = anyio.Event()

    async def drain(self) -> None:
        """Return when nothing waits."""
        while self._queue:
            await self._queue[-1].done.wait()

    def abort(self) -> None:
        """Make what is under way fail now."""
        self._sink.abort()

    async def aclose(self) -> None:
        """Let go of the connection."""
        for waiting in self._queue:
            waiting.done.set()
        self._queue.clear()
        await self._sink.disconnect()

    def _take(self) -> list[_Waiting]:
        taken: list[_Waiting] = []
        seen: set[tuple[UUID, int]] = set()
        size = 0
        for waiting in self._queue:
            key = _key(waiting.batch)
            if key in seen:
                continue  # for the next transaction; whoever sends many at once holds nobody else up
            if taken and size + len(waiting.batch.deltas) > self._max_batch_size:
                break
            seen.add(key)
            size += len(waiting.batch.deltas)
            taken.append(waiting)
        return taken

    async def _flush(self, taken: list[_Waiting]) -> None:
        started = self._clock.monotonic()
        # What the senders hear when this is cancelled: they come again, and their ledgers know.
        answers: Sequence[Applied | TrackerError] | None = None
        fault: SinkFault | SchemaError = SinkFault("connection", _ENDING)
        try:
            async with self._turn:
                answers = await self._sink.apply_many([waiting.batch for waiting in taken])
        except Exception as error:
            # One request must not end all of them, whatever is wrong with it.
            if isinstance(error, SinkFault | SchemaError):
                fault = error
            else:
                get_logger().error("relay_failed", error=repr(error), exc_info=error)
                fault = SinkFault("other", "the daemon failed; its log says why")
            self._failed(fault, len(taken))
        finally:
            if answers is None:
                self._books.give_back([waiting.hand for waiting in taken])
                answers = [fault] * len(taken)
            else:
                self._count(taken, answers, started)
                found = list(zip(taken, answers, strict=True))
                again = {waiting for waiting, answer in found if isinstance(answer, SinkFault)}
                self._books.give_back([waiting.hand for waiting in again])
                self._books.settle([(each.hand, each.batch, answer) for each, answer in found if each not in again])
            for waiting, answer in zip(taken, answers, strict=True):
                self._queue.remove(waiting)
                self._admission.release(waiting.client, len(waiting.batch.deltas))
                waiting.answer = answer
                waiting.done.set()

    def _failed(self, fault: SinkFault | SchemaError, batches: int) -> None:
        kind = "schema" if isinstance(fault, SchemaError) else fault.kind
        self.numbers.errors[kind] += 1
        self.numbers.flushes["retry"] += 1
        self._tell("batches_failed", fault, kind, kind=kind, batches=batches)

    def _tell(self, event: str, error: TrackerError, sort: str, **fields: object) -> None:
        self.numbers.last_error = error
        self.on_error(error)
        if (rated := self._rated.due(f"{event}:{sort}")) is not None:
            get_logger().warning(event, error=str(error), **fields, **rated)

    def _count(self, taken: list[_Waiting], answers: Sequence[Applied | TrackerError], started: float) -> None:
        numbers, now = self.numbers, self._clock.monotonic()
        rows = 0
        for waiting, answer in zip(taken, answers, strict=True):
            if isinstance(answer, SinkFault):
                self._failed(answer, 1)
                continue
            if not isinstance(answer, Applied):
                numbers.regressions += isinstance(answer, LedgerRegressed)
                numbers.flushes["error"] += 1
                self._tell("batch_refused", answer, type(answer).__name__, producer=str(waiting.batch.producer))
                continue
            numbers.flushes["duplicate"] += answer.duplicate
            if waiting.hand.again or not answer.duplicate:
                rows += len(waiting.batch.deltas)
                self.batches += 1
                numbers.commit_lag_seconds.observe(now - waiting.since)
        if rows:
            numbers.flushes["ok"] += 1
            numbers.flush_seconds.observe(now - started)
            numbers.flush_rows.observe(rows)
            numbers.last_success = self._clock.wall()
            numbers.last_error = None

    # -- for the metrics ---------------------------------------------------------------------------

    def collected(self) -> Reading:
        """Return the numbers of this instant. The bound counts with the tracker's: it is the same number."""
        return Reading(self._books.read(), dict(self._refusals.counts), self.numbers, queue_limit=0)


def _key(batch: Batch) -> tuple[UUID, int]:
    return batch.producer, batch.lane


_ENDING = "the daemon is shutting down"
_MOST_CLIENTS = 10_000
_CLIENT_IS_GONE = 300.0
