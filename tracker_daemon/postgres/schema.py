"""The tables: making them, and finding out whether those that exist will do.

Rules:
1. A table of conversations that exists is used as it is, whatever other columns it has.
2. Migrations are numbered, each applied once in the transaction that records it, under one advisory lock: running
   twice, or twice at once, changes nothing.
"""

from __future__ import annotations

import re
from shlex import quote
from typing import TYPE_CHECKING, Any, Final

from psycopg import sql
from psycopg.rows import tuple_row

from tracker_daemon.errors import SchemaError
from tracker_daemon.postgres.statements import Statements, migrations

if TYPE_CHECKING:
    from psycopg import AsyncConnection

COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "thread_id": ("text", "character varying"),
    "started_at": ("timestamp with time zone",),
    "last_activity": ("timestamp with time zone",),
    "turn_count": ("integer", "bigint"),
    "agents_used": ("text[]",),
    "total_tokens": ("bigint", "integer"),
    "total_cost_usd": ("numeric", "double precision"),
    "resolution_type": ("text", "character varying"),
    "ended_at": ("timestamp with time zone",),
}
LEDGER_COLUMNS: Final = (
    "producer",
    "lane",
    "epoch",
    "applied_sequence",
    "opened_at",
    "updated_at",
    "closed_at",
)
DEAD_LETTER_COLUMNS: Final = (
    "producer",
    "lane",
    "sequence",
    "thread_id",
    "delta",
    "sqlstate",
    "error",
    "at",
)
WRITER_RIGHTS: Final = (
    ("SELECT", "INSERT", "UPDATE"),
    ("SELECT", "INSERT", "UPDATE", "DELETE"),
    ("SELECT", "INSERT"),
)
"""What a flush needs on the conversations, on the ledger and on the dead letters."""
_PLAIN: Final = re.compile(r"[a-z_][a-z0-9_$]*")
_LOCK: Final = 0x7472_6163_6B65_7264  # "trackerd": one migration at a time in a database


async def find_schema(connection: AsyncConnection[Any], schema: str | None, table: str) -> str:
    """Return the schema of *table*: the given one, the one where the search path finds it, or the first of the path."""
    if schema is not None:
        return schema
    cursor = connection.cursor(row_factory=tuple_row)
    await cursor.execute(
        "SELECT coalesce((SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE c.oid = to_regclass(%s)), current_schema())",
        [sql.Identifier(table).as_string(connection)],
    )
    row = await cursor.fetchone()
    if row is None or row[0] is None:
        raise SchemaError("the search_path names no schema that exists; qualify the table (table='schema.name')")
    return str(row[0])


async def faults_of(connection: AsyncConnection[Any], schema: str, table: str) -> list[str]:
    """Return what is missing or of another type, a sentence each; empty when the flush can work."""
    found: list[str] = []
    columns = await _columns(connection, schema, table)
    if columns is None:
        found.append(f"table {schema}.{table} does not exist")
    else:
        for name, types in COLUMNS.items():
            wanted = " or ".join(types)
            if name not in columns:
                found.append(f"column {schema}.{table}.{name} is missing; it must be {wanted}")
            elif columns[name] not in types:
                found.append(f"column {schema}.{table}.{name} is {columns[name]}; it must be {wanted}")
        found += [
            f"column {schema}.{table}.{name} is NOT NULL and has no default: no row can be made"
            for name in await _columns_without_value(connection, schema, table)
            if name not in COLUMNS
        ]
        if not found and not await _has_unique_thread_id(connection, schema, table):
            found.append(
                f"table {schema}.{table} has no primary key or unique index, not deferrable, on (thread_id) alone"
            )
    for name, needed in (("tracker_ledger", LEDGER_COLUMNS), ("tracker_dead_letters", DEAD_LETTER_COLUMNS)):
        columns = await _columns(connection, schema, name)
        if columns is None:
            found.append(f"table {schema}.{name} does not exist")
        else:
            found += [f"column {schema}.{name}.{c} is missing" for c in needed if c not in columns]
    return found


async def rights_missing(connection: AsyncConnection[Any], schema: str, table: str) -> list[str]:
    """Return which rights this role lacks for the flush on the tables that exist, a sentence each, with the mend."""
    role, found = connection.info.user, []
    cursor = connection.cursor(row_factory=tuple_row)
    for name, needed in zip((table, "tracker_ledger", "tracker_dead_letters"), WRITER_RIGHTS, strict=True):
        await cursor.execute(
            # Of some columns will do, where it is given for columns; DELETE is of tables alone.
            "SELECT r FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace,"
            " unnest(%s::text[]) WITH ORDINALITY AS needed (r, i) WHERE n.nspname = %s AND c.relname = %s"
            " AND NOT CASE r WHEN 'DELETE' THEN has_table_privilege(c.oid, r)"
            " ELSE has_any_column_privilege(c.oid, r) END"
            " ORDER BY i",
            [list(needed), schema, name],
        )
        if lacking := ", ".join(row[0] for row in await cursor.fetchall()):
            where, who = sql.Identifier(schema, name).as_string(), sql.Identifier(role).as_string()
            found.append(f"{role} lacks rights on {schema}.{name}; as the owner: GRANT {lacking} ON {where} TO {who}")
    return found


