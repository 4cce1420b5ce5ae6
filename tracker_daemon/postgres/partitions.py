"""A stream's partition in the database: who reads it, how far it is applied, and applying more of it.

Rules:
1. Where a partition stands is the `applied_sequence` of its row in the ledger: (the stream's own producer, lane of the
   partition, epoch of the owner). It moves by compare-and-set of epoch and position in the transaction of the data and
   of the rows of the producers whose batches those are. That is fence, lease and cursor in one; leases only say who
   should try.
2. Which batches came before is told by their producers' rows. Those of a partition's lane are written by whoever has
   moved the position, so they are read first and hold until the commit.
3. Deltas of one thread are summed over the batches. Where that could matter (bad data, `create_missing=False`) each
   batch goes alone.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from psycopg.types.json import Jsonb

from tracker_daemon.errors import Fenced, TrackerError
from tracker_daemon.postgres import encoding, faults
from tracker_daemon.postgres.many import summed
from tracker_daemon.postgres.sink import PostgresSink
from tracker_daemon.sink import DeadLetter, LedgerMissing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from tracker_daemon.batch import Batch
    from tracker_daemon.postgres.session import Session

_MOST_KNOWN: Final = 100_000
_MUCH: Final = 2_000
_MOST_IDLE: Final = 5_000
"""Milliseconds between two statements of a transaction."""
_UNREADABLE: Final = "(unreadable message)"


class Moved(TrackerError):  # noqa: N818 - says what is the case
    """The position is not where it was thought to be: the log is to be read from where it is now."""


@dataclass(slots=True)
class Place:
    """Where the owner of a partition stands.

    Attributes:
        producer, lane: of its row in the ledger.
        epoch: the owner's.
        position: the last message applied.
        stamp: when its log took that message, in the log's own words; `None`: not known.
    """

    producer: UUID
    lane: int
    epoch: int
    position: int
    stamp: str | None = None

    def __str__(self) -> str:
        return f"{self.producer}/{self.lane}/{self.epoch}/{self.position}"


@dataclass(frozen=True, slots=True)
class Logged:
    """A message of the log, as the database is to see it.

    Attributes:
        position: its place in the log.
        batch: what it says; `None`: it cannot be read.
        unreadable: why it cannot be read.
        body: the bytes that cannot be read.
        stamp: when the log took it, in the log's own words.
    """

    position: int
    batch: Batch | None
    unreadable: str = ""
    body: bytes = b""
    stamp: str | None = None


@dataclass(slots=True)
class Outcome:
    """What became of some messages.

    Attributes:
        new: batches that were applied.
        duplicates: how many had been applied before.
        unreadable: how many were no batches.
        rows: threads inserted or updated.
        skipped: threads without a row, left alone.
        letters: deltas set aside, each with its batch.
    """

    new: list[Batch] = field(default_factory=list)
    duplicates: int = 0
    unreadable: int = 0
    rows: int = 0
    skipped: int = 0
    letters: list[tuple[Batch, DeadLetter]] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        """Count *other* as well."""
        self.new += other.new
        self.duplicates += other.duplicates
        self.unreadable += other.unreadable
        self.rows += other.rows
        self.skipped += other.skipped
        self.letters += other.letters


class PartitionSink(PostgresSink):
    """Applies messages of one partition's log; used by one task."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._moving: tuple[Place, Logged] | None = None
        self._known: dict[UUID, int] = {}

    async def look(self, place: Place) -> None:
        """Set *place* to where the partition stands.

        Raises:
            SinkFault, SchemaError: the database cannot be asked now.
            Fenced: another owner has it.
            LedgerMissing: its row is gone.
        """
        session = await self._connected()
        try:
            with session.deadline(self._timeout):
                await self._look(session, place)
        except (Fenced, LedgerMissing):
            raise
        except Exception as error:
            raise await self._failed(session, error, "asking where the partition stands") from error

    async def apply_logged(self, place: Place, messages: Sequence[Logged]) -> Outcome:
        """Apply *messages*, which follow *place* without a gap, and move it behind them.

        Raises:
            SinkFault, SchemaError: it could not be done now, or it is not known whether it was: `look` first.
            Moved: the partition stands elsewhere, and *place* says where: read again from there.
            Fenced: another owner has it.
            LedgerMissing: its row is gone.
        """
        session = await self._connected()
        try:
            with session.deadline(self._timeout * 1.1):
                return await self._together(session, place, messages)
        except (Fenced, LedgerMissing, Moved):
            raise
        except Exception as error:
            kind = faults.kind_of(error)
            if session.connection.broken or not (kind == "data" or kind in faults.IN_DOUBT):
                raise await self._failed(session, error, f"applying {len(messages)} messages") from error
            if not await self._rolled_back(session):
                raise await self._failed(session, error, f"applying {len(messages)} messages") from error
        batches = [message.batch for message in messages if message.batch is not None]
        # What waits behind a row that may be bad, or the table: see `PostgresSink`.
        self.following = lambda batch: [delta for each in batches if each is not batch for delta in each.deltas]
        total = Outcome()
        for message in messages:
            total.add(await self._alone(place, message))
        return total

    async def disconnect(self) -> None:
        """Let go of the connection."""
        await self._drop()

    # -- one transaction ---------------------------------------------------------------------------

    async def _together(self, session: Session, place: Place, messages: Sequence[Logged]) -> Outcome:
        # Made ready before the transaction, which holds locks, by where producers stood last; that is looked up in it.
        expected = {m.batch.producer: self._known.get(m.batch.producer, 0) for m in messages if m.batch is not None}
        ready = await self._made_ready(messages, expected)
        await self._begin(session)
        found = await self._move(session, place, messages)
        if (found := {producer: found.get(producer, 0) for producer in expected}) != expected:
            ready = await self._made_ready(messages, found)
        outcome = Outcome(list(ready.outcome.new), ready.outcome.duplicates, ready.outcome.unreadable)
        await self._advance_producers(session, place, ready.producers)
        for batch, rows, parameters in ready.groups:
            sent, merged = await self._merge(session, batch, parameters)
            outcome.rows += merged
            outcome.skipped += rows - sent
        for message in messages:
            if message.batch is None:
                await self._keep_unreadable(session, place, message)
        await session.connection.execute("COMMIT")
        place.position, place.stamp = messages[-1].position, messages[-1].stamp
        if len(self._known) > _MOST_KNOWN:
            self._known.clear()
        self._known |= ready.producers
        return outcome

    async def _made_ready(self, messages: Sequence[Logged], known: dict[UUID, int]) -> _Ready:
        """Return what is written of *messages*; much of it is made in a thread, while other partitions go on."""
        if sum(len(message.batch.deltas) for message in messages if message.batch is not None) < _MUCH:
            return _made_ready(messages, known)
        return await asyncio.get_running_loop().run_in_executor(None, _made_ready, messages, known)

    async def _move(self, session: Session, place: Place, messages: Sequence[Logged]) -> dict[UUID, int]:
        """Move the position; return what is known of the messages' producers."""
        cursor = session.cursor()
        producers = {message.batch.producer for message in messages if message.batch is not None}
        await cursor.execute(
            session.statements["advance_partition"],
            {
                "producer": place.producer,
                "lane": place.lane,
                "epoch": place.epoch,
                "previous": place.position,
                "position": messages[-1].position,
                "stamp": messages[-1].stamp,
                "producers": list(producers),
            },
        )
        row = await cursor.fetchone()
        assert row is not None  # a SELECT of counts
        moved, names, sequences = row
        if not moved:
            await session.connection.rollback()
            await self._look(session, place)
            raise Moved(f"the partition stands at {place.position}")
        return dict(zip(names, sequences, strict=True))

    async def _advance_producers(self, session: Session, place: Place, known: dict[UUID, int]) -> None:
        if known:
            await session.connection.execute(
                session.statements["advance_producers"],
                {"lane": place.lane, "producers": list(known), "sequences": list(known.values())},
            )

    async def _merge(self, session: Session, batch: Batch, parameters: dict[str, str]) -> tuple[int, int]:
        cursor = session.cursor()
        await cursor.execute(session.statements.merging("merge_arrays", batch), parameters)
        row = await cursor.fetchone()
        assert row is not None  # a SELECT of counts
        return row[1], row[2]

    async def _keep_unreadable(self, session: Session, place: Place, message: Logged) -> None:
        value = {"unreadable": b64encode(message.body).decode()}
        await session.connection.execute(
            session.statements["bury"],
            {
                "producer": place.producer,
                "lane": place.lane,
                "sequence": message.position,
                "thread_id": _UNREADABLE,
                "delta": Jsonb(value),
                "sqlstate": "",
                "error": message.unreadable.encode("ascii", "backslashreplace").decode(),
            },
        )

    async def _look(self, session: Session, place: Place) -> None:
        cursor = session.cursor()
        key = {"producer": place.producer, "lane": place.lane}
        await cursor.execute(session.statements["partition_position"], key)
        row = await cursor.fetchone()
        if row is None:
            raise LedgerMissing(str(place.producer), place.lane)
        epoch, place.position, place.stamp = row
        if epoch != place.epoch:
            raise Fenced(str(place.producer), place.lane, place.epoch, epoch)

    # -- one message -------------------------------------------------------------------------------

    async def _alone(self, place: Place, message: Logged) -> Outcome:
        session = await self._connected()
        try:
            try:
                with session.deadline(self._timeout * 1.1):
                    return await self._together(session, place, [message])
            except (Fenced, LedgerMissing, Moved):
                raise
            except Exception as error:
                batch = message.batch
                if batch is None or not faults.may_be_of_a_row(error, session.connection, self._doubts(batch)):
                    raise
            await session.connection.rollback()
            self._moving = place, message
            applied = await self._flush_apart(session, batch)
        except (Fenced, LedgerMissing, Moved):
            raise
        except Exception as error:
            fault = await self._failed(session, error, f"applying the message at {message.position}")
            if fault.kind in faults.IN_DOUBT and not session.connection.broken and message.batch is not None:
                self._in_doubt.count(message.batch)
            raise fault from error
        self._in_doubt.forget(batch)
        place.position, place.stamp = message.position, message.stamp
        letters = [(batch, letter) for letter in applied.dead_letters]
        return Outcome([batch], rows=applied.rows, skipped=applied.skipped, letters=letters)

    async def _advance(self, session: Session, batch: Batch) -> bool:
        assert self._moving is not None
        place, message = self._moving
        await self._move(session, place, [message])
        await self._advance_producers(session, place, {batch.producer: batch.sequence})
        return True

    async def _begin(self, session: Session) -> None:
        await super()._begin(session)
        # An owner that is stopped in the middle holds the position's row: whoever takes over waits no longer than this.
        await session.connection.execute(f"SET LOCAL idle_in_transaction_session_timeout = {_MOST_IDLE}")

    async def _rolled_back(self, session: Session) -> bool:
        with suppress(Exception), session.deadline(self._timeout):  # lost: the first error says it
            await session.connection.rollback()
        return not session.connection.broken


