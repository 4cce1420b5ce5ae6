"""Batches that come from clients, into the database: coalesced over a short window, exactly once by each one's ledger.

Rules:
1. A batch is answered when its transaction is committed, or refused with the reason; nothing is kept here in between
   but in memory, and whoever sent it keeps it until the answer.
2. One transaction at a time. What comes meanwhile waits for the next one, which takes it all, up to a bound.
3. A fault of the database is every sender's answer: each tries again by its own plan.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio

from tracker_daemon.books import Books
from tracker_daemon.collector import Reading
from tracker_daemon.errors import SchemaError, TrackerError
from tracker_daemon.flush_numbers import FlushNumbers
from tracker_daemon.logs import get_logger
from tracker_daemon.sink import Applied, LedgerRegressed, Opened, SinkFault

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from tracker_daemon.batch import Batch
    from tracker_daemon.clock import Clock
    from tracker_daemon.postgres.many import ManySink


@dataclass(slots=True, eq=False)
class _Waiting:
    batch: Batch
    since: float
    answer: Applied | TrackerError | None = None
    done: anyio.Event = field(default_factory=anyio.Event)


class Full(Exception):  # noqa: N818 - says what is the case
    """Too much waits already; nothing was taken."""


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
        self._window, self._max_batch_size, self._max_waiting = window, max_batch_size, max_waiting
        self._queue: deque[_Waiting] = deque()
        self._sizes = 0
        self._arrived = anyio.Event()
        self._turn = anyio.Lock()
        self._applied: Counter[str] = Counter()
        self._dead: Counter[str] = Counter()
        self._in_doubt: dict[tuple[UUID, int], tuple[int, int]] = {}
        """Of each client, the batch whose transaction may have been committed although it failed here."""
        self._skipped = 0
        self.numbers = FlushNumbers()
        self.closed = self.folded = self.ended = False
        self.clients: dict[UUID, float] = {}
        """When each client was heard last, seconds since 1970."""

    # -- for the requests --------------------------------------------------------------------------

    async def apply(self, batch: Batch) -> Applied:
        """Return when *batch* is in the database.

        Raises:
            Full: nothing was taken.
            SinkFault, SchemaError, Fenced, LedgerMissing, LedgerRegressed: as `Sink.apply`.
        """
        self._heard(batch.producer)
        size = len(batch.deltas)
        if self._queue and self._sizes + size > self._max_waiting:
            raise Full
        waiting = _Waiting(batch, self._clock.monotonic())
        self._queue.append(waiting)
        self._sizes += size
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
        answers: Sequence[Applied | TrackerError] = [SinkFault("connection", _ENDING)] * len(taken)
        try:
            async with self._turn:
                answers = await self._sink.apply_many([waiting.batch for waiting in taken])
            self._count(taken, answers, started)
        except Exception as error:
            # One request must not end all of them, whatever is wrong with it.
            if not isinstance(error, SinkFault | SchemaError):
                get_logger().error("relay_failed", error=repr(error), exc_info=error)
                error = SinkFault("other", "the daemon failed; its log says why")
            self._failed(error, taken)
            answers = [error] * len(taken)
        finally:
            for waiting, answer in zip(taken, answers, strict=True):
                self._queue.remove(waiting)
                self._sizes -= len(waiting.batch.deltas)
                waiting.answer = answer
                waiting.done.set()

    def _failed(self, error: SinkFault | SchemaError, taken: list[_Waiting]) -> None:
        numbers = self.numbers
        if len(self._in_doubt) > _MOST_CLIENTS:
            self._in_doubt.clear()
        self._in_doubt.update({_key(waiting.batch): _identity(waiting.batch) for waiting in taken})
        numbers.errors["schema" if isinstance(error, SchemaError) else error.kind] += 1
        numbers.flushes["retry"] += 1
        numbers.last_error = error

    def _count(self, taken: list[_Waiting], answers: Sequence[Applied | TrackerError], started: float) -> None:
        numbers, now = self.numbers, self._clock.monotonic()
        rows = 0
        for waiting, answer in zip(taken, answers, strict=True):
            if not isinstance(answer, Applied):
                numbers.regressions += isinstance(answer, LedgerRegressed)
                numbers.flushes["error"] += 1
                numbers.last_error = answer
                continue
            in_doubt = self._in_doubt.pop(_key(waiting.batch), None)
            if answer.duplicate:
                numbers.flushes["duplicate"] += 1
                if in_doubt != _identity(waiting.batch):
                    continue  # counted when it was applied, here or by another daemon
            rows += len(waiting.batch.deltas)
            numbers.commit_lag_seconds.observe(now - waiting.since)
            dead = {letter.delta.thread_id: letter.reason for letter in answer.dead_letters}
            self._skipped += answer.skipped
            for delta in waiting.batch.deltas:
                if reason := dead.get(delta.thread_id):
                    self._dead[reason] += delta.calls
                else:
                    self._applied["ensure_conversation"] += delta.ensures
                    self._applied["record_turn"] += delta.turns
                    self._applied["resolve"] += delta.resolves
        if rows:
            numbers.flushes["ok"] += 1
            numbers.flush_seconds.observe(now - started)
            numbers.flush_rows.observe(rows)
            numbers.last_success = self._clock.wall()
            numbers.last_error = None

    # -- for the metrics ---------------------------------------------------------------------------

    def collected(self) -> Reading:
        """Return the numbers of this instant: a client's calls count once they are in the database."""
        # Each copied in one step: a scrape reads them in a thread of its own, while they grow.
        applied, dead = dict(self._applied), dict(self._dead)
        accepted = Counter(applied)
        # Which kind of call a dead letter's were is not kept; they are turns, for all that anybody asks.
        accepted["record_turn"] += sum(dead.values())
        return Reading(
            books=Books(
                accepted=dict(accepted),
                applied=applied,
                dead_lettered=dead,
                lost={},
                queue_calls=0,
                threads=0,
                oldest_at=0,
                rows_skipped=self._skipped,
            ),
            rejected={},
            numbers=self.numbers,
            queue_limit=0,
        )


def _key(batch: Batch) -> tuple[UUID, int]:
    return batch.producer, batch.lane


def _identity(batch: Batch) -> tuple[int, int]:
    return batch.epoch, batch.sequence


_ENDING = "the daemon is shutting down"
_MOST_CLIENTS = 10_000
_CLIENT_IS_GONE = 300.0
