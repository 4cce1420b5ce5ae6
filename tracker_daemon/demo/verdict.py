"""The table beside the count: every row, every column."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from psycopg import sql
from psycopg.rows import tuple_row

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from decimal import Decimal

    from psycopg import AsyncConnection

    from tracker_daemon.demo.count import Counted, Span

SHOWN: Final = 10
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_CHUNK: Final = 2_000


class Row(NamedTuple):
    """A row of the table; the fields are its columns."""

    thread_id: str
    started_at: datetime
    last_activity: datetime
    turn_count: int
    agents_used: list[str]
    total_tokens: int
    total_cost_usd: Decimal
    resolution_type: str | None
    ended_at: datetime | None


@dataclass(slots=True)
class Comparison:
    """What came of comparing: `differences` of them, the first ten named."""

    rows: int = 0
    differences: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, difference: str) -> None:
        """Count a difference, and name it if it is one of the first."""
        self.differences += 1
        if len(self.named) < SHOWN:
            self.named.append(difference)


async def compare(connection: AsyncConnection[Any], table: str, counted: Mapping[str, Counted]) -> Comparison:
    """Compare every row of *table* with what was *counted* by thread id; a row too many or too few is a difference."""
    found = Comparison()
    missing = set(counted)
    query = sql.SQL("SELECT {} FROM {}").format(
        sql.SQL(", ").join(map(sql.Identifier, Row._fields)), sql.Identifier(table)
    )
    async with connection.transaction(), connection.cursor("rows", row_factory=tuple_row) as cursor:
        cursor.itersize = _CHUNK
        await cursor.execute(query)
        async for values in cursor:
            row = Row(*values)
            found.rows += 1
            missing.discard(row.thread_id)
            for fault in faults(row, counted.get(row.thread_id)):
                found.add(f"{row.thread_id}: {fault}")
    for thread_id in sorted(missing):
        found.add(f"{thread_id}: has no row, counted {counted[thread_id].calls} calls")
    return found


def faults(row: Row, counted: Counted | None) -> Iterator[str]:
    """Yield each column of *row* that differs from what was counted, with both values."""
    if counted is None:
        yield "has a row, and no call was made"
        return
    expected = {
        "turn_count": counted.turns,
        "agents_used": counted.agents,
        "total_tokens": counted.tokens,
        "total_cost_usd": counted.cost,
        "resolution_type": counted.resolution,
    }
    for column, value in expected.items():
        if getattr(row, column) != value:
            yield f"{column} is {_text(getattr(row, column))}, counted {_text(value)}"
    moments = {"started_at": counted.first, "last_activity": counted.active, "ended_at": counted.ended}
    for column, span in moments.items():
        if not _within(getattr(row, column), span):
            yield f"{column} is {_text(getattr(row, column))}, counted {_span_text(span)}"
    if row.started_at > row.last_activity:
        yield f"started_at {row.started_at} is after last_activity {row.last_activity}"


def _within(found: datetime | None, span: Span | None) -> bool:
    """Tell whether the database's microsecond lies in the span of the call."""
    if found is None or span is None:
        return found is None and span is None
    before, after = span
    return before // 1_000 <= (found - _EPOCH) // timedelta(microseconds=1) <= after // 1_000


def _text(value: object) -> str:
    if value is None:
        return "null"
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)


def _span_text(span: Span | None) -> str:
    if span is None:
        return "none"
    return " to ".join(f"{_EPOCH + timedelta(microseconds=moment // 1_000):%H:%M:%S.%f}" for moment in span)
