"""A journal that processes share: its places, the quota of all together, and taking over what dead children left."""

from __future__ import annotations

import logging
import os
import resource
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import PATIENCE, Trackers, wait_until
from tests.journal.forgetful import ForgetfulSink, told
from tests.journal.rig import Calls, Rig, small_files
from tracker_daemon import Tracker, journal_keeper
from tracker_daemon.clock import SystemClock
from tracker_daemon.journal.lock import DirectoryLock, noted, try_lock
from tracker_daemon.journal.retention import Retention
from tracker_daemon.memory_sink import MemorySink

if TYPE_CHECKING:
    from pathlib import Path

    import anyio

    from tracker_daemon.sink import Sink


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    small_files(monkeypatch)
    caplog.set_level(logging.INFO, "tracker_daemon")


def dead_child(directory: Path, sink: Sink, calls: Calls, name: str, windows: int = 3, **options: Any) -> Rig:
    """Be a child of a fork, which calls and dies."""
    rig = Rig(directory, sink, forked=True, **options)
    for _ in range(windows):
        rig.call(calls.next(name))
        rig.seal()
    rig.sync()
    rig.crash()
    return rig


def take_over(rig: Rig) -> None:
    """Do what the worker does about once a minute."""
    rig.journal.adopt()
    if rig.backlog.recovering:
        rig.recover()


def on_disk(directory: Path) -> int:
    """Return what the files take."""
    return sum(path.stat().st_size for path in directory.rglob("*.journal"))


def test_everybody_knows_what_all_take(tmp_path: Path) -> None:
    """Whoever holds a place tells in its lock; of a dead one it is what was last true."""
    sink, calls = MemorySink(), Calls()
    parent, child = Rig(tmp_path, sink), Rig(tmp_path, sink, forked=True)
    for rig, name in ((parent, "p"), (child, "c"), (parent, "p"), (child, "c")):
        rig.call(calls.next(name))
        assert parent.journal.bytes == child.journal.bytes == on_disk(tmp_path)
        rig.seal()
        assert parent.journal.bytes == child.journal.bytes == on_disk(tmp_path)
    parent.flush()
    assert parent.journal.bytes == child.journal.bytes == on_disk(tmp_path)
    child.crash()
    assert parent.journal.bytes == on_disk(tmp_path)
    assert noted(tmp_path / "forks" / "0")[0] > 0
    parent.crash()


def test_quota_of_all_together(tmp_path: Path) -> None:
    """What one of them takes the other has not: it goes on in memory, and in files again when there is room."""
    sink, calls = MemorySink(), Calls()
    parent, child = Rig(tmp_path, sink, quota=20_000), Rig(tmp_path, sink, quota=20_000, forked=True)
    for rig, name in ((parent, "p"), (child, "c")):
        while not rig.journal.degraded:
            rig.call(calls.next(f"{name}{len(calls.made)}"))
            rig.seal()
            assert on_disk(tmp_path) <= 20_000
        assert rig.journal.errors["quota"] == 1
    assert len(parent.backlog.sealed) > 10 * len(child.backlog.sealed)
    parent.flush()
    child.keep()
    assert not child.journal.degraded
    child.call(calls.next("c"))
    child.flush()
    assert Calls.counted(sink.rows) == calls.made
    parent.crash()
    child.crash()


def test_what_is_kept_is_a_quarter_for_all_together(tmp_path: Path) -> None:
    """One that has kept a quarter leaves the other its newest window alone; none is degraded by what is only kept."""
    sink, calls = MemorySink(), Calls()
    parent, child = Rig(tmp_path, sink, quota=40_000), Rig(tmp_path, sink, quota=40_000, forked=True)
    for rig in (parent, child):
        for _ in range(60):
            rig.call(calls.next(f"t{len(calls.made) // 20}" + "x" * 100))
            rig.flush()
    assert len(parent.journal.retained(parent.journal.producer)) > 10
    assert len(child.journal.retained(child.journal.producer)) == 1
    assert on_disk(tmp_path) < 20_000
    assert not parent.journal.errors
    assert not child.journal.errors
    parent.crash()
    child.crash()


