"""Files written anew: after an fsync that failed, and when an open window has grown long."""

from __future__ import annotations

import os
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from tests.journal.disk import Choice, Disk, write_files
from tests.journal.interruptions import Interruption
from tests.journal.rig import NOW, Calls, Rig, recovered, small_files
from tests.model.manual_clock import run
from tracker_daemon.generation import ensure
from tracker_daemon.memory_sink import MemorySink

if TYPE_CHECKING:
    from pathlib import Path

    from tracker_daemon.batch import Batch
    from tracker_daemon.generation import Record
    from tracker_daemon.sink import Applied


class Killed(BaseException):
    """The process ends here."""


class Away(MemorySink):
    """A sink that takes so many batches and then none any more."""

    batches_left = 10**6

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        if not self.batches_left:
            raise Killed
        self.batches_left -= 1
        return await super().apply(batch)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_files(monkeypatch)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A disk that notes everything."""
    disk = Disk(lambda: None)
    with disk.watching(monkeypatch):
        yield disk


def fail_fsync(rig: Rig, disk: Disk, name: str = "") -> None:
    """Let the next fsync fail; it does."""
    disk.fails.append(("fdatasync", name))
    rig.sync()
    assert disk.fails == []
    assert rig.journal.degraded
    assert rig.journal.errors["fsync"] == 1


def after_loss_of_power(disk: Disk, directory: Path, sink: MemorySink) -> set[tuple[str, int]]:
    """Return what is counted when nothing is kept but what was synced."""
    disk.look("the end")
    if isinstance(sink, Away):
        sink.batches_left = 10**6
    write_files(directory, disk.moments[-1].after(Choice(Random(0), names="none", data="none")))
    rig = recovered(directory, sink)
    assert rig.told == []
    return Calls.counted(sink.rows)


def test_of_the_open_window(tmp_path: Path, disk: Disk) -> None:
    """What its file held is in a new one, synced; calls go on in a third; the one that failed is gone."""
    rig, sink, calls = Rig(tmp_path / "live", MemorySink()), MemorySink(), Calls()
    for number in range(5):
        rig.call(calls.next(f"t{number}"))
    before = {segment.path for segment in rig.journal.queue.segments}
    fail_fsync(rig, disk)
    rig.call(calls.next("t1"))
    assert rig.journal.wants_rewriting
    rig.keep()
    assert rig.journal.untrusted == []
    assert not rig.journal.degraded
    after = {segment.path for segment in rig.journal.queue.segments}
    assert not before & after
    assert not any(path.exists() for path in before if path)
    rig.call(calls.next("t2"))
    rig.sync()
    rig.crash()
    assert after_loss_of_power(disk, tmp_path / "left", sink) == calls.made


def test_another_file_at_once(tmp_path: Path, disk: Disk) -> None:
    """After a failed fsync calls go to the next file that is needed, not to memory for a while."""
    rig, calls = Rig(tmp_path / "live", MemorySink()), Calls()
    rig.call(calls.next("t0"))
    fail_fsync(rig, disk)
    rig.seal()
    rig.call(calls.next("t1"))
    assert rig.journal.queue.on_disk
    assert not rig.journal.degraded
    rig.crash()


@pytest.mark.parametrize("then", ["allocate", "fsync"])
def test_another_file_once(then: str, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that one cannot be had, or synced, either, the disk is left alone for a while."""
    rig, calls = Rig(tmp_path / "live", MemorySink()), Calls()
    rig.call(calls.next("t0"))
    fail_fsync(rig, disk)
    assert rig.journal.may_try
    if then == "fsync":
        disk.fails.append(("fdatasync", ""))
        rig.mender.mend()
        assert rig.journal.errors == {"fsync": 2}
    else:
        monkeypatch.setattr(os, "posix_fallocate", no_room)
        rig.mender.mend()
        assert rig.journal.errors == {"fsync": 1, "allocate": 1}
    assert rig.journal.degraded
    assert not rig.journal.may_try
    rig.crash()


