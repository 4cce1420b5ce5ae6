"""Batches for a sink, as the tracker would seal them, and a sink that is driven alone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from tracker_daemon.batch import Batch
from tracker_daemon.generation import Generation
from tracker_daemon.postgres.connection import Connector
from tracker_daemon.postgres.lanes import Lanes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tracker_daemon.sink import Opened


def batch_of(ids: Sequence[str], calls: int = 1) -> Batch:
    """Return an unnumbered batch with *calls* turns on each of *ids*."""
    generation = Generation(create_missing=True)
    at = time.time_ns()
    for _ in range(calls):
        for thread_id in ids:
            generation.fold((thread_id, "billing", 812, 0.0041, at))
    [deltas] = generation.batches(len(ids))
    return Batch(UUID(int=0), 0, 0, 0, deltas)


class Flushes:
    """One producer of so many lanes, for as long as the benchmark takes."""

    def __init__(self, conninfo: str, lanes: int = 1) -> None:
        self.sink = Lanes(Connector(conninfo), (None, "conversations"), lanes)
        self._producer = uuid4()
        self._sequence = 0
        self._opened: Opened | None = None

    async def apply(self, batch: Batch) -> None:
        """Apply the deltas of *batch* as the next one."""
        if self._opened is None:
            self._opened = await self.sink.open(self._producer, 0)
        self._sequence += 1
        applied = await self.sink.apply(Batch(self._producer, 0, self._opened.epoch, self._sequence, batch.deltas))
        assert applied.rows == len(batch.deltas)

    async def close(self) -> None:
        """Let go of the connections."""
        await self.sink.aclose(self._producer, 0, clean=True)