def test_windows_of_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a few hundred bytes, and takes a block of the disk: that is what counts."""
    monkeypatch.setattr("tracker_daemon.journal.place.BLOCK", 4_096)
    sink, calls, quota = MemorySink(), Calls(), 80 * 4_096
    rig = Rig(tmp_path, sink, quota=quota)
    for number in range(200):
        rig.call(calls.next(f"t{number}"))
        rig.flush()
        takes = sum(path.stat().st_blocks * 512 for path in tmp_path.glob("*.journal"))
        assert takes <= rig.journal.bytes <= quota
    assert len(rig.journal.retained(rig.journal.producer)) == 80 // 4
    assert not rig.journal.errors
    rig.crash()


def test_taken_over_and_given_back(tmp_path: Path) -> None:
    """By a parent that has worked for long; the place is free again when nothing of it is kept any more."""
    sink, calls = MemorySink(), Calls()
    parent = Rig(tmp_path, sink, retain=-1.0)
    parent.call(calls.next("p"))
    parent.flush()
    take_over(parent)
    for round_of in range(3):
        dead_child(tmp_path, sink, calls, f"c{round_of}")
        take_over(parent)
        assert Calls.counted(sink.rows) == calls.made
        assert len(list((tmp_path / "forks" / "0").glob("*.journal"))) == 0, "its newest window is kept elsewhere"
        parent.call(calls.next("p"))
        parent.flush()
        take_over(parent)
        assert noted(tmp_path / "forks" / "0") == (0, 0)
        assert parent.journal.files == len(list(tmp_path.glob("*.journal")))
        assert [each.name for each in (tmp_path / "forks").iterdir()] == ["0"]
    assert parent.journal.recovered == 9
    assert len(parent.flusher._acknowledged) <= 2, "its own, and the last one's"
    parent.crash()


class Watched(SystemClock):
    """Knows for how long somebody waits."""

    timeout: float | None = 0.0

    async def wait(self, event: anyio.Event, timeout: float | None) -> bool:  # noqa: ASYNC109 - the protocol's
        """See `Clock.wait`."""
        self.timeout = timeout
        return await super().wait(event, timeout)


def test_parent_that_is_idle(tmp_path: Path, trackers: Trackers, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps until a call wakes it; once it has forked it looks by itself."""
    clock, sink, calls = Watched(), MemorySink(), Calls()
    monkeypatch.setattr(Tracker, "_clock", clock)
    monkeypatch.setattr(journal_keeper, "_ADOPT_EVERY", 0.01)
    tracker = trackers(sink, journal=tmp_path)
    assert tracker.record_turn("p")
    tracker.flush(PATIENCE)
    wait_until(lambda: clock.timeout is None or clock.timeout > 86_400, "it sleeps")
    tracker.after_fork()
    dead_child(tmp_path, sink, calls, "c")
    wait_until(lambda: "c" in sink.rows and sink.rows["c"].turn_count == 3, "the child's calls applied")
    tracker.close()


def test_not_more_than_so_many_at_once(tmp_path: Path) -> None:
    """The rest has its turn when those are done."""
    sink, calls = MemorySink(), Calls()
    parent = Rig(tmp_path, sink, retain=-1.0)
    for number in range(5):
        dead_child(tmp_path, sink, calls, f"c{number}", quota=64_000)
    assert len(list((tmp_path / "forks").iterdir())) == 5
    for round_of in range(1, 5):
        parent.journal.adopt(2)
        assert len(parent.journal._places) <= 1 + 2
        parent.recover()
        assert len(sink.rows) <= min(6, 1 + 2 * round_of)
        parent.call(calls.next("p"))
        parent.flush()
    assert Calls.counted(sink.rows) == calls.made
    parent.crash()


