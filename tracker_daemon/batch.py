"""A sealed batch: deltas with an identity.

Rules:
1. `(producer, lane, epoch, sequence)` names one batch for ever; every retry carries the same deltas under it.
2. Sequences are contiguous from 1 in each (producer, lane); the ledger holds the highest one applied.
3. A thread stands at most once in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from tracker_daemon.delta import ThreadDelta


@dataclass(frozen=True, slots=True)
class Batch:
    """Deltas of distinct threads, in order of first call, with the identity under which they are applied once.

    Attributes:
        producer, lane, epoch, sequence: the identity.
        deltas: what is applied.
        create_missing: whether a delta without an `ensure` may create its row: as whoever took the calls was set, also
            where somebody else applies them.
    """

    producer: UUID
    lane: int
    epoch: int
    sequence: int
    deltas: Sequence[ThreadDelta]
    create_missing: bool = True

    def __str__(self) -> str:
        return f"{self.producer}/{self.lane}/{self.epoch}/{self.sequence}"
