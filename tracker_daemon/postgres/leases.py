"""Who reads which partition of a stream, by the database's clock.

Rules:
1. A lease says who should read a partition; that nobody else can write is the position's epoch, which a claim raises.
2. A position that should be there and is not, or is of another stream, is refused: never begun anew, never guessed.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, UUID, uuid5

from tracker_daemon.errors import SchemaError, TrackerError
from tracker_daemon.postgres.partitions import Place
from tracker_daemon.postgres.sink import PostgresSink

if TYPE_CHECKING:
    from tracker_daemon.postgres.session import Session


@dataclass(frozen=True, slots=True)
class Standing:
    """Who reads what, as the database has it now.

    Attributes:
        owned: partitions of this consumer.
        free: partitions of nobody.
        members: every consumer that is there, in one order for all.
    """

    owned: frozenset[int]
    free: tuple[int, ...]
    members: tuple[UUID, ...]


class Leases(PostgresSink):
    """The leases of one stream; used by one task.

    Args:
        stream: its name.
        partitions: how many.
        consumer: this one.
        lease: seconds for which a claim holds without being renewed.
    """

    def __init__(
        self, *arguments: Any, stream: str, partitions: int, consumer: UUID, lease: float, **settings: Any
    ) -> None:
        super().__init__(*arguments, **settings)
        self._names = {"stream": stream, "partitions": partitions, "consumer": consumer, "lease": lease}
        self._stream = stream

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection that `abort` would sever."""
        return self._session is not None

    async def prepare(self) -> None:
        """See that there is a row for each partition.

        Raises:
            SchemaError: the tables are not there.
        """
        await self._execute("partition_rows")

    async def beat(self) -> Standing:
        """Say that this consumer is there, renew its leases, and return who reads what.

        Raises:
            SchemaError: the others read the stream into another table; it says what to do.
        """
        await self.prepare()  # rows that somebody has truncated come back
        if (words := await self.other_table()) is not None:
            raise SchemaError(words)
        await self._execute("lease_beat")
        owned = await self._execute("lease_renew")
        free = await self._execute("lease_free")
        members = await self._execute("lease_members")
        return Standing(
            frozenset(row[0] for row in owned), tuple(row[0] for row in free), tuple(row[0] for row in members)
        )

    async def other_table(self) -> str | None:
        """Return what is said of a stream that is read into another table of the schema; `None`: it is not."""
        for (table,) in await self._execute("partition_tables"):
            return (
                f"the stream {self._stream} is read into the table {table}: tables of one schema share its position, "
                "and each would get a part. Give --table as the others have it, or one in a schema of its own; if "
                "the table was renamed: tracker-daemon stream adopt --stream URL --database URL --table TABLE"
            )
        return None

    async def collect(self) -> None:
        """Forget producers that are gone."""
        await self._execute("collect")

    async def claim(self, partition: int, lane: int, created: str) -> Place | None:
        """Become the owner of a partition; `None`: another one was faster.

        Raises:
            SchemaError: its position is of an earlier stream of that name, or is gone; it says what to do.
        """
        session = await self._connected()
        names = self._filled(session, partition=partition, created=created)
        producer = self._producer(created)
        try:
            with session.deadline(self._timeout):
                async with session.connection.transaction():
                    cursor = session.cursor()
                    await cursor.execute(session.statements["lease_claim"], names)
                    row = await cursor.fetchone()
                    if row is None:
                        return None
                    before = row[0]
                    if before is not None and before != created:
                        raise SchemaError(
                            f"partition {partition} of the stream {self._stream} was made {created}, the database has "
                            f"applied one made {before}: it was deleted and made again, or these are other servers. "
                            "What the old one held and was not applied is not in the new one. To go on with it: "
                            "tracker-daemon stream adopt --stream URL --database URL"
                        )
                    await cursor.execute(session.statements["lease_created"], names)
                    where = {"producer": producer, "lane": lane, "known": before is not None}
                    await cursor.execute(session.statements["take_position"], where)
                    row = await cursor.fetchone()
                    if row is None:
                        raise SchemaError(
                            f"the position of partition {partition} of the stream {self._stream} is gone from "
                            "tracker_ledger, which was truncated. What of the log was applied cannot be known; to "
                            "apply all that is still in it, and what was applied already by producers that the ledger "
                            "does not know once more: tracker-daemon stream adopt --stream URL --database URL"
                        )
                    return Place(producer, lane, *row)
        except SchemaError:
            raise
        except Exception as error:
            raise await self._failed(session, error, f"claiming partition {partition}") from error

    async def release(self, partition: int) -> None:
        """Give a partition up."""
        await self._execute("lease_release", partition=partition)

    async def adopt(self, partition: int, lane: int, created: str, first: int, *, again: bool = False) -> None:
        """Take a partition as it is now, with a log that begins at *first*, whatever it was when it was read last.

        Args:
            partition: which.
            lane: its lane.
            created: when its log was made.
            first: where that begins.
            again: from its first message, although there is a position: that is of another log.
        """
        where = {"producer": self._producer(created), "lane": lane, "position": first - 1, "again": again}
        await self._execute("adopt_position", **where)
        await self._execute("lease_created", partition=partition, created=created)

    async def places(self, partitions: dict[int, tuple[int, str]]) -> dict[int, Place]:
        """Return how far each partition is applied, where that is known; they are given by lane and creation."""
        found: dict[int, Place] = {}
        for partition, (lane, created) in partitions.items():
            producer = self._producer(created)
            for row in await self._execute("partition_position", producer=producer, lane=lane):
                found[partition] = Place(producer, lane, *row)
        return found

    async def creations(self) -> dict[int, tuple[str | None, bool]]:
        """Return of which creation of the stream each partition's position is, and whether a consumer reads it now."""
        return {row[0]: (row[1], row[2]) for row in await self._execute("partition_created")}

    def _producer(self, created: str) -> UUID:
        return uuid5(NAMESPACE_URL, f"nats:{self._stream}/{created}")

    async def leave(self) -> None:
        """Say that this consumer goes, and let go of the connection."""
        with suppress(TrackerError):  # the leases end by themselves
            await self._execute("lease_leave")
        await self._drop()

    async def disconnect(self) -> None:
        """Let go of the connection."""
        await self._drop()

    def _filled(self, session: Session, **more: Any) -> dict[str, Any]:
        return {**self._names, "conversations": session.statements.table, **more}

    async def _execute(self, name: str, **more: Any) -> list[tuple[Any, ...]]:
        session = await self._connected()
        try:
            with session.deadline(self._timeout):
                cursor = session.cursor()
                await cursor.execute(session.statements[name], self._filled(session, **more))
                return await cursor.fetchall() if cursor.description else []
        except Exception as error:
            fault = await self._failed(session, error, "looking after the leases")
            if getattr(error, "sqlstate", None) in ("42P01", "42703"):
                raise SchemaError(f"{fault}. To mend it: run `tracker-daemon migrate --database URL`") from error
            raise fault from error