def no_room(*_: object) -> None:
    """Fail as a full disk does."""
    raise OSError(28, "No space left on device")


def test_of_a_file_that_is_read_already(tmp_path: Path, disk: Disk) -> None:
    """Of several files of the open window one fails: the window is written anew as a whole."""
    rig, sink, calls = Rig(tmp_path / "live", MemorySink()), MemorySink(), Calls()
    for number in range(16):
        rig.call(calls.next(f"t{number}" + "x" * 500))
        rig.call(calls.next("u" * 500))
    rig.drain()
    segments = rig.journal.queue.segments
    assert len(segments) > 2
    assert segments[1].path is not None
    fail_fsync(rig, disk, segments[1].path.name)
    rig.keep()
    rig.sync()
    rig.crash()
    assert after_loss_of_power(disk, tmp_path / "left", sink) == calls.made


@pytest.mark.parametrize("settled", [0, 1, 2])
@pytest.mark.parametrize("files", [1, 3])
def test_of_a_sealed_window(settled: int, files: int, tmp_path: Path, disk: Disk) -> None:
    """What of it is not applied is in a new file, under the sequences it had."""
    sink, calls = Away(), Calls()
    rig = Rig(tmp_path / "live", sink)
    for number in range(5):
        rig.call(calls.next(f"t{number}"))
        if files > 1:
            for _ in range(3):
                rig.call(calls.next(f"t{number}" + "x" * 500))
    rig.seal()
    sink.batches_left = settled
    with pytest.raises(Killed):
        run(rig.flusher.flush())
    window = rig.backlog.head_window
    assert window is not None
    # Synced before its flush; then something is written to it once more, and that fails.
    old = list(window.paths)
    assert (len(old) > 1) == (files > 1)
    segment = rig.journal._make(99, 0)
    segment.path, rig.journal._bad = old[0], [segment]
    first = window.first
    rig.keep()
    assert (window.first, len(window.paths)) == (first + settled, 1)
    assert not any(path.exists() for path in old)
    rig.crash()
    assert after_loss_of_power(disk, tmp_path / "left", sink) == calls.made


def test_of_a_sealed_window_twice(tmp_path: Path, disk: Disk) -> None:
    """A second time, with more batches applied meanwhile, the sequences are right again."""
    sink, calls = Away(), Calls()
    rig = Rig(tmp_path / "live", sink)
    for number in range(9):
        rig.call(calls.next(f"t{number}"))
    rig.seal()
    for _ in range(3):
        sink.batches_left = 1
        with pytest.raises(Killed):
            run(rig.flusher.flush())
        window = rig.backlog.head_window
        assert window is not None
        segment = rig.journal._make(99, 0)
        segment.path, rig.journal._bad = window.paths[0], [segment]
        rig.keep()
        assert window.first == 1 + sink.ledger[rig.journal.producer, 0].applied_sequence
        assert window.load().calls == rig.backlog.sealed[0].calls
    rig.crash()
    assert after_loss_of_power(disk, tmp_path / "left", sink) == calls.made


def test_of_a_spilled_window(tmp_path: Path, disk: Disk) -> None:
    """It is in no memory: it is read from the old file, which is not trusted to keep it, into a new one."""
    sink, calls = MemorySink(), Calls()
    rig = Rig(tmp_path / "live", sink)
    rig.call(calls.next("t0"))
    rig.seal()
    rig.sync()
    for number in range(5):
        rig.call(calls.next(f"t{number}"))
    rig.seal()
    spilled = rig.backlog.sealed[1]
    assert spilled.generation is None
    assert spilled.stored is not None
    fail_fsync(rig, disk, spilled.stored.paths[0].name)
    rig.keep()
    assert rig.journal.untrusted == []
    rig.crash()
    assert after_loss_of_power(disk, tmp_path / "left", sink) == calls.made


