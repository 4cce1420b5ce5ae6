"""Several connections that apply disjoint threads of one batch at the same time.

Rules:
1. A thread's lane is `crc32(thread_id) % lanes`, and a batch is one batch a lane, of the same sequence, each with a row
   of its own in the ledger: (producer, 0), (producer, -1), ... Each is exactly once by itself; together they are the
   batch. (Above 0 are a stream's partitions.)
2. Every lane takes part in every batch, be its share empty, and the next batch begins when all lanes are done. The
   producer stands where the last of its lanes does; a lane that stands further on, after a failure of another or in a
   database that forgot, is not asked again for what it has.
3. How many lanes a producer has is what its ledger says, from its first opening on, in one transaction for all of
   them: a later life with another setting cuts what is left of it as it was.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar
from zlib import crc32

from tracker_daemon.breath import Breath
from tracker_daemon.delta import Deltas, rows_of
from tracker_daemon.errors import Fenced
from tracker_daemon.postgres.sink import PostgresSink
from tracker_daemon.sink import Applied, LedgerMissing, LedgerRegressed, Opened

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence
    from uuid import UUID

    from tracker_daemon.batch import Batch
    from tracker_daemon.delta import Row, ThreadDelta
    from tracker_daemon.postgres.connection import Connector
    from tracker_daemon.postgres.session import Session

Answer = TypeVar("Answer")

_PART = 1_000


class Lanes:
    """A `Sink` of one `PostgresSink` a lane; with one lane it is no more than that.

    Args:
        connector: makes connections, one a lane.
        table: schema (or `None`: the search path's) and name.
        lanes: of producers that are new.
    """

    def __init__(self, connector: Connector, table: tuple[str | None, str], lanes: int = 1) -> None:
        self._first = _Opener(connector, table, lanes)
        self._sinks: list[PostgresSink] = [self._first, *(PostgresSink(connector, table) for _ in range(lanes - 1))]
        self._breath = Breath(_PART)
        self._whole: Batch | None = None
        self.following: Callable[[Batch], Sequence[ThreadDelta]] = lambda _: ()
        """See `Looks`."""
        for sink in self._sinks:
            sink.following = lambda share: self.following(self._whole or share)

    async def open(self, producer: UUID, lane: int, *, known: Opened | None = None, after: int = 0) -> Opened:
        """See `Sink.open`."""
        return await self._first.open(producer, lane, known=known, after=after)

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        self._whole = batch
        try:
            return await self._apply(batch)
        finally:
            self._whole = None  # its rows are let go of elsewhere, part by part

    async def _apply(self, batch: Batch) -> Applied:
        standing = self._first.standing(batch.producer)
        if len(standing) == 1:
            return await self._first.apply(batch)

        def step(sink: PostgresSink, share: Batch) -> Coroutine[Any, Any, Applied]:
            return sink.recall(share) if standing[share.lane] >= share.sequence else sink.apply(share)

        return _together(await self._each(step, self._shares(batch)))

    async def recall(self, batch: Batch) -> Applied:
        """See `Recalls.recall`."""
        return _together(await self._each(lambda sink, share: sink.recall(share), self._shares(batch)))

    def abort(self) -> None:
        """See `Sink.abort`."""
        for sink in self._sinks:
            sink.abort()

    async def aclose(self, producer: UUID, lane: int, *, clean: bool) -> None:
        """See `Sink.aclose`."""
        await _all(sink.aclose(producer, lane - number, clean=clean) for number, sink in enumerate(self._sinks))

    def _shares(self, batch: Batch) -> list[Batch]:
        """Return what each lane has of *batch*."""
        lanes = len(self._first.standing(batch.producer))
        if lanes == 1:
            return [batch]
        shares: list[list[Row]] = [[] for _ in range(lanes)]
        for part in self._breath.parts(rows_of(batch.deltas)):
            for row in part:
                shares[crc32(row[0].encode()) % lanes].append(row)
        return [
            replace(batch, lane=batch.lane - number, deltas=Deltas(tuple(rows))) for number, rows in enumerate(shares)
        ]

    async def _each(
        self, do: Callable[[PostgresSink, Batch], Coroutine[Any, Any, Applied]], shares: list[Batch]
    ) -> list[Applied]:
        """Do something with every share; of one connection one after the other."""

        async def in_turn(sink: PostgresSink, own: list[Batch]) -> list[Applied]:
            return [await do(sink, share) for share in own]

        width = len(self._sinks)
        found = await _all(in_turn(sink, shares[number::width]) for number, sink in enumerate(self._sinks))
        return [answer for answers in found for answer in answers]


class _Opener(PostgresSink):
    """The sink of lane 0, which opens all lanes."""

    def __init__(self, connector: Connector, table: tuple[str | None, str], lanes: int) -> None:
        super().__init__(connector, table)
        self._lanes = lanes
        self._standing: dict[UUID, dict[int, int]] = {}

    def standing(self, producer: UUID) -> dict[int, int]:
        """Return the lanes of an opened producer, and the sequence at which each stood when it was opened last."""
        return self._standing.get(producer, {0: 0})

    async def _open(self, session: Session, producer: UUID, lane: int, seen_last: Opened | None, after: int) -> Opened:
        seen = [each for each in (seen_last, self._last.get((producer, lane))) if each is not None]
        last = max(seen, key=lambda each: each.epoch, default=None)
        await self._begin(session)
        try:
            cursor = session.cursor()
            await cursor.execute(session.statements["lanes"], {"producer": producer})
            rows = await cursor.fetchall()
            if rows and rows[0][0] != 0:
                # Lane 0 is collected first: how many there were is not known any more.
                raise LedgerMissing(str(producer), 0)
            lanes = [-number for number in range(len(rows) or self._lanes)]
            opened = [await self._opened(session, producer, each, last, after) for each in lanes]
            await session.connection.execute("COMMIT")
        except LedgerMissing:
            await session.connection.rollback()
            raise
        self._standing[producer] = {each: at.applied_sequence for each, at in zip(lanes, opened, strict=True)}
        return min(opened, key=lambda each: each.applied_sequence)


async def _all(doing: Iterable[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """Wait for all of them, so that none is at work when the batch comes again; raise the gravest of their errors."""
    found = await asyncio.gather(*doing, return_exceptions=True)
    if errors := [each for each in found if isinstance(each, BaseException)]:
        raise min(errors, key=_gravity)
    return [each for each in found if not isinstance(each, BaseException)]


def _gravity(error: BaseException) -> int:
    order = ((Fenced, LedgerMissing), (LedgerRegressed,))
    if not isinstance(error, Exception):
        return -1
    return next((number for number, kinds in enumerate(order) if isinstance(error, kinds)), len(order))


def _together(answers: list[Applied]) -> Applied:
    return Applied(
        rows=sum(answer.rows for answer in answers),
        skipped=sum(answer.skipped for answer in answers),
        duplicate=all(answer.duplicate for answer in answers),
        dead_letters=tuple(letter for answer in answers for letter in answer.dead_letters),
    )
