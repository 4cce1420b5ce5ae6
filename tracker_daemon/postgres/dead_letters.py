"""Deltas that the database will never take, kept with their reason."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from psycopg.types.json import Jsonb

if TYPE_CHECKING:
    from tracker_daemon.batch import Batch
    from tracker_daemon.delta import ThreadDelta
    from tracker_daemon.postgres.session import Session
    from tracker_daemon.sink import DeadLetter

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _instant(at: int | None) -> str | None:
    return None if at is None else (_EPOCH + timedelta(microseconds=at)).isoformat()


def as_json(delta: ThreadDelta) -> dict[str, Any]:
    """Return *delta* as JSON: instants in RFC 3339, numbers that may exceed a double as strings."""
    return {
        "thread_id": delta.thread_id,
        "ensures": delta.ensures,
        "turns": delta.turns,
        "resolves": delta.resolves,
        "tokens": str(delta.tokens),
        "cost": format(delta.cost, "f"),
        "agents": list(delta.agents),
        "first_at": _instant(delta.first_at),
        "last_turn_at": _instant(delta.last_turn_at),
        "resolution_type": delta.resolution_type,
        "resolved_at": _instant(delta.resolved_at),
    }


async def bury(session: Session, batch: Batch, letters: list[DeadLetter]) -> None:
    """Store *letters* in the transaction of their batch."""
    if not letters:
        return
    cursor = session.cursor()
    await cursor.executemany(
        session.statements["bury"],
        [
            {
                "producer": batch.producer,
                "lane": batch.lane,
                "sequence": batch.sequence,
                "thread_id": letter.delta.thread_id,
                "delta": Jsonb(as_json(letter.delta)),
                "sqlstate": letter.sqlstate,
                "error": letter.error,
            }
            for letter in letters
        ],
    )
