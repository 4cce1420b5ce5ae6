"""`embedded:DIR`: a Postgres of the tracker's own, started with the worker and stopped with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracker_daemon.embedded import EmbeddedPostgres
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.schema import migrate
from tracker_daemon.postgres.sink import PostgresSink

if TYPE_CHECKING:
    from pathlib import Path
    from uuid import UUID

    from tracker_daemon.sink import Opened


class EmbeddedSink(PostgresSink):
    """A `PostgresSink` that starts its server in *directory*, makes the tables, and stops the server at the end.

    A directory whose server runs already is an error that names the process: one tracker, one directory.
    """

    def __init__(self, directory: Path, table: tuple[str | None, str]) -> None:
        self._server = EmbeddedPostgres(directory)
        self._migrated = False
        super().__init__(Connector(lambda: self._server.conninfo), table)

    async def open(self, producer: UUID, lane: int, *, known: Opened | None = None, after: int = 0) -> Opened:
        """See `Sink.open`."""
        if not self._server.running:
            # Blocks the worker's thread for about a second, and nobody else.
            self._server.start()
        if not self._migrated:
            connection = await Connector(self._server.conninfo).connect()
            async with connection:
                await migrate(connection, *self._table)
            self._migrated = True
        return await super().open(producer, lane, known=known, after=after)

    async def aclose(self, producer: UUID, lane: int, *, clean: bool) -> None:
        """See `Sink.aclose`."""
        try:
            await super().aclose(producer, lane, clean=clean)
        finally:  # also when the ledger has something to say, or the deadline has passed
            self._server.stop()
