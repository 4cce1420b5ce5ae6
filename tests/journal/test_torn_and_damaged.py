"""Files that a loss of power has cut, and files in which a bit has changed: what is read of them, and what is said."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.journal.rig import Calls, Rig, header, recovered, small_files
from tracker_daemon.generation import TURN, method_of
from tracker_daemon.journal import records
from tracker_daemon.journal.records import FIRST_AT, FRAME, HEADER_SIZE, SYNCED_AT
from tracker_daemon.journal.windows import Lost, pieces, producer_of, written
from tracker_daemon.memory_sink import MemorySink

if TYPE_CHECKING:
    from pathlib import Path

    from tracker_daemon.generation import Record

HEADER: tuple[range, ...] = (
    range(len(header().encode())),
    range(FIRST_AT, FIRST_AT + 8),
    range(SYNCED_AT, SYNCED_AT + 8),
)
"""What of the first 128 bytes says something."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small_files(monkeypatch)


@dataclass
class Kept:
    """One file of one life.

    Attributes:
        data: its bytes.
        ends: where each of its records ends.
        calls: those in it, in order.
        synced: up to where it is on the disk.
    """

    name: str
    data: bytes
    ends: list[int]
    calls: list[Record]
    synced: int

    def whole(self, size: int) -> set[str]:
        """Return the threads of the calls that end before *size*."""
        return {call[0] for call, end in zip(self.calls, self.ends, strict=True) if end <= size}


def a_file(directory: Path, *, synced: int, sealed: bool = False, calls: int = 8) -> Kept:
    """Return the file of a life of *calls* calls, each on a thread of its own, the first *synced* of them synced."""
    rig, made = Rig(directory, MemorySink(), max_batch_size=3), Calls()
    all_calls = [made.next(f"thread-{number}") for number in range(calls)]
    for number, call in enumerate(all_calls):
        rig.call(call)
        if number + 1 == synced:
            rig.sync()
    [segment] = rig.journal.queue.segments
    end, synced_at = segment.end, segment.synced_at
    if sealed:
        rig.seal()
        rig.sync()
        synced_at = segment.synced_at
    rig.crash()
    [path] = [
        path for path in directory.glob("*.journal") if path.stat().st_size >= end and "-open-00000002" not in path.name
    ]
    data = path.read_bytes()[: end + 40]
    for other in directory.iterdir():
        other.unlink()
    ends, offset = [], HEADER_SIZE
    for call in all_calls:
        offset += len(records.encode(call))
        ends.append(offset)
    return Kept(path.name, data, ends, all_calls, synced_at)


