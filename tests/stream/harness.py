"""A consumer within the test's own process."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import psycopg

from tracker_daemon.clock import SystemClock
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.leases import Leases
from tracker_daemon.postgres.partitions import PartitionSink
from tracker_daemon.stream.address import address
from tracker_daemon.stream.consumer import Consumer
from tracker_daemon.stream.partition import Following

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self
    from uuid import UUID

TABLE = (None, "conversations")
LEASE = 3.0


class Consuming:
    """A consumer in a thread of its own, with a loop of its own."""

    def __init__(
        self, url: str, database: str, *, lease: float = LEASE, table: str = TABLE[1], **following: Any
    ) -> None:
        self._url, self._database, self._lease, self._table = url, database, lease, (None, table)
        self._following = Following(**{"window": 0.05, "look_every": 0.2, **following})
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.errors: list[BaseException] = []
        self.consumer: Consumer

    async def _run(self) -> None:
        where = address(self._url)

        def leases(partitions: int, name: UUID) -> Leases:
            return Leases(
                Connector(self._database),
                self._table,
                stream=where.name,
                partitions=partitions,
                consumer=name,
                lease=self._lease,
            )

        self.consumer = Consumer(
            where,
            leases,
            lambda: PartitionSink(Connector(self._database), self._table),
            SystemClock(),
            self._following,
            lease=self._lease,
            note=self.errors.append,
        )
        self._loop = asyncio.get_running_loop()
        self._ready.set()
        await self.consumer.run()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self.consumer.stop)
        self._thread.join(60)
        assert not self._thread.is_alive()


def fail_rows_of_bad(database: str) -> None:
    """Make every row with the agent `bad` fail by an error that may be the table's as well: it is in doubt."""
    with psycopg.connect(database) as connection:
        connection.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " IF new.agents_used @> '{bad}' THEN PERFORM no_such_function(); END IF; RETURN new; END $$"
        )
        connection.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON conversations FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
