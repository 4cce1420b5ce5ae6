"""The semantics to hold: the statements of the tracker that writes through, one a call, with times as parameters.

Rules:
1. The three statements are those of the code that this package replaces; `NOW()` has become `%(now)s`, and the
   parameter in `IS NOT NULL` has a cast, without which Postgres cannot tell its type.
2. Costs are passed as the decimal that counts: `repr` of a float.
3. Calls are applied one by one, in the order of the list.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeAlias

from psycopg import sql

from tracker_daemon.generation import ENSURE, RESOLVE, method_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    import psycopg

    from tracker_daemon.generation import Record

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_ENSURE = """
INSERT INTO {table}
    (thread_id, started_at, last_activity)
VALUES
    (%(thread_id)s, %(now)s, %(now)s)
ON CONFLICT (thread_id) DO NOTHING
"""

_RECORD_TURN = """
UPDATE {table}
SET
    turn_count = turn_count + 1,
    agents_used = CASE
        WHEN %(agent_name)s::text IS NOT NULL AND NOT (agents_used @> ARRAY[%(agent_name)s]::text[])
        THEN agents_used || ARRAY[%(agent_name)s]::text[]
        ELSE agents_used
    END,
    total_tokens = total_tokens + %(tokens)s,
    total_cost_usd = total_cost_usd + %(cost)s,
    last_activity = %(now)s
WHERE thread_id = %(thread_id)s
"""

_RESOLVE = """
UPDATE {table}
SET
    resolution_type = %(resolution_type)s,
    ended_at = %(now)s
WHERE thread_id = %(thread_id)s
"""

COLUMNS = (
    "started_at",
    "last_activity",
    "turn_count",
    "agents_used",
    "total_tokens",
    "total_cost_usd",
    "resolution_type",
    "ended_at",
)
Row: TypeAlias = "tuple[Any, ...]"


def instant(nanoseconds: int) -> datetime:
    """Return the microsecond, as Postgres keeps it, of a call's time stamp."""
    return EPOCH + timedelta(microseconds=nanoseconds // 1_000)


def _statement(record: Record) -> tuple[str, dict[str, Any]]:
    parameters: dict[str, Any] = {"thread_id": record[0], "now": instant(record[-1])}
    if method_of(record) == ENSURE:
        return _ENSURE, parameters
    if method_of(record) == RESOLVE:
        return _RESOLVE, {**parameters, "resolution_type": record[1]}
    _, agent_name, tokens, cost, _ = record
    # A Python int of any size, like a float, is passed as the decimal that it counts as.
    exact = Decimal(repr(cost)) if isinstance(cost, float) else Decimal(cost)
    return _RECORD_TURN, {**parameters, "agent_name": agent_name, "tokens": tokens, "cost": exact}


def identifier(table: str) -> sql.Identifier:
    """Return *table*, `name` or `schema.name`, as SQL."""
    return sql.Identifier(*table.split("."))


def write_through(connection: psycopg.Connection[Any], table: str, records: Iterable[Record]) -> None:
    """Apply *records* to *table* one by one, as the reference does."""
    name = identifier(table)
    with connection.pipeline():
        for record in records:
            text, parameters = _statement(record)
            connection.execute(sql.SQL(text).format(table=name), parameters)


def rows(connection: psycopg.Connection[Any], table: str) -> dict[str, Row]:
    """Return every row of *table* by thread id, in the order of `COLUMNS`."""
    columns = sql.SQL(", ").join(map(sql.Identifier, COLUMNS))
    found = connection.execute(sql.SQL("SELECT thread_id, {} FROM {}").format(columns, identifier(table)))
    return {row[0]: tuple(row[1:]) for row in found}