@dataclass(frozen=True, slots=True)
class _Ready:
    """What a transaction writes.

    Attributes:
        outcome: which batches are new.
        producers: where they stand afterwards.
        groups: what goes together: a batch of it (all are alike in what they want with missing rows), how many rows
            it has, and the parameters of the merge.
    """

    outcome: Outcome
    producers: dict[UUID, int]
    groups: list[tuple[Batch, int, dict[str, str]]]


def _made_ready(messages: Sequence[Logged], known: dict[UUID, int]) -> _Ready:
    """Tell new batches from repeats by where their producers stand, and sum the new ones."""
    outcome, known = Outcome(), dict(known)
    groups: list[list[Batch]] = []
    for message in messages:
        batch = message.batch
        if batch is None:
            outcome.unreadable += 1
        elif batch.sequence <= known.get(batch.producer, 0):
            outcome.duplicates += 1
        else:
            known[batch.producer] = batch.sequence
            outcome.new.append(batch)
            if groups and groups[-1][0].create_missing and batch.create_missing:
                groups[-1].append(batch)
            else:
                groups.append([batch])
    sums = ((batches[0], summed(batches)) for batches in groups)
    return _Ready(outcome, known, [(batch, len(deltas), encoding.arrays(deltas)) for batch, deltas in sums])
