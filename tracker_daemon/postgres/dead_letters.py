"""Deltas that the database would not take, kept with their reason until somebody decides.

Rules:
1. A letter is written in the transaction of its batch: it is neither lost nor applied beside it.
2. A retry takes the letter and merges its delta in one transaction: it is applied once, or stays.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.types.json import Jsonb

from tracker_daemon.delta import ThreadDelta
from tracker_daemon.postgres import encoding, faults
from tracker_daemon.sink import DeadLetter

if TYPE_CHECKING:
    from tracker_daemon.batch import Batch
    from tracker_daemon.postgres.session import Session

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def _instant(at: int | None) -> str | None:
    return None if at is None else (_EPOCH + timedelta(microseconds=at)).isoformat()


def _microseconds(text: str | None) -> int | None:
    return None if text is None else (datetime.fromisoformat(text) - _EPOCH) // _MICROSECOND


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


def from_json(value: dict[str, Any]) -> ThreadDelta:
    """Return the delta that `as_json` wrote."""
    if "escaped" in value:
        value = json.loads(value["escaped"])
    delta = ThreadDelta(value["thread_id"], _microseconds(value["first_at"]) or 0)
    delta.ensures, delta.turns, delta.resolves = value["ensures"], value["turns"], value["resolves"]
    delta.tokens = int(value["tokens"])
    delta.pay(Decimal(value["cost"]))
    delta.use(value["agents"])
    delta.last_turn_at = _microseconds(value["last_turn_at"])
    delta.resolution_type = value["resolution_type"]
    delta.resolved_at = _microseconds(value["resolved_at"])
    return delta


def _storable(session: Session, text: str) -> str:
    """Return *text*, or where the database cannot hold every character, its ASCII with the rest escaped, one to one."""
    if session.is_unicode:
        return text
    return text.replace("\\", "\\\\").encode("ascii", "backslashreplace").decode()


def _stored_delta(session: Session, delta: ThreadDelta) -> Jsonb:
    value = as_json(delta)
    # jsonb turns \u escapes into characters; inside a string they stay what they are.
    return Jsonb(value if session.is_unicode else {"escaped": json.dumps(value)})


async def bury(session: Session, batch: Batch, letters: list[DeadLetter]) -> None:
    """Store *letters* in the transaction of their batch."""
    if letters:
        parameters = [
            {
                "producer": batch.producer,
                "lane": batch.lane,
                "sequence": batch.sequence,
                "thread_id": _storable(session, letter.delta.thread_id),
                "delta": _stored_delta(session, letter.delta),
                "sqlstate": letter.sqlstate,
                "error": _storable(session, letter.error),
            }
            for letter in letters
        ]
        await session.cursor().executemany(session.statements["bury"], parameters)


async def dead_letters_of(session: Session, batch: Batch) -> tuple[DeadLetter, ...]:
    """Return the letters that an earlier try of *batch* left behind."""
    cursor = session.cursor()
    key = {"producer": batch.producer, "lane": batch.lane, "sequence": batch.sequence}
    await cursor.execute(session.statements["letters_of_batch"], key)
    found = {thread_id: (state, error) for thread_id, state, error in await cursor.fetchall()}
    told = [(delta, found.get(_storable(session, delta.thread_id))) for delta in batch.deltas]
    return tuple(DeadLetter(delta, faults.reason_of_state(why[0]), *why) for delta, why in told if why is not None)


@dataclass(frozen=True, slots=True)
class StoredLetter:
    """A row of `tracker_dead_letters`."""

    producer: str
    lane: int
    sequence: int
    thread_id: str
    delta: dict[str, Any]
    sqlstate: str
    error: str
    at: str


async def stored(session: Session, thread_id: str | None, limit: int | None = None) -> list[StoredLetter]:
    """Return the letters of one thread, or of all, oldest first."""
    cursor = session.cursor()
    await cursor.execute(session.statements["letters"], {"thread_id": thread_id, "limit": limit})
    return [StoredLetter(str(row[0]), *row[1:]) for row in await cursor.fetchall()]


async def count(session: Session, thread_id: str | None) -> int:
    """Return how many letters there are of one thread, or of all."""
    cursor = session.cursor()
    await cursor.execute(session.statements["count_letters"], {"thread_id": thread_id})
    row = await cursor.fetchone()
    return row[0] if row else 0


async def retry(session: Session, thread_id: str | None) -> tuple[int, list[StoredLetter]]:
    """Merge the letters of one thread, or of all, each in a transaction of its own; return how many, and the others.

    A letter that is refused again stays, with the new reason.

    Raises:
        psycopg.Error: the connection is lost, or this role may not do it: that is no reason of a letter's.
    """
    applied, refused = 0, list[StoredLetter]()
    for letter in await stored(session, thread_id):
        if "unreadable" in letter.delta:
            refused.append(letter)  # a message that was no batch: there is nothing to apply
            continue
        key = {name: getattr(letter, name) for name in ("producer", "lane", "sequence", "thread_id")}
        try:
            async with session.connection.transaction():
                cursor = session.cursor()
                await cursor.execute(session.statements["take_letter"], key)
                taken = await cursor.fetchone()
                if taken is not None:
                    await cursor.execute(session.statements["merge_arrays"], encoding.arrays([from_json(taken[0])]))
        except psycopg.Error as error:
            lacks_a_right = (
                isinstance(error, psycopg.errors.InsufficientPrivilege) and faults.kind_of(error) == "schema"
            )
            if session.connection.broken or lacks_a_right:
                raise
            state, text = error.sqlstate or "", _storable(session, " ".join(str(error).split()))
            refused.append(replace(letter, sqlstate=state, error=text))
            reason = {"sqlstate": state, "error": text}
            await session.connection.execute(session.statements["mark_letter"], {**key, **reason})
        else:
            applied += taken is not None
    return applied, refused


async def drop(session: Session, thread_id: str | None) -> int:
    """Delete the letters of one thread, or of all; return how many."""
    cursor = session.cursor()
    await cursor.execute(session.statements["drop_letters"], {"thread_id": thread_id})
    return cursor.rowcount
