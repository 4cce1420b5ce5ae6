"""The Postgres sink: one transaction a batch.

Rules:
1. The ledger's compare-and-set and the data commit together or not at all.
2. Small batches, and all behind a pooler, are one statement with arrays, in one round trip; large ones are staged by
   COPY. Both run the same merge.
3. After an exception that leaves the outcome unknown the connection is dropped; the ledger tells when the batch
   comes again.
4. Data that the database refuses is looked for by halving (`apart`), each half under a savepoint, all in one
   transaction: what stands alone is set aside as a dead letter, the rest commits with it.
5. An error that may be about the table as well (`faults.IN_DOUBT`) is looked for in the same way, but only once the
   same batch has failed by such a one three times, and sets nothing aside unless another row goes through: of the
   batch, or of what waits behind it (`Looks.following`), which is tried under a savepoint and rolled back. Else nothing
   tells a bad row from a table at fault: the batch is held, and fails as before.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any, Final

from tracker_daemon.batch import Batch
from tracker_daemon.breath import Breath
from tracker_daemon.delta import rows_of
from tracker_daemon.errors import Fenced, SchemaError
from tracker_daemon.postgres import encoding, faults
from tracker_daemon.postgres.apart import Apart
from tracker_daemon.postgres.dead_letters import bury, dead_letters_of
from tracker_daemon.postgres.doubts import Doubts
from tracker_daemon.postgres.session import Session
from tracker_daemon.sink import Applied, BegunOnStream, DeadLetter, LedgerMissing, LedgerRegressed, Opened, SinkFault

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from uuid import UUID

    from tracker_daemon.delta import ThreadDelta
    from tracker_daemon.postgres.connection import Connector

# Below it COPY is not faster than arrays.
COPY_FROM: Final = 5_000
# Deltas encoded at once, the first time.
_PART: Final = 125
# Arrays are made for twice as long at a time as other work is done, seconds: the server waits for them. Of a COPY it
# reads what it has while the worker sleeps.
_HOLD: Final = 0.000_2
_MOST_TIMEOUT: Final = 600.0
_CLOSE_TIMEOUT: Final = 2.0
_PROBES: Final = 16


class PostgresSink:
    """A `Sink` for one table.

    Args:
        connector: makes connections.
        table: schema (or `None`: the search path's) and name.
        statement_timeout: seconds for one flush. It doubles with each flush that fails by it, up to 10 minutes: a batch
            keeps its identity, so it cannot be made smaller for a server that has become slow.
        copy_from: deltas from which on a batch goes by COPY.
    """

    def __init__(
        self,
        connector: Connector,
        table: tuple[str | None, str],
        *,
        statement_timeout: float = 30.0,
        copy_from: int = COPY_FROM,
    ) -> None:
        self._connector, self._table = connector, table
        self._first_timeout = self._timeout = statement_timeout
        self._copy_from = copy_from
        self._session: Session | None = None
        self._last: dict[tuple[UUID, int], Opened] = {}
        self._in_doubt = Doubts()
        self._checking, self._staging, self._listing = Breath(_PART), Breath(_PART), Breath(_PART, _HOLD)
        self._random = Random()  # noqa: S311 - which rows are tried first
        self.following: Callable[[Batch], Sequence[ThreadDelta]] = lambda _: ()
        """See `Looks`."""

    # -- the port ----------------------------------------------------------------------------------

    async def open(self, producer: UUID, lane: int, *, known: Opened | None = None, after: int = 0) -> Opened:
        """See `Sink.open`."""
        if known is not None and known.is_of_a_stream:
            raise BegunOnStream(str(producer), lane)
        session = await self._connected()
        try:
            with session.deadline(self._timeout):
                await session.connection.execute(session.statements["collect"])
                opened = await self._open(session, producer, lane, known, after)
        except LedgerMissing:
            raise
        except Exception as error:
            raise await self._failed(session, error, "opening the ledger") from error
        self._last[producer, lane] = opened
        return opened

    async def _open(self, session: Session, producer: UUID, lane: int, seen_last: Opened | None, after: int) -> Opened:
        cursor = await session.cursor().execute(session.statements["lanes"], {"producer": producer})
        if lane == 0 and (lanes := cursor.rowcount) > 1:
            # By one lane all of a batch would be applied, also what another lane has done.
            raise SinkFault("other", f"producer {producer} has {lanes} lanes: only Tracker('postgresql:…') goes on")
        return await self._opened(session, producer, lane, seen_last, after)

    async def _opened(
        self, session: Session, producer: UUID, lane: int, seen_last: Opened | None, after: int
    ) -> Opened:
        key = {"producer": producer, "lane": lane}
        known = max(last.epoch if last else 0 for last in (self._last.get((producer, lane)), seen_last))
        cursor = session.cursor()
        while True:
            await cursor.execute(session.statements["position"], key)
            seen = await cursor.fetchone()
            if seen is None and known:
                raise LedgerMissing(str(producer), lane)
            await cursor.execute(
                session.statements["open"],
                {**key, "known": known, "seen": 0 if seen is None else seen[0], "after": after},
            )
            if (row := await cursor.fetchone()) is not None:
                return Opened(row[0], row[1], session.database)
            # A late try of ours came in between: look again.

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        session = await self._connected()
        try:
            applied = await self._attempt(session, batch)
        except (Fenced, LedgerMissing, LedgerRegressed):
            raise
        except Exception as error:
            fault = await self._failed(session, error, f"flushing {len(batch.deltas)} threads")
            if fault.kind == "timeout":
                self._timeout = min(self._timeout * 2, _MOST_TIMEOUT)
            if fault.kind in faults.IN_DOUBT and not session.connection.broken:
                self._in_doubt.count(batch)
            raise fault from error
        self._timeout = self._first_timeout
        self._in_doubt.forget(batch)
        self._last[batch.producer, batch.lane] = Opened(batch.epoch, batch.sequence)
        return applied

    async def recall(self, batch: Batch) -> Applied:
        """See `Recalls.recall`."""
        session = await self._connected()
        try:
            with session.deadline(self._timeout):
                dead = await dead_letters_of(session, batch)
        except Exception as error:
            raise await self._failed(session, error, "asking for dead letters") from error
        return Applied(rows=0, duplicate=True, dead_letters=dead)

    def abort(self) -> None:
        """See `Sink.abort`."""
        session = self._session
        if session is not None:
            session.abort()

    async def aclose(self, producer: UUID, lane: int, *, clean: bool) -> None:
        """See `Sink.aclose`."""
        last = self._last.get((producer, lane))
        try:
            if clean and last is not None:
                await self._mark_closed(Batch(producer, lane, last.epoch, last.applied_sequence, ()))
        finally:
            await self._drop()

    async def _mark_closed(self, last: Batch) -> None:
        """Mark the ledger's row; raise what the ledger has to say, if it is not where the last batch left it.

        A connection that is lost is made anew, once: what took it away may have been a failover that forgot commits.
        When the server is away nothing is raised: what was to be written is written.
        """
        time = asyncio.get_running_loop().time
        until = time() + _CLOSE_TIMEOUT
        for _ in range(2):
            try:
                session = await self._connected(until - time())
                with session.deadline(until - time()):
                    cursor = session.cursor()
                    await cursor.execute(session.statements["close"], _key(last))
                    if await cursor.fetchone() is None:
                        await self._not_moved(session, replace(last, sequence=last.sequence + 1))
            except (Fenced, LedgerMissing, LedgerRegressed):
                raise
            except Exception:
                if self._session is None or not self._session.connection.closed:
                    return
            else:
                return

    # -- the connection ----------------------------------------------------------------------------

    async def _connected(self, within: float | None = None) -> Session:
        if self._session is not None and self._session.connection.closed:
            await self._drop()
        if self._session is None:
            try:
                self._session = await Session.open(
                    self._connector,
                    self._table,
                    timeout=self._timeout,
                    within=within,
                )
            except SchemaError:
                raise
            except Exception as error:
                raise faults.fault(error, "connecting") from error
        return self._session

    async def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _failed(self, session: Session, error: Exception, doing: str) -> SinkFault:
        """Drop the connection, and return the port's exception."""
        await self._drop()
        if session.overdue is not None:
            return SinkFault("timeout", f"{doing}: no answer within {session.overdue:.3g} s")
        if session.aborted:  # the driver would say that the server has died
            return SinkFault("connection", f"{doing}: cut off, as the time for the shutdown had passed")
        fault = faults.fault(error, doing)
        # Bad data is dealt with where it is found; here the connection was lost while that was done.
        return SinkFault("connection", fault.message) if fault.kind == "data" and session.connection.broken else fault

    # -- one transaction ---------------------------------------------------------------------------

    async def _attempt(self, session: Session, batch: Batch) -> Applied:
        with session.deadline(self._timeout * 1.1):
            try:
                if self._by_copy(session, batch.deltas):
                    return await self._flush_copy(session, batch)
                return await self._flush_arrays(session, batch)
            except Exception as error:
                if not faults.may_be_of_a_row(error, session.connection, self._doubts(batch)):
                    raise
            await session.connection.rollback()
        # Many statements: each has a deadline of its own.
        return await self._flush_apart(session, batch)

    def _by_copy(self, session: Session, deltas: Sequence[ThreadDelta]) -> bool:
        if len(deltas) < self._copy_from or not session.may_stage:
            return False
        return all(map(encoding.fits_stage, self._checking.parts(rows_of(deltas))))

    async def _flush_arrays(self, session: Session, batch: Batch) -> Applied:
        cursor = session.cursor()
        arrays = encoding.Arrays()
        for part in self._listing.parts(rows_of(batch.deltas)):
            arrays.add(part)
        parameters = {**_key(batch), **arrays.parameters()}
        if session.pooled:
            await self._begin(session)
        # Else a transaction of its own: one round trip, and a peer that vanishes meanwhile leaves no lock behind.
        await cursor.execute(session.statements.merging("flush_arrays", batch), parameters)
        row = await cursor.fetchone()
        if session.pooled:
            await session.connection.execute("COMMIT")
        assert row is not None  # a SELECT of counts
        moved, sent, merged = row
        return self._applied(batch, sent, merged) if moved else await self._not_moved(session, batch)

    async def _flush_copy(self, session: Session, batch: Batch) -> Applied:
        connection, cursor = session.connection, session.cursor()
        await self._begin(session)
        await connection.execute(session.statements["stage"])
        rows = encoding.StageRows()
        async with cursor.copy("COPY tracker_stage_v1 FROM STDIN (FORMAT BINARY)") as copy:
            await copy.write(encoding.COPY_HEADER)
            for part in self._staging.parts(rows_of(batch.deltas)):
                await copy.write(rows.block(part))
            await copy.write(encoding.COPY_END)
        # After the COPY: while the server waits for its rows no deadline runs there, and when the network goes then,
        # a lock held would keep every later try away.
        if not await self._advance(session, batch):
            await connection.rollback()
            return await self._not_moved(session, batch)
        await cursor.execute(session.statements.merging("merge_stage", batch), rows.parameters())
        row = await cursor.fetchone()
        await connection.execute("COMMIT")
        assert row is not None  # a SELECT of counts
        return self._applied(batch, row[1], row[2])

    async def _advance(self, session: Session, batch: Batch) -> bool:
        cursor = session.cursor()
        await cursor.execute(session.statements["advance"], _key(batch))
        return await cursor.fetchone() is not None

    async def _begin(self, session: Session) -> None:
        # No pipeline: the server watches the time between two statements only after the Sync that ends each of them.
        # In a pipeline that the network has cut in two it would hold the ledger's row for ever.
        await session.connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
        if session.pooled:
            await session.connection.execute(session.rules(self._timeout, local=True))

    def _applied(self, batch: Batch, sent: int, merged: int, dead: tuple[DeadLetter, ...] = ()) -> Applied:
        return Applied(rows=merged, skipped=len(batch.deltas) - sent - len(dead), dead_letters=dead)

    async def _not_moved(self, session: Session, batch: Batch) -> Applied:
        """The compare-and-set changed nothing: find out which of its reasons it was."""
        cursor = session.cursor()
        await cursor.execute(session.statements["position"], _key(batch))
        row = await cursor.fetchone()
        producer = str(batch.producer)
        if row is None:
            raise LedgerMissing(producer, batch.lane)
        epoch, applied = row
        if epoch == batch.epoch == 0 and applied >= batch.sequence:
            # A client without lives: whatever is not newer is a repeat.
            return Applied(rows=0, duplicate=True, dead_letters=await dead_letters_of(session, batch))
        if epoch > batch.epoch or (epoch == batch.epoch and applied > batch.sequence):
            raise Fenced(producer, batch.lane, batch.epoch, epoch)
        if epoch == batch.epoch and applied == batch.sequence:
            dead = await dead_letters_of(session, batch)
            return Applied(rows=0, duplicate=True, dead_letters=dead)
        raise LedgerRegressed(producer, batch.lane, batch.sequence - 1, applied)

    # -- bad data ----------------------------------------------------------------------------------

    def _doubts(self, batch: Batch) -> list[Exception] | None:
        """Return where errors go that may be about the table as well; `None`: they are not looked into yet."""
        return [] if self._in_doubt.is_due(batch) else None

    async def _flush_apart(self, session: Session, batch: Batch) -> Applied:
        connection = session.connection
        with session.deadline(self._timeout):
            await self._begin(session)
            # A deferred constraint would refuse the whole transaction at its end.
            await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
            if not await self._advance(session, batch):
                await connection.rollback()
                return await self._not_moved(session, batch)
        # In the order of the locks, so that the halves take them in order too.
        deltas = sorted(batch.deltas, key=lambda delta: delta.thread_id.encode())
        doubts = self._doubts(batch)
        apart = Apart(session, batch, self._timeout, doubts, self._merge_under_savepoint)
        is_sound = doubts is not None and await self._goes_through(session, batch, self.following(batch), [])
        if doubts is None or is_sound or await self._goes_through(session, batch, deltas, doubts) or not doubts:
            await apart.run(deltas)
        if doubts and not apart.merged and not is_sound:
            # Nothing goes through: the table may be at fault. What was set aside now would be everything.
            with session.deadline(self._timeout):
                await connection.rollback()
            raise doubts[0]
        with session.deadline(self._timeout):
            await bury(session, batch, apart.dead)
            await connection.execute("COMMIT")
        return self._applied(batch, apart.sent, apart.merged, tuple(apart.dead))

    async def _goes_through(
        self, session: Session, batch: Batch, deltas: Sequence[ThreadDelta], doubts: list[Exception]
    ) -> bool:
        """Say whether one of a few rows goes through alone: a table at fault is not asked about each of them.

        Nothing of it stays. Picked at random, so that with more bad rows than good ones a later try finds a good one.
        """
        if not deltas:
            return False
        with session.deadline(self._timeout):
            await session.connection.execute("SAVEPOINT probe")
        for delta in self._random.sample(deltas, min(_PROBES, len(deltas))):
            merged = 0
            try:
                with session.deadline(self._timeout):
                    _, merged = await self._merge_under_savepoint(session, batch, [delta])
            except Exception as error:
                if not faults.may_be_of_a_row(error, session.connection, doubts):
                    raise
            with session.deadline(self._timeout):
                # Its lock too: it was taken out of turn.
                await session.connection.execute("ROLLBACK TO SAVEPOINT probe")
            if merged:
                return True
        return False

    async def _merge_under_savepoint(
        self, session: Session, batch: Batch, deltas: list[ThreadDelta]
    ) -> tuple[int, int]:
        connection, cursor = session.connection, session.cursor()
        await connection.execute("SAVEPOINT part")
        await cursor.execute(session.statements.merging("merge_arrays", batch), encoding.arrays(deltas))
        row = await cursor.fetchone()
        await connection.execute("RELEASE SAVEPOINT part")
        assert row is not None
        return row[1], row[2]


def _key(batch: Batch) -> dict[str, Any]:
    return {
        "producer": batch.producer,
        "lane": batch.lane,
        "epoch": batch.epoch,
        "sequence": batch.sequence,
    }