@pytest.fixture
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about bytes, not about fsync."""
    for call in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, call, lambda _: None)


def recover(directory: Path, kept: Kept, data: bytes) -> tuple[MemorySink, Rig]:
    """Recover from *data* in place of the file."""
    directory.mkdir(exist_ok=True)
    for left in directory.iterdir():
        left.unlink()
    (directory / kept.name).write_bytes(data)
    sink = MemorySink()
    return sink, recovered(directory, sink, max_batch_size=3)


def told(rig: Rig) -> tuple[str, int] | None:
    """Return the file and the offset that the error names; `None` without one."""
    if not rig.told:
        return None
    [error] = rig.told
    found = re.search(r"/([^/ ]+\.journal) is damaged at byte (\d+)", str(error))
    assert found, str(error)
    assert "stays there" in str(error)
    assert "tracker-daemon journal inspect" in str(error)
    return found[1], int(found[2])


# -- torn ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_disk")
@pytest.mark.parametrize(("zeros", "ends_in_zero"), [(False, False), (True, False), (True, True)])
def test_cut_at_every_byte(zeros: bool, ends_in_zero: bool, tmp_path: Path) -> None:
    """Never synced, cut anywhere: the calls before the cut are applied, the piece of the next is counted, nothing raises."""
    kept = a_file(tmp_path / "made", synced=0)
    while ends_in_zero and kept.data[HEADER[0].stop - 1]:  # one header of 256: its checksum's last byte
        shutil.rmtree(tmp_path / "made")
        kept = a_file(tmp_path / "made", synced=0)
    half_a_word = range(FIRST_AT + 1, FIRST_AT + 8)  # written at once, aligned: no disk cuts there
    for size in (size for size in range(len(kept.data) + 1) if size not in half_a_word):
        data = kept.data[:size]
        sink, rig = recover(tmp_path / "cut", kept, data.ljust(len(kept.data), b"\0") if zeros else data)
        assert rig.told == [], size
        assert set(sink.rows) == (kept.whole(size) if size >= HEADER_SIZE else set()), size
        last = max([HEADER_SIZE, *(end for end in kept.ends if end <= size)])
        # Its checksum may end in zeros: then the zeros make a header whole that was cut.
        whole = size >= HEADER[0].stop or (zeros and not any(kept.data[size : HEADER[0].stop]))
        piece = data[last:] if size >= HEADER_SIZE else b"" if whole else data
        if whole and size < HEADER_SIZE:
            continue  # a header that is whole, and nothing behind it: with or without the zeros nothing is torn off
        assert rig.journal.torn == len(piece.rstrip(b"\0")), size
        assert rig.journal.recovered == len(sink.rows)


@pytest.mark.usefixtures("_no_disk")
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("synced", [3, 8])
def test_cut_behind_what_was_synced(synced: int, zeros: bool, tmp_path: Path) -> None:
    """Cut behind the sync it is torn; before it, it is damaged, and nothing of the window is applied."""
    kept = a_file(tmp_path / "made", synced=synced)
    for size in range(HEADER_SIZE, len(kept.data) + 1):
        data = kept.data[:size]
        sink, rig = recover(tmp_path / "cut", kept, data.ljust(len(kept.data), b"\0") if zeros else data)
        if size >= kept.synced:
            assert rig.told == [], size
            assert set(sink.rows) == kept.whole(size)
        elif data.ljust(kept.synced, b"\0") != kept.data[: kept.synced]:
            last = max([HEADER_SIZE, *(end for end in kept.ends if end <= size)])
            assert told(rig) == (kept.name, last), size
            assert sink.rows == {}


@pytest.mark.usefixtures("_no_disk")
def test_a_hole_in_what_was_not_synced(tmp_path: Path) -> None:
    """Any one record is lost, with what came later kept: the others are applied."""
    kept = a_file(tmp_path / "made", synced=0)
    start = HEADER_SIZE
    for number, end in enumerate(kept.ends):
        for hole in ((start, end), (start + 3, end - 2), (start, start + 4), (end - 1, end)):
            data = kept.data[: hole[0]] + bytes(hole[1] - hole[0]) + kept.data[hole[1] :]
            if data == kept.data:
                continue
            sink, rig = recover(tmp_path / "hole", kept, data)
            assert rig.told == []
            lost = {kept.calls[number][0]}
            if hole == (start, end):
                # A hole of zeros is where records end; what stands behind it is found all the same.
                assert set(sink.rows) in ({call[0] for call in kept.calls} - lost, kept.whole(start))
            else:
                assert set(sink.rows) == {call[0] for call in kept.calls} - lost
                assert rig.journal.torn
        start = end


# -- a flipped bit ---------------------------------------------------------------------------------


def flips(start: int, end: int) -> list[tuple[int, int]]:
    """Return every byte with one of its bits, in turn; in the header with each."""
    return [(at, bit) for at in range(start, end) for bit in (range(8) if at < HEADER_SIZE else [at * 5 % 8])]


def flipped(data: bytes, at: int, bit: int) -> bytes:
    """Return *data* with one bit changed."""
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return bytes(changed)


@pytest.mark.usefixtures("_no_disk")
@pytest.mark.parametrize("sealed", [False, True])
def test_a_flipped_bit_in_what_was_synced(sealed: bool, tmp_path: Path) -> None:
    """It is told, with the file and the offset, and nothing of the window is applied; or it changed nothing."""
    kept = a_file(tmp_path / "made", synced=8, sealed=sealed)
    everything = {call[0]: call[2] for call in kept.calls if method_of(call) == TURN}
    unnoticed = set[int]()
    starts = [0, HEADER_SIZE, *kept.ends]
    for at, bit in flips(0, min(len(kept.data), kept.synced)):
        sink, rig = recover(tmp_path / "flipped", kept, flipped(kept.data, at, bit))
        found = told(rig)
        if found is None:
            assert {name: row.total_tokens for name, row in sink.rows.items()} == everything, at
            assert [batch.sequence for batch in sink.batches] == [1, 2, 3]
            unnoticed.add(at)
        else:
            name, offset = found
            assert sink.rows == {}, at
            assert name == kept.name
            assert offset == max(start for start in starts if start <= at)
    assert not any(at in part for at in unnoticed for part in HEADER)
    assert all(at < HEADER_SIZE for at in unnoticed)


@pytest.mark.usefixtures("_no_disk")
def test_a_flipped_bit_in_what_was_not_synced(tmp_path: Path) -> None:
    """The record is passed over and counted; those behind it are read."""
    kept = a_file(tmp_path / "made", synced=3)
    for at, bit in flips(kept.synced, kept.ends[-1]):
        sink, rig = recover(tmp_path / "flipped", kept, flipped(kept.data, at, bit))
        assert rig.told == []
        number = next(number for number, end in enumerate(kept.ends) if at < end)
        assert set(sink.rows) == {call[0] for call in kept.calls} - {kept.calls[number][0]}, at
        assert rig.journal.torn == kept.ends[number] - (kept.ends[number - 1] if number else HEADER_SIZE)
        assert Calls.counted(sink.rows) == {(name, 0) for name in sink.rows}


@pytest.mark.usefixtures("_no_disk")
def test_a_flipped_bit_behind_the_end(tmp_path: Path) -> None:
    """Where nothing was written yet: no record comes of it, and none is lost."""
    kept = a_file(tmp_path / "made", synced=8)
    for at, bit in flips(kept.ends[-1], len(kept.data)):
        sink, rig = recover(tmp_path / "flipped", kept, flipped(kept.data, at, bit))
        assert rig.told == []
        assert set(sink.rows) == {call[0] for call in kept.calls}


@pytest.mark.usefixtures("_no_disk")
def test_windows_before_and_lives_beside_the_damage(tmp_path: Path) -> None:
    """What comes before a damaged window is applied, and so are other lives; what follows it waits."""
    sink, made = MemorySink(), Calls()
    rig = Rig(tmp_path, sink)
    for name in ("before", "damaged", "after"):
        rig.call(made.next(name))
        rig.seal()
    rig.sync()
    rig.crash()
    paths = sorted(tmp_path.glob(f"{rig.journal.producer.hex}-0*.journal"))
    paths[1].write_bytes(flipped(paths[1].read_bytes(), HEADER_SIZE + FRAME.size + 9, 2))
    other = Rig(tmp_path, MemorySink())
    other.call(made.next("other"))
    other.crash()
    after = recovered(tmp_path, sink)
    assert told(after) == (paths[1].name, HEADER_SIZE)
    assert set(sink.rows) == {"before", "other"}
    assert after.journal.errors["damage"] == 1
    assert {producer_of(path.name) for path in paths} == set(after.journal.left)
    # It is told at every start, and nothing is applied twice.
    assert told(recovered(tmp_path, sink)) == (paths[1].name, HEADER_SIZE)
    assert Calls.counted(sink.rows) == {("before", 0), ("other", 0)}


@pytest.mark.usefixtures("_no_disk")
def test_what_stands_around_damage(tmp_path: Path) -> None:
    """Damage is one piece of a file; the records before and behind it are the others."""
    kept = a_file(tmp_path / "made", synced=8)
    path = tmp_path / kept.name
    path.write_bytes(flipped(kept.data, kept.ends[2] + 12, 1))
    file = written(path)
    found = list(pieces(file))
    file.close()
    lost = Lost(kept.ends[2], kept.ends[3] - kept.ends[2], "a checksum that does not match", synced=True)
    assert found == [*kept.calls[:3], lost, *kept.calls[4:]]


def test_a_long_search_for_the_next_record() -> None:
    """Behind a hole of zeros, of text and of other records' pieces the next good one is found where it is."""
    record = records.encode(("thread", "agent", 5, 0.5, 1))
    for rubbish in (b"\0" * 3_000, b"x" * 3_000, record[:-1] * 20, record[1:] * 20, bytes(range(1, 256)) * 10):
        data = rubbish + record + b"\0" * 50
        assert records.find_record(data, 0, len(data)) == len(rubbish)
    assert records.find_record(b"\0" * 100, 0, 100) is None
