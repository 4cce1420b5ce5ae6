"""Batches of many producers in one transaction.

Rules:
1. Each producer's ledger row moves in the transaction of its data, as in `sink`: that a batch came before is told by
   its own row, whoever brings it and with whatever it is brought.
2. Deltas of one thread are summed over the batches. Where that could matter (bad data, `create_missing=False`) each
   batch goes alone; a fault that may be of a batch's own row is the answer to that batch, and to no other.
"""

from __future__ import annotations

from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tracker_daemon.batch import Batch
from tracker_daemon.errors import Fenced, TrackerError
from tracker_daemon.postgres import encoding, faults
from tracker_daemon.postgres.sink import PostgresSink
from tracker_daemon.sink import Applied, LedgerMissing, LedgerRegressed, Opened, SinkFault

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tracker_daemon.delta import ThreadDelta
    from tracker_daemon.postgres.session import Session


class ManySink(PostgresSink):
    """A `PostgresSink` for batches of many producers."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._registered: dict[tuple[UUID, int], float] = {}
        """When each client without lives was seen last; one that was not for a day may have been collected."""

    async def apply_many(self, batches: Sequence[Batch]) -> list[Applied | TrackerError]:
        """Apply *batches*, at most one of each (producer, lane); return for each what became of it.

        Raises:
            SinkFault: nothing can be said of any of them; they come again.
        """
        await self._register(batches)
        self.following = lambda batch: [delta for each in batches if each is not batch for delta in each.deltas]
        answers: dict[int, Applied | TrackerError] = {}
        # What failed alone before would only drag the others along: it goes alone again, and last.
        joined = {
            number: batch
            for number, batch in enumerate(batches)
            if batch.create_missing and not self._in_doubt.is_suspect(batch)
        }
        while len(joined) > 1:
            moved = await self._together(list(joined.values()))
            if moved is None:
                break  # bad data among them
            stayed = {number: batch for number, batch in joined.items() if (batch.producer, batch.lane) not in moved}
            if not stayed:
                answers |= {number: Applied(rows=len(batch.deltas)) for number, batch in joined.items()}
                break
            for number, batch in stayed.items():
                # Found done, or refused: its ledger says which, and nothing of it is written here.
                answers[number] = await self._alone(batch)
                del joined[number]
        left = [(number, batch) for number, batch in enumerate(batches) if number not in answers]
        faulty = list[SinkFault]()
        for number, batch in sorted(left, key=lambda each: self._in_doubt.is_suspect(each[1])):
            # Nothing goes through: it is the table, and need not be asked for each of them.
            if len(faulty) >= _FAULTY and not any(isinstance(answer, Applied) for answer in answers.values()):
                answers[number] = faulty[-1]
                continue
            answer = answers[number] = await self._alone(batch)
            if isinstance(answer, SinkFault):
                faulty.append(answer)
        return [answers[number] for number in range(len(batches))]

    async def mark_closed(self, producer: UUID, lane: int, last: Opened) -> None:
        """A producer has ended, cleanly: its row may be collected sooner."""
        self._last.pop((producer, lane), None)
        with suppress(Fenced, LedgerMissing, LedgerRegressed):  # the producer is gone: nobody to tell
            await self._mark_closed(Batch(producer, lane, last.epoch, last.applied_sequence, ()))

    async def probe(self) -> None:
        """Connect if need be, and look at the tables.

        Raises:
            SinkFault, SchemaError: nothing could be written now; the message says why.
        """
        session = await self._connected()
        try:
            with session.deadline(_PROBE):
                await session.connection.execute(session.statements["position"], {"producer": _NOBODY, "lane": 0})
        except Exception as error:
            raise await self._failed(session, error, "asking the database") from error

    async def disconnect(self) -> None:
        """Let go of the connection."""
        await self._drop()

    async def _alone(self, batch: Batch) -> Applied | TrackerError:
        await self._connected()  # what is wrong here, or with the tables as they are found, is wrong for all of them
        try:
            return await self.apply(batch)
        except LedgerMissing as error:
            # Told once: what it brings next is registered anew.
            self._registered.pop((batch.producer, batch.lane), None)
            return error
        except (Fenced, LedgerRegressed) as error:
            return error
        except SinkFault as fault:
            if fault.kind in faults.IN_DOUBT:
                return fault  # it may be of a row of this batch: the others are not answered with it
            raise

    async def _register(self, batches: Sequence[Batch]) -> None:
        now, seen = monotonic(), self._registered
        clients = [(batch.producer, batch.lane) for batch in batches if batch.epoch == 0]
        new = [client for client in clients if client not in seen or now - seen[client] >= _DAY]
        if not new:
            seen.update(dict.fromkeys(clients, now))
            return
        session = await self._connected()
        try:
            with session.deadline(self._timeout):
                await session.connection.execute(
                    session.statements["register"],
                    {"producers": [producer for producer, _ in new], "lanes": [lane for _, lane in new]},
                )
        except Exception as error:
            raise await self._failed(session, error, "registering clients") from error
        if len(seen) > _KNOWN:
            seen.clear()
        seen.update(dict.fromkeys(clients, now))

    async def _together(self, batches: list[Batch]) -> set[tuple[UUID, int]] | None:
        """Try one transaction; return whose ledger moved: of all, or nothing was written. `None`: bad data."""
        session = await self._connected()
        deltas = summed(batches)
        try:
            with session.deadline(self._timeout * 1.1):
                return await self._transaction(session, batches, deltas)
        except Exception as error:
            kind = faults.kind_of(error)
            if (kind == "data" or kind in faults.IN_DOUBT) and await self._rolled_back(session):
                return None
            raise await self._failed(session, error, f"flushing {len(batches)} batches") from error

    async def _rolled_back(self, session: Session) -> bool:
        if not session.connection.broken:
            with (
                suppress(Exception),
                session.deadline(self._timeout),
            ):  # the connection is lost: the first error says it
                await session.connection.rollback()
        return not session.connection.broken

    async def _transaction(
        self, session: Session, batches: list[Batch], deltas: list[ThreadDelta]
    ) -> set[tuple[UUID, int]]:
        cursor = session.cursor()
        await self._begin(session)
        await cursor.execute(
            session.statements["advance_many"],
            {
                "producers": [batch.producer for batch in batches],
                "lanes": [batch.lane for batch in batches],
                "epochs": [batch.epoch for batch in batches],
                "sequences": [batch.sequence for batch in batches],
            },
        )
        moved = {(row[0], row[1]) for row in await cursor.fetchall()}
        if len(moved) < len(batches):
            await session.connection.rollback()
            return moved
        await cursor.execute(session.statements["merge_arrays"], encoding.arrays(deltas))
        await session.connection.execute("COMMIT")
        return moved


_FAULTY = 3
_KNOWN = 100_000
_DAY = 86_400.0
_PROBE = 5.0
_NOBODY = UUID(int=0)


def summed(batches: Sequence[Batch]) -> list[ThreadDelta]:
    """Return one delta a thread, the batches' own added up in their order."""
    found: dict[str, ThreadDelta] = {}
    for batch in batches:
        for delta in batch.deltas:
            before = found.get(delta.thread_id)
            found[delta.thread_id] = delta if before is None else before.merge(delta)
    return list(found.values())
