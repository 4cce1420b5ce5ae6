"""What the fault tests share: errors to wait for, a tracker that must end exact, the table's sums."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg

from tests.helpers import PATIENCE
from tracker_daemon import Tracker
from tracker_daemon.sink import FAULT_KINDS, SinkFault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client import CollectorRegistry


class Errors:
    """Collects what `on_error` is told, and lets a test wait for one of a kind."""

    def __init__(self) -> None:
        self.seen: list[BaseException] = []
        self._changed = threading.Condition()

    def __call__(self, error: BaseException) -> None:
        """Take one."""
        with self._changed:
            self.seen.append(error)
            self._changed.notify_all()

    def wait_for(self, wanted: Callable[[BaseException], bool], count: int = 1) -> None:
        """Wait until *count* errors are as wanted; fails after a minute."""
        with self._changed:
            found = self._changed.wait_for(lambda: sum(map(wanted, self.seen)) >= count, PATIENCE)
        assert found, self.seen

    def wait_for_kind(self, kind: str, count: int = 1) -> None:
        """Wait for *count* faults of one kind."""
        assert kind in FAULT_KINDS
        self.wait_for(lambda error: isinstance(error, SinkFault) and error.kind == kind, count)


@contextmanager
def tracking(sink: Any, errors: Errors, registry: CollectorRegistry, **options: Any) -> Iterator[Tracker]:
    """Run a tracker; at the end a fresh call goes through, the books add up, and nothing was lost."""
    tracker = Tracker(sink, on_error=errors, registry=registry, **{"flush_interval": 0.01, **options})
    try:
        yield tracker
        assert tracker.record_turn("afterwards", "agent", 1)
        tracker.flush(PATIENCE)
    finally:
        tracker.close()
    stats = tracker.stats()
    assert stats.accepted == stats.applied + stats.dead_lettered
    assert stats.lost == stats.pending == 0


def sums(conninfo: str) -> dict[str, int]:
    """Return tokens by thread, without the closing call of `tracking`."""
    with psycopg.connect(conninfo) as connection:
        found = connection.execute("SELECT thread_id, total_tokens FROM conversations").fetchall()
    return {row[0]: row[1] for row in found if row[0] != "afterwards"}


def outcome(registry: CollectorRegistry, name: str) -> int:
    """Return how many flushes ended so."""
    return int(registry.get_sample_value("tracker_flushes_total", {"outcome": name}) or 0)
