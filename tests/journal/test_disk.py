"""Disks that are full, read-only or gone: the tracker goes on in memory, says so once, and comes back by itself."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.digits import Digits
from tests.helpers import PATIENCE, GatedSink, Trackers, balanced, wait_until
from tests.journal.disks import SmallDisk, read_only, small_disk
from tests.journal.forgetful import told
from tracker_daemon import JournalError, MemorySink, Tracker
from tracker_daemon.journal import degradation as degradation_module

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tracker_daemon.journal.journal import Journal

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _quick_retry(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk is tried again after 20 ms; what is told is kept."""
    caplog.set_level(logging.INFO, "tracker_daemon")
    monkeypatch.setattr(degradation_module, "_RETRY_AFTER", 0.02)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of 32 MiB: room for more than one test needs at once, where nothing takes it."""
    with small_disk(tmp_path / "disk", 32 * MIB) as made:
        yield made


def journal_of(tracker: Tracker) -> Journal:
    """Return the tracker's journal."""
    assert tracker._journal is not None
    return tracker._journal


def windows(tracker: Tracker, digits: Digits, number: int, threads: int = 20, name: str = "t") -> None:
    """Make calls and flush them, so many times."""
    for _ in range(number):
        for i in range(threads):
            assert tracker.record_turn(f"{name}-{i}", "agent", digits.tokens(f"{name}-{i}"))
        tracker.flush(PATIENCE)


