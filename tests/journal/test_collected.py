"""The ledger's rows are collected: a day after a clean end, a month after the last sign of life. Nothing is amiss then."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import psycopg
import pytest

from tests.helpers import PATIENCE, Trackers, query, wait_until
from tests.journal.forgetful import ForgetfulSink, told
from tests.journal.rig import Calls, Rig, recovered, small_files
from tests.model.manual_clock import ManualClock, run
from tracker_daemon import MemorySink, Tracker
from tracker_daemon.applier import SIGN_OF_LIFE
from tracker_daemon.clock import SystemClock
from tracker_daemon.journal import journal as journal_module
from tracker_daemon.sink import Applied, LedgerMissing, Opened, SinkFault

if TYPE_CHECKING:
    from pathlib import Path
    from uuid import UUID

    import anyio

    from tracker_daemon.batch import Batch

DAY = 86_400.0


@pytest.fixture(autouse=True)
def _told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    small_files(monkeypatch)
    caplog.set_level(logging.INFO, "tracker_daemon")


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the journal's wall clock so many days on."""

    def set_on(days: float) -> None:
        now = time.time() + days * DAY
        monkeypatch.setattr(journal_module.time, "time", lambda: now)

    return set_on


def a_life(directory: Path, sink: MemorySink, calls: Calls, *, clean: bool) -> UUID:
    """Be a life of three windows, all applied, that ends cleanly, or is killed."""
    rig = Rig(directory, sink)
    for thread_id in ("t0", "t1", "t0"):
        rig.call(calls.next(thread_id))
        rig.flush()
    rig.sync()
    if clean:
        run(rig.flusher.aclose(clean=True))
        rig.end()
    else:
        rig.crash()
    return rig.journal.producer