async def steps_to_apply(connection: AsyncConnection[Any], schema: str, table: str) -> list[str] | None:
    """Return the migrations that are not recorded as applied; `None` if this role may not read what is."""
    done: set[int] = set()
    if await _columns(connection, schema, "tracker_migrations") is not None:
        if not await _may_read(connection, schema, "tracker_migrations"):
            return None
        done = await _done(connection, schema, table)
    return [f"{number:04}_{name}" for number, name, _ in migrations() if number not in done]


async def _may_read(connection: AsyncConnection[Any], schema: str, table: str) -> bool:
    cursor = connection.cursor(row_factory=tuple_row)
    name = sql.Identifier(schema, table).as_string(connection)
    await cursor.execute("SELECT has_table_privilege(%s, 'SELECT')", [name])
    return await cursor.fetchone() == (True,)


async def _done(connection: AsyncConnection[Any], schema: str, table: str) -> set[int]:
    names = Statements(schema, table).names
    cursor = connection.cursor(row_factory=tuple_row)
    await cursor.execute(sql.SQL("SELECT number FROM {migrations} WHERE conversations = %s").format(**names), [table])
    return {row[0] for row in await cursor.fetchall()}


async def check(connection: AsyncConnection[Any], schema: str, table: str) -> None:
    """Raise `SchemaError` naming everything that the flush would stumble over."""
    found = await faults_of(connection, schema, table)
    if found:
        raise SchemaError(schema_message(found, schema, table))


def schema_message(found: list[str], schema: str, table: str) -> str:
    """Return what is wrong and what to do about it."""
    parts = [part if _PLAIN.fullmatch(part) else sql.Identifier(part).as_string() for part in (schema, table)]
    option = "" if parts == ["public", "conversations"] else f" --table {quote('.'.join(parts))}"
    mends = []
    if any(not each.endswith("does not exist") for each in found):
        mends.append("alter what exists by hand")
    if any(each.endswith("does not exist") for each in found):
        mends.append(f"run `tracker-daemon migrate --database URL{option}`")
    return f"{'; '.join(found)}. To mend it: {', then '.join(mends)}"


async def migrate(
    connection: AsyncConnection[Any], schema: str | None, table: str, *, create_schema: bool = True
) -> list[str]:
    """Create or upgrade the tables in one transaction; return the names of the steps that were applied.

    Raises:
        SchemaError: a table that exists cannot be used, or the schema does not exist and is not to be created; nothing
            was changed.
    """
    async with connection.transaction():
        cursor = connection.cursor(row_factory=tuple_row)
        await cursor.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
        schema = await find_schema(connection, schema, table)
        names = Statements(schema, table).names
        applied: list[str] = []
        if not await _schema_exists(connection, schema):
            if not create_schema:
                raise SchemaError(
                    f"schema {schema} does not exist: correct the table's name, or have it made: --create-schema"
                )
            applied.append(f"schema {schema}")
            # Asked first: IF NOT EXISTS wants the right to create even where nothing is created.
            await cursor.execute(sql.SQL("CREATE SCHEMA {schema}").format(**names))
        await cursor.execute(
            sql.SQL(
                "CREATE TABLE IF NOT EXISTS {migrations} (conversations text NOT NULL, number integer NOT NULL,"
                " name text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now(),"
                " PRIMARY KEY (conversations, number))"
            ).format(**names)
        )
        done = await _done(connection, schema, table)
        for number, name, text in migrations():
            if number not in done or number == 1:
                # The first only creates what is missing; it also brings back a table that was dropped.
                await cursor.execute(sql.SQL(text).format(**names))
            if number not in done:
                await cursor.execute(
                    sql.SQL("INSERT INTO {migrations} (conversations, number, name) VALUES (%s, %s, %s)").format(
                        **names
                    ),
                    [table, number, name],
                )
                applied.append(f"{number:04}_{name}")
        await check(connection, schema, table)
    return applied


async def _schema_exists(connection: AsyncConnection[Any], schema: str) -> bool:
    cursor = connection.cursor(row_factory=tuple_row)
    await cursor.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", [schema])
    return await cursor.fetchone() is not None


async def _columns(connection: AsyncConnection[Any], schema: str, table: str) -> dict[str, str] | None:
    cursor = connection.cursor(row_factory=tuple_row)
    await cursor.execute(
        # quote_all_identifiers, where it is on, reaches into format_type.
        "SELECT a.attname, replace(format_type(a.atttypid, NULL), '\"', '')"
        " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
        " WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p', 'f', 'v')",
        [schema, table],
    )
    rows = await cursor.fetchall()
    return {row[0]: row[1] for row in rows if row[0] is not None} if rows else None


async def _columns_without_value(connection: AsyncConnection[Any], schema: str, table: str) -> list[str]:
    cursor = connection.cursor(row_factory=tuple_row)
    await cursor.execute(
        "SELECT a.attname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid"
        " JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped"
        " AND a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' ORDER BY a.attnum",
        [schema, table],
    )
    return [row[0] for row in await cursor.fetchall()]


async def _has_unique_thread_id(connection: AsyncConnection[Any], schema: str, table: str) -> bool:
    cursor = connection.cursor(row_factory=tuple_row)
    await cursor.execute(
        "SELECT 1 FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid"
        " JOIN pg_namespace n ON n.oid = c.relnamespace"
        " JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]"
        " WHERE n.nspname = %s AND c.relname = %s AND i.indisunique AND i.indisvalid"
        " AND i.indimmediate AND i.indnkeyatts = 1 AND i.indpred IS NULL AND i.indexprs IS NULL"
        " AND a.attname = 'thread_id'",
        [schema, table],
    )
    return await cursor.fetchone() is not None