def test_of_a_spilled_window_that_cannot_be_read(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays as it is and is tried again; nothing raises."""
    rig, calls = Rig(tmp_path / "live", MemorySink()), Calls()
    for thread_id in ("t0", "t1"):
        rig.call(calls.next(thread_id))
        rig.seal()
    spilled = rig.backlog.sealed[1].stored
    assert spilled is not None
    fail_fsync(rig, disk, spilled.paths[0].name)
    with monkeypatch.context() as patch:
        patch.setattr("tracker_daemon.journal.windows.Written", no_file)
        rig.keep()
    assert rig.journal.errors["read"] == 1
    assert len(rig.journal.untrusted) == 1
    rig.keep()
    assert rig.journal.untrusted == []
    rig.crash()


def no_file(path: Path, **_: object) -> Any:
    """Fail as a disk does."""
    raise OSError(5, "Input/output error", str(path))


def test_a_window_of_several_batches_goes_on_in_memory(tmp_path: Path, disk: Disk) -> None:
    """Neither its file nor a new one can be synced: it is applied from memory, and no file of it stays to double it."""
    sink, calls = Away(), Calls()
    rig = Rig(tmp_path / "live", sink)
    for number in range(5):
        rig.call(calls.next(f"t{number}"))
    disk.fails += [("fdatasync", "")] * 2
    sink.batches_left = 1
    with pytest.raises(Killed):
        rig.flush()
    assert list((tmp_path / "live").glob("*-0000000000000001-*")) == []
    assert rig.backlog.head_window is None
    sink.batches_left = 10
    run(rig.flusher.flush())
    assert Calls.counted(sink.rows) == calls.made
    assert rig.journal.retained(rig.journal.producer) == []
    rig.crash()


def test_of_an_applied_window(tmp_path: Path, disk: Disk) -> None:
    """It is not kept, and nothing asks for a sync for ever."""
    sink, calls = MemorySink(), Calls()
    rig = Rig(tmp_path / "live", sink, max_batch_size=100)
    rig.call(calls.next("t0"))
    rig.seal()
    fail_fsync(rig, disk)
    run(rig.flusher.flush())
    assert rig.journal.retained(rig.journal.producer) == []
    assert not rig.journal.untrusted
    rig.sync()
    assert not rig.journal.dirty
    rig.crash()


def test_two_syncs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one waits for the first, and learns that the file has failed instead of asking again."""
    import threading

    rig, calls = Rig(tmp_path, MemorySink()), Calls()
    rig.call(calls.next("t0"))
    inside, go, asked = threading.Event(), threading.Event(), list[int]()

    def fdatasync(file: int) -> None:
        asked.append(file)
        inside.set()
        go.wait(10)
        if len(asked) == 1:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    both = [threading.Thread(target=rig.journal.sync) for _ in range(2)]
    for thread in both:
        thread.start()
    inside.wait(10)
    go.set()
    for thread in both:
        thread.join()
    assert len(asked) == 1
    assert len(rig.journal.untrusted) == 1
    rig.crash()


@pytest.mark.parametrize("max_batch_size", [1, 2, 100])
@pytest.mark.parametrize("create_missing", [True, False])
def test_compacted_many_times(max_batch_size: int, create_missing: bool, tmp_path: Path) -> None:
    """A window that is written anew again and again gives the batches that the calls give."""
    options = {"max_batch_size": max_batch_size, "create_missing": create_missing}
    random, calls = Random(3), Calls()
    plain, compacted = MemorySink(), MemorySink()
    made = (("plain", plain), ("compacted", compacted))
    rigs = [Rig(tmp_path / name, sink, **options) for name, sink in made]  # type: ignore[arg-type]
    rewritten = 0
    for number in range(120):
        thread_id = f"t{random.randrange(7)}"
        record: Record = calls.next(thread_id) if random.random() < 0.3 else ensure(thread_id, NOW + number)
        for rig in rigs:
            rig.call(record)
        if not number % 7:
            before = rigs[1].journal.queue.segments
            rigs[1].drain()
            rigs[1].backlog.rewrite()
            rewritten += before != rigs[1].journal.queue.segments
    assert rewritten > 10
    for rig in rigs:
        rig.crash()
    recovered(tmp_path / "plain", plain)
    recovered(tmp_path / "compacted", compacted)
    assert [batch.deltas for batch in plain.batches] == [batch.deltas for batch in compacted.batches]
    assert plain.rows == compacted.rows


@pytest.mark.parametrize("what", ["open", "sealed"])
def test_killed_while_it_is_written_anew(what: str, tmp_path: Path) -> None:
    """Before any instruction: the files that are there hold every call, once."""
    number, step = 0, 29
    while True:
        directory = tmp_path / str(number)
        sink, calls = Away(), Calls()
        rig = Rig(directory, sink)
        for each in range(6):
            rig.call(calls.next(f"t{each % 4}" + "x" * 400))
        rig.drain()
        if what == "open":
            rig.journal.compact_from = 1
        else:
            rig.seal()
            sink.batches_left = 1
            with pytest.raises(Killed):
                run(rig.flusher.flush())
            window = rig.backlog.head_window
            assert window is not None
            segment = rig.journal._make(99, 0)
            segment.path, rig.journal._bad = window.paths[-1], [segment]
        interruption = Interruption(number, kill)
        try:
            interruption.during(rig.keep)
        except Killed:
            pass
        else:
            break
        finally:
            rig.crash()
        sink.batches_left = 100
        after = recovered(directory, sink)
        assert after.told == []
        assert Calls.counted(sink.rows) == calls.made
        # What was replaced, or never came to be, is gone with the next start.
        kept = {path for window in after.journal._retained for path in window.paths}
        assert set(directory.glob("*.journal")) == kept
        number += step
    assert number > 20 * step


def kill() -> None:
    """Die here."""
    raise Killed


def test_no_room_to_write_anew(tmp_path: Path) -> None:
    """A window that has grown long stays in the file that it has, not in memory."""
    rig, calls = Rig(tmp_path, MemorySink()), Calls()
    rig.call(calls.next("t0"))
    rig.drain()
    rig.journal.compact_from, rig.journal.quota = 1, rig.journal.bytes
    rig.keep()
    assert rig.journal.errors["quota"] == 1
    assert rig.journal.stores_window
    rig.call(calls.next("t0"))
    rig.crash()
    sink = MemorySink()
    recovered(tmp_path, sink)
    assert Calls.counted(sink.rows) == calls.made


def test_a_new_file_just_before_the_window_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller brings one between the two steps of the worker: it is not read beside the sum that holds it."""
    sink, calls = MemorySink(), Calls()
    rig = Rig(tmp_path, sink)
    rig.call(calls.next("t0"))
    rig.drain()
    real = rig.journal.queue.prepare_within

    def prepare() -> Any:
        following = real()
        for _ in range(12):
            rig.call(calls.next("t1" + "x" * 500))
        return following

    monkeypatch.setattr(rig.journal.queue, "prepare_within", prepare)
    rig.journal.compact_from = 1
    monkeypatch.setattr(rig.journal, "drop", lambda _: None)  # killed before it
    rig.keep()
    rig.crash()
    recovered(tmp_path, sink)
    assert Calls.counted(sink.rows) == calls.made


def test_a_sum_of_very_many_agents(tmp_path: Path) -> None:
    """A thread with more names of agents than a record may hold is in several, and comes back as one."""
    sink = MemorySink()
    rig = Rig(tmp_path, sink)
    rig.call(("t0", "a", 1, 0.5, 1_700_000_000_000_000_000))
    rig.drain()
    names = tuple(f"{number:0512d}" for number in range(40_000))
    [delta] = rig.backlog._window.of("t0")
    delta._agents = names
    rig.backlog._window.put(delta, late=False)
    rig.journal.compact_from = 1
    rig.keep()
    rig.crash()
    after = recovered(tmp_path, sink)
    assert after.told == []
    assert sink.rows["t0"].agents_used == names
    assert (sink.rows["t0"].turn_count, sink.rows["t0"].total_tokens) == (1, 1)
