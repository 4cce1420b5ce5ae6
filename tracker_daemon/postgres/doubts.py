"""Which batches have failed by what may be about the table, or about one of their rows."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from uuid import UUID

    from tracker_daemon.batch import Batch

_TRIES: Final = 3
_MOST: Final = 10_000


class Doubts:
    """Counts how often each batch failed so on a sound connection; of the last ten thousand."""

    def __init__(self) -> None:
        self._failed: Counter[tuple[UUID, int, int, int]] = Counter()

    def count(self, batch: Batch) -> None:
        """It has failed once more."""
        self._failed[_identity(batch)] += 1
        while len(self._failed) > _MOST:
            del self._failed[next(iter(self._failed))]

    def forget(self, batch: Batch) -> None:
        """It went through."""
        self._failed.pop(_identity(batch), None)

    def is_suspect(self, batch: Batch) -> bool:
        """Say whether it has failed so at all."""
        return self._failed[_identity(batch)] > 0

    def is_due(self, batch: Batch) -> bool:
        """Say whether it has failed often enough to be looked into."""
        return self._failed[_identity(batch)] >= _TRIES


def _identity(batch: Batch) -> tuple[UUID, int, int, int]:
    return batch.producer, batch.lane, batch.epoch, batch.sequence