@pytest.mark.parametrize(
    ("clean", "days", "quiet"), [(True, 1, True), (True, 0.9, False), (False, 30, True), (False, 29, False)]
)
def test_a_start_after_the_row_is_collected(
    clean: bool, days: float, quiet: bool, tmp_path: Path, later: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the row was due, what was applied is let go of without an alarm; sooner its absence is one, and all stays."""
    sink, calls = MemorySink(), Calls()
    producer = a_life(tmp_path, sink, calls, clean=clean)
    kept = set(tmp_path.glob("*.journal"))
    del sink.ledger[producer, 0]
    later(days)
    after = recovered(tmp_path, sink)
    assert Calls.counted(sink.rows) == calls.made
    assert len(told(caplog, "journal_collected")) == quiet
    assert len(told(caplog, "journal_set_aside")) == len(after.told) == (not quiet)
    assert set(tmp_path.glob("*.journal")) == (set() if quiet else kept)
    assert after.journal.errors == ({} if quiet else {"ledger": 1})


def test_with_something_pending(tmp_path: Path, later: Any, caplog: pytest.LogCaptureFixture) -> None:
    """However late: of what is not known to be applied nobody can say whether it was. It stays, and is told."""
    sink, calls = MemorySink(), Calls()
    rig = Rig(tmp_path, sink)
    for _ in range(2):
        rig.call(calls.next("t0"))
        rig.flush()
    rig.call(calls.next("t0"))
    rig.sync()
    rig.crash()
    sink.ledger.clear()
    later(400)
    for start in range(1, 3):
        after = recovered(tmp_path, sink)
        assert len(told(caplog, "journal_set_aside")) == start, "every start tells it"
        assert "a month has passed without a sign of life" in str(after.told[0])
        assert Calls.counted(sink.rows) == {("t0", 0), ("t0", 1)}
        assert after.journal.errors == {"ledger": 1}
    assert len(list(tmp_path.glob("*.journal"))) == 3


def test_the_ledger_is_asked_first(tmp_path: Path, later: Any) -> None:
    """A row that is still there, and stands before what is noted as applied: the database forgot it, it is applied again."""
    sink, calls = MemorySink(), Calls()
    producer = a_life(tmp_path, sink, calls, clean=True)
    sink.rows.clear()
    sink.ledger[producer, 0] = Opened(1, 0)
    later(2)
    recovered(tmp_path, sink)
    assert Calls.counted(sink.rows) == calls.made


def test_a_mark_alone_tells_that_the_life_was_registered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file that told of the registration is lost: a missing row does not mean a new producer all the same."""
    sink, calls = MemorySink(), Calls()
    rig = Rig(tmp_path, sink)
    rig.call(calls.next("t0"))
    rig.flush()
    rig.crash()
    [path] = tmp_path.glob("*-open-*.journal")
    path.unlink()
    sink.ledger.clear()
    recovered(tmp_path, sink)
    assert Calls.counted(sink.rows) == calls.made
    assert len(told(caplog, "journal_set_aside")) == 1


def test_a_life_that_never_reached_the_database(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its files tell of no registration; once it is recovered they do: without its row it is not applied again."""
    sink, calls = MemorySink(), Calls()
    rig = Rig(tmp_path, sink)
    for _ in range(3):
        rig.call(calls.next("t0"))
        rig.seal()
    rig.crash()
    first = Rig(tmp_path, sink)
    first.recover()
    first.crash()
    assert Calls.counted(sink.rows) == calls.made
    sink.ledger.clear()
    recovered(tmp_path, sink)
    assert Calls.counted(sink.rows) == calls.made
    assert len(told(caplog, "journal_set_aside")) == 1


class Dying(MemorySink):
    """The process dies when so many batches are in the database, and before it can note that."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        applied = await super().apply(batch)
        if len(self.batches) == self.after:
            raise KeyboardInterrupt
        return applied


@pytest.mark.parametrize("after", [1, 2, 3])
def test_killed_in_the_first_window_of_its_recovery(
    after: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A life that never reached the database: that it is registered now is noted before anything of it is applied.

    So without its row, which somebody has truncated meanwhile, nothing of it is applied again.
    """
    sink, calls = Dying(after), Calls()
    rig = Rig(tmp_path, sink)
    for thread_id in ("t0", "t1", "t2", "t3"):  # two batches
        rig.call(calls.next(thread_id))
    rig.seal()
    rig.call(calls.next("t0"))
    rig.seal()
    rig.crash()
    first = Rig(tmp_path, sink)
    with pytest.raises(KeyboardInterrupt):
        first.recover()
    first.crash()
    there = Calls.counted(sink.rows)
    assert len(sink.batches) == after
    sink.ledger.clear()
    recovered(tmp_path, sink)
    assert Calls.counted(sink.rows) == there
    assert len(told(caplog, "journal_set_aside")) == 1


def test_registered_and_nothing_applied(tmp_path: Path) -> None:
    """Killed right after the note: the row is there, and everything is applied once."""
    sink, calls = Dying(-1), Calls()
    rig = Rig(tmp_path, sink)
    for _ in range(2):
        rig.call(calls.next("t0"))
        rig.seal()
    rig.crash()
    first = Rig(tmp_path, sink)
    first.flusher._recover_window = dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.recover()
    first.crash()
    assert not sink.rows
    assert sink.ledger
    recovered(tmp_path, sink)
    assert Calls.counted(sink.rows) == calls.made


async def dies(_: object) -> int:
    """Be killed."""
    raise KeyboardInterrupt


class Losing(MemorySink):
    """Loses its ledger right after the first batch."""

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        applied = await super().apply(batch)
        if len(self.batches) == 1:
            self.ledger.clear()
        return applied


def test_a_row_gone_in_the_middle_of_a_recovery(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is the earlier life's affair: that is set aside and told, once; this process goes on, and is not fenced."""
    sink, calls = Losing(), Calls()
    rig = Rig(tmp_path, sink)
    for _ in range(3):
        rig.call(calls.next("t0"))
        rig.seal()
    rig.crash()
    after = Rig(tmp_path, sink)
    after.recover()
    assert told(caplog, "flush_halted") == []
    assert len(told(caplog, "journal_set_aside")) == 1
    assert not after.numbers.fenced
    after.call(calls.next("t1"))
    after.flush()
    assert after.flusher.halted is None
    assert sorted(sink.rows) == ["t0", "t1"]
    after.crash()


# -- what is kept, and counted ---------------------------------------------------------------------


def test_kept_from_the_moment_it_is_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An outage longer than `journal_retain`: what is applied after it is kept for as long as anything else.

    So is what an earlier life left, and what an hour's change of the wall clock finds there.
    """
    sink, calls = ForgetfulSink(back_to=1), Calls()
    rig = Rig(tmp_path, sink, retain=20.0)
    rig.call(calls.next("t0"))
    rig.flush()
    for _ in range(5):
        rig.call(calls.next("t0"))
        rig.seal()
    rig.crash()
    for path in tmp_path.glob("*.journal"):
        os.utime(path, (1, 1))
    real, clock = time.monotonic, [0.0]
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: real() + clock[0])
    after = Rig(tmp_path, sink, retain=20.0)
    after.recover()
    clock[0] = 19.0
    for _ in range(3):
        after.call(calls.next("t1"))
        after.seal()
    clock[0] = 60.0
    now = time.time()
    monkeypatch.setattr(journal_module.time, "time", lambda: now + 3_600)
    for _ in range(3):
        run(after.flusher.flush())
    assert Calls.counted(sink.rows) == calls.made
    assert len(after.journal.retained(after.journal.producer)) == 3
    clock[0] = 81.0
    after.call(calls.next("t1"))
    after.flush()
    assert len(after.journal.retained(after.journal.producer)) == 1
    after.crash()


def test_what_an_earlier_life_left_is_kept(tmp_path: Path) -> None:
    """Written long ago and applied now: all of it is there when the database forgets it."""
    sink, calls = ForgetfulSink(back_to=1), Calls()
    rig = Rig(tmp_path, sink)
    rig.call(calls.next("t0"))
    rig.flush()
    for _ in range(5):
        rig.call(calls.next("t0"))
        rig.seal()
    rig.crash()
    for path in tmp_path.glob("*.journal"):
        os.utime(path, (1, 1))
    recovered(tmp_path, sink)
    assert len(sink.rows) == 1
    sink.forget()
    recovered(tmp_path, sink)
    assert Calls.counted(sink.rows) == calls.made


@pytest.mark.parametrize(("since", "kept"), [(590, 4), (610, 1)])
def test_kept_over_a_restart(since: int, kept: int, tmp_path: Path, later: Any) -> None:
    """The time of what an earlier life has applied goes on: it does not begin anew with each start."""
    sink, calls = MemorySink(), Calls()
    a_life(tmp_path, sink, calls, clean=False)
    later(since / DAY)
    after = Rig(tmp_path, sink)
    after.recover()
    assert sum(len(after.journal.retained(producer)) for producer in after.journal.retained_producers) == kept
    after.crash()


def test_counted_by_the_one_that_applies_it(tmp_path: Path) -> None:
    """Starts after the one that has recovered what was left count nothing of it, also when it ended in its open window."""
    sink, calls = MemorySink(), Calls()
    rig = Rig(tmp_path, sink)
    for thread_id in ("t0", "t1", "t2", "t3", "t4"):
        rig.call(calls.next(thread_id))
    rig.seal()
    rig.call(calls.next("t0"))
    rig.crash()
    counts = []
    for _ in range(3):
        after = recovered(tmp_path, sink)
        books = after.backlog.books()
        counts.append((sum(books.accepted.values()), sum(books.applied.values()), after.journal.recovered))
    assert counts == [(6, 6, 6), (0, 0, 0), (0, 0, 0)]


def test_on_the_database(
    database: str, tmp_path: Path, trackers: Trackers, later: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A tracker closed cleanly and begun again two days later, as a user has it: no alarm, each call once."""
    for days in (0, 2, 4):
        later(days)
        tracker = trackers(database, journal=tmp_path, flush_interval=600)
        assert tracker.record_turn("t", "agent", 1)
        tracker.flush(PATIENCE)
        assert tracker._journal is not None
        assert not tracker._journal.errors
        tracker.close()
        with psycopg.connect(database) as connection:
            connection.execute("UPDATE tracker_ledger SET closed_at = now() - interval '2 days'")
    assert told(caplog, "journal_set_aside") == []
    assert len(told(caplog, "journal_collected")) == 2
    assert query(database, "SELECT total_tokens::int FROM conversations") == [(3,)]


# -- a process that is idle ------------------------------------------------------------------------


class Collecting(MemorySink):
    """Collects rows by a clock, as the database does; fails as often as it is told to.

    `opened` are the instants of every `open`.
    """

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self.clock, self.fails = clock, 0
        self.opened: list[float] = []

    async def open(self, producer: UUID, lane: int, *, known: Opened | None = None, after: int = 0) -> Opened:
        """See `Sink.open`."""
        if self.fails:
            self.fails -= 1
            raise SinkFault("connection", "away")
        if self.opened and self.clock.monotonic() - self.opened[-1] > 30 * DAY:
            self.ledger.clear()
        self.opened.append(self.clock.monotonic())
        return await super().open(producer, lane, known=known, after=after)


def test_idle_for_months(tmp_path: Path) -> None:
    """With a journal the ledger gets a sign of life once a week: its row is there when the next call comes."""
    clock, calls = ManualClock(), Calls()
    sink = Collecting(clock)
    rig = Rig(tmp_path, sink, clock=clock)
    rig.call(calls.next("t0"))
    rig.flush()
    for _ in range(100):
        clock.advance(DAY)
        run(rig.flusher.give_sign())
    assert [round(at / DAY) for at in sink.opened] == [0, *range(7, 100, 7)]
    run(sink.open(uuid4(), 0))
    rig.call(calls.next("t0"))
    rig.flush()
    assert rig.told == []
    assert Calls.counted(sink.rows) == calls.made
    rig.crash()
    recovered(tmp_path, sink)
    assert Calls.counted(sink.rows) == calls.made


def test_a_sign_that_fails(tmp_path: Path) -> None:
    """The database is away when the sign is due: it is tried again every hour, and calls go on."""
    clock, calls = ManualClock(), Calls()
    sink = Collecting(clock)
    rig = Rig(tmp_path, sink, clock=clock)
    rig.call(calls.next("t0"))
    rig.flush()
    sink.fails = 3
    clock.advance(SIGN_OF_LIFE)
    for _ in range(10):
        run(rig.flusher.give_sign())
        clock.advance(3_600)
    assert len(rig.told) == 3
    assert len(sink.opened) == 2
    assert rig.flusher.halted is None
    rig.crash()


def test_a_sign_that_finds_no_row(tmp_path: Path) -> None:
    """The ledger was truncated meanwhile: it is said then, not only at the next call."""
    clock, calls, sink = ManualClock(), Calls(), MemorySink()
    rig = Rig(tmp_path, sink, clock=clock)
    rig.call(calls.next("t0"))
    rig.flush()
    sink.ledger.clear()
    clock.advance(SIGN_OF_LIFE)
    run(rig.flusher.give_sign())
    assert isinstance(rig.flusher.halted, LedgerMissing)
    rig.crash()


class Hasty(SystemClock):
    """Waits of more than an hour pass at once."""

    passed = 0.0

    def monotonic(self) -> float:
        """See `Clock.monotonic`."""
        return super().monotonic() + self.passed

    async def wait(self, event: anyio.Event, timeout: float | None) -> bool:  # noqa: ASYNC109 - the protocol's
        """See `Clock.wait`."""
        if timeout is not None and timeout > 3_600 and not event.is_set() and self.passed < 30 * DAY:
            self.passed += timeout
            return False
        return await super().wait(event, timeout)


def test_the_worker_wakes_for_it(tmp_path: Path, trackers: Trackers, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle worker wakes by itself when a sign is due; without a journal it sleeps on."""
    clock = Hasty()
    monkeypatch.setattr(Tracker, "_clock", clock)
    sink = MemorySink()
    tracker = trackers(sink, journal=tmp_path, flush_interval=0.01)
    assert tracker.record_turn("t")
    tracker.flush(PATIENCE)
    wait_until(lambda: sink.ledger[tracker._backlog.producer, 0].epoch >= 4, "three signs")
    assert tracker.record_turn("t")
    tracker.flush(PATIENCE)
    assert sink.rows["t"].turn_count == 2
