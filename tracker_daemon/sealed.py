"""A window that is sealed and not settled."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from tracker_daemon.delta import calls_of

if TYPE_CHECKING:
    from uuid import UUID

    from tracker_daemon.delta import Deltas
    from tracker_daemon.generation import Generation
    from tracker_daemon.journal.records import Header
    from tracker_daemon.journal.windows import Window


@dataclass(slots=True)
class Sealed:
    """A sealed window: in memory, or in the journal's files alone."""

    generation: Generation | None
    stored: Window | None
    sealed_at: int
    oldest_at: int
    threads: int
    producer: UUID | None = None
    first: int = 0
    settled: int = 0
    header: Header | None = None
    """Of its first file, or of what would have been one."""
    batches: deque[Deltas] = field(default_factory=deque)

    @property
    def calls(self) -> int:
        """Not settled yet."""
        if self.generation is None:
            return self.stored.calls if self.stored is not None else 0
        return sum(map(calls_of, chain.from_iterable(batch.rows for batch in self.batches)))