def test_the_rest_comes_right_behind(tmp_path: Path) -> None:
    """However long what is applied is kept: it goes into the own place, and the others' are free at once."""
    sink, calls = MemorySink(), Calls()
    parent = Rig(tmp_path, sink)
    parent.call(calls.next("p"))
    parent.flush()
    for number in range(5):
        dead_child(tmp_path, sink, calls, f"c{number}", quota=64_000)
    rounds = 0
    while parent.journal.adopt(2):
        assert len(parent.journal._places) <= 1 + 2
        parent.recover()
        rounds += 1
        assert parent.journal.bytes == on_disk(tmp_path)
    parent.recover()
    assert Calls.counted(sink.rows) == calls.made
    assert rounds == 2
    assert not parent.journal.adopt(2)
    assert [noted(place) for place in (tmp_path / "forks").iterdir()] == [(0, 0)] * 5
    assert len(parent.journal.retained_producers) == 1 + 5
    assert parent.journal.bytes == on_disk(tmp_path)
    parent.crash()


def test_idle_worker_takes_all_over(
    tmp_path: Path, trackers: Trackers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of more than may be held at once the rest does not wait for a minute, nor for what is kept to be let go of."""
    monkeypatch.setattr(Retention.adopt, "__defaults__", (2,))
    sink, calls = MemorySink(), Calls()
    for number in range(7):
        dead_child(tmp_path, sink, calls, f"c{number}", quota=64_000)
    tracker = trackers(sink, journal=tmp_path)
    tracker.record_turn("p", tokens=1)
    wait_until(lambda: len(told(caplog, "journal_applied")) == 7, "all that was left is applied")
    assert Calls.counted(sink.rows) == calls.made | {("p", 0)}
    tracker.close()


def test_what_cannot_be_moved_is_kept_where_it_is(tmp_path: Path) -> None:
    """And counted there; the database may still forget it."""
    sink, calls = ForgetfulSink(back_to=2), Calls()
    parent = Rig(tmp_path, sink)
    parent.call(calls.next("p"))
    parent.flush()
    child = dead_child(tmp_path, sink, calls, "c", windows=4)
    [_, second, *_] = sorted(child.journal.directory.glob("*-0000.journal"))
    (tmp_path / second.name).mkdir()
    take_over(parent)
    assert parent.journal.errors["rename"] == 1
    assert second.exists()
    kept = [path for window in parent.journal.retained(child.journal.producer) for path in window.paths]
    assert [path for path in kept if path.parent != tmp_path] == [second]
    (tmp_path / second.name).rmdir()
    assert parent.journal.bytes == on_disk(tmp_path)
    take_over(parent)
    assert try_lock(second.parent) is None, "it is still held"
    sink.forget()
    assert Calls.counted(sink.rows) < calls.made
    parent.call(calls.next("p"))
    parent.flush()
    assert Calls.counted(sink.rows) == calls.made
    parent.crash()


def test_place_that_cannot_be_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another user's, say: it is told, and holds up neither those behind it nor a child."""
    sink, calls = MemorySink(), Calls()
    theirs = dead_child(tmp_path, sink, Calls(), "c", quota=64_000)
    dead_child(tmp_path, sink, calls, "d", quota=64_000)
    lock = theirs.journal.directory / "lock"
    lock.unlink()
    lock.mkdir()  # as nobody may open it, not even root
    parent = Rig(tmp_path, sink)
    take_over(parent)
    assert Calls.counted(sink.rows) == calls.made
    [event] = told(caplog, "journal_not_adopted")
    assert (event["directory"], event["error"].endswith("cannot be opened: Is a directory")) == (str(lock.parent), True)
    assert parent.journal.errors["list"] == 1
    child = Rig(tmp_path, sink, forked=True)
    child.call(calls.next("e"))
    assert child.journal.directory.name in {"1", "2"}
    assert not child.journal.degraded
    child.crash()
    parent.crash()


def test_no_file_descriptor_left(tmp_path: Path) -> None:
    """A child that can have no place goes on in memory, and leaves none behind that it has tried; it tries again."""
    sink, calls = MemorySink(), Calls()
    parent, child = Rig(tmp_path, sink), Rig(tmp_path, sink, forked=True)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        child.call(calls.next("c"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert child.journal.degraded
    assert list((tmp_path / "forks").iterdir()) == []
    child.keep()
    assert child.journal.directory == tmp_path / "forks" / "0"
    child.crash()
    parent.crash()


def test_set_aside_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be applied stays there, in nobody's hands, and this process does not try it again; the next one does."""
    sink, calls = MemorySink(), Calls()
    child = dead_child(tmp_path, sink, calls, "c")
    [first, *_] = sorted((tmp_path / "forks" / "0").glob("*.journal"))
    data = bytearray(first.read_bytes())
    data[150] ^= 1
    first.write_bytes(data)
    parent = Rig(tmp_path, sink)
    for _ in range(3):
        take_over(parent)
        parent.call(calls.next("p"))
        parent.flush()
    assert len(told(caplog, "journal_set_aside")) == len(parent.told) == 1
    assert parent.journal.bytes == on_disk(tmp_path), "it counts all the same"
    lock = try_lock(tmp_path / "forks" / "0")
    assert lock is not None
    lock.release()
    dead_child(tmp_path, sink, calls, "d")  # beside it, in the same place
    take_over(parent)
    assert {name for name, _ in Calls.counted(sink.rows)} == {"p", "d"}
    assert len(parent.told) == 1
    parent.crash()
    after = Rig(tmp_path, sink)
    take_over(after)
    assert len(told(caplog, "journal_set_aside")) == 2
    assert str(child.journal.directory) in str(after.told[0])
    after.crash()


def test_newest_window_of_its_own_stays(tmp_path: Path) -> None:
    """However much is taken over: what follows it in files may not bear its own sequence yet."""
    sink, calls = MemorySink(), Calls()
    parent = Rig(tmp_path, sink, retain=-1.0)
    parent.call(calls.next("p"))
    parent.flush()
    own = parent.journal.retained(parent.journal.producer)
    for name in ("c", "d"):
        dead_child(tmp_path, sink, calls, name)
        take_over(parent)
    assert parent.journal.retained(parent.journal.producer) == own
    assert all(path.exists() for path in own[0].paths)
    parent.crash()


def test_forgotten_after_it_was_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The database forgets what was taken over and nothing of this process's own: it is applied again all the same."""
    sink, calls = ForgetfulSink(back_to=2), Calls()
    parent, child = Rig(tmp_path, sink), Rig(tmp_path, sink, forked=True)
    for rig, name in ((parent, "p"), (child, "c")):
        rig.call(calls.next(name))
        rig.flush()
    for _ in range(2):
        child.call(calls.next("c"))
        child.seal()
    child.crash()
    take_over(parent)
    assert Calls.counted(sink.rows) == calls.made
    sink.forget()
    assert Calls.counted(sink.rows) == {("p", 0), ("c", 0)}
    parent.call(calls.next("p"))
    parent.flush()
    assert Calls.counted(sink.rows) == calls.made
    assert sum(each["calls"] for each in told(caplog, "applied_again")) == 2
    parent.crash()


def test_place_in_which_much_is_left(tmp_path: Path) -> None:
    """A child leaves a place in which much is left to whoever adopts, and takes another."""
    sink, calls = MemorySink(), Calls()
    first = dead_child(tmp_path, sink, calls, "c", quota=64_000)
    second = dead_child(tmp_path, sink, calls, "d", quota=64_000)
    third = dead_child(tmp_path, sink, calls, "e", quota=64_000_000)
    assert [rig.journal.directory.name for rig in (first, second, third)] == ["0", "1", "0"]


def test_lock_of_an_earlier_version(tmp_path: Path) -> None:
    """It names a process and nothing else; until somebody holds the place it counts as empty."""
    (tmp_path / "lock").write_text("4711\n")
    assert noted(tmp_path) == (0, 0)
    lock = DirectoryLock(tmp_path)
    lock.note(12, 3)
    assert noted(tmp_path) == (12, 3)
    lock.release()
