"""What an operator does beside the flush: make and check the tables, look after dead letters.

Each opens what *database* names (a URL, a conninfo or `embedded:DIR`, whose server runs for as long as it takes), does
one thing, and returns it as plain values; the command line prints them.
"""

from __future__ import annotations

from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import psycopg
from psycopg import sql

from tracker_daemon.errors import SchemaError
from tracker_daemon.postgres import dead_letters, schema
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.session import Session
from tracker_daemon.settings import split_table

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from psycopg import AsyncConnection

    from tracker_daemon.postgres.dead_letters import StoredLetter

Table: TypeAlias = "tuple[str | None, str]"
_PATIENCE = 60.0


async def migrate(database: str, table: str | Table = "conversations", *, create_schema: bool = False) -> list[str]:
    """Create or upgrade the tables; return the steps applied. What `tracker-daemon migrate` does, for a program.

    Args:
        database: a URL, a conninfo or `embedded:DIR`.
        table: the conversations; may be schema.name.
        create_schema: whether to make the schema, too, if it does not exist.

    Raises:
        SchemaError: a table that exists cannot be used, the schema does not exist, or this role may not make tables in
            it; nothing was changed.
        ConfigError: *database* or *table* is none.
        psycopg.Error: the database cannot be reached, or refuses something else.
    """
    where = split_table(table) if isinstance(table, str) else table
    async with _connection(database) as connection:
        try:
            return await schema.migrate(connection, *where, create_schema=create_schema)
        except psycopg.errors.InsufficientPrivilege as error:
            role = sql.Identifier(connection.info.user).as_string()
            place = "DATABASE" if create_schema and "database" in str(error) else "SCHEMA"
            name = connection.info.dbname if place == "DATABASE" else where[0] or "public"
            raise SchemaError(
                f"{error.diag.message_primary}: migrate needs a role that may make tables there. Run it as the owner, "
                f"or, as the owner: GRANT CREATE ON {place} {sql.Identifier(name).as_string()} TO {role}"
            ) from error


async def missing(database: str, table: Table) -> tuple[list[str], str]:
    """Return what a flush by this role would stumble over and which steps are not applied, and what is not known.

    A sentence each. Changes nothing.
    """
    directory = database.removeprefix("embedded:")
    if directory != database and not (Path(directory) / "data" / "PG_VERSION").exists():
        return [f"{directory} holds no database"], ""  # starting the server would make one
    async with _connection(database) as connection:
        name = await schema.find_schema(connection, *table)
        faults = await schema.faults_of(connection, name, table[1])
        faults += await schema.rights_missing(connection, name, table[1])
        steps = await schema.steps_to_apply(connection, name, table[1])
        unknown = f"which steps are applied: {connection.info.user} may not read tracker_migrations" * (steps is None)
        return faults + [f"step {step} is not applied" for step in steps or ()], unknown


async def letters(database: str, table: Table, thread_id: str | None, limit: int) -> tuple[list[StoredLetter], int]:
    """Return dead letters, oldest first, at most *limit*; and how many there are."""
    async with _on_letters(database, table, "SELECT") as session:
        found = await dead_letters.stored(session, thread_id, limit)
        return found, len(found) if len(found) < limit else await dead_letters.count(session, thread_id)


async def retry(database: str, table: Table, thread_id: str | None) -> tuple[int, list[StoredLetter]]:
    """Apply dead letters again; return how many were applied, and those refused again.

    Raises:
        SchemaError: this role may not do it; the message says what to grant. What is not applied is as it was.
    """
    async with _on_letters(database, table, "SELECT, UPDATE, DELETE", merge=True) as session:
        return await dead_letters.retry(session, thread_id)


async def drop(database: str, table: Table, thread_id: str | None) -> int:
    """Delete dead letters for good; return how many."""
    async with _on_letters(database, table, "SELECT, DELETE") as session:
        return await dead_letters.drop(session, thread_id)


@asynccontextmanager
async def running_conninfo(database: str) -> AsyncIterator[str]:
    """Yield the conninfo of what *database* names; of `embedded:DIR` the server runs meanwhile."""
    with ExitStack() as stack:
        scheme, _, directory = database.partition(":")
        if scheme == "embedded":
            from tracker_daemon.embedded import EmbeddedPostgres  # noqa: PLC0415 - an extra that others need not have

            yield stack.enter_context(EmbeddedPostgres(directory)).conninfo
        else:
            yield database


@asynccontextmanager
async def _connection(database: str) -> AsyncIterator[AsyncConnection[Any]]:
    async with running_conninfo(database) as conninfo, await Connector(conninfo).connect() as connection:
        yield connection


@asynccontextmanager
async def opened_session(database: str, table: Table) -> AsyncIterator[Session]:
    """Yield a checked connection."""
    async with running_conninfo(database) as conninfo:
        session = await Session.open(Connector(conninfo), table, timeout=_PATIENCE)
        try:
            yield session
        finally:
            await session.close()


@asynccontextmanager
async def _on_letters(database: str, table: Table, rights: str, *, merge: bool = False) -> AsyncIterator[Session]:
    """Yield a checked connection for what needs *rights* on the dead letters, and to *merge* those of a flush."""
    async with opened_session(database, table) as session:
        try:
            yield session
        except psycopg.errors.InsufficientPrivilege as error:
            names = {**session.statements.names, "role": sql.Identifier(session.connection.info.user)}
            grants = [f"GRANT {rights} ON {{dead_letters}} TO {{role}}"]
            if merge:
                grants.append("GRANT SELECT, INSERT, UPDATE ON {table} TO {role}")
            what = sql.SQL("; ".join(grants)).format(**names).as_string()
            raise SchemaError(f"{error.diag.message_primary}: run it as the owner, or, as the owner: {what}") from error
