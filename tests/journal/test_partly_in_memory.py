"""Calls that go to files, and to memory while no file can be had: a window is in one or in the other, as a whole.

What is in files survives `kill -9`, whatever became of the rest; what is in memory is in files as soon as one can be had.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from tests.journal.interruptions import Interruption
from tests.journal.rig import Calls, Rig, recovered, small_files
from tests.model.manual_clock import run
from tracker_daemon.memory_sink import MemorySink

if TYPE_CHECKING:
    from pathlib import Path

    from tracker_daemon.batch import Batch
    from tracker_daemon.sink import Applied

PAD = "x" * 300


class Away(BaseException):
    """The sink does not answer any more; or the process ends here."""


class Some(MemorySink):
    """Takes so many batches."""

    left = 10**6

    async def apply(self, batch: Batch) -> Applied:
        """See `Sink.apply`."""
        if not self.left:
            raise Away
        self.left -= 1
        return await super().apply(batch)


class Room:
    """A disk that has room for files, or has none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.some = True
        real = os.posix_fallocate

        def allocate(file: int, offset: int, size: int) -> None:
            if not self.some:
                raise OSError(28, "No space left on device")
            real(file, offset, size)

        monkeypatch.setattr(os, "posix_fallocate", allocate)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    """The disk."""
    small_files(monkeypatch)
    monkeypatch.setattr("tracker_daemon.journal.degradation._RETRY_AFTER", 0.0)
    return Room(monkeypatch)


class Story:
    """Calls of one life, in files or in memory.

    Attributes:
        in_files, in_memory: the calls that went there, as they were made.
    """

    def __init__(self, directory: Path, room: Room, sink: MemorySink, **options: Any) -> None:
        self.rig, self.room, self.calls = Rig(directory, sink, **options), room, Calls()
        self.in_files = set[tuple[str, int]]()
        self.in_memory = set[tuple[str, int]]()
        self._filled = 0

    def call(self, thread_id: str) -> None:
        """Make one call."""
        before = set(self.calls.made)
        self.rig.call(self.calls.next(thread_id))
        made = self.calls.made - before
        if self.rig.journal.queue.on_disk:
            self.in_files |= made
        else:
            self.in_memory |= made

    def until(self, on_disk: bool, thread_id: str) -> None:
        """Make calls until they go to files, or to memory."""
        self.room.some = on_disk
        self.call(thread_id)
        while self.rig.journal.queue.on_disk is not on_disk:
            self._filled += 1
            self.call(f"{PAD}{self._filled // 10}")

    def mixed(self, parts: str) -> None:
        """Make two calls or more to files (f) or to memory (m), part by part, on threads of which some are in several."""
        for number, part in enumerate(parts):
            self.until(part == "f", f"t{number}")
            self.call("every")

    @property
    def pending_in_files(self) -> int:
        """How many calls of sealed windows are in files."""
        return sum(sealed.calls for sealed in self.rig.backlog.sealed if sealed.stored is not None)


@pytest.mark.parametrize("parts", ["fm", "fmf", "mf", "mfm", "fmfmf"])
@pytest.mark.parametrize("sealed", [False, True])
def test_killed(parts: str, sealed: bool, tmp_path: Path, room: Room) -> None:
    """What was in files is applied by the next process, no call of it twice; what was in memory alone is gone."""
    sink = MemorySink()
    story = Story(tmp_path, room, sink)
    story.mixed(parts)
    if sealed:
        room.some = False
        story.rig.seal()
        windows = story.rig.backlog.sealed
        assert [sealed.stored is not None for sealed in windows] == [part == "f" for part in parts]
    story.rig.crash()
    assert recovered(tmp_path, sink).told == []
    assert Calls.counted(sink.rows) == story.in_files


@pytest.mark.parametrize("parts", ["f", "fm", "fmf", "mf", "mfm", "mfmf", "mfmfmf"])
@pytest.mark.parametrize("before", ["m", "fm", "ffm"])
def test_killed_behind_what_was_applied(before: str, parts: str, tmp_path: Path, room: Room) -> None:
    """What was applied and is in no file, or is not kept, hides none of the windows that follow."""
    sink = MemorySink()
    story = Story(tmp_path, room, sink, retain=0)
    for part in before:
        story.mixed(part)
        room.some = part == "f"
        story.rig.flush()
    done = Calls.counted(sink.rows)
    assert done == story.calls.made
    story.in_files.clear()
    story.mixed(parts)
    story.rig.crash()
    assert recovered(tmp_path, sink).told == []
    assert Calls.counted(sink.rows) == done | story.in_files


@pytest.mark.parametrize("batches", range(12))
def test_killed_in_the_middle_of_the_flush(batches: int, tmp_path: Path, room: Room) -> None:
    """After any number of batches: what was applied is there once, what was in files and was not is applied."""
    sink = Some()
    story = Story(tmp_path, room, sink)
    story.mixed("fmfm")
    room.some = False
    story.rig.seal()
    sink.left = batches
    with suppress(Away):
        run(story.rig.flusher.flush())
    done = Calls.counted(sink.rows)
    story.rig.crash()
    sink.left = 10**6
    recovered(tmp_path, sink)
    assert Calls.counted(sink.rows) == done | story.in_files


