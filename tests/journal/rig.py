"""One life of a process by hand: journal, backlog and flusher, without a thread, a loop or a wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

from tests.digits import Digits
from tests.model.manual_clock import ManualClock, run
from tracker_daemon.backlog import Backlog
from tracker_daemon.flush_numbers import FlushNumbers
from tracker_daemon.flusher import Flusher
from tracker_daemon.journal.journal import Journal
from tracker_daemon.journal.records import Header
from tracker_daemon.mending import Mender

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tracker_daemon.generation import Generation, Record
    from tracker_daemon.journal.segment import Segment
    from tracker_daemon.journal.windows import Window
    from tracker_daemon.memory_sink import MemoryRow
    from tracker_daemon.sink import Sink

NOW = 1_700_000_000_000_000_000


def header(**changed: Any) -> Header:
    """Return a header like any other."""
    values: dict[str, Any] = {
        "producer": uuid4(),
        "lane": 0,
        "epoch": 0,
        "database": 0,
        "number": 1,
        "window": 1,
        "anew": False,
        "max_batch_size": 2,
        "create_missing": True,
        "created_at": NOW,
    }
    return Header(**(values | changed))


class ByHand(Flusher):
    """A flusher that needs no event loop."""

    async def _in_thread(self, do: Callable[..., object], *arguments: object) -> None:
        do(*arguments)

    async def _read(self, window: Window) -> Generation:
        return window.load()


class Calls:
    """Makes calls that carry digits, and reads them in the rows again.

    Attributes:
        made: every call, (thread, number of its digit).
    """

    def __init__(self) -> None:
        self._digits = Digits()
        self._ticks = 0
        self.made: set[tuple[str, int]] = set()

    def next(self, thread_id: str) -> Record:
        """Return the next call on a thread."""
        self._ticks += 1
        tokens = self._digits.tokens(thread_id)
        self.made.add((thread_id, self._digits.made[thread_id] - 1))
        return (thread_id, f"a{self._ticks % 3}", tokens, 0.5, NOW + self._ticks * 1_000)

    @staticmethod
    def counted(rows: Mapping[str, MemoryRow]) -> set[tuple[str, int]]:
        """Return the calls in the rows; fail if one is there twice."""
        found = set[tuple[str, int]]()
        for thread_id, row in rows.items():
            rest, place = row.total_tokens, 0
            while rest:
                rest, digit = divmod(rest, 4)
                assert digit < 2, f"call {place} of {thread_id} is counted {digit} times"
                if digit:
                    found.add((thread_id, place))
                place += 1
            assert row.turn_count == sum(name == thread_id for name, _ in found)
        return found


class Rig:
    """A life in *directory*.

    Attributes:
        told: what `on_error` was told.
    """

    def __init__(
        self,
        directory: Path,
        sink: Sink,
        *,
        max_batch_size: int = 2,
        create_missing: bool = True,
        clock: ManualClock | None = None,
        max_pending: int = 1_000_000,
        **options: Any,
    ) -> None:
        self.told: list[BaseException] = []
        cut: dict[str, Any] = {"max_batch_size": max_batch_size, "create_missing": create_missing}
        settings: dict[str, Any] = {"sync_interval": 0.1, "retain": 600.0, "quota": 1 << 30, **cut, **options}
        self.journal = Journal(directory, **settings)
        self.backlog = Backlog(max_queue_size=10_000, max_pending=max_pending, journal=self.journal, **cut)
        self.mender = Mender(self.backlog, self.journal)
        self.numbers = FlushNumbers()
        self.flusher = ByHand(self.backlog, sink, clock or ManualClock(), self.numbers, self.told.append, self.journal)

    def call(self, record: Record) -> None:
        """Make one call."""
        assert self.backlog.enter(record) is None

    def drain(self) -> None:
        """Fold everything that waits."""
        while self.backlog.drain(1_000):
            pass

    def seal(self) -> None:
        """End the window."""
        self.drain()
        while self.backlog.must_seal:
            self.backlog.seal()
            self.drain()
        if self.backlog.window_threads:
            self.backlog.seal()

    def flush(self) -> None:
        """Seal, and apply everything."""
        self.seal()
        run(self.flusher.flush())

    def recover(self) -> None:
        """Apply what earlier lives left."""
        run(self.flusher.recover())

    def keep(self) -> None:
        """Do what the worker does for the journal between two chunks of calls."""
        self.journal._failed_at = self.journal._anew_from = float("-inf")
        self.mender.mend()

    def sync(self) -> None:
        """Bring everything to the disk."""
        self.journal.sync()
        self.journal.release_synced()

    def crash(self) -> None:
        """Die as by `kill -9`: nothing more is written."""
        held: list[Segment] = [*self.journal._unsynced, *self.journal._bad, *self.journal.queue.segments]
        for segment in held:
            segment.close()
        self.journal.forget_fork()

    def end(self) -> None:
        """End as at the deadline of `close`."""
        self.backlog.close()
        self.backlog.abandon("deadline")
        self.journal.end()


def recovered(directory: Path, sink: Sink, **options: Any) -> Rig:
    """Return the next life in *directory*, which has applied what was left, and ended."""
    rig = Rig(directory, sink, **options)
    rig.recover()
    rig.end()
    return rig


def small_files(monkeypatch: Any) -> None:
    """Have files of a few hundred bytes, on a disk of blocks of one."""
    monkeypatch.setattr("tracker_daemon.journal.journal._LEAST", 1_024)
    monkeypatch.setattr("tracker_daemon.journal.place.BLOCK", 1)
