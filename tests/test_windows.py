"""How long a window is: what its setting says, however calls come."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.helpers import PATIENCE
from tracker_daemon import MemorySink, Tracker

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from tracker_daemon.batch import Batch
    from tracker_daemon.sink import Applied


class Noting(MemorySink):
    """Notes how many threads each batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    async def apply(self, batch: Batch) -> Applied:
        """Apply it at once."""
        self.sizes.append(len(batch.deltas))
        return await super().apply(batch)


@pytest.mark.parametrize("at_once", [1, 40])
def test_calls_that_never_cease(registry: CollectorRegistry, at_once: int) -> None:
    """Calls that wait already when a window is sealed begin the next one: it is as long as any other."""
    sink, interval, pause = Noting(), 0.1, threading.Event()
    with Tracker(sink, registry=registry, flush_interval=interval) as tracker:
        tracker.record_turn("first")
        tracker.flush(PATIENCE)
        sink.sizes.clear()
        number, began = 0, time.monotonic()
        while time.monotonic() - began < 10 * interval:
            for _ in range(at_once):
                assert tracker.record_turn(f"t-{number % 3_000}", "agent", 1)
                number += 1
            pause.wait(0.0005)
        whole = time.monotonic() - began
        assert len(sink.sizes) <= whole / interval + 1
        tracker.flush(PATIENCE)
    assert sum(row.turn_count for row in sink.rows.values()) == number + 1