@pytest.mark.parametrize("parts", ["f", "m", "fm", "mf", "mfm", "fmfmf"])
@pytest.mark.parametrize("sealed", [False, True])
def test_the_end_tells_the_truth(parts: str, sealed: bool, tmp_path: Path, room: Room) -> None:
    """What counts as journaled is what the next process applies; what counts as lost is what is gone."""
    sink = MemorySink()
    story = Story(tmp_path, room, sink)
    story.mixed(parts)
    room.some = False
    if sealed:
        story.rig.seal()
    story.rig.end()
    books = story.rig.backlog.books()
    assert books.journaled == len(story.in_files)
    assert sum(books.lost.values()) == len(story.in_memory)
    after = recovered(tmp_path, sink)
    assert Calls.counted(sink.rows) == story.in_files
    assert after.journal.recovered == books.journaled


@pytest.mark.parametrize("parts", ["m", "fm", "mf", "fmfm"])
@pytest.mark.parametrize("sealed", [False, True])
def test_room_again(parts: str, sealed: bool, tmp_path: Path, room: Room) -> None:
    """All that is in memory is in files as soon as one can be had: nothing is lost by a kill any more."""
    sink = MemorySink()
    story = Story(tmp_path, room, sink)
    story.mixed(parts)
    if sealed:
        room.some = False
        story.rig.seal()
    room.some = True
    rig = story.rig
    rig.keep()
    rig.seal()
    rig.keep()
    assert not rig.journal.degraded
    assert all(sealed.stored is not None for sealed in rig.backlog.sealed)
    assert sum(sealed.generation is not None for sealed in rig.backlog.sealed) == 1, "the oldest alone is in memory too"
    rig.crash()
    assert recovered(tmp_path, sink).told == []
    assert Calls.counted(sink.rows) == story.calls.made


def test_room_again_with_nothing_pending(tmp_path: Path, room: Room) -> None:
    """A window that is open in memory and holds nothing gives way to a file; the next call is in it."""
    story = Story(tmp_path, room, MemorySink())
    story.until(False, "t")
    story.rig.flush()
    room.some = True
    story.rig.keep()
    assert story.rig.journal.queue.on_disk
    story.rig.flush()
    assert story.rig.journal.stores_window
    assert story.rig.backlog.is_empty
    story.rig.crash()


@pytest.mark.parametrize("batches", range(1, 4))
def test_room_again_in_the_middle_of_a_flush(batches: int, tmp_path: Path, room: Room) -> None:
    """Of a window of which some batches are applied, the rest is written, under its own sequences."""
    sink = Some()
    story = Story(tmp_path, room, sink, max_batch_size=1)
    room.some = False
    for number in range(5):
        story.call(f"t{number}")
    story.rig.seal()
    sink.left = batches
    with suppress(Away):
        run(story.rig.flusher.flush())
    room.some = True
    story.rig.keep()
    story.rig.crash()
    sink.left = 10**6
    recovered(tmp_path, sink)
    assert Calls.counted(sink.rows) == story.calls.made


def test_killed_while_it_is_brought_to_files(tmp_path: Path, room: Room) -> None:
    """Before any instruction: what was in files before is applied once, and nothing is twice."""
    number, step, complete = 0, 31, 0
    while True:
        directory = tmp_path / str(number)
        sink = Some()
        story = Story(directory, room, sink)
        story.mixed("fmfm")
        room.some = False
        story.rig.seal()
        sink.left = 1
        with suppress(Away):
            run(story.rig.flusher.flush())
        done = Calls.counted(sink.rows)
        room.some = True
        interruption = Interruption(number, kill)
        try:
            interruption.during(story.rig.keep)
        except Away:
            pass
        else:
            break
        finally:
            story.rig.crash()
        sink.left = 10**6
        assert recovered(directory, sink).told == []
        found = Calls.counted(sink.rows)
        assert done | story.in_files <= found
        complete += found == story.calls.made
        number += step
    assert number > 20 * step
    assert complete


def kill() -> None:
    """Die here."""
    raise Away


def test_applied_all_the_same(tmp_path: Path, room: Room) -> None:
    """With nobody killed every call is applied once, in memory or not, and the books say so."""
    sink = MemorySink()
    story = Story(tmp_path, room, sink)
    for parts in ("fm", "mfm", "ff", "m"):
        story.mixed(parts)
        story.rig.flush()
    assert Calls.counted(sink.rows) == story.calls.made
    books = story.rig.backlog.books()
    assert sum(books.applied.values()) == len(story.calls.made)
    assert books.queue_calls == 0
    story.rig.end()


@pytest.mark.parametrize("which", ["first", "last", "all"])
def test_files_deleted_before_the_window_is_sealed(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has deleted a file of the open window: it goes on in memory, and is written to a file again."""
    small_files(monkeypatch)
    sink, calls = MemorySink(), Calls()
    rig = Rig(tmp_path, sink)
    rig.call(calls.next("t0"))
    rig.seal()  # it stays in memory as the oldest; the next one would wait in its files alone
    rig.call(calls.next("t0"))
    for number in range(500):
        if len(rig.journal.queue.of_window) < 3:
            rig.call(calls.next(f"u{number}"))
    paths = [segment.path for segment in rig.journal.queue.of_window]
    for path in {"first": paths[:1], "last": paths[-1:], "all": paths}[which]:
        assert path is not None
        path.unlink()
    rig.seal()
    assert [sealed.generation is not None for sealed in rig.backlog.sealed] == [True, True]
    rig.keep()
    assert rig.backlog.sealed[1].stored is not None
    rig.crash()
    recovered(tmp_path, sink)
    assert Calls.counted(sink.rows) == calls.made
