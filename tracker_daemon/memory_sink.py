"""A sink in a dictionary, for the tests of whoever uses the tracker.

It passes the same conformance suite as the Postgres sink: the ledger's rules hold, and the rows merge alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from tracker_daemon.delta import EXACT
from tracker_daemon.errors import Fenced
from tracker_daemon.sink import Applied, LedgerMissing, LedgerRegressed, Opened

if TYPE_CHECKING:
    from uuid import UUID

    from tracker_daemon.batch import Batch
    from tracker_daemon.delta import ThreadDelta


@dataclass(slots=True)
class MemoryRow:
    """One conversation, with the columns of the table; instants in microseconds since 1970."""

    started_at: int
    last_activity: int
    turn_count: int = 0
    agents_used: tuple[str, ...] = ()
    total_tokens: int = 0
    total_cost_usd: Decimal = Decimal(0)
    resolution_type: str | None = None
    ended_at: int | None = None

    def add(self, delta: ThreadDelta) -> None:
        """Merge *delta* into the row, as the table does."""
        if self.turn_count == 0 and self.last_activity == self.started_at > delta.first_at:
            self.last_activity = delta.first_at if delta.last_turn_at is None else delta.last_turn_at
        elif delta.last_turn_at is not None:
            self.last_activity = max(self.last_activity, delta.last_turn_at)
        self.started_at = min(self.started_at, delta.first_at)
        self.turn_count += delta.turns
        self.total_tokens += delta.tokens
        self.total_cost_usd = EXACT.add(self.total_cost_usd, delta.cost)
        self.agents_used = tuple(dict.fromkeys((*self.agents_used, *delta.agents)))
        if delta.resolved_at is not None and (self.ended_at is None or delta.resolved_at >= self.ended_at):
            self.resolution_type, self.ended_at = delta.resolution_type, delta.resolved_at


class MemorySink:
    """A `Sink` whose table is `rows`, by thread id."""

    def __init__(self) -> None:
        self.rows: dict[str, MemoryRow] = {}
        self.ledger: dict[tuple[UUID, int], Opened] = {}
        self.batches: list[Batch] = []
        """Every batch applied, in order; one that came twice stands here once."""

    async def open(self, producer: UUID, lane: int, *, known: Opened | None = None, after: int = 0) -> Opened:
        """See `Sink.open`."""
        before = self.ledger.get((producer, lane))
        if before is None and known is not None and known.epoch:
            raise LedgerMissing(str(producer), lane)
        epoch = max(before.epoch if before else 0, known.epoch if known else 0) + 1
        applied = max(before.applied_sequence if before else 0, after)
        opened = self.ledger[producer, lane] = Opened(epoch, applied)
        return opened

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        key = (batch.producer, batch.lane)
        found = self.ledger.get(key)
        if found is None:
            raise LedgerMissing(str(batch.producer), batch.lane)
        if found.epoch > batch.epoch or (found.epoch == batch.epoch and found.applied_sequence > batch.sequence):
            raise Fenced(str(batch.producer), batch.lane, batch.epoch, found.epoch)
        if found.epoch == batch.epoch and found.applied_sequence == batch.sequence:
            return Applied(rows=0, duplicate=True)
        if found.epoch < batch.epoch or found.applied_sequence != batch.sequence - 1:
            raise LedgerRegressed(str(batch.producer), batch.lane, batch.sequence - 1, found.applied_sequence)
        self.ledger[key] = Opened(batch.epoch, batch.sequence)
        self.batches.append(batch)
        rows = sum(self._merge(delta, create_missing=batch.create_missing) for delta in batch.deltas)
        return Applied(rows=rows, skipped=len(batch.deltas) - rows)

    def abort(self) -> None:
        """Nothing is ever under way."""

    async def aclose(self, producer: UUID, lane: int, *, clean: bool) -> None:
        """Keep everything: a test looks at it afterwards."""

    def _merge(self, delta: ThreadDelta, *, create_missing: bool) -> bool:
        row = self.rows.get(delta.thread_id)
        if row is None:
            if not (delta.ensures or create_missing):
                return False
            row = self.rows[delta.thread_id] = MemoryRow(delta.first_at, delta.first_at)
        row.add(delta)
        return True
