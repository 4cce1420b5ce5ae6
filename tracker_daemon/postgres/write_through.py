"""The statements of writing through: one a call, each by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from psycopg import sql

if TYPE_CHECKING:
    from typing import LiteralString

_TEXTS: dict[str, LiteralString] = {
    "ensure": """
        INSERT INTO {table} (thread_id, started_at, last_activity) VALUES (%(thread_id)s, now(), now())
        ON CONFLICT (thread_id) DO NOTHING
    """,
    "turn": """
        UPDATE {table} SET
            turn_count = coalesce(turn_count, 0) + 1,
            agents_used = CASE
                WHEN %(agent_name)s::text IS NULL OR agents_used @> ARRAY[%(agent_name)s::text] THEN agents_used
                ELSE coalesce(agents_used, '{{}}') || ARRAY[%(agent_name)s::text]
            END,
            total_tokens = coalesce(total_tokens, 0) + %(tokens)s,
            total_cost_usd = coalesce(total_cost_usd, 0) + %(cost)s,
            last_activity = now()
        WHERE thread_id = %(thread_id)s
    """,
    "resolve": """
        UPDATE {table} SET resolution_type = %(resolution_type)s, ended_at = now() WHERE thread_id = %(thread_id)s
    """,
}


def statements(schema: str | None, table: str) -> dict[str, sql.Composed]:
    """Return the statements by call, for *table* (found by the search path if *schema* is `None`)."""
    name = sql.Identifier(table) if schema is None else sql.Identifier(schema, table)
    return {key: sql.SQL(text).format(table=name) for key, text in _TEXTS.items()}