def long_calls(tracker: Tracker, digits: Digits, size: int, name: str = "long") -> None:
    """Make calls that take at least *size* bytes in the journal."""
    for i in range(size // 900 + 1):
        thread_id = f"{name}{i:08}-{'x' * 480}"
        assert tracker.record_turn(thread_id, "y" * 500, digits.tokens(thread_id))


def sums(sink: MemorySink) -> dict[str, int]:
    """Return tokens by thread."""
    return {thread_id: row.total_tokens for thread_id, row in sink.rows.items()}


def until_recovered(tracker: Tracker, digits: Digits) -> None:
    """Make calls until they go to files again."""

    def look() -> bool:
        thread_id = f"again-{len(digits.made)}"
        assert tracker.record_turn(thread_id, "agent", digits.tokens(thread_id))
        tracker.flush(PATIENCE)
        return not journal_of(tracker).degraded and journal_of(tracker).stores_window

    wait_until(look, "the journal's recovery")


def ends_exact(tracker: Tracker, digits: Digits, sink: MemorySink) -> None:
    """Close, and compare."""
    tracker.flush(PATIENCE)
    report = tracker.close()
    assert (report.lost, report.journaled) == (0, 0)
    stats = tracker.stats()
    assert balanced(stats)
    assert (stats.lost, stats.pending, stats.rejected) == (0, 0, 0)
    verdict = digits.read(sums(sink))
    assert (verdict.missing, verdict.doubled) == ([], [])


def once(caplog: pytest.LogCaptureFixture, times: int = 1) -> None:
    """Assert that the trouble was told once, and its end once, each *times* over."""
    assert len(told(caplog, "journal_degraded")) == len(told(caplog, "journal_recovered")) == times


# -- full ------------------------------------------------------------------------------------------


def test_full_at_the_first_call(disk: SmallDisk, trackers: Trackers, caplog: pytest.LogCaptureFixture) -> None:
    """No file can be had from the start: calls are accepted and applied from memory, until there is room again."""
    digits, sink = Digits(), MemorySink()
    disk.leave(MIB // 2)
    tracker = trackers(sink, journal=disk.folder / "journal", flush_interval=0.01)
    windows(tracker, digits, 5)
    assert journal_of(tracker).degraded
    assert journal_of(tracker).errors["allocate"] >= 1
    [event] = told(caplog, "journal_degraded")
    assert event["operation"] == "allocate"
    assert os.strerror(errno.ENOSPC) in event["error"]
    disk.relieve()
    until_recovered(tracker, digits)
    windows(tracker, digits, 3)
    once(caplog)
    ends_exact(tracker, digits, sink)


def test_full_in_the_middle_of_a_window(disk: SmallDisk, trackers: Trackers, caplog: pytest.LogCaptureFixture) -> None:
    """A window's first file is full and no second one can be had: what follows is in memory, and all of it counts."""
    digits, sink = Digits(), GatedSink()
    disk.leave(MIB + MIB // 4)
    tracker = trackers(sink, journal=disk.folder / "journal", flush_interval=600)
    long_calls(tracker, digits, 2 * MIB)
    assert journal_of(tracker).degraded
    assert not journal_of(tracker).queue.on_disk
    disk.relieve()
    wait_until(lambda: not tracker._backlog.queue, "an empty queue")
    sink.let_through()
    until_recovered(tracker, digits)
    long_calls(tracker, digits, 2 * MIB, "later")
    once(caplog)
    ends_exact(tracker, digits, sink)


def test_full_when_a_window_is_sealed(disk: SmallDisk, trackers: Trackers, caplog: pytest.LogCaptureFixture) -> None:
    """The sealed window stands in its file, the next one finds no room: it goes on in memory, and comes back."""
    digits, sink = Digits(), MemorySink()
    disk.leave(MIB + MIB // 4)
    tracker = trackers(sink, journal=disk.folder / "journal", flush_interval=600)
    windows(tracker, digits, 1)
    assert journal_of(tracker).degraded
    assert journal_of(tracker).bytes < MIB // 4  # the sealed window gave back what it did not need
    assert tracker.record_turn("after", "agent", digits.tokens("after"))

    def has_a_file() -> bool:
        # No further window: each one finds as little room while the one before it still stands, and is told anew.
        tracker._worker.wake()
        return not journal_of(tracker).degraded

    # By itself: what it gave back is room enough.
    wait_until(has_a_file, "a file")
    once(caplog)
    ends_exact(tracker, digits, sink)


def test_full_again_and_again(
    disk: SmallDisk, trackers: Trackers, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time that the disk is full it is told once, however often a file is tried meanwhile."""
    digits, sink = Digits(), MemorySink()
    tracker = trackers(sink, journal=disk.folder / "journal", flush_interval=0.005)
    for round_ in range(3):
        disk.leave(MIB // 8)
        # Not before what the sealed window gives back is taken as well.
        monkeypatch.setattr(degradation_module, "_RETRY_AFTER", float("inf"))
        windows(tracker, digits, 1, name=f"first{round_}")
        assert journal_of(tracker).degraded
        disk.leave(MIB // 8)
        monkeypatch.setattr(degradation_module, "_RETRY_AFTER", 0.0)
        before = journal_of(tracker).errors["allocate"]
        windows(tracker, digits, 10, name=f"full{round_}")
        assert journal_of(tracker).degraded
        assert journal_of(tracker).errors["allocate"] >= before + 10
        assert len(told(caplog, "journal_degraded")) == round_ + 1
        disk.relieve()
        until_recovered(tracker, digits)
    once(caplog, 3)
    ends_exact(tracker, digits, sink)


def test_files_again_after_windows_in_memory(disk: SmallDisk, trackers: Trackers, tmp_path: Path) -> None:
    """Calls that go to files again, behind windows in memory alone, are found by the next process, and count once."""
    digits, sink, journal = Digits(), MemorySink(), disk.folder / "journal"
    disk.leave(MIB // 2)
    tracker = trackers(sink, journal=journal, flush_interval=600)
    windows(tracker, digits, 3)  # of which no file tells
    disk.relieve()

    def in_files_again() -> bool:
        # The open window began in memory. It ends with its segment, or where the worker gets a file; the next one is in it.
        for _ in range(100):
            assert tracker.record_turn("fill" + "x" * 500, "y" * 500)
        return not journal_of(tracker).degraded

    wait_until(in_files_again, "a file")

    def at_rest() -> bool:
        # The sink goes on while the files are copied: a window that is sealed meanwhile would be of another instant.
        # Under the lock: amid a seal the window is in neither place, and has no sequence yet.
        tracker._worker.wake()
        with tracker._backlog.lock:
            queue = journal_of(tracker).queue
            return journal_of(tracker).stores_window and not (tracker._backlog.sealed or queue.is_cut)

    wait_until(at_rest, "the windows in memory applied")
    # Not those of a window that is sealed from here on: the calls below may be in it.
    applied = {path.name for path in journal.glob("*.journal") if "-open-" not in path.name}
    for i in range(20):
        assert tracker.record_turn(f"kept-{i}", "agent", digits.tokens(f"kept-{i}"))
    shutil.copytree(journal, tmp_path / "copy")  # what a kill at this instant leaves
    for path in (tmp_path / "copy").glob("*.journal"):
        if path.name in applied:
            path.unlink()  # kept of what is applied, as it happens: then the open window would follow that one
    after = trackers(sink, journal=tmp_path / "copy")
    after.flush(PATIENCE)
    after.close()
    found = sums(sink)
    assert {f"kept-{i}": found.get(f"kept-{i}") for i in range(20)} == {f"kept-{i}": 1 for i in range(20)}


def test_quota(tmp_path: Path, trackers: Trackers, caplog: pytest.LogCaptureFixture) -> None:
    """The database is away and the quota is used up: the rest waits in memory; when it is back so is the journal."""
    digits, sink = Digits(), GatedSink()
    tracker = trackers(sink, journal=tmp_path, journal_quota=8 * MIB, flush_interval=0.01)
    long_calls(tracker, digits, 12 * MIB)
    wait_until(lambda: not tracker._backlog.queue, "an empty queue")
    assert journal_of(tracker).degraded
    assert journal_of(tracker).errors["quota"] >= 1
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 8 * MIB
    [event] = told(caplog, "journal_degraded")
    assert "quota is used up" in event["error"]
    sink.let_through()
    tracker.flush(PATIENCE)
    until_recovered(tracker, digits)
    once(caplog)
    ends_exact(tracker, digits, sink)


def delete(journal: Path) -> None:
    """Delete it, also if a file is just being made in it."""

    def look() -> bool:
        shutil.rmtree(journal, ignore_errors=True)
        return not journal.exists()

    wait_until(look, "the directory deleted")


# -- read-only, gone -------------------------------------------------------------------------------


def test_directory_made_read_only(tmp_path: Path, trackers: Trackers, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing can be made in it for a while: the tracker goes on in memory, and comes back."""
    digits, sink, journal = Digits(), MemorySink(), tmp_path / "journal"
    tracker = trackers(sink, journal=journal, flush_interval=0.005)
    windows(tracker, digits, 3)
    with read_only(journal):
        windows(tracker, digits, 10)
        assert journal_of(tracker).degraded
    until_recovered(tracker, digits)
    windows(tracker, digits, 3)
    once(caplog)
    ends_exact(tracker, digits, sink)


def test_directory_that_is_read_only_from_the_start(tmp_path: Path) -> None:
    """A tracker that could journal nothing is not made."""
    with read_only(tmp_path), pytest.raises(JournalError, match=r"cannot be|Read-only|Permission"):
        Tracker(MemorySink(), journal=tmp_path)


def test_directory_deleted(tmp_path: Path, trackers: Trackers, caplog: pytest.LogCaptureFixture) -> None:
    """The directory is deleted under the tracker: it goes on in memory to its end, and says so once."""
    digits, sink, journal = Digits(), MemorySink(), tmp_path / "journal"
    tracker = trackers(sink, journal=journal, flush_interval=0.005)
    windows(tracker, digits, 3)
    for i in range(20):
        assert tracker.record_turn(f"t-{i}", "agent", digits.tokens(f"t-{i}"))
    delete(journal)
    windows(tracker, digits, 10)
    assert journal_of(tracker).degraded
    assert len(told(caplog, "journal_degraded")) == 1
    ends_exact(tracker, digits, sink)
    assert not journal.exists()


def test_directory_deleted_while_windows_wait_there(
    tmp_path: Path, trackers: Trackers, caplog: pytest.LogCaptureFixture
) -> None:
    """What waited in the files alone is gone with them: it is counted as lost and told; the rest counts, and goes on."""
    digits, sink, journal = Digits(), GatedSink(), tmp_path / "journal"
    bounds = {"max_pending": 80, "max_queue_size": 20, "flush_interval": 0.005}
    tracker = trackers(sink, journal=journal, **bounds)
    for i in range(200):
        assert tracker.record_turn(f"t-{i}", "agent", digits.tokens(f"t-{i}"))
        wait_until(lambda: not tracker._backlog.queue, "an empty queue")
    wait_until(lambda: len(tracker._backlog.sealed) > 3, "windows in files")
    spilled = sum(each.calls for each in tracker._backlog.sealed if each.generation is None)
    assert spilled
    delete(journal)
    sink.let_through()
    assert tracker.record_turn("afterwards")
    wait_until(lambda: "afterwards" in sink.rows, "the next call applied")
    tracker.close()
    stats = tracker.stats()
    assert balanced(stats)
    assert stats.pending == 0
    verdict = digits.read({k: v for k, v in sums(sink).items() if k != "afterwards"})
    assert verdict.doubled == []
    assert len(verdict.missing) == stats.lost <= spilled
    assert len(told(caplog, "journal_window_gone")) >= 1


# -- what does not fit in memory ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "most"),
    [({"max_pending": 1_000, "max_queue_size": 250}, 1_000), ({"max_pending": 1_000}, 1_000), ({}, 1_000_000)],
)
def test_more_threads_than_fit_in_memory(tmp_path: Path, trackers: Trackers, bounds: dict[str, Any], most: int) -> None:
    """The database is away and threads keep coming: none is refused, few are held, and all count once in the end."""
    digits, sink = Digits(), GatedSink()
    tracker = trackers(sink, journal=tmp_path, flush_interval=0.01, **bounds)
    held = 0
    for i in range(20_000):
        assert tracker.record_turn(f"t-{i}", "agent", digits.tokens(f"t-{i}"))
        if not i % 100:
            wait_until(lambda: len(tracker._backlog.queue) < 50, "a short queue")
            with tracker._backlog.lock:
                resident = sum(map(len, tracker._backlog._resident)) + len(tracker._backlog._window)
            held = max(held, resident)
    assert held <= most
    if most < 20_000:
        stored = [each for each in tracker._backlog.sealed if each.generation is None]
        assert len(stored) >= 10
        # Windows of a size worth a file.
        assert len(tracker._backlog.sealed) < 20_000 / (most / 8)
    assert tracker.stats().pending == 20_000
    assert tracker.pending("t-19999") is not None
    assert tracker.pending("t-5000") is not None
    sink.let_through()
    ends_exact(tracker, digits, sink)
