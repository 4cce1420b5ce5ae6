"""One connection for its lifetime: what it can do, its deadlines, and how it ends.

Rules:
1. Every exchange has a deadline on this side, beside the server's `statement_timeout`: a peer that is deaf holds
   nobody. At the deadline the socket is shut down, which makes whatever waits on it fail at once. (Cancelling the
   waiting task would not do: the driver then asks the server to cancel, and waits for that.)
2. Behind a pooler in transaction mode nothing outlives a transaction: no prepared statement, no temporary table.
   A pooler is recognized by the process number it gives, which is not the server's.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import contextmanager, suppress
from math import inf
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql
from psycopg.rows import tuple_row

from tracker_daemon.postgres import schema
from tracker_daemon.postgres.statements import Statements

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tracker_daemon.postgres.connection import Connector


class Session:
    """A checked connection. Make one with `Session.open`.

    Attributes:
        connection: in autocommit.
        statements: for the table that was found.
        pooled: whether a pooler is in between.
        database: the system identifier of the cluster; 0 where the role may not read it.
        may_stage: whether large batches may go by a temporary table: not behind a pooler, nor without the right to it.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self.connection = connection
        self.statements: Statements
        self.pooled = False
        self.may_stage = False
        self.database = 0
        self.overdue: float | None = None
        """Seconds of the deadline that an exchange has passed, and with it the connection."""
        self.aborted = False
        """Whether it was severed by `abort`."""

    @classmethod
    async def open(
        cls,
        connector: Connector,
        table: tuple[str | None, str],
        *,
        timeout: float,  # noqa: ASYNC109
        within: float | None = None,
    ) -> Session:
        """Connect and look at the tables; give up after *within* seconds in all, unless that is `None`.

        Raises:
            SchemaError: the tables will not do; the message says what to run or to alter.
        """
        time = asyncio.get_running_loop().time
        until = inf if within is None else time() + within
        # Before there is a connection nothing can be severed; cancelling asks no server of anything then.
        async with asyncio.timeout(within):
            session = cls(await connector.connect())
        try:
            with session.deadline(min(timeout, until - time())):
                await session._look(*table, timeout=timeout)
        except BaseException as error:
            await session.close()
            if session.overdue is not None:
                raise TimeoutError(f"no answer within {session.overdue:.3g} s") from error
            raise
        return session

    async def _look(
        self,
        schema_name: str | None,
        table: str,
        *,
        timeout: float,  # noqa: ASYNC109
    ) -> None:
        cursor = self.cursor()
        await cursor.execute("SELECT pg_backend_pid()", prepare=False)
        row = await cursor.fetchone()
        self.pooled = row is None or row[0] != self.connection.info.backend_pid
        if self.pooled:
            self.connection.prepare_threshold = None
        else:
            # A server may default to SERIALIZABLE, under which the compare-and-set fails instead of waiting.
            await self.connection.execute("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED")
            await self.connection.execute(self.rules(timeout, local=False))
            # What the server keeps of a client that vanished ends within half a minute, not after hours.
            await self.connection.execute(
                "SET SESSION tcp_keepalives_idle = 15; SET SESSION tcp_keepalives_interval = 5;"
                " SET SESSION tcp_keepalives_count = 3"
            )
        await cursor.execute("SELECT has_database_privilege(current_database(), 'TEMPORARY')", prepare=False)
        self.may_stage = not self.pooled and await cursor.fetchone() == (True,)
        with suppress(psycopg.errors.InsufficientPrivilege):
            await cursor.execute("SELECT system_identifier FROM pg_control_system()", prepare=False)
            identifier = await cursor.fetchone()
            self.database = identifier[0] if identifier else 0
        found = await schema.find_schema(self.connection, schema_name, table)
        await schema.check(self.connection, found, table)
        self.statements = Statements(found, table)

    def cursor(self) -> psycopg.AsyncCursor[tuple[Any, ...]]:
        """Return a cursor whose rows are tuples, whatever the connection was configured for."""
        return self.connection.cursor(row_factory=tuple_row)

    def rules(self, seconds: float, *, local: bool) -> sql.Composed:
        """Return the statements that set what the flush relies on, for the session or for one transaction.

        Deadlines: when the network goes in the middle, the server lets go of the ledger's row by them, which the next
        try waits for. A role or a database may have set any of these to something else.
        """
        whole = max(1, round(seconds * 1_000))
        settings: dict[str, int | str] = {
            "statement_timeout": whole,
            "lock_timeout": max(1, whole // 2),
            "idle_in_transaction_session_timeout": whole,
            "array_nulls": "on",
            "jit": "off",  # the planner cannot know how short the arrays are, and would compile at each flush
        }
        if self.connection.info.server_version >= 170_000:
            settings["transaction_timeout"] = 0
        scope = sql.SQL("LOCAL" if local else "SESSION")
        return sql.SQL("; ").join(
            sql.SQL("SET {} {} = {}").format(scope, sql.Identifier(name), sql.Literal(value))
            for name, value in settings.items()
        )

    @property
    def is_unicode(self) -> bool:
        """Whether the database holds every character."""
        return self.connection.info.parameter_status("server_encoding") == "UTF8"

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Sever the connection when what is inside takes longer than *seconds*."""
        handle = asyncio.get_running_loop().call_later(seconds, self._pass, seconds)
        try:
            yield
        finally:
            handle.cancel()

    def _pass(self, seconds: float) -> None:
        self.overdue = max(seconds, 0.0)
        self.sever()

    def abort(self) -> None:
        """Sever the connection, from any thread: the deadline of a shutdown has passed."""
        self.aborted = True
        self.sever()

    def sever(self) -> None:
        """Shut the socket down, from any thread; what waits on it fails at once."""
        with suppress(Exception):  # closed meanwhile, which is as good
            copy = socket.socket(fileno=os.dup(self.connection.fileno()))
            with copy:
                copy.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """Close the connection."""
        with suppress(Exception):  # it is given up in any case
            await self.connection.close()
